"""The laws of the clock rules: closed forms, and one function for controllers and simulator."""

import inspect
from itertools import product

import numpy as np
import pytest
from cluster_support import placement, plant, trace
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_env.envs.cluster.engine import Cluster
from biscale_env.laws import ecofreq_law, greedy_law, level_search, slack_law, throttllem_law
from biscale_env.laws.ecofreq_law import binned_requests, ecofreq_level
from biscale_env.laws.greedy_law import lower_greedily
from biscale_env.laws.level_search import (
    first_token_limit_s,
    interval_limit_s,
    lowest_meeting_level,
    table_latency_s,
)
from biscale_env.laws.slack_law import slack_level
from biscale_env.laws.throttllem_law import (
    DecodeOutlook,
    lowest_level_for_queue,
    project_decode,
    throttllem_level,
)
from biscale_env.sim.cluster import routing, tier2_rules
from controllers.decode import slack
from controllers.prefill import mpc_greedy
from controllers.rivals import ecofreq, throttllem

rows = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=7).map(
    lambda v: np.sort(np.array(v))[::-1].copy()
)


@pytest.mark.parametrize(
    ("law", "name", "users"),
    [
        (slack_law, "slack_level", (slack, tier2_rules)),
        (ecofreq_law, "ecofreq_level", (ecofreq, tier2_rules)),
        (ecofreq_law, "binned_requests", (ecofreq, tier2_rules)),
        (throttllem_law, "throttllem_level", (throttllem, tier2_rules)),
        (throttllem_law, "project_decode", (throttllem, tier2_rules)),
        (throttllem_law, "lowest_level_for_queue", (throttllem, tier2_rules)),
        (greedy_law, "lower_greedily", (mpc_greedy, tier2_rules)),
        (level_search, "interval_limit_s", (slack, ecofreq, throttllem, tier2_rules, routing)),
        (level_search, "first_token_limit_s", (ecofreq, tier2_rules)),
        (level_search, "lowest_meeting_level", (routing,)),
    ],
)
def test_controllers_and_simulator_share_the_law(law, name, users):
    """The very same function, and each user calls it."""
    for user in users:
        assert getattr(user, name) is getattr(law, name)
        assert f"{name}(" in inspect.getsource(user)


@given(rows, st.floats(0.0, 1.2))
def test_lowest_level_by_exhaustion(row, limit):
    meeting = [k for k in range(len(row)) if row[k] <= limit]
    want = min(meeting, default=len(row) - 1)
    assert lowest_meeting_level(table_latency_s, row, len(row), limit) == want


def test_nan_meets_no_limit():
    row = np.array([np.nan, np.nan, 0.1])
    assert lowest_meeting_level(table_latency_s, row, 3, 0.2) == 2
    assert lowest_meeting_level(table_latency_s, np.array([0.3, 0.2]), 2, np.nan) == 1


@given(rows, st.floats(0.0, 1.2))
def test_the_escape_to_the_highest_clock(row, limit):
    """Guard, waiting requests, overflow: the highest; without them all three are the search."""
    n = len(row)
    want = lowest_meeting_level(table_latency_s, row, n, limit)
    for law in (slack_level, ecofreq_level, throttllem_level):
        assert law(table_latency_s, row, n, limit, True) == n - 1
        assert law(table_latency_s, row, n, limit, False) == want


def test_limits_by_hand():
    assert interval_limit_s(0.1, 0.2) == pytest.approx(0.08)
    assert first_token_limit_s(0.6, 0.1, 0.25) == pytest.approx(0.6 - 0.06 - 0.15)
    np.testing.assert_allclose(interval_limit_s(np.array([0.1, 0.2]), 0.5), [0.05, 0.1])


@pytest.mark.parametrize(("batch", "want"), [(1, 8), (7, 8), (8, 8), (9, 16), (64, 64), (65, 72)])
def test_bins_by_hand(batch, want):
    assert binned_requests(float(batch), 8.0) == want


def test_projection_by_hand():
    now = DecodeOutlook(10.0, 6.0, 9000.0, 320.0, 5120.0)
    then = project_decode(now, 32.0, 10_000.0, 12.0)
    assert then == (12 + 320 / 32, 5120 / 32, 9000 + 0.5 * 32 * 12, 12.0, False)
    assert project_decode(now, 32.0, 9191.0, 12.0).overflows
    assert not project_decode(now, 32.0, 9192.0, 12.0).overflows


tables = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.tuples(st.floats(0.02, 0.3), st.floats(0.0, 1.0)), min_size=n, max_size=n)
)


