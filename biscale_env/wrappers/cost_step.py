"""The constrained form: what a step costs apart from what it earns, as safe RL reads it."""

from typing import Any

import gymnasium as gym

from biscale_env.wrappers.reward_terms import NamedReward


class EnergyReward(NamedReward):
    """Energy alone is the reward; ``info["cost"]`` counts the requests that missed the SLO."""

    def __init__(self, env: "gym.Env[Any, Any]") -> None:
        """Wrap an environment of one instance."""
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env, ("energy",))


class CostStep(EnergyReward):
    """Six values per step, as in Safety-Gymnasium and OmniSafe.

    ``observation, reward, cost, terminated, truncated, info``. The constraint of BiScale's SLO is
    on their ratio: costs of an episode at most 1 % of its finished requests.
    """

    def step(  # type: ignore[override]
        self, action: Any
    ) -> tuple[Any, float, float, bool, bool, dict[str, Any]]:
        """One decision."""
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, info["cost"], terminated, truncated, info
