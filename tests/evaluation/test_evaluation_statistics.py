"""Statistics against known answers and known coverage."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.stats import bootstrap as s


def test_iqm_is_the_mean_of_the_middle_half():
    assert s.iqm([0, 1, 2, 3, 4, 5, 6, 1000]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert math.isnan(s.iqm([]))


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.floats(-10, 10), st.floats(0.1, 10)
)
def test_iqm_lies_within_the_data_and_moves_with_it(values, shift, scale):
    assert min(values) - 1e-9 <= s.iqm(values) <= max(values) + 1e-9
    moved = s.iqm([scale * v + shift for v in values])
    assert moved == pytest.approx(scale * s.iqm(values) + shift, abs=1e-6)


def test_score_is_zero_at_max_clock_and_one_at_the_oracle():
    assert s.normalised_score([100.0, 60.0, 80.0, 110.0], 100.0, 60.0) == pytest.approx(
        [0, 1, 0.5, -0.25]
    )
    assert np.isnan(s.normalised_score(5.0, 5.0, 5.0))


def test_probability_of_improvement_known_answers():
    rng = np.random.default_rng(0)
    assert s.probability_of_improvement([[2, 3]], [[0, 1]], rng, 50) == (1, 1, 1)
    assert s.probability_of_improvement([[1, 1]], [[1, 1]], rng, 50).estimate == 0.5
    mixed = s.probability_of_improvement([[1.0, 1.0], [0.0]], [[0.0], [1.0]], rng, 50)
    assert mixed.estimate == 0.5  # always better in one scenario, always worse in the other
    with pytest.raises(BiscaleError, match="same scenarios"):
        s.probability_of_improvement([[1]], [], rng)


def test_probability_of_improvement_equals_mann_whitney():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.3, 1, 30), rng.normal(0, 1, 25)
    u = stats.mannwhitneyu(a, b).statistic / (a.size * b.size)
    assert s.probability_of_improvement([a], [b], rng, 10).estimate == pytest.approx(u)


def test_paired_difference_is_students_interval():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), and t(0.975, 2) = 4.302653."""
    half = 4.302652729911275 / math.sqrt(3)
    found = s.paired_difference([2.0, 5.0, 9.0], [1.0, 3.0, 6.0])
    assert found == pytest.approx((2.0, 2.0 - half, 2.0 + half))
    assert s.paired_difference([2.0, 5.0, 9.0], [1.0, 3.0, 6.0], 0.5) == pytest.approx(
        (2.0, 2.0 - 0.816497 / math.sqrt(3), 2.0 + 0.816497 / math.sqrt(3)), rel=1e-5
    )


@pytest.mark.filterwarnings("error")
def test_equal_differences_have_an_interval_without_width():
    assert s.paired_difference([1.0, 2.0, 3.0], [0.0, 1.0, 2.0]) == (1.0, 1.0, 1.0)
    assert all(math.isnan(value) for value in s.paired_difference([], []))


def test_paired_difference_cannot_tell_from_one_workload():
    one = s.paired_difference([2.0], [1.5])
    assert one.estimate == 0.5
    assert math.isnan(one.low)
    with pytest.raises(BiscaleError, match="common workloads"):
        s.paired_difference([1, 2], [1])


def test_pairing_sharpens_the_comparison():
    rng = np.random.default_rng(3)
    workload = rng.normal(0, 10, 12)
    a, b = workload + rng.normal(1.0, 0.1, 12), workload + rng.normal(0, 0.1, 12)
    interval = s.paired_difference(a, b)
    assert interval.low > 0.5
    unpaired = stats.ttest_ind(a, b).confidence_interval(0.95)
    assert unpaired.low < 0 < unpaired.high


def test_blocks_are_cut_at_multiples_of_their_length():
    assert s.time_blocks([0.0, 29.9, 30.0, 61.0], 30.0).tolist() == [0, 0, 1, 2]
    with pytest.raises(BiscaleError, match="positive"):
        s.time_blocks([1.0], 0.0)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 2**32 - 1))
def test_resampling_stays_within_strata(strata, seed):
    weights = s.block_weights(strata, np.random.default_rng(seed), 20)
    label = np.asarray(strata)
    assert weights.min() >= 0
    for stratum in set(strata):
        assert (weights[:, label == stratum].sum(axis=1) == np.sum(label == stratum)).all()


def test_same_seed_same_interval_and_global_state_untouched():
    before = np.random.get_state()[1].copy()  # noqa: NPY002  the global state is what is being watched
    run = [s.stratified_bootstrap([[1, 2, 3], [4, 9]], np.random.default_rng(5)) for _ in range(2)]
    assert run[0] == run[1]
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_ratio_of_constant_ratio_has_no_width():
    weights = s.block_weights(np.zeros(10), np.random.default_rng(0), 200)
    base = np.arange(1.0, 11.0)
    assert s.ratio_interval(0.7 * base, base, weights) == pytest.approx((0.7, 0.7, 0.7))


def test_attainment_without_a_violation_is_not_certainty():
    weights = s.block_weights(np.zeros(10), np.random.default_rng(0), 200)
    interval = s.attainment_interval(np.full(10, 30), np.full(10, 30), weights)
    low, _ = stats.binomtest(300, 300).proportion_ci(0.95, method="exact")
    assert interval == pytest.approx((1.0, low, 1.0))
    assert all(math.isnan(v) for v in s.attainment_interval([0], [0], np.ones((5, 1), dtype=int)))


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]), st.integers(1, 60))
def test_resampled_quantile_equals_that_of_repeated_data(seed, probability, per_block):
    rng = np.random.default_rng(seed)
    values, blocks = rng.normal(size=10 * per_block), np.repeat(np.arange(10), per_block)
    weights = s.block_weights(np.zeros(10), rng, 1)
    repeated = np.repeat(values, weights[0][blocks])
    expected = np.quantile(repeated, probability, method="inverted_cdf")
    assert s.quantile_interval(values, blocks, probability, weights).low == pytest.approx(expected)


