"""The length of a step, and the key figures at the end of an episode."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from block_helpers import with_blocks

import biscale_env  # noqa: F401 - registers the ids
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.kpis import KEPT_REFERENCES, kpi_names
from biscale_env.envs.loads.capacity import run_static
from biscale_env.traces import Trace, generate

PHASES = ("prefill", "decode")
SMALL: dict[str, Any] = {"rate_rps": 4.0, "episode_s": 6.0}
IDS = {"prefill": "BiScale/Prefill-v1", "decode": "BiScale/Decode-v1"}


def finish(env: gym.Env, action: float, seed: int = 0, **options: Any) -> list[dict[str, Any]]:
    """Infos of an episode, that of the reset first."""
    infos = [env.reset(seed=seed, options=options or None)[1]]
    over = False
    while not over:
        *_, over, info = env.step(np.array([action], dtype=np.float32))
        infos.append(info)
    return infos


@pytest.mark.parametrize("phase", PHASES)
def test_lengths_of_steps_add_up_to_the_time(phase: str) -> None:
    infos = finish(gym.make(IDS[phase], **SMALL), 0.1)
    assert all(info["dt"] >= 0 for info in infos)
    assert all(info["dt"] > 0 for info in infos[1:])
    np.testing.assert_allclose(
        np.cumsum([info["dt"] for info in infos]), [info["time_s"] for info in infos], rtol=1e-12
    )


@pytest.mark.parametrize("phase", PHASES)
def test_key_figures_are_those_of_the_infos(phase: str) -> None:
    env = gym.make(IDS[phase], **SMALL)
    infos = finish(env, -0.6)
    kpis = infos[-1]["kpis"]
    assert [("kpis" in info) for info in infos[:-1]] == [False] * (len(infos) - 1)
    assert set(kpis) == set(kpi_names(phase))
    assert all(type(value) is float for value in kpis.values())
    assert kpis["energy_j"] == pytest.approx(sum(info["energy_j"] for info in infos))
    assert kpis["duration_s"] == infos[-1]["time_s"]
    missed = sum(info["cost"] for info in infos)
    assert kpis["attainment"] == pytest.approx(1 - missed / kpis["requests_finished"])
    assert kpis["energy_per_token_j"] == pytest.approx(kpis["energy_j"] / kpis["tokens"])


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("action", [1.0, -0.3])
def test_a_drained_episode_is_the_run_at_that_clock(phase: str, action: float) -> None:
    """Closed form: every token is made, and the ratio is that of two whole runs."""
    env = gym.make(IDS[phase], drain=True, **SMALL).unwrapped
    kpis = finish(env, action)[-1]["kpis"]
    trace = env.options.source.workload(int(env._episode[0]))
    plant = env.plant
    top = run_static(plant, trace, plant.clocks.freq_max_mhz)
    # every episode begins at max clock; without delay the first decision sets the clock at once
    keep = trace.output_tokens >= 2 if phase == "decode" else np.ones(len(trace), dtype=bool)
    made = trace.prompt_tokens if phase == "prefill" else trace.output_tokens[keep] - 1
    assert kpis["tokens"] == made.sum()
    assert kpis["requests_unfinished"] == 0
    assert kpis["requests_finished"] == keep.sum()
    assert kpis["energy_ratio"] == pytest.approx(kpis["energy_j"] / top.energy_j, rel=1e-9)
    if action == 1.0:
        assert kpis["energy_ratio"] == pytest.approx(1.0, rel=1e-12)
        name = "ttft_p99_s" if phase == "prefill" else "tpot_p99_s"
        assert kpis[name] == pytest.approx(np.quantile(top.latency_s, 0.99), rel=1e-12)
    else:
        assert kpis["energy_ratio"] < 0.95


@pytest.mark.parametrize("phase", PHASES)
def test_tokens_made_count_what_runs_when_the_episode_is_cut(phase: str) -> None:
    """Batch by batch: the sum over steps is what the key figures count from the records."""
    env = gym.make(IDS[phase], **SMALL).unwrapped
    env.reset(seed=1)
    made, over = 0, False
    while not over:
        *_, over, info = env.step(np.array([0.4], dtype=np.float32))
        made += int(env.batch.states["step_tokens" if phase == "prefill" else "step_requests"][0])
        if not over:
            assert env.kpis()["tokens"] == made
    assert info["kpis"]["tokens"] == made


def test_tokens_of_preempted_requests_are_counted() -> None:
    """A small KV cache: requests are preempted and recomputed; recomputing makes no token."""
    env = gym.make(IDS["decode"], tp=4, rate_rps=40.0, episode_s=30.0).unwrapped
    env.reset(seed=0)
    env.batch.params["kv_capacity"][:] = 20_000
    made, over = 0, False
    while not over:
        *_, over, info = env.step(np.array([1.0], dtype=np.float32))
        made += int(env.batch.states["step_requests"][0])
    assert env.batch.states["preemptions"][0] > 0
    assert info["kpis"]["tokens"] == made


@pytest.mark.parametrize("phase", PHASES)
def test_max_clock_is_the_unit_also_in_a_cut_episode_and_in_members(phase: str) -> None:
    env = gym.make(IDS[phase], ensemble_member="random", **SMALL)
    for seed in range(3):
        assert finish(env, 1.0, seed)[-1]["kpis"]["energy_ratio"] == pytest.approx(1.0, rel=1e-9)


def test_an_episode_cut_by_the_number_of_steps_has_key_figures_of_that_far() -> None:
    env = gym.make(IDS["decode"], max_episode_steps=40, **SMALL)
    infos = finish(env, 1.0)
    assert len(infos) == 41
    kpis = env.unwrapped.kpis()
    assert kpis["duration_s"] == infos[-1]["time_s"] < 6.0
    assert kpis["energy_ratio"] == pytest.approx(1.0, rel=1e-9)
    vector = gym.make_vec(IDS["decode"], num_envs=2, max_episode_steps=40, kpis=True, **SMALL)
    vector.reset(seed=[0, 0])
    for _ in range(40):
        told = vector.step(np.ones((2, 1), dtype=np.float32))[4]
    for name, value in kpis.items():
        np.testing.assert_allclose(told["final_info"]["kpis"][name], value, rtol=1e-12)


def prefix_trace() -> Trace:
    base = generate("azure-conv-like", rate_rps=4.0, duration_s=30.0, seed=2)
    contents = [[k % 3, k % 2, 1] for k in range(len(base))]
    return with_blocks(base, contents, 256)


def test_rows_of_their_own_run_the_same_requests_shared_prefixes_too() -> None:
    options = {"trace": prefix_trace(), "rate_rps": 4.0, "episode_s": 6.0}
    single = gym.make(IDS["prefill"], **options)
    vector = gym.make_vec(IDS["prefill"], num_envs=3, kpis=True, **options)
    assert single.unwrapped._tables.of(0).prefix.max() > 0
    vector.reset(seed=7)
    infos = finish(single, 0.2, seed=8)
    last: dict[str, Any] = {}
    while not last:
        *_, truncated, told = vector.step(np.full((3, 1), 0.2, dtype=np.float32))
        if truncated[1]:
            last = told["final_info"]["kpis"]
    for name, value in infos[-1]["kpis"].items():
        assert last[name][1] == pytest.approx(value, rel=1e-12), name


def test_a_trace_with_shared_prefixes_is_written_into_the_spec() -> None:
    env = gym.make(IDS["prefill"], trace=prefix_trace(), rate_rps=4.0, episode_s=6.0)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    np.testing.assert_array_equal(env.reset(seed=4)[0], again.reset(seed=4)[0])
    np.testing.assert_array_equal(
        env.unwrapped._tables.of(0).prefix, again.unwrapped._tables.of(0).prefix
    )


def test_without_key_figures() -> None:
    env = gym.make(IDS["prefill"], kpis=False, **SMALL)
    assert "kpis" not in finish(env, 1.0)[-1]
    with pytest.raises(BiscaleError, match="kpis=False"):
        env.unwrapped.kpis()
    with pytest.raises(BiscaleError, match="reset"):
        gym.make(IDS["prefill"], **SMALL).unwrapped.kpis()


def test_runs_of_max_clock_are_remembered_and_bounded() -> None:
    env = gym.make(IDS["prefill"], **SMALL).unwrapped
    for _ in range(2):
        finish(env, 0.0, workload=3)
    finish(env, 0.0, workload=4)
    assert len(env._reference._known) == 2 < KEPT_REFERENCES
