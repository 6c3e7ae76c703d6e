"""Clocks held by power limits: the translation, its delay, and what policies see."""

import gymnasium as gym
import numpy as np
import pytest

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, InstanceRecords, RequestTable
from biscale_env.envs.loads.workloads import generated
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.envs.power_caps import LOWEST_LIMIT_W, STEP_W, CapTranslator
from biscale_env.evaluation.experiment.experiments import Experiment
from biscale_env.evaluation.rollouts.rollout import rollout
from biscale_env.evaluation.tuning.hindsight import build_policy
from biscale_env.models import physics
from biscale_env.wrappers import PowerCapAction

IDS = {"prefill": "BiScale/Prefill-v1", "decode": "BiScale/Decode-v1"}
RATES = {"prefill": 3.0, "decode": 10.0}
PHASES = tuple(RATES)


def plant(phase, means="cap", delay_s=0.0):
    return Plant(PlantSettings.of(phase, means=means, actuation_delay_s=delay_s, drain=True))


def workload(phase, seed=0, duration_s=20.0):
    return generated("azure-conv-like")(RATES[phase], duration_s, seed)


def started(owner, rows=1):
    made = [workload(owner.phase, seed) for seed in range(rows)]
    batch = Batch(owner, rows, RequestTable.of(owner, made))
    every = np.arange(rows)
    batch.reset(every, every, np.full(rows, -1))
    return batch


@pytest.mark.parametrize("phase", PHASES)
def test_a_limit_stands_for_the_clock_by_the_one_formula(phase):
    """Under the limit the iteration runs at the clock, or above by no more than the rounding."""
    owner = plant(phase)
    translator, coefs = CapTranslator(owner, low_w=1.0), owner.model.member(-1)
    batch = started(owner)
    for _ in range(40):
        work = translator.work(batch.obs)[0]
        for freq_mhz in (600.0, 1005.0, 1395.0, 1800.0):
            limits, times = translator.limits(batch.obs, [freq_mhz])
            limit_w = float(limits[0])
            drawn_w = float(physics.power_w(coefs, *work, freq_mhz / 1e3))
            assert limit_w == min(STEP_W * np.ceil(drawn_w / STEP_W), translator.high_w)
            capped = coefs._replace(p_cap_w=limit_w)
            ghz, time_s, joules = physics.iteration_under_cap(
                capped, *work, 1.98, owner.clocks.freq_min_mhz / 1e3
            )
            assert joules / time_s <= limit_w + 1e-6
            if limit_w < translator.high_w:
                assert 1e3 * ghz >= freq_mhz - 1e-6
                assert joules / time_s >= drawn_w - 1e-6
                assert time_s <= times[0] + 1e-12
        batch.step(np.ones(1, dtype=np.float32))


@pytest.mark.parametrize("phase", PHASES)
def test_the_work_is_that_of_the_iteration_that_runs(phase):
    owner = plant(phase, "lock")
    translator, batch = CapTranslator(owner), started(owner)
    while not batch.done[0]:
        tokens, _, cached, n_seq = translator.work(batch.obs)[0]
        state = batch.states[0]
        if phase == "decode":
            assert cached == pytest.approx(state["cached"], rel=1e-6)
        batch.step(np.ones(1, dtype=np.float32))
        assert (tokens, n_seq) == pytest.approx(
            (state["step_tokens"], state["step_requests"]), rel=1e-6
        )


def test_the_work_of_recomputed_tokens_and_no_work_by_hand():
    """A prompt of n tokens that is read again attends to half of n squared."""
    owner = plant("decode")
    translator, spec = CapTranslator(owner), owner.spec
    obs = np.zeros((2, spec.dim), dtype=np.float32)
    for name, value in (("batch", 8.0), ("recompute_tokens", 100.0), ("cached_tokens", 4000.0)):
        obs[0, spec.index(name)] = value / spec.scale[spec.index(name)]
    np.testing.assert_allclose(translator.work(obs), [[108, 5000, 4000, 8], [0] * 4], rtol=1e-6)
    limits_w, _ = translator.limits(obs, [600.0, 600.0])
    assert limits_w[0] < limits_w[1] == translator.high_w
    assert CapTranslator(owner, low_w=1e4).low_w == translator.high_w


@pytest.mark.parametrize("phase", PHASES)
def test_the_highest_clock_is_no_limit(phase):
    runs = []
    for means in ("lock", "cap"):
        owner = plant(phase, means)
        (run,) = rollout(build_policy("max", owner, [], -1), owner, [workload(phase)])
        runs.append(run)
    assert runs[0].totals["energy_j"] == runs[1].totals["energy_j"]
    np.testing.assert_array_equal(runs[0].requests["finish_s"], runs[1].requests["finish_s"])