def _bursty(rng, n_blocks, per_block=20):
    """Requests whose chance to be late depends on the block they are in.

    1 % in the calm, 31 % in a burst of 10 %.
    """
    chance = np.where(rng.random(n_blocks) < 0.1, 0.31, 0.01)
    return rng.random((n_blocks, per_block)) >= chance[:, None]


TRUE_ATTAINMENT = 1 - (0.9 * 0.01 + 0.1 * 0.31)


def _coverage(truth, intervals):
    return np.mean([low <= truth <= high for _, low, high in intervals])


def test_block_bootstrap_covers_attainment_and_resampling_requests_does_not():
    rng = np.random.default_rng(11)
    by_block, by_request = [], []
    for _ in range(300):
        met = _bursty(rng, 80)
        weights = s.block_weights(np.zeros(80), rng, 300)
        by_block.append(s.attainment_interval(met.sum(axis=1), np.full(80, 20), weights))
        share = rng.binomial(met.size, met.mean(), 300) / met.size
        by_request.append((met.mean(), *np.quantile(share, [0.025, 0.975])))
    assert 0.89 <= _coverage(TRUE_ATTAINMENT, by_block) <= 0.985
    assert _coverage(TRUE_ATTAINMENT, by_request) < 0.85


def test_block_bootstrap_covers_the_p90_of_correlated_latencies():
    rng = np.random.default_rng(12)
    blocks = np.repeat(np.arange(100), 20)
    truth = stats.norm.ppf(0.9) * math.sqrt(2)
    intervals = []
    for _ in range(200):
        values = rng.normal(size=100)[blocks] + rng.normal(size=2000)
        intervals.append(
            s.quantile_interval(values, blocks, 0.9, s.block_weights(np.zeros(100), rng, 300))
        )
    assert 0.88 <= _coverage(truth, intervals) <= 0.99


def test_stratified_bootstrap_covers_the_iqm():
    rng = np.random.default_rng(13)
    means = np.array([0.2, 0.5, 0.9])
    truth = s.iqm(rng.normal(means[:, None], 0.1, (3, 200_000)).ravel())
    intervals = [
        s.stratified_bootstrap(rng.normal(means[:, None], 0.1, (3, 20)), rng, n_resamples=300)
        for _ in range(200)
    ]
    assert 0.88 <= _coverage(truth, intervals) <= 0.99


def test_paired_interval_covers_with_five_workloads():
    rng = np.random.default_rng(14)
    a, b = rng.normal(1.0, 1.0, (2000, 5)), rng.normal(0.0, 2.0, (2000, 5))
    assert (
        0.93
        <= _coverage(1.0, [s.paired_difference(x, y) for x, y in zip(a, b, strict=True)])
        <= 0.97
    )


def test_energy_ratio_interval_covers_when_blocks_are_paired():
    rng = np.random.default_rng(15)
    intervals = []
    for _ in range(300):
        base = rng.gamma(2.0, 50.0, 60)
        intervals.append(
            s.ratio_interval(
                base * rng.normal(0.7, 0.05, 60), base, s.block_weights(np.zeros(60), rng, 300)
            )
        )
    assert 0.90 <= _coverage(0.7, intervals) <= 0.98
    assert (
        np.mean([i.high - i.low for i in intervals]) < 0.05
    )  # unpaired energies alone spread by 18 %


def test_crossed_bootstrap_is_wide_when_training_seeds_differ():
    """Ten workloads per seed do not make up for two training seeds: the seeds are what is drawn."""
    rng = np.random.default_rng(0)
    seeds = np.repeat([[0.0], [1.0]], 10, axis=1)
    crossed = s.crossed_bootstrap([seeds, seeds], rng)
    assert crossed.estimate == 0.5
    assert (crossed.low, crossed.high) == (0.0, 1.0)
    alike = rng.normal(0.5, 0.1, (8, 10))
    narrow = s.crossed_bootstrap([alike], rng)
    assert narrow.low < alike.mean() < narrow.high
    assert narrow.high - narrow.low < 0.2
    with pytest.raises(BiscaleError, match="same training seeds"):
        s.crossed_bootstrap([seeds, seeds[:1]], rng)
    assert math.isnan(s.crossed_bootstrap([], rng).estimate)


def test_two_workloads_have_an_interval_already():
    half = 12.706204736174694 * 0.5  # t(0.975, 1) times the standard error of 1 and 2
    assert s.paired_difference([1.0, 2.0], [0.0, 0.0]) == pytest.approx(
        (1.5, 1.5 - half, 1.5 + half)
    )


def test_crossed_bootstrap_takes_every_workload():
    """The first of four workloads alone differs: it is taken in 1 - (3/4)^4 of the resamples."""
    taken = []

    def largest(values):
        taken.append(values.max())
        return float(values.max())

    s.crossed_bootstrap([[[1.0, 0.0, 0.0, 0.0]]], np.random.default_rng(0), largest, 2000)
    assert np.mean(taken) == pytest.approx(1 - 0.75**4, abs=0.04)


def test_a_ratio_does_not_depend_on_the_unit_of_its_denominator():
    rng = np.random.default_rng(0)
    weights = s.block_weights(np.zeros(10), rng, 200)
    top, bottom = rng.random(10), rng.random(10) + 0.5
    small = s.ratio_interval(1e-3 * top, 1e-3 * bottom, weights)
    assert small == pytest.approx(s.ratio_interval(top, bottom, weights))