def made_table(stages, n_levels=4):
    """Latency falls with the clock, energy has its least at a low level."""
    speed = 1.0 + 0.4 * np.arange(n_levels)
    latency = np.array([[t / v for v in speed] for t, _ in stages])
    energy = np.array([[100 * t * (0.3 + v**1.5 - 0.2 * v) for v in speed] for t, _ in stages])
    deadline = np.cumsum(latency[:, -1]) + np.array([extra * 0.3 for _, extra in stages])
    return latency, energy, deadline


@given(tables)
def test_queue_search_by_exhaustion(stages):
    latency, _, deadline = made_table(stages)

    def meets(k):
        return bool((np.cumsum(latency[:, k]) <= deadline).all())

    want = next((k for k in range(4) if meets(k)), 3)
    assert lowest_level_for_queue(latency, deadline) == want


@settings(max_examples=200)
@given(tables)
def test_greedy_keeps_deadlines_and_stops_only_when_it_must(stages):
    latency, energy, deadline = made_table(stages)
    level = np.zeros(len(latency), dtype=np.int64)
    lower_greedily(latency, energy, deadline, level)
    order = np.arange(len(latency))

    def feasible(levels):
        return bool((np.cumsum(latency[order, levels]) <= deadline + 1e-9).all())

    assert feasible(level)
    for k in order:
        lower = level.copy()
        lower[k] -= 1
        if level[k] > 0 and energy[k, level[k]] > energy[k, level[k] - 1]:
            slower = latency[k, level[k] - 1] - latency[k, level[k]]
            assert not feasible(lower) or slower <= 1e-9


@given(tables, st.integers(0, 1000))
def test_greedy_takes_the_largest_gain_first(stages, seed):
    """Against a plain search written anew."""
    latency, energy, deadline = made_table(stages)
    deadline = deadline + np.random.default_rng(seed).uniform(-0.02, 0.2, len(deadline))
    level = np.zeros(len(latency), dtype=np.int64)
    lower_greedily(latency, energy, deadline, level)
    np.testing.assert_array_equal(level, plain_greedy(latency, energy, deadline))


def plain_greedy(latency, energy, deadline):
    levels = np.full(len(latency), latency.shape[1] - 1)
    order = np.arange(len(latency))
    while True:
        done = np.cumsum(latency[order, levels])
        gains = {}
        for k, now in product(order, (0,)):
            now = levels[k]
            if now == 0:
                continue
            longer = latency[k, now - 1] - latency[k, now]
            saved = energy[k, now] - energy[k, now - 1]
            room = np.maximum(deadline - done, 0.0)[k:].min()
            if saved > 0 and longer <= room + 1e-12:
                gains[k] = saved / longer
        if not gains:
            return levels
        levels[max(gains, key=lambda k: (gains[k], -k))] -= 1


def test_rounding_above_the_power_cap_decides_nothing():
    """Two levels that run alike but for rounding: the plan does not depend on the rounding.

    In version 0.1 the cluster's own search did.
    """
    latency = np.array([[0.20, 0.16, 0.15, 0.15], [0.20, 0.16, 0.15, 0.15]])
    energy = np.array([[300.0, 350.0, 400.0, 400.0], [300.0, 350.0, 400.0, 400.0]])
    plans = set()
    for sign, slack_s in product((-1.0, 1.0), (0.0,)):
        noisy, joules = latency.copy(), energy.copy()
        noisy[:, 2] += sign * 3e-13
        joules[:, 2] += sign * 4e-10
        level = np.zeros(2, dtype=np.int64)
        lower_greedily(noisy, joules, np.cumsum(noisy[:, 3]) + slack_s, level)
        plans.add(tuple(level))
    assert plans == {(2, 2)}


def test_throttllem_of_the_cluster_runs_at_the_highest_clock_when_the_kv_overflows():
    """As its controller does.

    In version 0.1 the cluster's rule capped the projection instead, and ran slowly.
    """
    w = plant(gpus=8, decode_policy="throttllem", ahead=40000.0)
    cluster = Cluster(w, placement(freq_mhz=1395.0))
    cluster.offer(trace(np.arange(40) * 0.01, 12_000, 1500))
    cluster.advance(20.0)
    state, room = cluster.decodes.states[0], cluster.decodes.params["kv_capacity"][0]
    assert state["cached"] < room < state["cached"] + 0.5 * 40000 * state["batch"]
    assert state["freq_ghz"] == pytest.approx(1.98)