@pytest.mark.parametrize("phase", PHASES)
def test_a_clock_held_by_a_limit_runs_no_slower_and_costs_no_less(phase):
    energies, finishes, slowest = {}, {}, {}
    for means in ("lock", "cap"):
        owner = plant(phase, means)
        policy = build_policy("static:1200", owner, [], -1)
        (run,) = rollout(policy, owner, [workload(phase)])
        energies[means] = run.totals["energy_j"] - run.totals["energy_idle_j"]
        finishes[means] = run.requests["finish_s"]
        slowest[means] = run.timeline["freq_effective_mhz"][2:].min()
        assert (run.timeline["power_w"] <= owner.gpu.power_cap_w + 1e-6).all()
    assert slowest["cap"] >= 1200.0 - 1e-6
    assert energies["lock"] <= energies["cap"] < 1.2 * energies["lock"]
    assert finishes["cap"].mean() <= finishes["lock"].mean() + 1e-9


def test_no_limit_goes_below_what_the_driver_takes():
    owner = plant("decode")
    batch = started(owner)
    batch.step(np.full(1, -1.0, dtype=np.float32))
    batch.step(np.full(1, -1.0, dtype=np.float32))
    assert batch.coefs["p_cap_w"][0] >= LOWEST_LIMIT_W


@pytest.mark.parametrize("phase", PHASES)
def test_a_limit_takes_effect_after_the_delay_and_is_told_like_a_clock(phase):
    owner = plant(phase, delay_s=0.3)
    batch, spec = started(owner), owner.spec
    board_w, begun_s = owner.gpu.power_cap_w, float(batch.states["time_s"][0])
    low = owner.clocks.to_action(np.array([900.0])).astype(np.float32)
    limited = []
    while batch.states["time_s"][0] < begun_s + 1.5:
        now_s = float(batch.states["time_s"][0])
        batch.step(low)
        limited.append((now_s - begun_s, float(batch.coefs["p_cap_w"][0]) < board_w))
        seen = {n: float(spec.value(batch.obs[0], n)) for n in ("freq_current", "freq_pending")}
        waited_s = float(batch.states["time_s"][0]) - begun_s
        left_s = float(spec.value(batch.obs[0], "time_to_apply"))
        assert seen["freq_pending"] == pytest.approx(900.0)
        assert seen["freq_current"] == pytest.approx(900.0 if waited_s >= 0.3 else 1980.0)
        assert left_s == pytest.approx(max(0.3 - waited_s, 0.0), abs=1e-5)
    assert not any(on for since_s, on in limited if since_s < 0.3 - 0.2)
    assert all(on for since_s, on in limited if since_s >= 0.3)


@pytest.mark.parametrize("phase", PHASES)
def test_a_limit_that_is_due_in_the_first_half_of_an_iteration_holds_for_all_of_it(phase):
    owner = plant(phase)
    length_s = float(CapTranslator(owner).limits(started(owner).obs, [900.0])[1][0])
    low = owner.clocks.to_action(np.array([900.0])).astype(np.float32)
    for share in (0.0, 0.4, 0.6, 1.1):
        batch = started(plant(phase, delay_s=share * length_s))
        batch.step(low)
        is_limited = batch.coefs["p_cap_w"][0] < owner.gpu.power_cap_w
        assert is_limited == (share < 0.5), share


def test_rows_do_not_disturb_each_other():
    owner = plant("decode", delay_s=0.05)
    alone, both = started(owner), started(owner, 2)
    actions = np.random.default_rng(0).uniform(-1, 1, 60).astype(np.float32)
    for action in actions:
        alone.step(np.array([action]))
        both.step(np.array([action, -action], dtype=np.float32))
        np.testing.assert_array_equal(alone.obs[0], both.obs[0])
    both.reset(np.array([1]), np.array([1]), np.array([-1]))
    assert both.coefs["p_cap_w"][1] == owner.gpu.power_cap_w
    assert both.coefs["p_cap_w"][0] == alone.coefs["p_cap_w"][0]


@pytest.mark.parametrize("phase", PHASES)
def test_environments_take_the_option(phase):
    env = gym.make(IDS[phase], means="cap", rate_rps=RATES[phase], episode_s=10.0)
    env.reset(seed=0)
    for _ in range(5):
        observation, *_ = env.step(np.array([-1.0], dtype=np.float32))
    plain = env.unwrapped
    assert plain.batch.coefs["p_cap_w"][0] < plain.plant.gpu.power_cap_w
    assert env.observation_space.contains(observation)
    with pytest.raises(BiscaleError, match="means"):
        gym.make(IDS[phase], means="both")
    assert PowerCapAction(gym.make(IDS[phase])).low_w == LOWEST_LIMIT_W


def test_instances_of_several_kinds_have_no_limits():
    owner = plant("decode")
    batch = Batch(owner, 1, RequestTable.of(owner, [workload("decode")]))
    row = np.zeros(1, dtype=np.int64)
    with pytest.raises(BiscaleError, match="one kind of instance"):
        batch.reset(row, row, row - 1, records=InstanceRecords(batch.coefs, batch.params))


def test_an_experiment_runs_every_point_under_each_means():
    both = Experiment(name="x", workloads=("synthetic",), loads=(0.75,), means=("lock", "cap"))
    made = both.scenarios()
    assert [s.name for s in made] == ["synthetic, clocks locked", "synthetic, power capped"]
    assert [s.plant_settings("decode").means for s in made] == ["lock", "cap"]
    (plain,) = Experiment(name="x", workloads=("synthetic",), loads=(0.75,)).scenarios()
    assert (plain.name, plain.means) == ("synthetic", "lock")
