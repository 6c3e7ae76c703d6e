"""The last observations, actions and lengths of steps as one vector: memory for any network."""

from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError

Floats32 = NDArray[np.float32]


class History(
    gym.Wrapper[Floats32, Any, Floats32, Any],
    gym.utils.RecordConstructorArgs,
):
    """The newest observation, and those before it with what was done and how long it took.

    Layout: ``steps`` blocks, the newest first, each observation, action (a discrete one as 0 and 1
    per choice) and ``dt`` of the step that led to the observation. Before the first step the
    observation of the reset stands for earlier ones, with zeros for actions and ``dt``.
    """

    def __init__(self, env: "gym.Env[Any, Any]", steps: int = 4) -> None:
        """Wrap an environment.

        Args:
            env: its observations are vectors, its infos tell ``dt``.
            steps: observations in the vector, the newest included.

        Raises:
            BiscaleError: fewer than one step, or spaces that are none of these.
        """
        gym.utils.RecordConstructorArgs.__init__(self, steps=steps)
        super().__init__(env)
        space, actions = env.observation_space, env.action_space
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise BiscaleError(f"History needs observations that are vectors, got {space}")
        if steps < 1:
            raise BiscaleError(f"History needs at least one step, got {steps}")
        if isinstance(actions, gym.spaces.Discrete):
            low, high = np.zeros(int(actions.n)), np.ones(int(actions.n))
        elif isinstance(actions, gym.spaces.Box):
            low, high = actions.low.ravel(), actions.high.ravel()
        else:
            raise BiscaleError(f"History does not know actions of {actions}")
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
        self._none = np.zeros(low.size + 1, dtype=np.float32)
        block_low = np.concatenate([space.low, low, [0.0]])
        block_high = np.concatenate([space.high, high, [np.inf]])
        self.observation_space = gym.spaces.Box(
            np.tile(block_low, steps).astype(np.float32),
            np.tile(block_high, steps).astype(np.float32),
            dtype=np.float32,
        )
        self._blocks: deque[Floats32] = deque(maxlen=steps)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Floats32, dict[str, Any]]:
        """Start the next episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        block = np.concatenate([observation, self._none])
        self._blocks.extend([block] * int(self._blocks.maxlen or 1))
        return np.concatenate(self._blocks), info

    def step(self, action: Any) -> tuple[Floats32, Any, bool, bool, dict[str, Any]]:
        """One decision."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        done = self._none.copy()
        if isinstance(self.env.action_space, gym.spaces.Discrete):
            done[int(action)] = 1.0
        else:
            space = self.env.action_space
            done[:-1] = np.clip(np.ravel(action), np.ravel(space.low), np.ravel(space.high))  # type: ignore[attr-defined]
        done[-1] = info["dt"]
        self._blocks.appendleft(np.concatenate([observation, done]))
        return np.concatenate(self._blocks), reward, terminated, truncated, info
