"""A parked instance: one idle power for everybody, and the lowest clock while the ramp lasts."""

import numpy as np
import pytest
from reference_sim import Settings
from sim_support import COEFFICIENTS, compiled, run_out, workload

from biscale_env.config.cluster_layout import Placement
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_settings import ClusterPlant, ClusterSettings
from biscale_env.envs.cluster.whole_run import run_cluster
from biscale_env.envs.loads.capacity import SearchSettings, capacity_key, run_static
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.models import physics
from biscale_env.traces import generate

C = COEFFICIENTS
RAMP_S, PARKED_W = 0.05, 85.0
PARKED = {"parked": 1, "parked_w": PARKED_W, "parked_ramp_s": RAMP_S, "delay_s": 0.0}


def alone(tokens: int, freq_ghz: float) -> tuple[float, float]:
    """Duration (s) and energy of all GPUs (J) of one prompt at one clock."""
    work = (tokens, tokens**2 / 2, 0.0, 1.0)
    time_s = physics.latency_s(C, *work, freq_ghz)
    return time_s, C.n_gpus * physics.iteration_energy_j(C, *work, time_s, freq_ghz)


def test_prefill_ramps_after_every_wait() -> None:
    """Prompts half a second apart: each begins at the lowest clock and goes on at 1.2 GHz."""
    tokens, n, freq = 1000, 20, 1.2
    trace = workload([(0.5 * (k + 1), tokens, 1) for k in range(n)], 11.0)
    batch = compiled("prefill", C, Settings(**PARKED), trace)
    assert batch.obs[0, batch.plant.spec.index("freq_current")] * 1980 == pytest.approx(510)
    run_out(batch, [2 * (freq - 0.51) / 1.47 - 1])
    (slow_s, slow_j), (fast_s, fast_j) = alone(tokens, 0.51), alone(tokens, freq)
    part = RAMP_S / slow_s
    time_s, joules = RAMP_S + (1 - part) * fast_s, part * slow_j + (1 - part) * fast_j
    assert fast_s < time_s < 0.5
    np.testing.assert_allclose(batch.finish_s - trace.arrival_s, time_s, rtol=1e-9)
    waited_s = 11.0 - n * time_s
    st = batch.states[0]
    assert st["energy_idle_j"] == pytest.approx(C.n_gpus * PARKED_W * waited_s, rel=1e-9)
    assert st["energy_j"] == pytest.approx(n * joules + st["energy_idle_j"], rel=1e-9)
    assert st["n_switches"] == 1, "the ramp is not a change of the clock that was asked for"


def test_a_ramp_may_outlast_batches_and_work_without_a_wait_has_none() -> None:
    """Small prompts: the first two in the ramp; what is there at time 0 never waited."""
    rows = [(1.0, 10, 1), (1.01, 10, 1)]
    ramp_s = 1.5 * alone(10, 0.51)[0]
    settings = Settings(**{**PARKED, "parked_ramp_s": ramp_s, "max_seqs": 1}, end_s=2.0)
    batch = compiled("prefill", C, settings, workload(rows, 2.0))
    run_out(batch, [1.0])
    (slow_s, _), (fast_s, _) = alone(10, 0.51), alone(10, 1.98)
    both_s = ramp_s + (1 - (ramp_s - slow_s) / slow_s) * fast_s
    np.testing.assert_allclose(batch.finish_s, [1.0 + slow_s, 1.0 + both_s], rtol=1e-9)
    at_once = compiled("prefill", C, Settings(**PARKED), workload([(0.0, 10, 1)], 2.0))
    run_out(at_once, [1.0])
    assert at_once.finish_s[0] == pytest.approx(fast_s, rel=1e-9)


def test_a_request_still_takes_effect_during_the_ramp() -> None:
    """The delay of a request and the ramp run side by side: the later one counts."""
    tokens = 4000
    for delay_s in (0.02, 0.1):
        settings = Settings(**{**PARKED, "delay_s": delay_s}, token_budget=tokens, end_s=5.0)
        batch = compiled("prefill", C, settings, workload([(1.0, tokens, 1)], 5.0))
        asked = 2 * (1.2 - 0.51) / 1.47 - 1
        run_out(batch, [asked])
        (slow_s, _), (fast_s, _) = (alone(tokens, f) for f in (0.51, 1.2))
        done, now = RAMP_S / slow_s, RAMP_S
        if delay_s > RAMP_S:  # the clock before, the highest, between the ramp and the request
            freq = physics.effective_freq_ghz(C, tokens, tokens**2 / 2, 0.0, 1.0, 1.98, 0.51)
            done, now = done + (delay_s - RAMP_S) / alone(tokens, freq)[0], delay_s
        assert batch.finish_s[0] - 1.0 == pytest.approx(now + (1 - done) * fast_s, rel=1e-7)


