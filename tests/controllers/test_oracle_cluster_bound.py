"""The bound of a cluster: below everything that a cluster can do, and not far below."""

import numpy as np
import pytest
from cluster_support import placement, plant, random_trace
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_values import slow

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.whole_run import WindowedRun, cut, run_cluster
from biscale_env.envs.loads.capacity import run_static
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.models.physics import iteration_energy_j, latency_s
from biscale_env.reproduce.multi_systems import with_clocks
from biscale_env.traces import Trace, generate
from controllers.oracle.cluster_bound import (
    OwedWork,
    cluster_bound,
    fixed_stage,
    free_stages,
    prefill_cost,
)
from controllers.oracle.decode_bound import solve_decode_bound

PHASES = ("prefill", "decode")


def stages_of(cluster, made):
    return {
        phase: fixed_stage(
            cluster.plant(phase, made.instances(phase)[0].tp), len(made.instances(phase))
        )
        for phase in PHASES
    }


def workload(seed, duration_s=40.0, rate_rps=12.0):
    return generate("gamma-sharegpt-like", rate_rps=rate_rps, duration_s=duration_s, seed=seed)


CONTROLS = [
    {"prefill_policy": "static", "decode_policy": "static", "freq": 1980.0},
    {"prefill_policy": "static", "decode_policy": "static", "freq": 1200.0},
    {"prefill_policy": "static", "decode_policy": "static", "freq": 900.0},
    {"prefill_policy": "mpc", "decode_policy": "slack", "freq": 1980.0},
    {"prefill_policy": "mpc", "decode_policy": "slack", "freq": 1980.0, "prefill_margin": 0.4},
]


@pytest.mark.parametrize("idle", ["last-clock", slow("parked")])
@pytest.mark.parametrize("shape", [((4,), (4,)), slow(((4, 4), (4, 4))), slow(((8,), (4, 4)))])
@pytest.mark.parametrize("rate_rps", [slow(2.0), 12.0])
def test_nobody_beats_the_bound(idle, shape, rate_rps):
    """At the attainment that a run itself had, or any lower one."""
    work = [workload(seed, duration_s=20.0, rate_rps=rate_rps) for seed in (0, 1)]
    made = placement(*shape)
    for values in CONTROLS:
        others = {k: v for k, v in values.items() if k != "freq"}
        for router in ("shortest", "round_robin"):
            cluster = plant(idle=idle, prefill_router=router, actuation_delay_s=0.05, **others)
            own = with_clocks(made, dict.fromkeys(PHASES, values["freq"]))
            runs = [run_cluster(cluster, own, one) for one in work]
            kept = min(
                np.average([r.attainment(p) for r in runs], weights=[len(one) for one in work])
                for p in PHASES
            )
            bound = cluster_bound(stages_of(cluster, made), work, float(kept) - 1e-9)
            assert bound.prefill_j <= sum(r.energy.prefill_j for r in runs), values
            assert bound.decode_j <= sum(r.energy.decode_j for r in runs), values


@pytest.mark.slow
def test_it_is_not_far_below_what_clusters_do():
    """What is not yet due at the end of a workload is not in it, so short ones make it loose."""
    work, made = [workload(0, 300.0, 18.0)], placement()
    cluster = plant()
    low = with_clocks(made, dict.fromkeys(PHASES, 1200.0))
    spent = [run_cluster(cluster, low, one).energy for one in work]
    bound = cluster_bound(stages_of(cluster, made), work, 0.99)
    assert bound.prefill_j > 0.7 * sum(one.prefill_j for one in spent)
    assert bound.decode_j > 0.5 * sum(one.decode_j for one in spent)


PREFILL = Plant(PlantSettings.of("prefill"))
PREFILL_STAGE = fixed_stage(PREFILL, 1)
PREFILL_COST = prefill_cost(PREFILL_STAGE)


@settings(max_examples=200)
@given(
    tokens=st.integers(1, 8192),
    share=st.floats(0.0, 1.0),
    requests=st.integers(1, 64),
    level=st.integers(0, 10_000),
)
def test_every_prefill_batch_costs_at_least_the_cut(tokens, share, requests, level):
    stage, cost, c = PREFILL_STAGE, PREFILL_COST, PREFILL.model.member(-1)
    grid = PREFILL.clocks.grid_mhz / 1e3
    freq = float(grid[level % len(grid)])
    tokens = min(tokens, PREFILL.settings.instance.token_budget)
    pairs = tokens * (0.5 + share * 30_000.0)
    time_s = latency_s(c, tokens, pairs, 0.0, requests, freq)
    joules = c.n_gpus * iteration_energy_j(c, tokens, pairs, 0.0, requests, time_s, freq)
    above = joules - stage.floor_w * time_s
    work = (tokens, pairs, requests)
    assert above >= np.dot(work, cost) * (1 - 1e-12)
    assert cost.per_token_j > 0
    assert cost.per_pair_j > 0


@pytest.mark.slow
def test_with_one_instance_it_lies_below_the_bound_of_that_instance():
    """The single instance's bound knows when requests come to decode, and more."""
    work = workload(3, rate_rps=8.0)
    served = work.output_tokens > 1
    lengths = work.prompt_tokens[served], work.output_tokens[served]
    alone = Trace("alone", work.arrival_s[served], *lengths, "test", duration_s=work.duration_s)
    cluster, made = plant(), placement()
    own = cluster.plant("decode", 4)
    single = solve_decode_bound(own, alone, attainment=0.99)
    assert cluster_bound(stages_of(cluster, made), [work], 0.99).decode_j <= single.energy_j


