"""The interface of every policy, the one of Stable-Baselines3."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Policy(Protocol):
    """Anything with SB3's ``predict``.

    Reference controllers, rivals, learned agents, recorded decisions.
    """

    def predict(
        self,
        observation: NDArray[np.float32],
        state: Any = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[np.float32], Any]:
        """Choose clocks.

        Args:
            observation: ``(dim,)`` or ``(n, dim)``, encoded as the phase's ObservationSpec says.
            state: whatever the policy returned last time; None at the start.
            episode_start: ``(n,)``, True where an episode begins.
            deterministic: False lets a stochastic policy sample.

        Returns:
            Actions in [-1, 1], ``(1,)`` or ``(n, 1)``, and the next state.
        """
        ...
