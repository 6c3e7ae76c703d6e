"""The slack rule against levels worked out by hand, its guard, its floors and its extras."""

from dataclasses import replace

import numpy as np
import pytest
from controllers_cases import clock_of, context, encode, plant, recorded
from hypothesis import given, settings
from hypothesis import strategies as st

from controllers import make_policy
from controllers.columns import DECODE
from controllers.decode.slack import look_ahead, mean_power_under_load, resist_lowering
from controllers.surrogates.scan import LevelScan, next_work, search_grid

LEVELS = np.array(plant("decode").clocks.levels_mhz)
MODEL = plant("decode").model


def busy(batch=64, cached=70000.0, **values):
    return encode("decode", batch=batch, cached_tokens=cached, kv_use=0.2, **values)


def seen(**values):
    """A physical observation (1, dim), zero but for the given columns."""
    x = np.zeros((1, plant("decode").spec.dim))
    for name, value in values.items():
        x[0, getattr(DECODE, name)] = value
    return x


def latencies(batch=64, cached=70000.0):
    return MODEL.latency_s(batch, 0.0, cached, batch, LEVELS)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 256), st.floats(100.0, 4e5), st.integers(0, 6))
def test_picks_the_hand_computed_level(batch, cached, k):
    t = latencies(batch, cached)
    slo = t[k] * 1.0001
    assert (
        clock_of(make_policy("slack", context("decode")), busy(batch, cached, slo=slo)) == LEVELS[k]
    )


def test_margin_is_a_share_of_the_slo():
    t = latencies()
    o = busy(slo=t[2] * 1.001)
    assert clock_of(make_policy("slack", context("decode")), o) == LEVELS[2]
    share = 1.0 - t[5] / t[2]
    assert clock_of(make_policy("slack", context("decode"), margin=share), o) == LEVELS[5]


def test_an_interval_that_no_clock_meets_takes_the_highest():
    assert (
        clock_of(make_policy("slack", context("decode")), busy(slo=latencies()[-1] * 0.9)) == 1980.0
    )


def test_kv_guard_takes_the_highest_and_can_be_switched_off():
    o = busy()
    o[plant("decode").spec.index("kv_use")] = 0.95
    assert clock_of(make_policy("slack", context("decode")), o) == 1980.0
    assert clock_of(make_policy("slack", context("decode"), kv_guard=0.96), o) == LEVELS[0]


def test_energy_floor_is_the_cheapest_level_unless_the_slo_needs_more():
    energy = MODEL.energy_j(64, 0.0, 70000.0, 64, LEVELS)
    cheapest = LEVELS[energy.argmin()]
    policy = make_policy("slack", context("decode"), energy_floor=True)
    assert LEVELS[0] < cheapest < LEVELS[-1]
    assert clock_of(policy, busy(slo=1.0)) == cheapest
    assert clock_of(policy, busy(slo=latencies()[5] * 1.001)) == LEVELS[5]


def test_recompute_work_counts():
    t = MODEL.latency_s(64 + 500, 0.5 * 500**2, 70000.0, 64, LEVELS)
    assert t[3] > latencies()[0]
    o = busy(recompute_tokens=500.0, slo=t[3] * 1.001)
    assert clock_of(make_policy("slack", context("decode")), o) == LEVELS[3]


def test_accumulated_slack_is_spent_over_the_lookahead():
    t = latencies()
    policy = make_policy("slack", context("decode"), accumulated=True, lookahead=10.0)
    slo = t[3] * 1.0001
    assert clock_of(policy, busy(slo=slo, tpot_slack_min=0.0)) == LEVELS[3]
    for k in (0, 1, 5, 6):
        slack = 10.0 * (t[k] * 1.001 / slo - 1.0)
        assert clock_of(policy, busy(slo=slo, tpot_slack_min=slack)) == LEVELS[k]