@pytest.mark.slow
def test_more_misses_never_raise_it_and_misses_are_shared_by_all_workloads():
    work, cluster, made = [workload(0), workload(1)], plant(), placement()
    stages = stages_of(cluster, made)
    energies = [cluster_bound(stages, work, a).energy_j for a in (1.0, 0.99, 0.9, 0.5)]
    assert energies == sorted(energies, reverse=True)
    assert energies[0] > energies[-1]
    apart = [cluster_bound(stages, [one], 0.9).energy_j for one in work]
    together = cluster_bound(stages, work, 0.9)
    assert together.energy_j <= sum(apart) * (1 + 1e-9)
    assert together.allowed == int(0.1 * sum(len(one) for one in work))


def test_where_instances_come_and_go_it_is_lower():
    """Nobody beats it who changes the placement in the middle, either."""
    cluster = plant(gpus=16, spare_idle_w=70.0)
    work = workload(5, duration_s=60.0, rate_rps=10.0)
    plants = {phase: [cluster.plant(phase, tp) for tp in (4, 8)] for phase in PHASES}
    bound = cluster_bound(free_stages(plants, 16, 70.0), [work], 0.9)
    fixed = cluster_bound(stages_of(cluster, placement((4,), (4,))), [work], 0.9)
    spare_j = 8 * 70.0 * work.duration_s
    assert bound.energy_j <= fixed.energy_j + spare_j
    assert bound.energy_j > 16 * 70.0 * work.duration_s
    for shapes in ((((4,), (4,)), ((8,), (4, 4))), (((4, 4), (4, 4)), ((4,), (8,)))):
        plans = [with_clocks(placement(*one), dict.fromkeys(PHASES, 1200.0)) for one in shapes]
        run = WindowedRun(cluster, plans[0])
        seen = list(run.over(cut(work, 30.0), lambda k, _, plans=plans: plans[k]))
        seen.append(run.rest())
        bounds_s = cluster.slo.ttft_s, cluster.slo.tpot_s
        assert max(np.sum([one.missed(*bounds_s) for one in seen], axis=0)) <= 0.1 * len(work)
        assert bound.energy_j <= sum(one.energy.total_j for one in seen[:-1])


@given(st.lists(st.floats(1.0, 1e6), min_size=1, max_size=60), st.integers(0, 70), st.data())
def test_owed_work_is_the_sum_less_the_largest_misses(amounts, missed, data):
    amount = np.array(amounts)
    window = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(amount),
                                         max_size=len(amount))))  # fmt: skip
    owed = OwedWork(float(amount.max()))
    owed.add(amount, window, 4)
    found = owed.curve(missed)
    for border in range(4):
        due = np.sort(amount[window <= border])
        exact = due[: max(len(due) - missed, 0)].sum()
        assert found[border] <= exact + 1e-6
        # a bin is 0.4 % wide
        assert found[border] >= exact - 0.004 * due.sum() - 1e-6
    assert (np.diff(found) >= -0.004 * amount.sum() - 1e-6).all()


@pytest.mark.slow
@pytest.mark.parametrize("parked_w", [60.0, 250.0])
def test_it_holds_where_a_parked_instance_draws_more_than_a_running_one(parked_w):
    """A GPU at the lowest clock draws less than 250 W even while it decodes."""
    work, made = workload(0, 60.0, 8.0), placement()
    cluster = plant(idle="parked", parked_power_w=parked_w)
    low = with_clocks(made, {"prefill": 1200.0, "decode": 510.0})
    run = run_cluster(cluster, low, work)
    kept = min(run.attainment(phase) for phase in PHASES) - 1e-9
    bound = cluster_bound(stages_of(cluster, made), [work], kept)
    assert bound.prefill_j <= run.energy.prefill_j
    assert bound.decode_j <= run.energy.decode_j
    own = cluster.plant("decode", 4)
    served = work.output_tokens > 1
    lengths = work.prompt_tokens[served], work.output_tokens[served]
    alone = Trace("alone", work.arrival_s[served], *lengths, "test", duration_s=work.duration_s)
    single = run_static(own, alone, 510.0)
    met = own.slo.attained(single.latency_s, "decode") - 1e-9
    drained = Plant(own.settings.model_copy(update={"drain": True}))
    assert solve_decode_bound(drained, alone, attainment=met).energy_j <= single.energy_j


def test_mistakes():
    stages = stages_of(plant(), placement())
    with pytest.raises(BiscaleError, match="needs requests"):
        cluster_bound(stages, [], 0.99)
    with pytest.raises(BiscaleError, match="needs a prefill plant"):
        prefill_cost(stages["decode"])


def test_requests_of_one_token_need_no_decode():
    one = random_trace(50, 10.0, 1, output_max=2)
    assert (one.output_tokens == 1).all()
    stages = stages_of(plant(), placement())
    found = cluster_bound(stages, [one], 0.99)
    assert found.decode_j == pytest.approx(stages["decode"].floor_w * one.duration_s)
