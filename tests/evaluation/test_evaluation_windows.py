"""Windows of time and their weights against closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.stats import few_windows
from biscale_env.evaluation.stats import windows as w
from biscale_env.evaluation.stats.bootstrap import LEVEL

Z = stats.norm.ppf(0.975)


def weights_of(n, seed=0, n_resamples=2000, **options):
    return w.window_weights(n, np.random.default_rng(seed), n_resamples, **options)


@given(st.floats(0.0, 1e6), st.floats(1.0, 1e4))
def test_windows_are_equal_and_never_shorter_than_asked(duration_s, window_s):
    starts = w.window_starts(duration_s, window_s)
    ends = np.append(starts[1:], duration_s)
    assert starts[0] == 0
    assert np.ptp(ends - starts) <= 1e-6 * max(duration_s, 1.0)
    if duration_s >= window_s:
        assert (ends - starts).min() >= window_s * (1 - 1e-6)
        assert (ends - starts).max() < 2 * window_s * (1 + 1e-6)
    else:
        assert starts.size == 1


def test_half_an_hour_has_fifteen_windows_and_ten_minutes_five():
    assert w.window_starts(1800.0).size == 15
    assert w.window_starts(600.0).size == 5
    assert w.window_starts(900.0)[1] == pytest.approx(900 / 7)
    with pytest.raises(BiscaleError, match="positive"):
        w.window_starts(600.0, 0.0)


def test_an_instant_belongs_to_the_window_that_has_begun():
    starts = w.window_starts(360.0)
    assert w.window_of([0.0, 119.9, 120.0, 359.0, 360.0, 1e9], starts).tolist() == [
        *(0, 0, 1, 2, 2, 2)
    ]


def test_independent_windows_have_students_interval():
    """The mean of five independent Gaussian windows: t(0.975, 4), whatever the five values are."""
    rng = np.random.default_rng(1)
    for _ in range(5):
        values = rng.normal(1.0, 0.1, 5)
        # the discrete resampling of five values has no exact percentiles: compare spreads
        found = w.resampled_ratios(values, np.ones(5), weights_of(5, n_resamples=20_000))[1]
        half = stats.t.ppf(0.975, 4) * values.std(ddof=1) / math.sqrt(5)
        assert Z * found.std() == pytest.approx(half, rel=0.03)


def test_many_independent_windows_have_the_normal_interval():
    values = np.random.default_rng(2).normal(1.0, 0.1, 400)
    interval = w.ratio_interval(values, np.ones(400), weights_of(400))
    half = Z * values.std() / 20
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.2)


@pytest.mark.slow
@given(st.integers(3, 40), st.integers(0, 2**32 - 1))
def test_rows_add_up_and_every_window_counts_alike(n, seed):
    weights = weights_of(n, seed, 1000)
    assert weights.sum(axis=1) == pytest.approx(np.full(1000, n))
    error = weights.std(axis=0) / math.sqrt(1000)
    assert (np.abs(weights.mean(axis=0) - 1) <= 5.5 * error + 1e-9).all()


def test_neighbours_are_resampled_together():
    """One of 15 circular blocks of three holds a window in 3 cases, and its neighbour too in 2.

    Correlation (2/15 - 1/25) / (1/5 - 1/25); of windows further apart (0 - 1/25) / (1/5 - 1/25).
    """
    weights = weights_of(15, n_resamples=20_000)
    assert w.block_windows(15) == 3
    correlation = np.corrcoef(weights.T)
    assert correlation[4, 5] == pytest.approx(7 / 12, abs=0.03)
    assert correlation[4, 10] == pytest.approx(-1 / 4, abs=0.03)
    assert correlation[0, 14] == pytest.approx(7 / 12, abs=0.03)  # circular


def test_few_windows_tell_nothing():
    for n in (1, 2):
        weights = weights_of(n, n_resamples=10)
        assert np.isnan(weights).all()
        assert math.isnan(w.ratio_interval(np.ones(n), np.ones(n), weights).low)
        assert w.ratio_interval(np.ones(n), np.ones(n), weights).estimate == 1.0
        assert math.isnan(w.attainment_interval(np.ones(n), np.ones(n), weights).low)
    assert np.isfinite(weights_of(3)).all()


def test_correlated_windows_widen_the_interval():
    values = np.random.default_rng(3).normal(1.0, 0.1, 15)
    swing = np.sin(np.arange(15) / 3.0)
    plain = w.ratio_interval(values, np.ones(15), weights_of(15))
    wide = w.ratio_interval(values, np.ones(15), weights_of(15, series=[swing]))
    least = w.ratio_interval(values, np.ones(15), weights_of(15, series=[swing, values]))
    assert wide.high - wide.low > 1.5 * (plain.high - plain.low)
    assert least == wide  # the largest autocorrelation counts


def test_autocorrelation_is_corrected_for_the_bias_of_short_series():
    rng = np.random.default_rng(4)
    for truth in (0.3, 0.6):
        series = few_windows._ar1(15, truth, 3000, rng)
        found = np.mean([w.autocorrelation(one) for one in series])
        raw = np.mean(
            [np.sum(d[1:] * d[:-1]) / np.sum(d * d) for d in series - series.mean(1)[:, None]]
        )
        half_an_error = 0.5 * np.sqrt((1 - truth**2) / 15)
        assert abs(found - half_an_error - truth) < 0.4 * abs(raw - truth)
    assert w.autocorrelation(np.ones(10)) == 0.0
    assert w.autocorrelation([np.nan] * 5) == 0.0


def test_autocorrelation_does_not_reach_over_midnight():
    rng = np.random.default_rng(5)
    one = rng.normal(size=200)
    days = np.repeat(np.arange(100), 2)
    level = np.repeat(rng.normal(size=100), 2) * 10  # days differ, minutes within them do not swing
    assert w.autocorrelation(one + level) > 0.4
    assert w.autocorrelation(one + level, np.zeros(200)) == w.autocorrelation(one + level)
    assert w.autocorrelation(np.arange(200.0), days) < w.autocorrelation(np.arange(200.0))


@given(st.integers(1, 2000), st.floats(0.0, 0.9), st.floats(0.0, 0.9))
def test_blocks_grow_with_the_autocorrelation_and_leave_five_of_them(n, one, other):
    low, high = sorted((one, other))
    assert 1 <= w.block_windows(n, low) <= w.block_windows(n, high)
    assert w.block_windows(n, high) <= max(1, n / 5)


def test_bootstrap_variance_is_that_of_the_resampling():
    """The closed form that calibrates the factor, against the resampling itself."""
    rng = np.random.default_rng(6)
    for n, length in ((5, 1), (15, 3), (17, 4)):
        values = rng.normal(size=n)
        counts = w._block_counts(n, length, 40_000, rng)
        closed = few_windows._bootstrap_variance(values[None], length)[0]
        assert np.var(counts @ values) == pytest.approx(closed, rel=0.04)


# --- days


def test_four_days_are_students_interval_over_days():
    """Windows within a day are alike: only the number of days counts."""
    level = np.array([0.9, 1.0, 1.2, 0.7])
    days = np.repeat(["mon", "tue", "wed", "thu"], 15)
    values = np.repeat(level, 15)
    weights = weights_of(60, n_resamples=20_000, days=days)
    found = w.resampled_ratios(values, np.ones(60), weights)[1]
    half = stats.t.ppf(0.975, 3) * level.std(ddof=1) / 2
    assert Z * found.std() == pytest.approx(half, rel=0.03)
    assert (np.ptp(weights.reshape(-1, 4, 15), axis=2) == 0).all()  # whole days


def test_two_days_are_strata():
    """The interval speaks of these two days: that they differ makes it no wider."""
    rng = np.random.default_rng(7)
    days = np.repeat([0, 1], 15)
    values = rng.normal(1.0, 0.1, 30)
    weights = weights_of(30, days=days)
    assert weights[:, :15].sum(axis=1) == pytest.approx(np.full(2000, 15))
    shifted = w.ratio_interval(values + 5.0 * days, np.ones(30), weights)
    plain = w.ratio_interval(values, np.ones(30), weights)
    assert shifted.high - shifted.low == pytest.approx(plain.high - plain.low)


def test_days_of_few_windows_are_taken_whole():
    weights = weights_of(6, days=[0, 0, 1, 1, 2, 2])
    assert (weights[:, ::2] == weights[:, 1::2]).all()
    assert np.isnan(weights_of(4, n_resamples=5, days=[0, 0, 1, 1])).all()


def test_every_window_needs_its_day():
    with pytest.raises(BiscaleError, match="label of its day: got 2 labels for 5"):
        weights_of(5, days=[0, 1])


# --- statistics


def test_ratio_of_constant_ratio_has_no_width():
    base = np.arange(1.0, 11.0)
    assert w.ratio_interval(0.7 * base, base, weights_of(10)) == pytest.approx((0.7, 0.7, 0.7))


def test_a_ratio_does_not_depend_on_units():
    rng = np.random.default_rng(0)
    top, bottom = rng.random(10), rng.random(10) + 0.5
    small = w.ratio_interval(1e-3 * top, 1e-6 * bottom, weights_of(10))
    assert small == pytest.approx(
        [1e3 * end for end in w.ratio_interval(top, bottom, weights_of(10))]
    )
    assert math.isnan(w.ratio_interval(top, np.zeros(10), weights_of(10)).estimate)


def test_resampled_ratios_of_stacks_are_those_of_each():
    rng = np.random.default_rng(8)
    top, bottom, weights = rng.random((3, 10)), rng.random((3, 10)) + 1, weights_of(10)
    ratio, resampled = w.resampled_ratios(top, bottom, weights)
    for i in range(3):
        one, moved = w.resampled_ratios(top[i], bottom[i], weights)
        assert ratio[i] == pytest.approx(float(one))
        assert resampled[:, i] == pytest.approx(moved)


def test_attainment_without_a_violation_is_not_certainty():
    interval = w.attainment_interval(np.full(10, 30), np.full(10, 30), weights_of(10))
    low, _ = stats.binomtest(300, 300).proportion_ci(0.95, method="exact")
    assert interval == pytest.approx((1.0, low, 1.0))
    none = w.attainment_interval(np.zeros(10), np.full(10, 30), weights_of(10))
    assert none == pytest.approx((0.0, 0.0, 1 - low))
    assert all(math.isnan(v) for v in w.attainment_interval([0] * 5, [0] * 5, weights_of(5)))


def test_violations_in_one_window_are_one_piece_of_evidence():
    """Thirty in one window or three in each: the same attainment, another interval."""
    counted = np.full(10, 100)
    together, apart = counted.copy(), counted - 3
    together[4] -= 30
    wide = w.attainment_interval(together, counted, weights_of(10))
    narrow = w.attainment_interval(apart, counted, weights_of(10))
    exact = stats.binomtest(970, 1000).proportion_ci(0.95, method="exact")
    assert narrow == pytest.approx((0.97, exact.low, exact.high))
    assert wide.estimate == pytest.approx(narrow.estimate)
    assert 0 <= wide.low < narrow.low < narrow.high < wide.high <= 1
    assert wide.high - wide.estimate < wide.estimate - wide.low


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]), st.integers(1, 60))
def test_quantile_lies_within_its_interval_and_the_interval_within_the_sample(seed, q, per_window):
    rng = np.random.default_rng(seed)
    values, window = rng.gamma(1.0, size=10 * per_window), np.repeat(np.arange(10), per_window)
    found = w.quantile_interval(values, window, q, weights_of(10, n_resamples=100))
    assert values.min() <= found.low <= found.estimate <= found.high <= values.max()
    assert found.estimate == np.quantile(values, q)


def test_quantile_of_one_value_everywhere_has_no_width():
    found = w.quantile_interval(np.full(50, 2.0), np.repeat(np.arange(5), 10), 0.99, weights_of(5))
    assert found == (2.0, 2.0, 2.0)
    assert math.isnan(w.quantile_interval([], [], 0.9, weights_of(5)).estimate)
    assert LEVEL == 0.95
