"""The policy of a model in training, on the rows of the held-out evaluation."""

from typing import Any

import numpy as np

from agents.policy.feature_parts import Floats32
from agents.policy.sb3_policy import Sb3Policy
from agents.training.heldout import HeldOut
from agents.training.train_config import AgentConfig


class HeldOutPolicy(Sb3Policy):
    """The model's deterministic policy, each row in its own group's plant.

    Recurrent ones carry their memory along. ``price`` and ``margin`` are set by the evaluation.
    """

    def __init__(self, model: Any, config: AgentConfig, held_out: HeldOut) -> None:
        """Bind the model to the rows."""
        super().__init__(model, config, held_out.plant)
        self._nominal = held_out.nominal
        self._state: Any = None

    def __call__(self, obs: Floats32, start: bool) -> Floats32:
        """Actions (n,) of encoded observations (n, dim); ``start``: all episodes begin."""
        state = None if start else self._state
        action, self._state = self.predict(obs, state, np.full(len(obs), start))
        return action[:, 0]
