"""The decode bound is a bound, the search finds what the simulator repeats."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_helpers import brute_force, plant_of, run_policy, trace_of

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import RequestTable
from biscale_env.traces import generate
from controllers.base import context_of
from controllers.oracle import decode_cuts
from controllers.oracle.decode_bound import (
    DecodeFluid,
    coverage,
    deadline_curve,
    solve_decode_bound,
)
from controllers.oracle.decode_cuts import Iterations
from controllers.oracle.decode_search import DecodeRunner, search_decode_plan
from controllers.oracle.make import make_oracle
from controllers.oracle.plan_replay import OraclePolicy, oracle_plant, replay
from controllers.registry import make_policy

LEVELS_MHZ = (510.0, 1110.0, 1980.0)


@pytest.fixture(scope="module")
def workload():
    return generate("azure-conv-like", rate_rps=8.0, duration_s=60.0, seed=3)


def tiny_traces():
    """A few short answers, so that the tree of clock sequences stays small."""
    return (
        st.integers(1, 4)
        .flatmap(
            lambda n: st.builds(
                trace_of,
                st.lists(st.sampled_from([0.0, 0.01, 0.4]), min_size=n, max_size=n),
                st.lists(st.integers(1, 4000), min_size=n, max_size=n),
                st.lists(st.integers(2, 3), min_size=n, max_size=n),
                tail_s=st.sampled_from([0.0, 0.2]),
            )
        )
        .filter(lambda t: t.duration_s > 0)
    )


FEW_CUTS = {"N_SIZES": 3, "N_CLOCKS": 2, "CONTEXTS": (1.0,)}  # as valid as more, and quicker


@settings(max_examples=15, deadline=None)
@given(
    tiny_traces(),
    st.sampled_from([0.018, 0.03, 0.1]),
    st.sampled_from([0.0, 0.01, 0.05]),
    st.sampled_from([0.0, 0.05, 2.0]),
    st.booleans(),
    st.sampled_from([0.05, 10.0]),
    st.sampled_from(
        [{}, {"idle": "parked"}, {"idle": "parked", "parked_power_w": 10.0, "parked_ramp_s": 0.01}]
    ),
)
def test_no_sequence_of_clocks_beats_the_bound(
    trace, tpot_s, delay_s, price, drain, window_s, rule
):
    plant = plant_of("decode", tpot_s, actuation_delay_s=delay_s, drain=drain, max_seqs=2, **rule)
    best = brute_force(plant, trace, LEVELS_MHZ, price)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FEW_CUTS.items():
            patch.setattr(decode_cuts, name, value)
        bound = DecodeFluid(plant, trace, window_s=window_s).cost(price)
    assert 0.0 <= bound <= best + 1e-9


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("idle", ["last-clock", "parked"])
def test_nobody_beats_the_bound(idle, seed, delay_s):
    rate_rps = 4.0 + 8.0 * seed if idle == "last-clock" else 0.5 + seed
    trace = generate("azure-conv-like", rate_rps=rate_rps, duration_s=40.0, seed=seed)
    plant = plant_of("decode", actuation_delay_s=delay_s, drain=True, idle=idle)
    bound, fluid = solve_decode_bound(plant, trace), DecodeFluid(plant, trace)
    for name in ("max", "random", "static:510", "static:810", "static:1200", "slack"):
        cost, violations = run_policy(plant, trace, make_policy(name, context_of(plant)))
        assert bound.cost <= cost, name
        energy_j = (
            cost - plant.settings.violation_weight * violations
        ) * plant.energy_ref_j + fluid.before_j
        assert fluid.energy_j(violations) <= energy_j, name


@pytest.mark.slow
def test_the_bound_holds_with_preemptions():
    plant = plant_of("decode", drain=True, kv_watermark=0.0, actuation_delay_s=0.0)
    rng = np.random.default_rng(0)
    trace = trace_of(np.full(300, 0.02), rng.integers(1000, 3000, 300), rng.integers(300, 900, 300))
    bound = solve_decode_bound(plant, trace)
    for freq_mhz in LEVELS_MHZ:
        assert bound.energy_j <= replay(plant, trace, np.array([freq_mhz])).energy_j


def test_cuts_hold_for_iterations_that_they_were_not_made_of(workload):
    plant = plant_of("decode")
    fluid = DecodeFluid(plant, workload)
    rows = Iterations(plant, fluid.pool, -1)
    rng = np.random.default_rng(1)
    for _ in range(300):
        n = int(rng.integers(1, rows.n.max() + 1))
        low, high = (
            n * (fluid.pool.prompt.min() + 1),
            min(n * (fluid.pool.prompt + fluid.pool.output).max(), rows.capacity),
        )
        cached, freq_mhz = rng.uniform(low, high), rng.choice(plant.clocks.grid_mhz)
        recompute = rng.choice([0, 0, rng.integers(1, 50_000)])
        work = (n + recompute, 0.5 * recompute**2 * rng.uniform(), cached, n, freq_mhz)
        duration = float(plant.model.latency_s(*work))
        above = float(plant.model.energy_j(*work)) - rows.floor_w * duration
        assert (fluid.cuts @ np.array([duration, n, cached]) <= above * (1 + 1e-6)).all()


def test_bound_is_near_a_run_that_has_no_choice():
    """One clock, one batch size, no gaps: the fluid loses little."""
    plant = plant_of("decode", 1.0, drain=True)
    trace = trace_of(np.zeros(64), np.full(64, 1000), np.full(64, 2000))
    bound = solve_decode_bound(plant, trace, window_s=100.0)
    best = min(replay(plant, trace, np.array([f])).energy_j for f in plant.clocks.grid_mhz[::9])
    assert 0.9 * best < bound.energy_j <= best


def test_more_misses_never_raise_the_bound(workload):
    fluid = DecodeFluid(plant_of("decode", 0.02, drain=True), workload)
    energies = [fluid.energy_j(m) for m in (0, 5, 50, len(fluid.pool.prompt))]
    assert (np.diff(energies) <= 1.0).all()


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0.01, 5)), min_size=1, max_size=8))
def test_coverage_is_the_union_of_the_intervals(intervals):
    begin = np.cumsum([gap for gap, _ in intervals])
    length = np.array([x for _, x in intervals])
    borders = np.array([1.0, 2.5, 7.0, 100.0])
    times = np.arange(0.0, 100.0, 1e-3) + 5e-4
    inside = ((times[:, None] >= begin) & (times[:, None] <= begin + length)).any(axis=1)
    expected = np.diff([0.0, *[inside[times < b].sum() * 1e-3 for b in borders]])
    assert coverage(begin, length, borders) == pytest.approx(expected, abs=0.02)


def test_deadline_curve_spares_the_largest():
    plant = plant_of("decode")
    pool = RequestTable.of(plant, [trace_of([0.0, 1.0, 1.0], [10, 20, 30], [11, 101, 21])])
    least = deadline_curve(pool, np.array([1.0, 5.0, 100.0]), 0.1, 1)
    assert least[0].tolist() == [
        0.0,
        10.0,
        30.0,
    ]  # due at 1, 11 and 4 s; one of those due may be missed, the largest


def test_the_plan_is_what_the_environment_does(workload):
    plant = plant_of("decode", actuation_delay_s=0.2, drain=True)
    plan = search_decode_plan(plant, workload, max_runs=150)
    done = replay(plant, workload, plan.clocks_mhz)
    assert done.energy_j == pytest.approx(plan.energy_j, rel=1e-12)
    assert done.violations == plan.violations
    assert done.attainment == plan.attainment
    assert done.decisions == len(plan.clocks_mhz)
    cost, violations = run_policy(
        oracle_plant(plant), workload, OraclePolicy(plant.clocks, plan.clocks_mhz)
    )
    assert (cost, violations) == (pytest.approx(done.cost), done.violations)


def test_the_search_is_at_least_as_good_as_every_static_clock(workload):
    plant = plant_of("decode", 0.03, drain=True)
    plan = search_decode_plan(plant, workload, max_runs=250)
    statics = [replay(plant, workload, np.array([f])).cost for f in plant.clocks.grid_mhz[::5]]
    before = replay(plant, workload, plan.clocks_mhz)
    assert before.cost <= min(statics) + 1e-9
    assert plan.runs <= 250 + 3
    assert plan.seconds > 0


@pytest.mark.parametrize("attainment", [0.9, 0.99])
def test_attainment_is_met(workload, attainment):
    plant = plant_of("decode", 0.025, drain=True)
    plan = search_decode_plan(plant, workload, attainment, max_runs=250)
    assert plan.feasible
    assert plan.attainment >= attainment
    assert plan.energy_j <= plan.static_j
    assert solve_decode_bound(plant, workload, attainment).energy_j <= plan.energy_j


def test_the_search_repeats(workload):
    plant = plant_of("decode", 0.03, drain=True)
    first, second = (search_decode_plan(plant, workload, max_runs=200) for _ in range(2))
    assert np.array_equal(first.clocks_mhz, second.clocks_mhz)


def test_windows_add_up(workload):
    runner = DecodeRunner(plant_of("decode", 0.025, drain=True), workload)
    run, decisions = runner.run(np.linspace(600.0, 1800.0, 7), 10.0)
    before = float(runner.batch.states["energy_j"][0]) - run.window_j.sum()
    assert before == pytest.approx(0.0, abs=200.0 * runner.batch.pool.arrival_s[0] * 4)
    assert run.window_missed.sum() == run.violations
    assert decisions == runner.batch.states["iterations"][0]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("target", [None, 0.95])
def test_make_oracle(workload, phase, target):
    plant = plant_of(phase, 0.8 if phase == "prefill" else 0.03, drain=True)
    trace = (
        generate("azure-conv-like", rate_rps=1.5, duration_s=60.0, seed=2)
        if phase == "prefill"
        else workload
    )
    policy, info = make_oracle(plant, trace, target)
    assert all(isinstance(x, float) for x in info.values())
    assert info["lower_bound_any_delay_j"] <= info["lower_bound_j"] <= info["replay_j"]
    assert info["gap"] == pytest.approx(info["replay_j"] / info["lower_bound_j"] - 1.0)
    done = replay(plant, trace, policy.plan_mhz)
    assert (done.energy_j, done.attainment) == (pytest.approx(info["replay_j"]), info["attainment"])
    assert target is None or info["attainment"] >= target
    assert info["feasible"] == 1.0


def test_a_prefill_plant_is_refused(workload):
    plant = plant_of("prefill")
    with pytest.raises(BiscaleError, match="decode plant"):
        solve_decode_bound(plant, workload)
    with pytest.raises(BiscaleError, match="decode plant"):
        search_decode_plan(plant, workload)
