"""Policies of the coarse loop, one placement per window, and BiScale's own among them.

All see the environment's observation only, and remember what they saw and chose.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from biscale_env.config.cluster_layout import Placement
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_env import FEATURES, SCALE
from controllers.placement.load_plans import LoadPlans

RATE: Final = [f[0] for f in FEATURES].index("arrival_rate")
DEFAULT_ALPHA: Final = 0.1
ALPHAS: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)
"""Headrooms that tuning tries."""

TUNE_GUARD: Final = 0.3
"""In tuning, this fraction of the violations that the SLO allows is kept back (assumed)."""


@dataclass(frozen=True)
class CoarseMemory:
    """What a coarse policy remembers of an episode.

    Attributes:
        rates_rps: load of every window so far, requests/s.
        placement: of the window before.
    """

    rates_rps: tuple[float, ...]
    placement: Placement


class CoarsePolicy(Protocol):
    """Anything that chooses placements from what it sees."""

    def place(
        self, observation: NDArray[np.float32], memory: CoarseMemory | None
    ) -> tuple[Placement, CoarseMemory]:
        """Placement of the next window.

        Args:
            observation: of ``BiScale/Cluster-v1``.
            memory: what the policy returned last time; None at the start of an episode.
        """
        ...


def remembered(
    observation: NDArray[np.float32], memory: CoarseMemory | None, keep: int = 12
) -> tuple[float, ...]:
    """Loads of the windows so far, requests/s, the last ``keep`` of them; none at the start."""
    if memory is None:
        return ()
    seen = float(observation[RATE] * SCALE[RATE])
    return (*memory.rates_rps, seen)[-keep:]


class AlwaysLargest:
    """DistServe's placement, at every load."""

    def __init__(self, plans: LoadPlans) -> None:
        """``plans`` has it."""
        self._plans = plans

    def place(
        self, observation: NDArray[np.float32], memory: CoarseMemory | None
    ) -> tuple[Placement, CoarseMemory]:
        """See :class:`CoarsePolicy`."""
        largest = self._plans.largest
        return largest, CoarseMemory(remembered(observation, memory), largest)


class IlpRule:
    """BiScale's tier 1: the integer programme for the load of the window before.

    Before the first window nothing is known and the largest placement is taken; a window without
    requests changes nothing.
    """

    def __init__(self, plans: LoadPlans, alpha: float = DEFAULT_ALPHA) -> None:
        """Take the programme and its headroom.

        Args:
            plans: solves it.
            alpha: headroom over the load of the window before.

        Raises:
            BiscaleError: a headroom of -1 or less.
        """
        if not -1 < alpha < np.inf:
            raise BiscaleError(f"the headroom alpha must be above -1, got {alpha:g}")
        self._plans, self.alpha = plans, alpha

    def place(
        self, observation: NDArray[np.float32], memory: CoarseMemory | None
    ) -> tuple[Placement, CoarseMemory]:
        """See :class:`CoarsePolicy`."""
        rates = remembered(observation, memory)
        if memory is None or not rates[-1] > 0:
            chosen = self._plans.largest if memory is None else memory.placement
        else:
            chosen = self._plans.placement((1 + self.alpha) * rates[-1])
        return chosen, CoarseMemory(rates, chosen)


RULES: Final[dict[str, Callable[..., Any]]] = {"ilp": IlpRule, "largest": AlwaysLargest}
