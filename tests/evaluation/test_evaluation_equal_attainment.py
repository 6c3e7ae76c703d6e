"""Energy at equal attainment: closed forms, laws, brute force, coverage."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.stats.equal_attainment import (
    AttainmentCurve,
    energy_at,
    ratio_interval_at,
    standing,
)
from biscale_env.evaluation.stats.windows import window_weights

COUNTED = 1000.0


def curve(*settings, n_windows=4, tokens=None):
    """A curve of settings (attainment, energy in all), alike in every window."""
    attained, energy = np.array(settings, dtype=float).T
    ones = np.ones((attained.size, n_windows))
    return AttainmentCurve(
        ones * energy[:, None] / n_windows,
        ones * attained[:, None] * COUNTED,
        ones * COUNTED,
        None if tokens is None else ones * tokens / n_windows,
    )


def brute(settings, target):
    """The frontier, sorted and interpolated the plain way."""
    front = [
        (a, e)
        for a, e in set(settings)
        if not any((b >= a and d <= e and (b, d) != (a, e)) for b, d in settings)
    ]
    front.sort()
    if not front or front[-1][0] < target:
        return math.nan
    attained, energy = zip(*front, strict=True)
    return float(np.interp(target, attained, energy))


SETTINGS = st.lists(
    st.tuples(
        st.integers(800, 1000).map(lambda k: k / 1000), st.integers(10, 200).map(lambda k: k / 100)
    ),
    min_size=1,
    max_size=8,
)
TARGETS = st.integers(790, 1000).map(lambda k: k / 1000)


def test_between_two_settings_energy_is_linear():
    two = curve((0.98, 10.0), (1.0, 14.0))
    assert energy_at(two, 0.99) == pytest.approx(12.0)
    assert energy_at(two, 0.985) == pytest.approx(11.0)
    assert energy_at(two, 1.0) == pytest.approx(14.0)
    assert standing(two, 0.99) == "reached"


def test_no_number_where_the_target_is_not_reached():
    two = curve((0.90, 10.0), (0.98, 14.0))
    assert math.isnan(energy_at(two, 0.99))
    assert standing(two, 0.99) == "not reached"
    found = ratio_interval_at(two, curve((1.0, 9.0)), 0.99, np.ones((10, 4)))
    assert all(math.isnan(value) for value in found)
    assert math.isnan(ratio_interval_at(curve((1.0, 9.0)), two, 0.99, np.ones((10, 4))).estimate)


def test_no_extrapolation_on_the_lenient_side():
    lenient = curve((0.995, 10.0), (1.0, 14.0))
    assert energy_at(lenient, 0.99) == pytest.approx(10.0)
    assert standing(lenient, 0.99) == "above"
    # a setting below the target that costs more does not count
    worse = curve((0.995, 10.0), (1.0, 14.0), (0.9, 12.0))
    assert energy_at(worse, 0.99) == pytest.approx(10.0)
    assert standing(worse, 0.99) == "above"


def test_energy_is_per_token_where_tokens_are_given():
    assert energy_at(curve((1.0, 30.0), tokens=60.0), 0.99) == pytest.approx(0.5)
    a, b = curve((1.0, 30.0), tokens=60.0), curve((1.0, 40.0), tokens=40.0)
    assert ratio_interval_at(a, b, 0.99, np.ones((5, 4))).estimate == pytest.approx(0.5)


def test_a_step_of_the_grid_does_not_decide():
    """One policy on two grids: as tuned they differ by 4 %, at equal attainment by 0.2 %."""
    fine = [(1 - 10.0**-k, 1 + 0.1 * k) for k in np.arange(1.0, 3.0, 0.05)]
    coarse = [(1 - 10.0**-k, 1 + 0.1 * k) for k in np.arange(1.0, 3.0, 0.4)]

    def tuned(settings):
        return min(e for a, e in settings if a >= 0.99)

    assert tuned(coarse) / tuned(fine) > 1.015
    ratio = energy_at(curve(*coarse), 0.99) / energy_at(curve(*fine), 0.99)
    assert ratio == pytest.approx(1.0, abs=0.011)


@given(SETTINGS, TARGETS)
def test_against_brute_force(settings, target):
    found, expected = energy_at(curve(*settings), target), brute(settings, target)
    assert found == pytest.approx(expected, nan_ok=True)
    reached = {"reached": True, "above": True, "not reached": False}
    assert reached[standing(curve(*settings), target)] == (not math.isnan(found))


@given(SETTINGS, TARGETS, TARGETS)
def test_more_attainment_never_costs_less(settings, one, other):
    low, high = sorted((one, other))
    dear = energy_at(curve(*settings), high)
    assume(not math.isnan(dear))
    assert energy_at(curve(*settings), low) <= dear + 1e-12


@given(SETTINGS, TARGETS, st.randoms(use_true_random=False))
def test_order_and_repeats_of_settings_do_not_matter(settings, target, random):
    more = settings + random.choices(settings, k=3)
    random.shuffle(more)
    expected = energy_at(curve(*settings), target)
    assert energy_at(curve(*more), target) == pytest.approx(expected, nan_ok=True)


@given(SETTINGS)
def test_a_setting_of_the_frontier_is_its_own_value(settings):
    for attained, energy in settings:
        found = energy_at(curve(*settings), attained)
        assert found <= energy + 1e-9
        if not any(
            a >= attained and e <= energy and (a, e) != (attained, energy) for a, e in settings
        ):
            assert found == pytest.approx(energy)


@given(SETTINGS, TARGETS, st.floats(0.1, 10.0))
def test_energy_scales(settings, target, factor):
    scaled = curve(*[(a, factor * e) for a, e in settings])
    expected = factor * energy_at(curve(*settings), target)
    assert energy_at(scaled, target) == pytest.approx(expected, nan_ok=True)


@given(SETTINGS, TARGETS)
def test_a_policy_against_itself_is_one_without_width(settings, target):
    mine = curve(*settings, n_windows=6)
    assume(not math.isnan(energy_at(mine, target)))
    weights = window_weights(6, np.random.default_rng(0), 50)
    assert ratio_interval_at(mine, mine, target, weights)[:3] == pytest.approx((1.0, 1.0, 1.0))


def test_resamples_that_miss_are_counted():
    """Half of the windows attain 1, half 0.98: just enough, and in half the resamples not."""
    met = COUNTED * np.where(np.arange(20) % 2, 1.0, 0.98)[None]
    flat = np.ones((1, 20))
    a = AttainmentCurve(flat, met, COUNTED * flat)
    b = curve((1.0, 40.0), n_windows=20)
    weights = np.random.default_rng(0).multinomial(20, np.full(20, 0.05), 4000)
    found = ratio_interval_at(a, b, 0.99, weights)
    assert found.estimate == pytest.approx(0.5)
    assert 0.3 < found.not_reached < 0.5
    assert ratio_interval_at(a, b, 0.98, weights).not_reached < 0.01


def test_shapes_are_checked():
    with pytest.raises(BiscaleError, match="one shape"):
        AttainmentCurve(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 4)))
    with pytest.raises(BiscaleError, match="same windows"):
        ratio_interval_at(curve((1.0, 1.0)), curve((1.0, 1.0)), 0.9, np.ones((5, 3)))


def test_too_few_windows_leave_the_estimate():
    weights = window_weights(2, np.random.default_rng(0), 10)
    a, b = curve((1.0, 1.0), n_windows=2), curve((1.0, 2.0), n_windows=2)
    found = ratio_interval_at(a, b, 0.99, weights)
    assert found.estimate == 0.5
    assert math.isnan(found.low)
    assert math.isnan(found.not_reached)


FACTORS = np.array([0.0, 0.1, 0.2, 0.3])  # savings of the four settings


def _noisy_curve(rng, load, price):
    """Settings that save more and miss more; both depend on the load of the window."""
    wave = 1 + 0.5 * (load - 1)
    energy = price * wave * (1 - FACTORS[:, None]) * rng.normal(1.0, 0.01, (4, load.size))
    missed = 0.04 * FACTORS[:, None] * np.clip(load, 0, None) ** 2
    counted = np.broadcast_to(200 * load, missed.shape)
    return AttainmentCurve(energy, counted * (1 - missed), counted)


@pytest.mark.slow
def test_intervals_at_equal_attainment_cover():
    """Two policies on the same windows, one 10 % dearer; the truth from a long run."""
    rng = np.random.default_rng(1)

    def pair(n_windows):
        load = np.clip(rng.normal(1.0, 0.3, n_windows), 0.1, None)
        return _noisy_curve(rng, load, 1.1 + 0.2 * (load - 1)), _noisy_curve(rng, load, 1.0)

    long = pair(200_000)
    truth = energy_at(long[0], 0.995) / energy_at(long[1], 0.995)
    hits = []
    for _ in range(400):
        a, b = pair(15)
        weights = window_weights(15, rng, 300, series=[b.n_counted[0]])
        found = ratio_interval_at(a, b, 0.995, weights)
        assert found.not_reached < 0.05
        hits.append(found.low <= truth <= found.high)
    assert 0.91 <= np.mean(hits) <= 0.98


def test_the_luckiest_setting_of_a_resample_is_not_chosen():
    """Twelve settings that are alike but for the chance of their windows: no bias downwards."""
    rng = np.random.default_rng(2)
    energy = rng.normal(1.0, 0.2, (12, 15))
    energy *= 15.0 / energy.sum(axis=1, keepdims=True)
    attained = np.linspace(0.985, 0.995, 12)[:, None]
    energy *= 1.0 + 0.001 * np.arange(12)[:, None]
    counted = np.full((12, 15), COUNTED)
    mine = AttainmentCurve(energy, attained * counted, counted)
    plain = curve((0.98, 15.0), (1.0, 16.0), n_windows=15)
    weights = window_weights(15, rng, 2000)
    found = ratio_interval_at(mine, plain, 0.99, weights)
    assert 0.6 < (found.high - found.estimate) / (found.estimate - found.low) < 1.6
