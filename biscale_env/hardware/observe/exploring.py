"""A policy that visits clocks which the SLO allows, so that live traffic shows what each does."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.contract import ClockRange, Policy
from biscale_env.policies import resolve_policy
from controllers.base import PolicyContext

EXPLORING = "biscale_env.hardware.observe.exploring:explore_above"
BASES = {"prefill": "mpc", "decode": "slack"}  # what knows which clocks the SLO allows
LEVELS = 7  # clocks visited, spread evenly over the range
HOLD = 40  # decisions at one clock: a clock change of 50 ms is seen after a few (chosen)


class Exploring:
    """Never below the clock that BiScale's own policy asks for; above it, each level in turn.

    A level is held for :data:`HOLD` decisions, in an order that is drawn anew for every round.
    Where the SLO asks for a higher clock than the level, that one is taken.
    """

    def __init__(self, base: Policy, clocks: ClockRange, seed: int = 0) -> None:
        """Explore above a policy.

        Args:
            base: asks for the lowest clock that the SLO allows.
            clocks: range of the clocks.
            seed: of the order of the levels.
        """
        self.base, self.clocks = base, clocks
        low, high = clocks.freq_min_mhz, clocks.freq_max_mhz
        self.levels_mhz = np.unique(clocks.snap_mhz(np.linspace(low, high, LEVELS)))
        self._rng = np.random.default_rng(seed)
        self._round: list[float] = []
        self._left = 0
        self._level_mhz = float(high)

    def _next_level(self) -> float:
        if self._left == 0:
            if not self._round:
                self._round = self._rng.permutation(self.levels_mhz).tolist()
            self._level_mhz, self._left = self._round.pop(), HOLD
        self._left -= 1
        return self._level_mhz

    def predict(
        self,
        observation: NDArray[np.float32],
        state: Any = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[np.float32], Any]:
        """The level whose turn it is, or what the base policy asks for where that is higher."""
        action, state = self.base.predict(observation, state, episode_start, deterministic)
        needed = self.clocks.to_freq_mhz(action)
        chosen = np.maximum(needed, self._next_level())
        return self.clocks.to_action(chosen), state


def explore_above(context: PolicyContext, seed: int = 0) -> Exploring:
    """Explore above BiScale's own policy of the context's phase."""
    return Exploring(resolve_policy(BASES[context.phase], context), context.clocks, seed)
