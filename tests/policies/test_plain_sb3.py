"""Models of plain Stable-Baselines3 as policies: each algorithm, spaces that fit and do not."""

import json
import zipfile

import gymnasium as gym
import numpy as np
import pytest
from controllers_cases import context, recorded

import biscale_env  # noqa: F401 - registers the environments
from biscale_env.core.errors import BiscaleError
from biscale_env.policies import phases_of, policy_settings, resolve_policy
from biscale_env.policies.plain_sb3 import algorithm_of, phase_of_plain

pytest.importorskip("stable_baselines3")
ALGORITHMS = {
    "PPO": "BiScale/Decode-v1",
    "A2C": "BiScale/Prefill-v1",
    "SAC": "BiScale/Decode-v1",
    "TD3": "BiScale/Decode-v1",
    "DQN": "BiScale/DecodeDiscrete-v1",
    "RecurrentPPO": "BiScale/Decode-v1",
    "TRPO": "BiScale/Decode-v1",
}


def untrained(name, env):
    package = "stable_baselines3" if name in ("PPO", "A2C", "SAC", "TD3", "DQN") else "sb3_contrib"
    made = getattr(pytest.importorskip(package), name)
    more = {"buffer_size": 10} if name in ("SAC", "TD3", "DQN") else {}
    policy = "MlpLstmPolicy" if name == "RecurrentPPO" else "MlpPolicy"
    return made(policy, env, seed=0, policy_kwargs={"net_arch": [4]}, **more)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_zip_of_every_algorithm_acts_as_its_model(name, tmp_path):
    env = gym.make(ALGORITHMS[name])
    phase = "prefill" if "Prefill" in ALGORITHMS[name] else "decode"
    model = untrained(name, env)
    model.save(tmp_path / "mine.zip")
    path = str(tmp_path / "mine.zip")
    assert phases_of(path) == (phase,)
    assert policy_settings(path, phase) == []
    assert algorithm_of(tmp_path / "mine.zip").__name__ == name
    c, rows = context(phase), recorded(phase, 5)
    mine, _ = resolve_policy(path, c).predict(rows, deterministic=True)
    expected, _ = model.predict(rows, deterministic=True)
    if name == "DQN":
        expected = c.clocks.to_action(np.asarray(c.clocks.levels_mhz))[expected][:, None]
    assert mine.shape == (5, 1)
    np.testing.assert_array_equal(mine, expected.astype(np.float32))
    one, _ = resolve_policy(path, c).predict(rows[0], deterministic=True)
    assert one.shape == (1,)


def test_spaces_that_do_not_fit_are_one_sentence(tmp_path):
    path = tmp_path / "mine.zip"
    other = gym.make("CartPole-v1")
    untrained("PPO", other).save(path)
    with pytest.raises(BiscaleError, match=r"shape \(4,\) are neither those of prefill \(63,\)"):
        phases_of(str(path))
    untrained("A2C", gym.make("BiScale/Prefill-v1")).save(path)
    with pytest.raises(BiscaleError, match="is for prefill, not for decode"):
        resolve_policy(str(path), context("decode"))
    with pytest.raises(BiscaleError, match="plain Stable-Baselines3 takes no parameters"):
        resolve_policy(f"{path}:margin=0.1", context("prefill"))


def test_a_zip_that_is_no_model_is_one_sentence(tmp_path):
    path = tmp_path / "mine.zip"
    path.write_bytes(b"no zip")
    with pytest.raises(BiscaleError, match="corrupt, or not a model of Stable-Baselines3"):
        phase_of_plain(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data", json.dumps({"observation_space": {"_shape": [21]}}))
    with pytest.raises(BiscaleError, match="an algorithm that is not known here"):
        resolve_policy(str(path), context("decode"))
    with zipfile.ZipFile(path, "w") as file:
        data = {"observation_space": {"_shape": [21]}, "clip_range": 0.2}
        file.writestr("data", json.dumps(data))
    with pytest.raises(BiscaleError, match="cannot be loaded"):
        resolve_policy(str(path), context("decode"))


def test_more_or_fewer_clock_levels_are_refused(tmp_path):
    class Env(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (21,), np.float32)
        action_space = gym.spaces.Discrete(3)

    untrained("DQN", Env()).save(tmp_path / "mine.zip")
    with pytest.raises(BiscaleError, match="chooses among 3 clock levels, but this GPU has 7"):
        resolve_policy(str(tmp_path / "mine.zip"), context("decode"))
    Env.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    untrained("SAC", Env()).save(tmp_path / "mine.zip")
    with pytest.raises(BiscaleError, match="the environments take one clock"):
        resolve_policy(str(tmp_path / "mine.zip"), context("decode"))
