"""The prefill oracle: equal to brute force where that can be done, a bound elsewhere."""

import time

import numpy as np
import pytest
from block_helpers import contents_of, with_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_helpers import brute_force, every_outcome, plant_of, run_policy, trace_of

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.rollouts.rollout import rollout
from biscale_env.traces import generate
from controllers.base import context_of
from controllers.oracle import prefill_problem
from controllers.oracle import prefill_records as records
from controllers.oracle.plan_replay import OraclePolicy, oracle_plant, replay
from controllers.oracle.prefill_optimum import _Search, solve_prefill_oracle
from controllers.oracle.prefill_problem import PrefillProblem
from controllers.registry import make_policy, policy_names

PLAN_MHZ = (990.0, 1485.0, 1980.0)  # every 495 MHz below the highest clock
STEP_MHZ = 495.0
STATIC = ("static:1110", "static:1215", "static:1395", "static:1605")
GAPS_S = st.sampled_from([0.0, 0.003, 0.07, 0.2, 0.5, 3.0])


def traces(most):
    """Traces of up to ``most`` requests."""
    return (
        st.integers(1, most)
        .flatmap(
            lambda n: st.builds(
                trace_of,
                st.lists(GAPS_S, min_size=n, max_size=n),
                st.lists(st.integers(1, 3000), min_size=n, max_size=n),
                tail_s=st.sampled_from([0.0, 0.1, 1.0]),
            )
        )
        .filter(lambda t: t.duration_s > 0)
    )


def sharing(most):
    """Traces of up to ``most`` requests that share blocks of 400 tokens."""
    return traces(most).flatmap(
        lambda t: st.builds(with_blocks, st.just(t), contents_of(len(t)), st.just(400))
    )


# ramps that end within any batch, within most, and after several; parked above and below idle power
IDLE_RULES = st.sampled_from(
    [
        {},
        {"idle": "parked"},
        {"idle": "parked", "parked_ramp_s": 0.0, "parked_power_w": 85.0},
        {"idle": "parked", "parked_ramp_s": 0.03, "parked_power_w": 300.0},
        {"idle": "parked", "parked_ramp_s": 0.5},
    ]
)


def plants(delays_s=(0.0,)):
    """Prefill plants with tight and wide SLOs, limits that bind, and every idle rule."""
    return st.builds(
        lambda bound_s, rule, **settings: plant_of("prefill", bound_s, **rule, **settings),
        st.sampled_from([0.1, 0.25, 0.6]),
        IDLE_RULES,
        drain=st.booleans(),
        token_budget=st.sampled_from([1024, 2048]),
        max_seqs=st.sampled_from([1, 2, 256]),
        actuation_delay_s=st.sampled_from(delays_s),
    )


PRICES = st.sampled_from([0.0, 0.3, 5.0, 30.0])


def solve(plant, trace, mode, price, cell_s, margin=np.inf):
    problem = PrefillProblem(plant, trace, clock_step_mhz=STEP_MHZ, slots=64, window_cells=1 << 18)
    run, plan = problem.run(mode, price, cell_s, margin)
    assert run["status"] == records.OK
    assert run["late"] == 0
    return float(run["best_cost"]), plan


@settings(max_examples=30, deadline=None)
@given(plants(), st.one_of(traces(4), sharing(4)), PRICES)
def test_programme_equals_brute_force(plant, trace, price):
    best = brute_force(plant, trace, PLAN_MHZ, price)
    cost, _ = solve(plant, trace, records.EXACT, price, 2e-5)
    assert cost == pytest.approx(best, rel=1e-9)
    bound, _ = solve(plant, trace, records.CELLS, price, 1e-3)
    assert bound <= best + 1e-9


@settings(max_examples=30, deadline=None)
@given(plants((0.0, 0.02, 0.08, 0.3)), st.one_of(traces(3), sharing(3)), PRICES)
def test_no_delay_beats_the_bound_for_any_delay(plant, trace, price):
    best = brute_force(plant, trace, (510.0, 1110.0, 1980.0), price)
    bound, _ = solve(plant, trace, records.CELLS_ANY_DELAY, price, 1e-3)
    assert bound <= best + 1e-9


@settings(max_examples=30, deadline=None)
@given(
    plants((0.0, 0.02, 0.08, 0.3)),
    st.one_of(traces(3), sharing(3)),
    st.sampled_from([0.0, 0.5, 0.7, 1.0]),
)
def test_no_delay_uses_less_energy_than_the_bound_at_an_attainment(plant, trace, attainment):
    """The lower bound of the README.

    Every sequence of clocks that misses no more requests than allowed, in the delayed plant.
    """
    oracle = solve_prefill_oracle(plant, trace, attainment, clock_step_mhz=STEP_MHZ)
    before_j = PrefillProblem(plant, trace).energy_before_j
    outcomes = every_outcome(plant, trace, (510.0, 1110.0, 1980.0))
    allowed = [
        energy_j for missed, energy_j in outcomes.items() if missed <= oracle.violations_allowed
    ]
    assert oracle.energy_bound_any_delay_j <= min(allowed, default=np.inf) + before_j + 1e-6


