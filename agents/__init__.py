"""Learned agents: training on Stable-Baselines3; shipped policies need neither it nor torch."""

from pathlib import Path
from typing import TYPE_CHECKING

from biscale_env.contract import Policy

if TYPE_CHECKING:
    from agents.policy.feature_policy import ControlledPlant


def load_agent(
    path: Path,
    plant: "ControlledPlant",
    member: int = -1,
    price: float | None = None,
    margin: float | None = None,
) -> Policy:
    """Policy of a checkpoint for a plant.

    ``.npz`` without torch, ``.zip`` (a run's SB3 model) through SB3.

    Args:
        path: checkpoint.
        plant: gives phase, observation, clocks and model (`biscale_env.envs.plant.Plant` or a
            controller's context).
        member: coefficients that the features use; -1 nominal.
        price: SLO-violation penalty, for networks that are told one; None takes their own.
        margin: fraction of the phase's bound that is kept free; None takes the
            checkpoint's own.

    Raises:
        BiscaleError: missing, corrupt, or made for another phase or observation.
    """
    if Path(path).suffix == ".zip":
        from agents.policy.sb3_policy import Sb3Policy

        return Sb3Policy.load(Path(path), plant, member, price, margin)
    from agents.policy.numpy_policy import NumpyPolicy

    return NumpyPolicy.load(Path(path), plant, member, price, margin)
