"""Discounting by time: steps differ in length, and a low clock makes long ones.

With a discount per step, a second at a high clock is discounted more often than one at a low clock,
so that what it costs counts less: the discounted sum prefers high clocks. A semi-Markov decision
process discounts a step of length ``dt`` by ``exp(-dt / horizon_s)`` instead (Bradtke and Duff,
NIPS 1994).
"""

import math
from typing import Any

import gymnasium as gym
import numpy as np

from biscale_env.core.errors import BiscaleError


def discount(dt_s: Any, horizon_s: float) -> Any:
    """Discount of steps of these lengths, any shape."""
    return np.exp(-np.asarray(dt_s) / horizon_s)


def checked_horizon(horizon_s: float) -> float:
    """The horizon itself, if it is one.

    Raises:
        BiscaleError: not a positive number of seconds.
    """
    if not 0 < horizon_s < math.inf:
        raise BiscaleError(f"horizon_s must be a positive number of seconds, got {horizon_s}")
    return float(horizon_s)


class TimeDiscount(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Tells the discount of each step, or ends the episode as often as it says.

    ``info["discount"]`` is ``exp(-dt / horizon_s)``, for algorithms that take a discount per
    transition. With ``terminate=True`` a step ends the episode with probability ``1 - discount``
    (``terminated``): the expected undiscounted sum is then the time-discounted one exactly, so any
    library does it right with its own discount set to 1.
    """

    def __init__(
        self, env: "gym.Env[Any, Any]", horizon_s: float = 10.0, terminate: bool = False
    ) -> None:
        """Wrap an environment whose infos tell ``dt``.

        Args:
            env: any of this package.
            horizon_s: time after which a cost counts 1/e, s.
            terminate: end episodes at random.

        Raises:
            BiscaleError: the horizon is not a positive number.
        """
        gym.utils.RecordConstructorArgs.__init__(self, horizon_s=horizon_s, terminate=terminate)
        super().__init__(env)
        self.horizon_s, self.terminate = checked_horizon(horizon_s), terminate
        self._rng = np.random.default_rng()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start the next episode; a seed also restarts the random ends."""
        if seed is not None:
            self._rng = np.random.default_rng([seed, 1])
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, {**info, "discount": 1.0}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One decision."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        kept = float(discount(info["dt"], self.horizon_s))
        if self.terminate and self._rng.random() >= kept:
            terminated = True
        return observation, reward, terminated, truncated, {**info, "discount": kept}
