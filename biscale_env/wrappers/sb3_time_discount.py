"""Discounting by time in Stable-Baselines3's on-policy algorithms (PPO, A2C)."""

from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from biscale_env.wrappers.time_discount import checked_horizon, discount


class StepLengths:
    """Discounts of the latest step of every environment, shared by environment and buffer."""

    def __init__(self, n_envs: int, horizon_s: float) -> None:
        """No step has been made yet."""
        self.horizon_s = checked_horizon(horizon_s)
        self.discounts = np.ones(n_envs, dtype=np.float32)


class TimedVecEnv(VecEnvWrapper):
    """Reads ``dt`` of every step for :class:`TimeDiscountedBuffer`.

    Attributes:
        lengths: what the buffer reads.
    """

    def __init__(self, venv: VecEnv, horizon_s: float = 10.0) -> None:
        """Wrap a vector environment of SB3 whose infos tell ``dt``."""
        super().__init__(venv)
        self.lengths = StepLengths(venv.num_envs, horizon_s)

    def reset(self) -> Any:
        """Start all episodes."""
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """Step, and keep the discounts."""
        observations, rewards, dones, infos = self.venv.step_wait()
        lengths_s = np.array([info["dt"] for info in infos])
        self.lengths.discounts = discount(lengths_s, self.lengths.horizon_s).astype(np.float32)
        return observations, rewards, dones, infos


class TimeDiscountedBuffer(RolloutBuffer):
    """Generalised advantages with a discount per transition instead of ``gamma``.

    ``PPO("MlpPolicy", timed, rollout_buffer_class=TimeDiscountedBuffer,
    rollout_buffer_kwargs={"lengths": timed.lengths})``. SB3 itself bootstraps the last step of a
    truncated episode with its ``gamma``: set that near the mean discount.
    """

    def __init__(self, *args: Any, lengths: StepLengths, **kwargs: Any) -> None:
        """Make room for discounts.

        Args:
            *args: of SB3's buffer.
            lengths: of the :class:`TimedVecEnv` that is stepped.
            **kwargs: of SB3's buffer.
        """
        self.lengths = lengths
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        """Empty the buffer."""
        super().reset()
        self.discounts = np.ones((self.buffer_size, self.n_envs), dtype=np.float32)

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Add a transition of every environment, with its discount."""
        self.discounts[self.pos] = self.lengths.discounts
        super().add(*args, **kwargs)

    def compute_returns_and_advantage(
        self, last_values: th.Tensor, dones: NDArray[np.bool_]
    ) -> None:
        """Advantages by GAE (Schulman et al. 2016) with the discount of each transition."""
        last = last_values.clone().cpu().numpy().flatten()
        after = np.zeros(self.n_envs, dtype=np.float32)
        for k in reversed(range(self.buffer_size)):
            end = k == self.buffer_size - 1
            alive = 1.0 - (dones.astype(np.float32) if end else self.episode_starts[k + 1])
            values = last if end else self.values[k + 1]
            kept = self.discounts[k] * alive
            delta = self.rewards[k] + kept * values - self.values[k]
            after = delta + kept * self.gae_lambda * after
            self.advantages[k] = after
        self.returns = self.advantages + self.values