def test_looking_ahead_grows_the_context_until_the_clock_can_act():
    table, clocks = np.array([[0.040, 0.030, 0.020]]), np.array([800.0, 1200.0, 1600.0])
    cases = ((0.05, 0.0, 3), (0.04, 0.0, 2), (0.0, 0.0, 0), (0.01, 0.061, 4), (0.05, 0.03, 3))
    for delay, wait, steps in cases:
        work = np.array([[10.0, 0.0, 5000.0, 10.0]])
        x = seen(
            freq_pending=1590.0, time_to_apply=wait, actuation_delay=delay, incoming_requests=2.0
        )
        look_ahead(table, clocks, x, work)
        np.testing.assert_allclose(work[0], [12.0, 0.0, 5000.0 + steps * 10.0, 12.0])


def test_only_clocks_below_the_newest_are_resisted():
    table = np.array([[0.040, 0.030, 0.020]])
    resist_lowering(table, np.array([800.0, 1200.0, 1600.0]), seen(freq_pending=1210.0), 0.1)
    np.testing.assert_allclose(table[0], [0.040 / 0.9, 0.030, 0.020])


def test_delay_awareness_needs_room_to_go_down_and_none_to_stay():
    t = latencies()
    o = busy(slo=t[2] * 1.02, freq_pending=LEVELS[2], actuation_delay=0.0)
    lower = busy(slo=t[2] * 1.02, freq_pending=LEVELS[4], actuation_delay=0.0)
    policy = make_policy("slack", context("decode"), delay_aware=True, hysteresis=0.05)
    assert clock_of(policy, o) == LEVELS[2]
    assert clock_of(policy, lower) > LEVELS[2]
    assert clock_of(make_policy("slack", context("decode")), lower) == LEVELS[2]


def test_power_under_load_solves_littles_law():
    """T = a + b B, E = c + d B at each clock; the settled batch solves B = rate T(B)."""
    a, b, c, d = (
        np.array([0.03, 0.02]),
        np.array([2e-4, 1e-4]),
        np.array([20.0, 25.0]),
        np.array([0.2, 0.25]),
    )
    batch, old = 50.0, 1
    tables = [
        np.array([v]) for v in (a + b * batch, c + d * batch, a + 2 * b * batch, c + 2 * d * batch)
    ]
    power, clocks = np.empty((1, 2)), np.array([800.0, 1200.0])
    x = seen(freq_pending=1190.0, kv_use=0.1)
    mean_power_under_load(*tables, x, 0.9, clocks, power)
    rate = batch / (a[old] + b[old] * batch)
    settled = rate * a / (1 - rate * b)
    np.testing.assert_allclose(power[0], (c + d * settled) / (a + b * settled), rtol=1e-12)
    limit = 0.1 * settled[0] / batch * 0.999
    mean_power_under_load(*tables, x, limit, clocks, power)
    assert power[0, 0] == np.inf
    assert np.isfinite(power[0, 1])


def test_load_floor_forbids_clocks_whose_batch_would_fill_the_cache():
    roomy, tight = busy(), busy()
    tight[plant("decode").spec.index("kv_use")] = 0.88
    policy = make_policy("slack", context("decode"), load_floor=True, fine=True)
    assert clock_of(policy, roomy) == search_grid(context("decode"))[0]
    assert clock_of(policy, tight) > 1005.0


def test_fine_scan_ends_at_the_highest_clock_and_reaches_lower():
    grid = search_grid(context("decode"))
    assert grid[-1] == 1980.0
    assert np.all(np.diff(grid) == 60.0)
    assert grid[0] < LEVELS[0]
    assert clock_of(make_policy("slack", context("decode"), fine=True), busy(slo=1.0)) == grid[0]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_any_model_gives_the_compiled_tables(phase):
    model = plant(phase).model

    class Same:
        def latency_s(self, *work):
            return model.latency_s(*work)

        def energy_j(self, *work):
            return model.energy_j(*work)

    c = context(phase)
    x = recorded(phase, 50) * c.spec.scale
    work = np.vstack([next_work(x, phase), np.zeros((1, 4))])
    for ours, theirs in zip(
        LevelScan(c)(work), LevelScan(replace(c, model=Same()))(work), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
        assert np.all(ours[-1] == 0.0)