def test_delay_can_help():
    """Why the second bound is needed: a clock that lands in an idle period saves idle power.

    The first prompt meets the SLO at the highest clock only; without delay the instance then idles
    at that clock.
    """
    model = plant_of("prefill").model
    n = 2000
    at_max, at_next = (float(model.latency_s(n, n * n / 2, 0, 1, f)) for f in (1980.0, 1485.0))
    trace = trace_of([0.0, 20.0], [n, 1], tail_s=0.1)
    best = {}
    for delay_s in (0.0, at_max + 1e-3):
        plant = plant_of("prefill", 0.5 * (at_max + at_next), actuation_delay_s=delay_s, drain=True)
        best[delay_s] = brute_force(plant, trace, PLAN_MHZ, 30.0)
    at_once, delayed = best.values()
    assert delayed < at_once
    assert solve(plant, trace, records.CELLS_ANY_DELAY, 30.0, 1e-3)[0] <= delayed
    oracle = solve_prefill_oracle(plant, trace, 1.0)
    least_j = (
        every_outcome(plant, trace, PLAN_MHZ)[0] + PrefillProblem(plant, trace).energy_before_j
    )
    assert oracle.violations_allowed == 0
    assert oracle.energy_bound_any_delay_j <= least_j < oracle.energy_bound_j


@settings(max_examples=25, deadline=None)
@given(plants(), traces(8), PRICES)
def test_bounds_are_ordered_and_the_replay_is_the_programmes(plant, trace, price):
    cost, plan = solve(plant, trace, records.EXACT, price, 1e-3)
    lower, _ = solve(plant, trace, records.CELLS, price, 1e-3)
    lower_any, _ = solve(plant, trace, records.CELLS_ANY_DELAY, price, 1e-3)
    assert lower_any <= lower + 1e-9
    assert lower <= cost + 1e-9
    done = replay(plant, trace, plan)
    weight = plant.settings.violation_weight
    assert done.cost + (price - weight) * done.violations == pytest.approx(cost, rel=1e-9)
    assert done.decisions == len(plan)


@settings(max_examples=25, deadline=None)
@given(plants(), traces(8), PRICES)
def test_pruning_a_plan_never_undercuts_the_one_without(plant, trace, price):
    """A pruned plan is still a plan.

    It may be dearer than the one without pruning, never cheaper, and never below the bound.
    """
    narrow, wide = (
        solve(plant, trace, records.EXACT, price, 1e-3, margin)[0] for margin in (0.5, np.inf)
    )
    assert narrow >= wide - 1e-9
    assert solve(plant, trace, records.CELLS, price, 1e-3, np.inf)[0] <= wide + 1e-9


# (drain, token budget, requests per batch, SLO in s, price, gaps, prompts): found by a search at
# random
SLACK_OF_BEING_LATE = (
    (True, 2048, 256, 0.25, 5.0, [0.0, 0.003, 0.5, 0.003, 0.07, 0.07],
     [1323, 1551, 793, 2345, 493, 897], 1.0),
    (False, 1024, 256, 0.1, 1.0, [0.5, 0.07, 0.0, 0.003, 0.07], [940, 2339, 1007, 1969, 473], 1.0),
)  # fmt: skip


@pytest.mark.parametrize("case", SLACK_OF_BEING_LATE)
def test_bounds_keep_labels_that_pruning_would_drop(case):
    """Two workloads on which being later helps: a pruned "bound" lies above the true one there."""
    drain, budget, most, slo_s, price, gaps_s, prompts, tail_s = case
    plant = plant_of("prefill", slo_s, drain=drain, token_budget=budget, max_seqs=most)
    trace = trace_of(gaps_s, prompts, tail_s=tail_s)
    search = _Search(PrefillProblem(plant, trace), 1e-3, 0.5)
    for mode in (records.CELLS, records.CELLS_ANY_DELAY):
        kept, pruned = (
            solve(plant, trace, mode, price, 1e-3, margin)[0] for margin in (np.inf, 0.5)
        )
        assert kept < pruned - 1e-3
        assert search.bound(mode, price) == pytest.approx(kept, rel=1e-12)
    assert not search.pruned


