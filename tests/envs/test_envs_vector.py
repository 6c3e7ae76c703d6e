"""The native vector environment and its SB3 adapter.

The same physics as the single one, and both libraries' conventions.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import biscale_env  # noqa: F401 - registers the ids
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.registration import ENV_IDS
from biscale_env.envs.single import DecodeEnv, PrefillEnv
from biscale_env.envs.vector import PhaseVectorEnv

SMALL: dict[str, Any] = {"rate_rps": 4.0, "episode_s": 4.0, "n_workloads": 8}
PHASES = ("prefill", "decode")


def actions_for(env: PhaseVectorEnv, seed: int, steps: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (steps, env.num_envs, 1)).astype(np.float32)


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_make_vec_by_entry_point(env_id: str) -> None:
    env = gym.make_vec(env_id, num_envs=3, vectorization_mode="vector_entry_point", **SMALL)
    assert isinstance(env.unwrapped, PhaseVectorEnv)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    obs, _ = env.reset(seed=0)
    assert obs.shape == (3, env.single_observation_space.shape[0])
    assert env.observation_space.contains(obs)
    obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
    assert env.observation_space.contains(obs)
    assert reward.shape == terminated.shape == truncated.shape == (3,)
    env.close()


@pytest.mark.parametrize("phase", PHASES)
def test_equals_single_env_step_by_step(phase: str) -> None:
    """Copy i seeded with s + i walks the path of a single environment seeded with s + i, over
    several episodes.
    """
    options = {**SMALL, "ensemble_member": "random", "kpis": False}
    vector = PhaseVectorEnv(phase, 4, **options)
    singles = [(PrefillEnv if phase == "prefill" else DecodeEnv)(**options) for _ in range(4)]
    obs, _ = vector.reset(seed=10)
    for i, env in enumerate(singles):
        np.testing.assert_array_equal(obs[i], env.reset(seed=10 + i)[0])
    ended = np.zeros(4, dtype=int)
    for acts in actions_for(vector, 0, 60 if phase == "prefill" else 400):
        obs, reward, terminated, truncated, infos = vector.step(acts)
        assert not terminated.any()
        for i, env in enumerate(singles):
            one, r, _, end, info = env.step(acts[i])
            assert (r, end) == (reward[i], truncated[i])
            told = infos["final_info"] if end else infos
            for key, value in info.items():
                assert told[f"_{key}"][i]
                assert told[key][i] == pytest.approx(value, rel=1e-12), key
            if end:
                np.testing.assert_array_equal(infos["final_obs"][i], one)
                ended[i] += 1
                one = env.reset()[0]
            np.testing.assert_array_equal(obs[i], one)
    assert ended.min() >= 1


@pytest.mark.parametrize("phase", PHASES)
def test_same_step_autoreset(phase: str) -> None:
    """The step that ends an episode returns the next one's first observation.

    The last one is ``final_obs``.
    """
    env = PhaseVectorEnv(phase, 3, **SMALL)
    env.reset(seed=0)
    seen = 0
    for acts in actions_for(env, 1, 600):
        obs, _, _, truncated, infos = env.step(acts)
        if not truncated.any():
            assert "final_obs" not in infos
            continue
        seen += 1
        np.testing.assert_array_equal(infos["_final_obs"], truncated)
        for i in range(3):
            if truncated[i]:
                assert infos["final_obs"][i].shape == obs[i].shape
                assert infos["final_info"]["time_s"][i] >= 4.0
                assert env.batch.states[i]["time_s"] < 4.0
                assert not np.array_equal(infos["final_obs"][i], obs[i])
            else:
                assert infos["final_obs"][i] is None
    assert seen >= 3
    assert not env.batch.done.any()


def test_outputs_are_not_views() -> None:
    env = PhaseVectorEnv("prefill", 2, **SMALL)
    first, _ = env.reset(seed=0)
    kept = first.copy()
    acts = actions_for(env, 0, 2)
    _, reward, _, _, infos = env.step(acts[0])
    copies = reward.copy(), {k: v.copy() for k, v in infos.items()}
    env.step(acts[1])
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(reward, copies[0])
    for key, value in infos.items():
        np.testing.assert_array_equal(value, copies[1][key])


def test_seeds_of_a_vector_env() -> None:
    """Same seed same path; numpy integers are seeds; a list seeds each copy; None continues.

    Copies differ.
    """
    one, two = PhaseVectorEnv("prefill", 3, **SMALL), PhaseVectorEnv("prefill", 3, **SMALL)
    a, _ = one.reset(seed=0)
    b, _ = two.reset(seed=np.int64(0))
    np.testing.assert_array_equal(a, b)
    c, _ = two.reset(seed=[0, 1, 2])
    np.testing.assert_array_equal(a, c)
    np.testing.assert_array_equal(one.reset()[0], two.reset()[0])
    firsts = {tuple(PhaseVectorEnv("prefill", 1, **SMALL).reset()[0][0]) for _ in range(6)}
    assert len(firsts) > 1


def test_reset_mask_restarts_only_some() -> None:
    env = PhaseVectorEnv("decode", 3, **SMALL)
    env.reset(seed=0)
    for acts in actions_for(env, 0, 10):
        env.step(acts)
    before = env.batch.states["iterations"].copy()
    obs_before = env.batch.obs.copy()
    obs, _ = env.reset(options={"reset_mask": np.array([False, True, False])})
    assert env.batch.states["iterations"].tolist() == [before[0], 0, before[2]]
    np.testing.assert_array_equal(obs[[0, 2]], obs_before[[0, 2]])


def test_discrete_vector_env() -> None:
    env = PhaseVectorEnv("prefill", 2, discrete=True, **SMALL)
    env.reset(seed=0)
    env.step(np.array([0, 6]))
    np.testing.assert_allclose(env.batch.states["requested_ghz"], [0.81, 1.98])
    for bad in ([0, 7], [-1, 0]):
        with pytest.raises(BiscaleError, match="clock level"):
            env.step(np.array(bad))


def test_mistakes_are_sentences() -> None:
    with pytest.raises(BiscaleError, match="num_envs"):
        PhaseVectorEnv("prefill", 0, **SMALL)
    with pytest.raises(BiscaleError, match="reset"):
        PhaseVectorEnv("prefill", 1, **SMALL).step(np.zeros((1, 1)))


def test_sb3_vec_env_conventions() -> None:
    pytest.importorskip("stable_baselines3")
    from biscale_env.envs.sb3 import make_sb3

    venv, native = make_sb3("prefill", 3, **SMALL), PhaseVectorEnv("prefill", 3, **SMALL)
    venv.seed(4)
    obs = venv.reset()
    np.testing.assert_array_equal(obs, native.reset(seed=4)[0])
    ended = 0
    for acts in actions_for(native, 2, 300):
        obs, reward, done, infos = venv.step(acts)
        expected, r, _, truncated, more = native.step(acts)
        np.testing.assert_array_equal(obs, expected)
        np.testing.assert_allclose(reward, r, rtol=1e-6)
        np.testing.assert_array_equal(done, truncated)
        assert obs.dtype == reward.dtype == np.float32
        assert len(infos) == 3
        for i in range(3):
            told = more["final_info"] if truncated[i] else more
            assert infos[i]["cost"] == told["cost"][i]
            assert infos[i]["energy_j"] == told["energy_j"][i]
            assert infos[i]["dt"] == told["dt"][i]
            assert type(infos[i]["cost"]) is float
            assert infos[i].get("TimeLimit.truncated", False) == bool(truncated[i])
            if truncated[i]:
                np.testing.assert_array_equal(
                    infos[i]["terminal_observation"], more["final_obs"][i]
                )
                ended += 1
    assert ended >= 3
    assert venv.get_attr("plant") == [venv.env.plant] * 3
    assert venv.env_is_wrapped(gym.Wrapper, indices=[0, 1]) == [False, False]


def test_sb3_logs_returns_of_episodes_and_can_scale_rewards() -> None:
    """VecMonitor tells the return of the environment itself, whatever VecNormalize makes of it."""
    pytest.importorskip("stable_baselines3")
    from biscale_env.envs.sb3 import SB3VecEnv, make_sb3

    plain = make_sb3("prefill", 3, kpis=True, **SMALL)
    scaled = make_sb3("prefill", 3, normalize_reward=0.99, **SMALL)
    for venv in (plain, scaled):
        venv.seed(4)
        venv.reset()
    total, ended, rewards = np.zeros(3), 0, []
    for acts in actions_for(PhaseVectorEnv("prefill", 3, **SMALL), 2, 60):
        _, reward, done, infos = plain.step(acts)
        _, r, _, told = scaled.step(acts)
        rewards.append((reward, r))
        total += reward
        for i in np.flatnonzero(done):
            assert infos[i]["episode"]["r"] == pytest.approx(total[i], abs=1e-4)
            assert told[i]["episode"]["r"] == pytest.approx(infos[i]["episode"]["r"], abs=1e-4)
            assert infos[i]["kpis"]["energy_ratio"] > 0
            assert "kpis" not in told[i]
            total[i], ended = 0.0, ended + 1
    assert ended > 3
    assert np.std([s for _, s in rewards]) < np.std([r for r, _ in rewards])
    with pytest.raises(BiscaleError, match="SAME_STEP"):
        SB3VecEnv(PhaseVectorEnv("prefill", 2, autoreset_mode="NEXT_STEP", **SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_ppo_trains_and_is_evaluated(phase: str) -> None:
    """SB3's own PPO and evaluate_policy run over the native batch and the single environment."""
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    from biscale_env.envs.sb3 import make_sb3

    venv = make_sb3(phase, 8, **SMALL)
    model = sb3.PPO("MlpPolicy", venv, n_steps=32, batch_size=64, n_epochs=2, seed=0, device="cpu")
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(512)
    assert model.num_timesteps == 512
    assert any((p != q).any() for p, q in zip(model.policy.parameters(), before, strict=True))
    single = (PrefillEnv if phase == "prefill" else DecodeEnv)(**SMALL)
    mean, deviation = evaluate_policy(model, Monitor(single), n_eval_episodes=2)
    assert mean < 0 <= deviation
    mean, _ = evaluate_policy(model, venv, n_eval_episodes=8, warn=False)
    assert mean < 0


@pytest.mark.skipif(
    tuple(map(int, gym.__version__.split(".")[:2])) < (1, 4),
    reason="before 1.4 the wrapper leaves out the first step after a SAME_STEP reset",
)
def test_gymnasium_statistics_wrapper_understands_it() -> None:
    """Gymnasium's own bookkeeping over SAME_STEP resets: returns and lengths of whole episodes."""
    native = PhaseVectorEnv("prefill", 2, **SMALL)
    env = gym.wrappers.vector.RecordEpisodeStatistics(native)
    env.reset(seed=0)
    total, length, ended = np.zeros(2), np.zeros(2, dtype=int), 0
    for acts in actions_for(native, 0, 100):
        _, reward, _, truncated, infos = env.step(acts)
        total, length = total + reward, length + 1
        for i in np.flatnonzero(truncated):
            assert infos["episode"]["r"][i] == pytest.approx(total[i])
            assert infos["episode"]["l"][i] == length[i]
            total[i], length[i], ended = 0.0, 0, ended + 1
    assert ended > 2
