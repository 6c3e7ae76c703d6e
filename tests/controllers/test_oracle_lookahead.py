"""The controller with foresight: the optimum where it knows all, blind beyond its horizon."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_helpers import brute_force, plant_of, trace_of

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.rollouts.rollout import rollout
from biscale_env.evaluation.runs.record import is_bound
from biscale_env.evaluation.tuning.hindsight import Hindsight, build_policy
from biscale_env.policies import resolve_policy
from biscale_env.traces import generate
from controllers.oracle.lookahead import (
    LookaheadPlanner,
    PlanWeights,
    run_lookahead,
)
from controllers.oracle.prefill_optimum import solve_prefill_oracle

STEP_MHZ = 495.0
PLAN_MHZ = (990.0, 1485.0, 1980.0)
GAPS_S = st.sampled_from([0.0, 0.003, 0.07, 0.2, 0.5, 3.0])
TINY = st.lists(st.tuples(GAPS_S, st.integers(1, 3000)), min_size=1, max_size=4).filter(
    lambda rows: sum(gap for gap, _ in rows) > 0
)
WEIGHTS = PlanWeights(5.0, 0.0)


def made(rows):
    """A trace of (gap, prompt) pairs that goes on for a tenth of a second."""
    gaps, prompts = zip(*rows, strict=True)
    return trace_of(gaps, prompts, tail_s=0.1)


def fine(plant, trace, seconds=np.inf):
    """A planner whose grid of times is as good as none."""
    planner = LookaheadPlanner(
        plant, trace, seconds, cell_s=2e-5, clock_step_mhz=STEP_MHZ, window_s=5.0, slots=64
    )
    planner.margin = np.inf
    return planner


@settings(max_examples=20, deadline=None)
@given(TINY, st.sampled_from([0.1, 0.25, 0.6]), st.booleans(), st.sampled_from([1, 2, 256]))
def test_knowing_everything_it_is_the_optimum(rows, bound_s, drain, max_seqs):
    plant = plant_of(
        "prefill",
        bound_s,
        drain=drain,
        max_seqs=max_seqs,
        actuation_delay_s=0.0,
        violation_weight=WEIGHTS.price,
    )
    trace = made(rows)
    _, done = run_lookahead(fine(plant, trace), WEIGHTS)
    assert done.cost == pytest.approx(brute_force(plant, trace, PLAN_MHZ, WEIGHTS.price), rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(TINY, st.sampled_from([0.1, 0.25, 0.6]), st.sampled_from([0.02, 0.08]))
def test_no_horizon_costs_less_than_brute_force_at_a_delay(rows, bound_s, delay_s):
    plant = plant_of(
        "prefill", bound_s, drain=True, actuation_delay_s=delay_s, violation_weight=WEIGHTS.price
    )
    trace = made(rows)
    best = brute_force(plant, trace, PLAN_MHZ, WEIGHTS.price)
    for seconds in (0.0, 0.5, np.inf):
        _, done = run_lookahead(fine(plant, trace, seconds), WEIGHTS)
        assert done.cost >= best - 1e-9


@pytest.mark.slow
def test_at_a_delay_it_comes_near_the_optimum():
    """Its plans forget what is left of a delay: the loss is small where batches outlast it."""
    rng = np.random.default_rng(3)
    ratios = []
    for _ in range(12):
        rows = list(zip(rng.choice([0.05, 0.2, 0.5], 5), rng.integers(600, 4000, 5), strict=True))
        plant = plant_of(
            "prefill", 0.6, drain=True, actuation_delay_s=0.05, violation_weight=WEIGHTS.price
        )
        trace = made(rows)
        _, done = run_lookahead(fine(plant, trace), WEIGHTS)
        ratios.append(done.cost / brute_force(plant, trace, PLAN_MHZ, WEIGHTS.price))
    assert min(ratios) >= 1.0 - 1e-9
    assert np.mean(ratios) < 1.02


@pytest.mark.parametrize("seconds", [0.0, 0.5, 2.0])
def test_nothing_beyond_the_horizon_counts(seconds):
    plant = plant_of("prefill")
    trace = generate("azure-conv-like", 2.0, 60.0, seed=4)
    known = int(np.searchsorted(trace.arrival_s, 30.0))
    prompts = trace.prompt_tokens.copy()
    prompts[known:] = 4000
    other = replace(trace, prompt_tokens=prompts)
    plans = [
        run_lookahead(LookaheadPlanner(plant, t, seconds), PlanWeights(10.0, 0.3))[0]
        for t in (trace, other)
    ]
    batches = int((trace.arrival_s < 25.0).sum()) // 2  # a batch holds two requests at most here
    first = [plan[: batches // 2] for plan in plans]
    assert len(first[0]) > 5
    np.testing.assert_array_equal(*first)
    assert len(plans[0]) != len(plans[1]) or (plans[0] != plans[1]).any()


def test_a_reserve_makes_it_faster_than_the_bound_demands():
    """One request, nothing else known: the lowest clock within the bound, or within the reserve."""
    model = plant_of("prefill").model
    slow, fast = (float(model.latency_s(2000, 2e6, 0, 1, f)) for f in (1485.0, 1980.0))
    bound_s = 1.05 * slow
    plant = plant_of("prefill", bound_s, drain=True, actuation_delay_s=0.0)
    trace = trace_of([0.1], [2000], tail_s=0.1)
    reserve = 1.0 - 0.5 * (slow + fast) / bound_s
    for chosen, weights in ((1485.0, WEIGHTS), (1980.0, PlanWeights(50.0, reserve))):
        plan, done = run_lookahead(fine(plant, trace), replace(weights, price=50.0))
        assert plan == pytest.approx([chosen])
        assert done.violations == 0


@pytest.fixture(scope="module")
def generated():
    """A plant with delay and a minute and a half of generated load."""
    return plant_of("prefill", drain=True), generate("azure-conv-like", 2.2, 90.0, seed=1)


def test_its_plan_repeats_itself_in_a_comparison(generated):
    plant, trace = generated
    policy = build_policy("lookahead:seconds=1", plant, [trace], -1)
    assert isinstance(policy, Hindsight)
    (run,) = rollout(policy, policy.plant, [trace], -1)
    assert run.totals["energy_j"] == pytest.approx(policy.report["replay_j"], rel=1e-12)


def test_names():
    plant = plant_of("prefill")
    with pytest.raises(BiscaleError, match="seconds"):
        build_policy("lookahead:seconds=-1", plant, [], -1)
    with pytest.raises(BiscaleError, match="no parameter 'second'"):
        build_policy("lookahead:second=1", plant, [], -1)
    with pytest.raises(BiscaleError, match="whole workload"):
        resolve_policy("lookahead:seconds=1", plant)
    with pytest.raises(BiscaleError, match="prefill plant"):
        LookaheadPlanner(plant_of("decode"), trace_of([0.1], [5]), 1.0)
    assert is_bound("lookahead:seconds=0.5")
    assert not is_bound("mpc")


def test_foresight_helps_and_nothing_beats_the_bound():
    weights = PlanWeights(4.0, 0.0)
    plant = plant_of("prefill", drain=True, violation_weight=weights.price)
    trace = generate("azure-conv-like", 2.2, 40.0, seed=1)
    blind, half, far = (
        run_lookahead(LookaheadPlanner(plant, trace, seconds), weights)[1]
        for seconds in (0.0, 0.5, 4.0)
    )
    assert far.cost <= 1.01 * half.cost
    assert half.cost <= 1.01 * blind.cost
    oracle = solve_prefill_oracle(plant, trace)
    assert oracle.lower_bound_any_delay <= min(blind.cost, half.cost, far.cost) + 1e-9
    assert far.cost <= 1.15 * oracle.upper_bound