def test_a_bound_widens_its_windows_and_says_when_it_had_to_prune_or_found_none(monkeypatch):
    trace = generate("azure-conv-like", rate_rps=4.0, duration_s=30.0, seed=0)
    plant = plant_of("prefill", drain=True)

    def bound(**limits):
        search = _Search(
            PrefillProblem(plant, trace, window_cells=limits.pop("window_cells", 4096)), 1e-3, 1.0
        )
        for name, value in limits.items():
            monkeypatch.setattr(prefill_problem, name, value)
        return search.bound(records.CELLS, 1.0), search

    proven, search = bound()
    assert not search.pruned
    narrow, search = bound(window_cells=16)
    assert narrow == pytest.approx(proven, rel=1e-12)
    assert search.programmes > 1
    checked, search = bound(MOST_EXPANDED=10)
    assert search.pruned
    assert checked >= proven - 1e-9
    none, search = bound(window_cells=16, MOST_WINDOW_CELLS=16)
    assert np.isnan(none)
    assert search.dropped > 0


def test_no_programme_is_solved_twice_and_what_had_no_room_is_not_tried_again(monkeypatch):
    """With room for few labels cells are widened: the plan keeps the attainment all the same."""
    trace = generate("azure-conv-like", rate_rps=4.0, duration_s=30.0, seed=0)
    plant, runs = plant_of("prefill", drain=True), []
    roomy = solve_prefill_oracle(plant, trace, 0.97)
    solved = PrefillProblem.run

    def run(self, mode, price, cell_s, margin, stride=1):
        found = solved(self, mode, price, cell_s, margin, stride)
        if mode == records.EXACT:
            runs.append((price, cell_s, stride, int(found[0]["status"])))
        return found

    monkeypatch.setattr(PrefillProblem, "run", run)
    monkeypatch.setattr(prefill_problem, "MAX_LABELS", 3000)
    cramped = solve_prefill_oracle(plant, trace, 0.97)
    assert len(runs) == len(set(runs))
    failed = [one for one in runs if one[3] != records.OK]
    assert failed
    for k, (price, cell_s, stride, _) in enumerate(runs):
        before = [f for f in failed if runs.index(f) < k]
        assert not any(s == stride and c >= cell_s and price <= p for p, c, s, _ in before)
    assert cramped.replay.attainment >= 0.97
    assert cramped.energy_bound_j <= roomy.replay.energy_j <= cramped.replay.energy_j * 1.001


@pytest.fixture(scope="module")
def workload():
    return generate("azure-conv-like", rate_rps=2.0, duration_s=120.0, seed=5)


@pytest.mark.slow
def test_finer_cells_close_the_gap(workload):
    plant = plant_of("prefill", drain=True)
    gaps = [solve_prefill_oracle(plant, workload, cell_s=cell_s).gap for cell_s in (4e-3, 2.5e-4)]
    assert 0.0 <= gaps[1] < gaps[0]
    assert gaps[1] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("attainment", [0.9, 0.97, 1.0])
def test_attainment_is_met_at_less_energy_than_any_static_clock_that_meets_it(workload, attainment):
    plant = plant_of("prefill", 1.2, drain=True, actuation_delay_s=0.0)
    oracle = solve_prefill_oracle(plant, workload, attainment)
    assert oracle.feasible
    assert oracle.replay.attainment >= attainment
    assert oracle.replay.violations <= oracle.violations_allowed
    assert oracle.energy_bound_any_delay_j <= oracle.energy_bound_j <= oracle.replay.energy_j
    energies = []
    for freq_mhz in plant.clocks.grid_mhz[::7]:
        static = replay(plant, workload, np.array([freq_mhz]))
        if static.attainment >= attainment:
            energies.append(static.energy_j)
    assert energies
    assert oracle.replay.energy_j <= min(energies) * (1.0 + 1e-3)
    assert oracle.energy_bound_j <= min(energies)


@pytest.mark.slow
def test_more_attainment_costs_more_energy(workload):
    plant = plant_of("prefill", 0.6, drain=True)
    loose, tight = (solve_prefill_oracle(plant, workload, a) for a in (0.5, 0.9))
    assert loose.replay.energy_j <= tight.replay.energy_j
    assert loose.price <= tight.price


def test_an_impossible_attainment_is_named():
    plant = plant_of("prefill", 0.05, drain=True)
    trace = trace_of([0.0, 1.0, 1.0, 1.0], [4000, 16, 4000, 16])
    oracle = solve_prefill_oracle(plant, trace, 1.0)
    assert not oracle.feasible
    assert oracle.violations_allowed == oracle.replay.violations == 2


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("idle", ["last-clock", "parked"])
def test_nobody_beats_the_oracle(idle, seed, delay_s):
    trace = generate("azure-conv-like", rate_rps=1.5 + seed, duration_s=60.0, seed=seed)
    plant = plant_of("prefill", actuation_delay_s=delay_s, drain=seed % 2 == 0, idle=idle)
    oracle = solve_prefill_oracle(plant, trace)
    assert oracle.lower_bound_any_delay <= oracle.lower_bound <= oracle.upper_bound
    names = [
        n
        for n in policy_names("prefill")
        if n in ("max", "random", "mpc", "mpc-plus", "ecofreq", "throttllem", "dynamollm", "agft")
    ]
    names += ["static:810", "static:1110", "static:1395", "static:1605"]
    for name in names:
        cost, _ = run_policy(plant, trace, make_policy(name, context_of(plant)))
        assert oracle.lower_bound_any_delay <= cost + 1e-9, name
        if delay_s == 0.0:
            assert oracle.upper_bound <= cost + 1e-9, name


