"""From what a caller hands to ``step`` to clock actions in [-1, 1], for every environment.

A box action is one number in [-1, 1] (shape (1,), a scalar or a 0-d array); what lies outside is
clipped by the simulator. A discrete action is the index of a clock level.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from biscale_env.contract import ClockRange
from biscale_env.core.errors import BiscaleError

Floats32 = NDArray[np.float32]
FLOAT32 = np.dtype(np.float32)  # NumPy has one object of it


def numbers(action: Any, kinds: str, what: str) -> NDArray[Any]:
    """The action as an array of numbers.

    Args:
        action: anything that NumPy makes an array of.
        kinds: kinds of dtype that are meant, e.g. ``iuf``.
        what: what an action is, for the error.

    Raises:
        BiscaleError: not numbers of these kinds.
    """
    try:
        array = np.asarray(action)
    except (TypeError, ValueError):
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in kinds:
        shown = " ".join(repr(action).split())
        shown = shown if len(shown) <= 40 else f"a {type(action).__name__}"
        raise BiscaleError(f"an action is {what}, got {shown}")
    return array


class ActionReader:
    """Reads actions for the clocks of one plant.

    Attributes:
        space: action space of one environment.
    """

    def __init__(self, clocks: ClockRange, discrete: bool) -> None:
        """Choose between clock levels and the whole range."""
        levels = clocks.to_action(np.array(clocks.levels_mhz)).astype(np.float32)
        self._levels = levels if discrete else None
        self.space: gym.Space[Any] = (
            gym.spaces.Discrete(len(levels))
            if discrete
            else gym.spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)
        )
        self._kinds = "iu" if discrete else "iuf"
        self._what = (
            f"the index of a clock level, 0 to {len(levels) - 1}"
            if discrete
            else "one number in [-1, 1]"
        )

    def one(self, action: Any) -> float:
        """The clock action of one environment.

        Raises:
            BiscaleError: not one number, not a number (NaN), or a clock level that does not exist.
        """
        if type(action) is np.ndarray and action.dtype is FLOAT32 and action.size == 1:
            value: float = action.item()  # the usual case, without the checks of the others
            if value == value and self._levels is None:
                return value
        array = numbers(action, self._kinds, self._what)
        if array.size != 1:
            raise BiscaleError(f"an action is {self._what}, got shape {array.shape}")
        return float(self._checked(array.reshape(1))[0])

    def many(self, actions: Any, num_envs: int) -> Floats32:
        """The clock actions of ``num_envs`` environments, given as (n,) or (n, 1); float32 (n,).

        Raises:
            BiscaleError: another shape, not a number (NaN), or a clock level that does not exist.
        """
        array = numbers(actions, self._kinds, f"{self._what} for each environment")
        alone = num_envs == 1 and array.size == 1
        if array.shape not in ((num_envs,), (num_envs, 1)) and not alone:
            raise BiscaleError(
                f"actions of {num_envs} environments have shape ({num_envs}, 1) or ({num_envs},), "
                f"got {array.shape}"
            )
        return self._checked(array.reshape(num_envs))

    def _checked(self, flat: NDArray[Any]) -> Floats32:
        if self._levels is not None:
            wrong = (flat < 0) | (flat >= len(self._levels))
            if wrong.any():
                last = len(self._levels) - 1
                raise BiscaleError(
                    f"clock level {flat[wrong][0]} does not exist: choose 0 to {last}"
                )
            return self._levels[flat]
        read = np.ascontiguousarray(flat, dtype=np.float32)
        if np.isnan(read.dot(read)):  # quicker than asking each
            where = f" of environment {int(np.argmax(np.isnan(read)))}" if read.size > 1 else ""
            raise BiscaleError(f"the action{where} is not a number (NaN): give one in [-1, 1]")
        return read
