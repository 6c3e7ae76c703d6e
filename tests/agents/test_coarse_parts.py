"""Parts of the learned coarse policy: forecast, costs of windows, days, the programme's plans."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.coarse.coarse_rollout import Sums, least_careful, tuned_enough
from agents.coarse.load_forecast import NAMES, LoadForecast, load_changes
from agents.coarse.service_days import ConstantLoad, ServiceDay
from agents.coarse.window_costs import SHARES, WindowCosts
from biscale_env.core.errors import BiscaleError
from biscale_env.traces import load_envelope
from controllers.placement.coarse_rules import CoarseMemory, IlpRule
from controllers.placement.ilp import PHASES, CapacityEntry, CapacityTable, biscale_plan
from controllers.placement.load_plans import GRID, LoadPlans

RATES = st.lists(st.floats(0.5, 200.0), min_size=1, max_size=20)
SERVICE = "servegen-m-large-fortnight"


def forecast(location=0.0, spread=0.1, residuals=(-1.0, 0.0, 1.0), jumps=()):
    """One that says the same whatever was before."""
    zeros = np.zeros((1, len(NAMES), 2))
    out = np.array([[location, np.log(spread)]])
    return LoadForecast(
        np.zeros(len(NAMES)),
        np.ones(len(NAMES)),
        zeros,
        np.zeros((1, 2)),
        np.zeros((1, 2, 2)),
        out,
        np.array(residuals),
        np.array(jumps),
    )


# --- forecast


@given(RATES, st.floats(0.5, 20.0))
def test_the_size_of_a_service_does_not_matter(rates, factor):
    scaled = [factor * r for r in rates]
    np.testing.assert_allclose(load_changes(rates), load_changes(scaled), atol=1e-9)


def test_features_of_a_known_path():
    """A doubling after constant loads."""
    seen = dict(zip(NAMES, load_changes([8.0] * 12 + [16.0]), strict=True))
    log2 = np.log(2)
    assert seen["change_1"] == pytest.approx(log2)
    assert seen["largest_rise_6"] == pytest.approx(log2)
    assert seen["mean_change_12"] == pytest.approx(log2 / 12)
    assert seen["over_mean_6"] == pytest.approx(log2 * 5 / 6)
    assert seen["under_peak_6"] == 0
    assert not load_changes([5.0] * 30).any()


def test_loads_are_residuals_and_jumps_around_the_last_load():
    made = forecast(0.2, 0.5, (-1.0, 2.0), (np.log(3.0),)).loads_rps([7.0, 10.0])
    np.testing.assert_allclose(made, [10 * np.exp(-0.3), 10 * np.exp(1.2), 30.0])


# --- costs


def costs(power_w=(100.0, 200.0), capacity=(10.0, 20.0)):
    """Linear power, misses from the capacity on."""
    missed = np.where(SHARES > 1.0, SHARES - 1.0, 0.0)
    rows = len(capacity)
    return WindowCosts(
        tuple(("decode", 2, n + 1) for n in range(rows)),
        np.array(capacity),
        np.array([p * SHARES for p in power_w]),
        np.tile(missed, (rows, 1)),
        {},
    )


def test_costs_are_linear_between_what_was_measured():
    power_w, missed = costs().at(1, np.array([10.0, 20.0, 26.0, 1000.0]))
    np.testing.assert_allclose(power_w, [100.0, 200.0, 260.0, 360.0])
    left = [0.0, 0.0, 1 - 1 / 1.3, 0.98]  # of the load, beyond the capacity
    np.testing.assert_allclose(missed, np.array([0.0, 0.0, 0.3, 0.8]) + left)


@given(st.floats(0.5, 400.0), st.floats(0.0, 100.0))
def test_misses_rise_with_the_load_and_fall_with_instances(load_rps, more_rps):
    """Also where measured ones fall, in the noise of windows that miss nearly all."""
    noisy = costs()
    noisy.missed[:, -2:] = 0.1
    loads = np.array([load_rps, load_rps + more_rps])
    (_, one), (_, two) = (noisy.at(kind, loads) for kind in (0, 1))
    assert one[0] <= one[1] + 1e-12
    assert (two <= one + 1e-12).all()


# --- days


def test_a_day_has_the_measured_load_of_every_window():
    day = ServiceDay(SERVICE, 3, 4.0)
    factors = np.array(load_envelope(SERVICE).factors)[3 * 144 : 4 * 144]
    np.testing.assert_allclose(day.rates_rps(144, 600.0), 4.0 * factors)
    made = day.trace(6, 600.0)
    counts = np.histogram(made.arrival_s, np.arange(7) * 600.0)[0]
    # Gamma gaps of CV 2: the variance of a count is four times its mean
    expected = 4.0 * factors[:6] * 600.0
    assert (np.abs(counts - expected) < 5 * 2 * np.sqrt(expected)).all()
    np.testing.assert_array_equal(made.arrival_s, day.trace(6, 600.0).arrival_s)


def test_a_day_that_there_is_not():
    with pytest.raises(BiscaleError, match="days 0 to 13, not 14"):
        ServiceDay(SERVICE, 14, 4.0).trace(2, 600.0)


def test_a_constant_load_needs_no_profile():
    assert ConstantLoad("none", 0, 5.0).rates_rps(3, 1.0).tolist() == [5.0] * 3


# --- the programme's plans


def table():
    entries = [
        CapacityEntry(phase, tp, mhz, tp * mhz / 200.0, 10.0 + 5.0 * (mhz / 1000.0) ** 2 + tp)
        for phase in PHASES
        for tp in (2, 4)
        for mhz in (810.0, 1395.0, 1980.0)
    ]
    return CapacityTable(tuple(entries))


@pytest.mark.slow
@given(st.floats(1.0, 70.0))
def test_plans_are_those_of_the_programme_on_a_grid(need_rps):
    plans = LoadPlans(table(), 16)
    found = plans.placement(need_rps)
    for phase in PHASES:
        assert plans.capacity_rps(found, phase) >= need_rps * (1 - 1e-9)

    def power_w(placement):
        entries = [(plans.table.find(g.phase, g.tp, g.freq_mhz), g.count) for g in placement.groups]
        return sum(e.power_w * n for e, n in entries)

    exact = biscale_plan(plans.table, need_rps, 16, 0.0).placement
    above = biscale_plan(plans.table, need_rps * GRID, 16, 0.0).placement
    assert power_w(exact) - 1e-6 <= power_w(found) <= power_w(above) + 1e-6


def test_the_rule_asks_for_the_load_of_the_window_before():
    plans = LoadPlans(table(), 16)
    rule = IlpRule(plans, 0.5)
    seen = np.zeros(17, dtype=np.float32)
    first, memory = rule.place(seen, None)
    assert first == plans.largest
    still, memory = rule.place(seen, memory)
    assert still == plans.largest  # a window without requests changes nothing
    seen[0] = 20.0 / 30.0
    chosen, memory = rule.place(seen, memory)
    assert chosen == plans.placement(1.5 * float(seen[0]) * 30.0)
    assert memory == CoarseMemory((0.0, pytest.approx(20.0)), chosen)
    seen[0] = 10.0
    assert rule.place(seen, memory)[0] == plans.largest


# --- tuning


@pytest.mark.slow
@given(st.lists(st.booleans(), min_size=1, max_size=12).map(sorted))
def test_bisection_finds_the_first_that_is_enough(enough):
    asked = []

    def is_enough(k):
        asked.append(k)
        return enough[k]

    first = enough.index(True) if True in enough else len(enough) - 1
    assert least_careful(range(len(enough)), is_enough) == (first, True in enough)
    assert len(asked) <= 4


def test_tuning_keeps_some_violations_back():
    """At 99 %, three tenths of the one per cent."""
    good = Sums(1.0, 10_000.0, 69.0, 70.0)
    assert tuned_enough(good, 0.99)
    assert not tuned_enough(Sums(1.0, 10_000.0, 71.0, 0.0), 0.99)
    assert not tuned_enough(Sums(1.0, 10_000.0, 0.0, 71.0), 0.99)