@pytest.mark.slow
@pytest.mark.parametrize("attainment", [0.8, 0.95])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_delayed_controller_that_attains_the_target_uses_less_than_the_bound(seed, attainment):
    """`energy_bound_any_delay_j`, which the README prints as the lower bound, workload by workload
    at 50 ms.
    """
    trace = generate("azure-conv-like", rate_rps=1.0 + 0.75 * seed, duration_s=60.0, seed=seed)
    plant = plant_of("prefill", 0.6, actuation_delay_s=0.05, drain=True)
    oracle = solve_prefill_oracle(plant, trace, attainment)
    spent_j = {}
    for name in (
        "max",
        "mpc",
        "mpc-plus",
        "mpc-plus:margin=0.2",
        "ecofreq",
        "throttllem",
        "greenllm",
        *STATIC,
    ):
        (run,) = rollout(make_policy(name, context_of(plant)), plant, [trace], time_probe=False)
        if 1.0 - run.totals["n_violations"] / len(trace) >= attainment:
            spent_j[name] = run.totals["energy_j"]
            assert oracle.energy_bound_any_delay_j <= run.totals["energy_j"], name
    assert len(spent_j) > 3
    assert oracle.energy_bound_any_delay_j > 0.8 * min(
        spent_j.values()
    )  # a bound of nothing would pass the rest


def test_what_a_parked_instance_saves_by_its_clock_is_less():
    """With idle power the same for all, a low clock is worth its batches alone."""
    trace = generate("azure-conv-like", rate_rps=1.0, duration_s=120.0, seed=1)
    ratio = {}
    for idle in ("last-clock", "parked"):
        plant = plant_of("prefill", drain=True, actuation_delay_s=0.0, idle=idle)
        top = replay(plant, trace, np.array([1980.0]))
        best = solve_prefill_oracle(plant, trace, top.attainment)
        assert best.replay.energy_j < top.energy_j
        ratio[idle] = best.replay.energy_j / top.energy_j
    assert ratio["last-clock"] + 0.05 < ratio["parked"] < 1.0


def test_the_policy_repeats_the_plan(workload):
    plant = plant_of("prefill", actuation_delay_s=0.1)
    oracle = solve_prefill_oracle(plant, workload)
    cost, violations = run_policy(oracle_plant(plant), workload, oracle.policy(plant))
    assert cost == pytest.approx(oracle.replay.cost, rel=1e-12)
    assert violations == oracle.replay.violations
    assert cost == pytest.approx(oracle.upper_bound, rel=1e-9)


def test_policy_counts_rows_apart():
    plant = plant_of("prefill")
    policy = OraclePolicy(plant.clocks, np.array([510.0, 1980.0]))
    observation = np.zeros((2, plant.spec.dim), dtype=np.float32)
    first, state = policy.predict(observation, None, np.array([True, True]))
    second, _ = policy.predict(observation, state, np.array([False, True]))
    assert first.shape == (2, 1)
    assert np.array_equal(first[:, 0], [-1.0, -1.0])
    assert np.array_equal(second[:, 0], [1.0, -1.0])
    single, _ = policy.predict(observation[0])
    assert single.shape == (1,)


def test_a_decode_plant_is_refused(workload):
    with pytest.raises(BiscaleError, match="prefill plant"):
        solve_prefill_oracle(plant_of("decode"), workload)


@pytest.mark.slow
def test_the_azure_hour_takes_less_than_a_minute(shared_data):
    from biscale_env.envs.loads.capacity import find_capacity
    from biscale_env.traces import read_trace

    plant = plant_of("prefill", drain=True)
    trace = read_trace(shared_data / "traces" / "AzureLLMInferenceTrace_conv_2023.csv")
    part = trace.scaled_to(0.75 * find_capacity(plant, trace).rate_rps, 0)
    solve_prefill_oracle(plant, part.window(0.0, 60.0))  # compiles
    begin = time.process_time()
    oracle = solve_prefill_oracle(plant, part, plant.slo.attainment)
    assert time.process_time() - begin < 60.0
    assert oracle.feasible
    assert oracle.gap < 0.01
    assert oracle.dropped == 0
    assert not oracle.bound_pruned