def test_without_a_ramp_only_idle_energy_differs() -> None:
    """Same clocks, same times; each second of waiting costs the parked power instead."""
    trace = workload([(0.7 * k + 0.1, 50 + 30 * k, 2 + k) for k in range(12)], 10.0)
    chosen = [0.3, -0.8, 1.0, -0.1]
    for phase in ("prefill", "decode"):
        last, parked = (
            compiled(phase, C, Settings(**rule, end_s=10.0), trace)
            for rule in ({"delay_s": 0.0}, {**PARKED, "parked_ramp_s": 0.0})
        )
        run_out(last, chosen)
        run_out(parked, chosen)
        np.testing.assert_array_equal(last.finish_s, parked.finish_s)
        a, b = last.states[0], parked.states[0]
        assert b["energy_idle_j"] == pytest.approx(
            C.n_gpus * PARKED_W * (b["time_s"] - b["busy_s"]), rel=1e-9
        )
        assert b["energy_j"] - b["energy_idle_j"] == pytest.approx(
            a["energy_j"] - a["energy_idle_j"], rel=1e-9
        )


def test_parked_power_is_that_of_the_lowest_clock_in_each_member_unless_given() -> None:
    plant = Plant(PlantSettings.of("prefill", idle="parked"))
    for member in (-1, 0):
        c, p = plant.model.member(member), plant.params(member, 1.0)
        assert p["parked_w"] == pytest.approx(physics.idle_power_w(c, 0.51), rel=1e-12)
        for freq_mhz in (510.0, 1980.0):
            assert plant.waiting_power_w(member, freq_mhz) == pytest.approx(4 * p["parked_w"])
    given = Plant(PlantSettings.of("decode", idle="parked", parked_power_w=85, parked_ramp_s=0.01))
    assert given.waiting_power_w(0, 1980.0) == 4 * 85.0
    assert given.params(0, 1.0)["parked_ramp_s"] == 0.01
    last = Plant(PlantSettings.of("prefill"))
    assert last.parked_power_w(-1) is None
    c = last.model.member(-1)
    assert last.waiting_power_w(-1, 1200.0) == pytest.approx(4 * physics.idle_power_w(c, 1.2))


def test_a_capacity_of_another_ramp_is_another_capacity() -> None:
    how = SearchSettings(1980.0)
    rules = ({}, {"idle": "parked"}, {"idle": "parked", "parked_ramp_s": 0.01})
    keys = [capacity_key(Plant(PlantSettings.of("decode", **rule)), how, "w") for rule in rules]
    assert len(set(keys)) == 3
    power = {"idle": "parked", "parked_power_w": 1.0}
    assert capacity_key(Plant(PlantSettings.of("decode", **power)), how, "w") == keys[1]


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(BiscaleError, match="idle"):
        PlantSettings.of("prefill", idle="off")
    with pytest.raises(BiscaleError, match="parked_ramp_s"):
        PlantSettings.of("prefill", idle="parked", parked_ramp_s=-1.0)


@pytest.mark.parametrize("groups", [("prefill", "decode"), ("colocated",)])
def test_a_parked_cluster_draws_parked_power_while_it_waits(groups: tuple[str, ...]) -> None:
    """Little load: between two parked powers lies the time spent waiting."""
    placement = Placement(
        name="test", groups=tuple({"phase": g, "tp": 4, "freq_mhz": 1200} for g in groups)
    )
    trace = generate("azure-conv-like", rate_rps=0.3, duration_s=60.0, seed=0)
    total = {}
    for power_w in (0.0, 50.0, 100.0):
        settings = ClusterSettings.of(
            gpus=8, idle="parked", parked_power_w=power_w, parked_ramp_s=0.02, spare="off"
        )
        run = run_cluster(ClusterPlant(settings), placement, trace)
        total[power_w] = run.energy.prefill_j + run.energy.decode_j
    assert total[100.0] - total[50.0] == pytest.approx(total[50.0] - total[0.0], rel=1e-9)
    waited_s = (total[50.0] - total[0.0]) / (4 * 50.0)
    assert 10.0 < waited_s < 60.0 * len(groups)


def test_a_static_run_of_a_parked_plant_pays_for_its_waits() -> None:
    trace = generate("azure-conv-like", rate_rps=0.5, duration_s=60.0, seed=2)
    runs = {}
    for rule in ({}, {"idle": "parked"}, {"idle": "parked", "parked_ramp_s": 0.0}):
        plant = Plant(PlantSettings.of("prefill", actuation_delay_s=0.0, **rule))
        runs[len(rule)] = (run_static(plant, trace, 1980.0), plant)
    (last, _), (ramped, plant), (at_once, _) = runs.values()
    waited_s = at_once.duration_s - at_once.busy_s
    saved_w = 4 * physics.idle_power_w(plant.model.member(-1), 1.98) - plant.waiting_power_w(-1, 0)
    assert last.energy_j - at_once.energy_j == pytest.approx(saved_w * waited_s, rel=1e-9)
    assert (ramped.latency_s > at_once.latency_s).all()
    np.testing.assert_array_equal(last.latency_s, at_once.latency_s)
