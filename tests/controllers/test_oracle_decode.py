"""The decode bound is a bound, the search finds what the simulator repeats."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_helpers import ROW, brute_force, plant_of, run_policy, trace_of
from slow_values import slow

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.evaluation.rollouts.rollout import rollout
from biscale_env.models.physics import iteration_energy_j, latency_s
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
from controllers.oracle.decode_plans import DecodeRunner, WindowPlan
from controllers.oracle.decode_search import search_decode_plan
from controllers.oracle.make import make_oracle
from controllers.oracle.plan_replay import OraclePolicy, oracle_plant, replay
from controllers.registry import make_policy

LEVELS_MHZ = (510.0, 1110.0, 1980.0)
CASES = [(8.0, 0.03, "last-clock"), (15.0, 0.04, "last-clock"), (1.0, 0.025, "parked")]


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


# all layers see everything; half of the layers see a window, and few experts are read; experts
LLMS = [{}, {"llm": "gpt-oss-20b", "tp": 1}, {"llm": "qwen3-30b-a3b", "tp": 1}]
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
    st.sampled_from(LLMS),
)
def test_no_sequence_of_clocks_beats_the_bound(
    trace, tpot_s, delay_s, price, drain, window_s, rule, llm
):
    given = {"actuation_delay_s": delay_s, "drain": drain, "max_seqs": 2, **rule, **llm}
    plant = plant_of("decode", tpot_s, **given)
    best = brute_force(plant, trace, LEVELS_MHZ, price)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FEW_CUTS.items():
            patch.setattr(decode_cuts, name, value)
        bound = DecodeFluid(plant, trace, window_s=window_s).cost(price)
    assert 0.0 <= bound <= best + 1e-9


@pytest.mark.parametrize("delay_s", [slow(0.0), 0.05, slow(0.3)])
@pytest.mark.parametrize("seed", [0, slow(1)])
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


@pytest.mark.slow
@pytest.mark.parametrize("llm", LLMS, ids=lambda given: given.get("llm", "default"))
def test_cuts_hold_for_iterations_that_they_were_not_made_of(workload, llm):
    plant = plant_of("decode", **llm)
    fluid = DecodeFluid(plant, workload)
    assert (fluid.cuts[:, 2] >= 0.0).all(), "the ends of the cache suffice because of it"
    rows = Iterations(plant, fluid.pool, -1)
    rng = np.random.default_rng(1)
    for _ in range(300):
        n = int(rng.integers(1, rows.n.max() + 1))
        low, high = (
            n * (fluid.pool.prompt.min() + 1),
            min(n * (fluid.pool.prompt + fluid.pool.output).max(), rows.capacity),
        )
        cached, freq_mhz = rng.uniform(low, high), rng.choice(plant.clocks.grid_mhz)
        recompute = 0 if rows.always_fit else rng.choice([0, 0, rng.integers(1, 50_000)])
        pairs = 0.5 * recompute * min(recompute, rows.longest) * rng.uniform()
        work = (n + recompute, pairs, cached, n, freq_mhz)
        duration = float(plant.model.latency_s(*work))
        above = float(plant.model.energy_j(*work)) - rows.floor_w * duration
        assert (fluid.cuts @ np.array([duration, n, cached]) <= above * (1 + 1e-6)).all()


@pytest.mark.slow
@pytest.mark.parametrize("llm", LLMS[1:], ids=lambda given: given["llm"])
def test_the_bound_of_recomputing_iterations_lies_below_them(llm):
    """Few experts read, windows, operations that are cheaper in small batches: any cut with mu.

    The function behind the corners is checked as a whole: whatever mu, the least of the rows of a
    batch size, a clock and a filling is below every iteration that recomputes.
    """
    plant = plant_of("decode", **llm)
    crowd = trace_of(np.zeros(600), np.tile([100, 20_000], 300), np.full(600, 1000))
    rows = Iterations(plant, RequestTable.of(plant, [crowd]), -1)
    assert not rows.always_fit
    few = trace_of(np.zeros(4), np.full(4, 100))
    assert Iterations(plant, RequestTable.of(plant, [few]), -1).always_fit
    rng = np.random.default_rng(2)
    mus = np.array([0.0, 100.0, 300.0, 600.0, 1000.0, 3000.0])
    for _ in range(300):
        freq_ghz = rng.choice(rows.clocks_ghz)
        n = rng.choice([1.0, 2.0, 5.0, 20.0, 100.0])
        at = (rows.n == n) & (rows.freq == freq_ghz)
        cached = rng.choice(rows.cached[at])
        at &= rows.cached == cached
        recompute = rng.uniform(0.0, 1.0) ** 4 * rows.capacity
        attn = 0.5 * recompute * min(recompute, rows.longest) * rng.choice([0.0, 1e-3, 0.1, 1.0])
        work = (n + recompute, attn, cached, n, freq_ghz)
        duration = latency_s(rows.c, *work)
        joules = rows.n_gpus * iteration_energy_j(rows.c, *work[:4], duration, freq_ghz)
        above = joules - (rows.floor_w + mus) * duration
        least = (rows.energy[at, None] - rows.time[at, None] * mus).min(axis=0)
        assert (least <= above + 1e-9 * np.abs(above)).all()


def test_bound_is_near_a_run_that_has_no_choice():
    """One clock, one batch size, no gaps: the fluid loses little."""
    plant = plant_of("decode", 1.0, drain=True)
    trace = trace_of(np.zeros(64), np.full(64, 1000), np.full(64, 2000))
    bound = solve_decode_bound(plant, trace, window_s=100.0)
    best = min(replay(plant, trace, np.array([f])).energy_j for f in plant.clocks.grid_mhz[::9])
    assert 0.9 * best < bound.energy_j <= best


@pytest.mark.slow
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


def rivals(n_clocks, step, slo_s, crowds):
    """Plans of one rule from a grid: one clock, two clocks by who runs, one iteration time."""
    clocks = range(0, n_clocks, step)
    yield from (WindowPlan.single(k) for k in clocks)
    yield from (
        WindowPlan.single(i, j, crowd=crowd) for i in clocks for j in clocks for crowd in crowds
    )
    times = slo_s * np.linspace(0.3, 1.3, 11)
    yield from (WindowPlan.single(k, target_s=float(t)) for k in clocks for t in times)


@pytest.mark.slow
@pytest.mark.parametrize(("rate_rps", "tpot_s", "idle"), CASES)
def test_no_static_clock_and_no_two_clocks_beat_the_plan_found(rate_rps, tpot_s, idle):
    """A grid of one and two clocks by the requests that run, and of two clocks in time.

    At an attainment, with the bound below.
    """
    trace = generate("azure-conv-like", rate_rps=rate_rps, duration_s=60.0, seed=11)
    plant = plant_of("decode", tpot_s, drain=True, idle=idle)
    plan = search_decode_plan(plant, trace, 0.97)
    assert plan.feasible
    runner = DecodeRunner(plant, trace)
    n, found = len(runner.grid_ghz), []
    others = list(rivals(n, 7, tpot_s, (4, 8, 12, 16, 24, 32, 48, 64, 96, 128)))
    for i, j in product(range(0, n, 14), repeat=2):  # two clocks in time, by turns and once
        for window_s, shape in ((5.0, [0, 1] * 6), (20.0, [0, 1, 0]), (30.0, [0, 1])):
            clocks = np.where(np.array(shape) == 0, i, j)
            others.append(
                WindowPlan(clocks, clocks, np.full(len(shape), np.inf), window_s=window_s)
            )
    for other in others:
        run, _ = runner.run(other)
        if run.violations <= plan.violations_allowed:
            found.append(run.energy_j)
    assert len(found) > 100
    assert plan.energy_j <= min(found) * (1.0 + 1e-9)
    assert solve_decode_bound(plant, trace, 0.97).energy_j <= plan.energy_j


@settings(max_examples=15, deadline=None)
@given(
    tiny_traces(),
    st.sampled_from([0.018, 0.03, 0.1]),
    st.sampled_from([0.0, 0.05, 2.0]),
    st.sampled_from([{}, {"idle": "parked"}]),
)
def test_the_plan_found_is_near_brute_force_on_tiny_workloads(trace, tpot_s, price, rule):
    """Windows of 3 s cannot follow single iterations; a rule by the batch can, nearly.

    Brute force takes any of three clocks at each decision, the search any of 99.
    """
    plant = plant_of("decode", tpot_s, drain=True, max_seqs=2, violation_weight=price, **rule)
    best = brute_force(plant, trace, LEVELS_MHZ, price)
    plan = search_decode_plan(plant, trace, max_runs=600)
    cost = replay(plant, trace, plan.clocks_mhz).cost
    assert cost <= best * 1.02


def test_a_plan_spread_over_finer_windows_is_the_same_plan(workload):
    runner = DecodeRunner(plant_of("decode", 0.03, drain=True), workload)
    one = WindowPlan.single(20, 60, crowd=10)
    coarse = one.spread(20.0, runner.horizon_s)
    assert len(coarse.target_s) == 3
    mixed = coarse.where(np.array([False, True, False]), WindowPlan.single(5, target_s=0.02).spread(
        20.0, runner.horizon_s))  # fmt: skip
    fine = mixed.spread(5.0, runner.horizon_s)
    assert fine.quiet.tolist() == [20] * 4 + [5] * 4 + [20] * 4
    for plan in (one, mixed):
        again = plan.spread(5.0, runner.horizon_s)
        assert runner.run(again)[0].energy_j == runner.run(plan)[0].energy_j


def test_a_target_is_met_by_the_lowest_clock_that_meets_it(workload):
    """Every decision of a plan of one iteration time, against the physics."""
    plant = plant_of("decode", 0.03, drain=True, actuation_delay_s=0.0)
    runner, target_s, lowest = DecodeRunner(plant, workload), 0.022, 10
    clocks = runner.clocks_mhz(WindowPlan.single(lowest, target_s=target_s))
    (run,) = rollout(OraclePolicy(plant.clocks, clocks), plant, [workload], time_probe=False)
    steps, grid = run.timeline, plant.clocks.grid_mhz
    assert len(np.unique(clocks)) > 5
    slow = steps["duration_s"] > target_s * (1 + 1e-9)
    assert (clocks[slow] == grid[-1]).all()
    assert clocks.min() >= grid[lowest]
    batch = Batch(plant, 1, RequestTable.of(plant, [workload]))
    batch.reset(ROW, ROW, ROW - 1)
    for clock in clocks[:400]:
        s = batch.states[0]
        work = (s["batch"] + s["recompute_tokens"], s["recompute_attn"], s["cached"], s["batch"])
        takes_s = plant.model.latency_s(*(float(x) for x in work), grid[lowest:])
        enough = grid[lowest:][takes_s <= target_s]
        assert clock == pytest.approx(enough[0] if len(enough) else grid[-1])
        batch.step(plant.clocks.to_action([clock]))


@pytest.mark.slow
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
    clocks = np.arange(6, 90, 12)
    plan = WindowPlan(clocks, clocks, np.full(7, np.inf), window_s=10.0)
    run, decisions = runner.run(plan)
    before = float(runner.batch.states["energy_j"][0]) - run.window_j.sum()
    assert before == pytest.approx(0.0, abs=200.0 * runner.batch.pool.arrival_s[0] * 4)
    assert run.window_missed.sum() == run.violations
    assert decisions == runner.batch.states["iterations"][0]


@pytest.mark.slow
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
