"""Other ways to say what the clock shall be: in MHz, as a level, as a change, as a power limit."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from biscale_env.contract import ClockRange
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.actions import ActionReader, numbers
from biscale_env.envs.power_caps import LOWEST_LIMIT_W
from biscale_env.envs.single import PhaseEnv
from biscale_env.wrappers.last_step import phase_env, requested_mhz

Floats32 = NDArray[np.float32]


def one_number(action: Any, what: str) -> float:
    """The number that an action is.

    Raises:
        BiscaleError: not one number, or NaN.
    """
    value = numbers(action, "iuf", what)
    if value.size != 1 or np.isnan(value).any():
        raise BiscaleError(f"an action is {what}, got {value.tolist()}")
    return float(value.item())


class _ClockWrapper(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """A wrapper that answers the environment with a clock of its own finding."""

    def __init__(self, env: "gym.Env[Any, Any]", **arguments: Any) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, **arguments)
        super().__init__(env)
        self._inner: PhaseEnv = phase_env(env, type(self).__name__)
        if not isinstance(env.action_space, gym.spaces.Box) or env.action_space.shape != (1,):
            raise BiscaleError(
                f"{type(self).__name__} needs the action of the continuous ids, one number in "
                f"[-1, 1], got {env.action_space}"
            )
        self.clocks: ClockRange = self._inner.plant.clocks

    def _step_at(self, freq_mhz: float) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One decision for a clock, clipped to the range."""
        kept = min(max(freq_mhz, self.clocks.freq_min_mhz), self.clocks.freq_max_mhz)
        return self.env.step(self.clocks.to_action([kept]))


class MhzAction(_ClockWrapper):
    """The action is a clock, MHz; what lies outside the range is clipped."""

    def __init__(self, env: "gym.Env[Any, Any]") -> None:
        """Wrap an environment with continuous actions."""
        super().__init__(env)
        low, high = self.clocks.freq_min_mhz, self.clocks.freq_max_mhz
        self.action_space = gym.spaces.Box(low, high, (1,), dtype=np.float32)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One decision."""
        return self._step_at(one_number(action, "one clock in MHz"))


class LevelAction(_ClockWrapper):
    """The action is the index of a clock level."""

    def __init__(self, env: "gym.Env[Any, Any]", levels_mhz: Sequence[float] | None = None) -> None:
        """Wrap an environment with continuous actions.

        Args:
            env: of one instance.
            levels_mhz: the levels, MHz; None: those of the discrete ids.

        Raises:
            BiscaleError: a level that the GPU does not have.
        """
        super().__init__(env, levels_mhz=None if levels_mhz is None else list(levels_mhz))
        chosen = self.clocks.levels_mhz if levels_mhz is None else levels_mhz
        self.levels_mhz = tuple(float(level) for level in chosen)
        for level in self.levels_mhz:
            self._inner.plant.gpu.check_clock(level)
        own = ClockRange(
            self.clocks.freq_min_mhz,
            self.clocks.freq_max_mhz,
            self.clocks.freq_step_mhz,
            self.levels_mhz,
        )
        self._reader = ActionReader(own, discrete=True)
        self.action_space = self._reader.space

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One decision."""
        return self.env.step(np.array([self._reader.one(action)], dtype=np.float32))


class DeltaAction(_ClockWrapper):
    """The action changes the clock that was asked for last, which is max clock at the start.

    It is a number in [-1, 1], times ``most_mhz``; or, with ``moves_mhz``, the index of a change.
    """

    def __init__(
        self,
        env: "gym.Env[Any, Any]",
        most_mhz: float = 300.0,
        moves_mhz: Sequence[float] | None = None,
    ) -> None:
        """Wrap an environment with continuous actions.

        Args:
            env: of one instance.
            most_mhz: greatest change per decision, MHz.
            moves_mhz: changes to choose from instead, MHz, e.g. ``(-150, 0, 150)``.

        Raises:
            BiscaleError: a change that is not a positive number, or no moves.
        """
        moves = None if moves_mhz is None else [float(move) for move in moves_mhz]
        super().__init__(env, most_mhz=most_mhz, moves_mhz=moves)
        if not 0 < most_mhz < np.inf:
            raise BiscaleError(f"most_mhz must be a positive number, got {most_mhz}")
        if moves is not None and not (moves and np.isfinite(moves).all()):
            raise BiscaleError(f"moves_mhz must be changes in MHz, got {moves_mhz}")
        self.most_mhz, self.moves_mhz = float(most_mhz), moves
        self.action_space = (
            gym.spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)
            if moves is None
            else gym.spaces.Discrete(len(moves))
        )

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One decision."""
        return self._step_at(requested_mhz(self._inner) + self._change_mhz(action))

    def _change_mhz(self, action: Any) -> float:
        if self.moves_mhz is None:
            share = one_number(action, "one number in [-1, 1]")
            return self.most_mhz * min(max(share, -1.0), 1.0)
        what = f"the index of a change, 0 to {len(self.moves_mhz) - 1}"
        index = numbers(action, "iu", what)
        if index.size != 1 or not 0 <= int(index.item()) < len(self.moves_mhz):
            raise BiscaleError(f"an action is {what}, got {index.tolist()}")
        return self.moves_mhz[int(index.item())]


class PowerCapAction(_ClockWrapper):
    """The action is a power limit of each GPU; the clock asked for stays at the highest.

    -1 is the lowest limit, 1 that of the board, linear between. It holds from the next iteration
    on, without the delay of a clock change (assumed), and works as the simulator's cap always does:
    every iteration runs at the highest clock at which its mean power keeps the limit, or at the
    lowest clock if none does. Clocks held by limits, with the delay of a clock change, are the
    environments' own option ``means="cap"``.
    """

    def __init__(self, env: "gym.Env[Any, Any]", low_w: float = LOWEST_LIMIT_W) -> None:
        """Wrap an environment with continuous actions.

        Args:
            env: of one instance.
            low_w: lowest limit, W; the default is the lowest that an H100 SXM takes.

        Raises:
            BiscaleError: it is not between 0 and the limit of the board.
        """
        super().__init__(env, low_w=low_w)
        self.high_w = float(self._inner.plant.model.member(-1).p_cap_w)
        if not 0 < low_w < self.high_w:
            raise BiscaleError(
                f"low_w must lie between 0 and the board's {self.high_w:g} W, got {low_w}"
            )
        self.low_w = float(low_w)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One decision."""
        share = min(max(one_number(action, "one number in [-1, 1]"), -1.0), 1.0)
        cap_w = self.low_w + 0.5 * (share + 1.0) * (self.high_w - self.low_w)
        self._inner.batch.coefs["p_cap_w"][0] = cap_w
        return self._step_at(self.clocks.freq_max_mhz)
