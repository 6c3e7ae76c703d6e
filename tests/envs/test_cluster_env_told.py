"""What the cluster environments tell and show: infos, key figures, screens, specs, the load."""

import json
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("pettingzoo")

import biscale_env  # noqa: F401 - registers the ids
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.parallel_env import ClusterParallelEnv

ID = "BiScale/Cluster-v1"
SMALL: dict[str, Any] = {
    "windows": 3,
    "window_s": 10.0,
    "rate_rps": 15.0,
    "freqs_mhz": (1200, 1980),
}


def finish(env: gym.Env, action: int = -1) -> list[dict[str, Any]]:
    infos = [env.reset(seed=0)[1]]
    over = False
    while not over:
        *_, over, info = env.step(action % int(env.action_space.n))
        infos.append(info)
    return infos


def test_infos_have_the_same_keys_and_key_figures_come_last() -> None:
    infos = finish(gym.make(ID, **SMALL))
    kpis = infos[-1].pop("kpis")
    assert all(set(info) == set(infos[0]) for info in infos)
    assert [info["dt"] for info in infos] == [0.0, 10.0, 10.0, 10.0]
    assert [info["time_s"] for info in infos] == pytest.approx([0, 10, 20, 30])
    assert kpis["energy_j"] == pytest.approx(sum(info["energy_j"] for info in infos))
    assert kpis["duration_s"] == 30.0
    assert kpis["energy_per_token_j"] == pytest.approx(kpis["energy_j"] / kpis["tokens"])
    assert 0 < kpis["ttft_p99_s"] < 5
    assert 0 < kpis["tpot_p99_s"] < 1
    assert kpis["requests_unfinished"] > 0


def test_attainment_counts_a_request_once_that_misses_both_bounds() -> None:
    slo = {"name": "none", "ttft_s": 1e-6, "tpot_s": 1e-6, "attainment": 0.99}
    infos = finish(gym.make(ID, slo=slo, **SMALL))
    kpis = infos[-1]["kpis"]
    assert kpis["attainment"] == 0.0
    assert sum(info["cost"] for info in infos) > kpis["requests_finished"]


def test_no_key_figures_before_the_first_window() -> None:
    env = gym.make(ID, **SMALL).unwrapped
    env.reset(seed=0)
    with pytest.raises(BiscaleError, match="step"):
        env.kpis()


def test_the_vector_form_tells_them_at_the_end() -> None:
    vector = gym.make_vec(ID, num_envs=2, **SMALL)
    single = finish(gym.make(ID, **SMALL))[-1]["kpis"]
    vector.reset(seed=[0, 1])
    last = vector.action_space.nvec - 1
    for _ in range(3):
        infos = vector.step(last)[4]
    for name, value in single.items():
        assert infos["final_info"]["kpis"][name][0] == pytest.approx(value)


def test_screens_show_windows_and_each_vector_environment_has_its_own() -> None:
    env = gym.make(ID, render_mode="ansi", **SMALL)
    infos = finish(env)
    screen = env.unwrapped._screen
    shown = [step.values["power_kw"] for step in screen.steps]
    assert shown == pytest.approx([info["energy_j"] / 1e4 for info in infos[1:]])
    assert "requests/s" in env.render()
    vector = gym.make_vec(ID, num_envs=2, render_mode="ansi", **SMALL)
    vector.reset(seed=0)
    vector.step(vector.action_space.nvec - 1)
    first, second = vector.render()
    assert first != second


def test_a_spec_with_capacities_is_json() -> None:
    kinds = {("prefill", 4, 1980.0): 9.0, ("decode", 4, 1980.0): 8.0}
    env = gym.make(ID, capacities_rps=kinds, **SMALL)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert json.loads(env.spec.to_json())["kwargs"]["capacities_rps"]
    for one in (env, again):
        one.reset(seed=0)
        one.step(0)
    np.testing.assert_array_equal(env.unwrapped.action_masks(), again.unwrapped.action_masks())
    with pytest.raises(BiscaleError, match="capacities_rps"):
        gym.make(ID, capacities_rps=[1, 2], **SMALL)


def test_masks_leave_something_out_without_capacities() -> None:
    env = gym.make(ID, windows=2, window_s=20.0, rate_rps=40.0).unwrapped
    env.reset(seed=0)
    env.step(len(env.placements) - 1)
    allowed = env.action_masks()
    assert 0 < allowed.sum() < len(allowed)


# --- many agents --------------------------------------------------------------------------------


def play(env: ClusterParallelEnv, action: float) -> tuple[float, float, float]:
    """Energy of all instances, requests that missed a bound, and finished ones, at one clock."""
    env.reset(seed=0)
    energy_j = cost = 0.0
    while env.agents:
        _, _, _, _, infos = env.step({agent: np.array([action]) for agent in env.agents})
        energy_j += sum(info["energy_j"] for info in infos.values())
        cost += sum(info["cost"] for info in infos.values())
    assert env.cluster is not None
    return energy_j, cost, float(env.cluster.counts()["finished"])


def test_at_the_default_load_something_is_at_stake() -> None:
    """Max clock serves it within the SLO; the lowest clock saves energy and does not."""
    env = ClusterParallelEnv(episode_s=30.0)
    top_j, top_missed, finished = play(env, 1.0)
    low_j, low_missed, _ = play(env, -1.0)
    assert top_missed <= 0.01 * finished
    assert low_missed > 0.03 * finished
    assert low_j < 0.8 * top_j


def test_agents_are_told_the_same_keys_always() -> None:
    env = ClusterParallelEnv(rate_rps=10.0, episode_s=2.0)
    _, infos = env.reset(seed=0)
    keys = {frozenset(info) for info in infos.values()}
    time_s = 0.0
    while env.agents:
        _, _, _, _, infos = env.step({agent: np.array([0.0]) for agent in env.agents})
        keys |= {frozenset(info) for info in infos.values()}
        time_s += next(iter(infos.values()))["dt"]
    assert len(keys) == 1
    assert {"time_s", "dt", "energy_j", "freq_mhz", "cost"} <= set(keys.pop())
    assert time_s == pytest.approx(2.0)


def test_agents_on_a_screen() -> None:
    env = ClusterParallelEnv(rate_rps=10.0, episode_s=5.0, render_mode="ansi")
    assert env.render() is None
    env.reset(seed=0)
    for _ in range(10):
        _, _, _, _, infos = env.step({agent: np.array([0.0]) for agent in env.agents})
    assert "mean clock of decode" in env.render()
    assert env._screen is not None
    power_kw = [step.values["power_kw"] for step in env._screen.steps]
    last = sum(info["energy_j"] for info in infos.values()) / 100.0
    assert power_kw[-1] == pytest.approx(last)
    assert len(power_kw) == 10
