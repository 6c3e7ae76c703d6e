"""Discounting by time in Stable-Baselines3: the advantages, and that PPO runs with them."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("stable_baselines3")
import gymnasium as gym
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer

from biscale_env.envs.sb3 import make_sb3
from biscale_env.wrappers.sb3_time_discount import StepLengths, TimeDiscountedBuffer, TimedVecEnv

SMALL: dict[str, Any] = {"rate_rps": 6.0, "episode_s": 6.0}
BOX = gym.spaces.Box(-1, 1, (2,))


def filled(make: Any, discounts: np.ndarray, **more: Any) -> RolloutBuffer:
    """A buffer of random transitions; its seed and so its contents are always the same."""
    steps, n = discounts.shape
    lengths = StepLengths(n, 1.0)
    kwargs = {"lengths": lengths} if make is TimeDiscountedBuffer else {}
    buffer = make(steps, BOX, BOX, "cpu", n_envs=n, gae_lambda=0.9, **kwargs, **more)
    rng = np.random.default_rng(0)
    for k in range(steps):
        lengths.discounts = discounts[k]
        starts = rng.random(n) < 0.2
        buffer.add(
            rng.normal(size=(n, 2)), rng.normal(size=(n, 2)), rng.normal(size=n), starts,
            torch.tensor(rng.normal(size=n)), torch.zeros(n),
        )  # fmt: skip
    buffer.compute_returns_and_advantage(torch.tensor(rng.normal(size=n)), rng.random(n) < 0.5)
    return buffer


def test_with_equal_lengths_it_is_the_buffer_of_sb3() -> None:
    ours = filled(TimeDiscountedBuffer, np.full((30, 4), 0.93, dtype=np.float32), gamma=0.1)
    theirs = filled(RolloutBuffer, np.zeros((30, 4)), gamma=0.93)
    np.testing.assert_allclose(ours.advantages, theirs.advantages, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours.returns, theirs.returns, rtol=1e-4, atol=1e-5)


def test_with_lambda_one_returns_are_discounted_by_time() -> None:
    """Closed form: no values, no ends: the return is the sum of exp(-t / horizon) reward."""
    lengths_s = np.random.default_rng(3).exponential(0.2, (20, 1))
    steps = StepLengths(1, 2.0)
    buffer = TimeDiscountedBuffer(20, BOX, BOX, "cpu", gae_lambda=1.0, n_envs=1, lengths=steps)
    zero = torch.zeros(1)
    rewards = np.random.default_rng(4).normal(size=20)
    for k in range(20):
        steps.discounts = np.exp(-lengths_s[k] / 2.0).astype(np.float32)
        buffer.add(np.zeros(2), np.zeros(2), rewards[k : k + 1], np.zeros(1), zero, zero)
    buffer.compute_returns_and_advantage(zero, np.zeros(1, dtype=bool))
    times_s = np.concatenate([[0.0], np.cumsum(lengths_s)[:-1]])
    assert buffer.returns[0, 0] == pytest.approx((np.exp(-times_s / 2.0) * rewards).sum(), rel=1e-4)


def test_ppo_learns_with_it_and_its_file_is_small(tmp_path: Any) -> None:
    timed = TimedVecEnv(make_sb3("decode", 4, **SMALL), horizon_s=5.0)
    model = PPO(
        "MlpPolicy",
        timed,
        n_steps=16,
        batch_size=32,
        rollout_buffer_class=TimeDiscountedBuffer,
        rollout_buffer_kwargs={"lengths": timed.lengths},
    )
    model.learn(128)
    kept = model.rollout_buffer.discounts
    assert kept.shape == (16, 4)
    assert ((kept > 0.5) & (kept < 1)).all()
    model.save(tmp_path / "model.zip")
    assert (tmp_path / "model.zip").stat().st_size < 1_000_000
