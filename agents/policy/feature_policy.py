"""What every learned policy does around its network: features in front, the action behind."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agents.policy.action_map import ActionMap
from agents.policy.feature_parts import Floats32
from agents.policy.features import (
    FeatureMap,
    NominalPlants,
    check_margin,
    nominal_plants,
    tighten,
    with_price,
)
from biscale_env.contract import ClockRange, ObservationSpec
from biscale_env.core.errors import BiscaleError
from biscale_env.models import IterationModel

Bools = NDArray[np.bool_]


class ControlledPlant(Protocol):
    """What a policy must know of a plant; a `Plant` and a controller's context offer it."""

    @property
    def phase(self) -> str:
        """``prefill`` or ``decode``."""
        ...

    @property
    def spec(self) -> ObservationSpec:
        """Observation of the phase."""
        ...

    @property
    def clocks(self) -> ClockRange:
        """Control range."""
        ...

    @property
    def model(self) -> IterationModel:
        """Latency and energy model that the features take for granted."""
        ...

    @property
    def parked_power_w(self) -> Callable[[int], float | None] | float | None:
        """Power of a GPU of a parked instance, W, of a member or of the context's own."""
        ...


def check_phase(made_for: str, phase: str) -> None:
    """Refuse a checkpoint of the other phase.

    Raises:
        BiscaleError: names both.
    """
    if made_for != phase:
        raise BiscaleError(f"the checkpoint is for {made_for}, but the environment is {phase}")


def check_price(price: float | None, own: float | None) -> float | None:
    """The SLO-violation penalty that a network is told; None where it takes none.

    Args:
        price: the one asked for; None takes the network's own.
        own: the network's default; None when it was trained at one constraint.

    Raises:
        BiscaleError: a price for a network that takes none, or one that is not positive.
    """
    if price is None:
        return own
    if own is None:
        raise BiscaleError(
            "the checkpoint was trained at one constraint and takes no price: leave the price out"
        )
    if not price > 0:
        raise BiscaleError(f"the SLO-violation penalty (price) must be positive, got {price}")
    return float(price)


def _nominal(plant: ControlledPlant, member: int) -> NominalPlants:
    """What the features take one plant to be."""
    parked = plant.parked_power_w
    parked_w = parked(member) if callable(parked) else parked
    return nominal_plants(plant.phase, plant.model, plant.clocks, [member], [parked_w])


class FeaturePolicy:
    """Base of the learned policies; a subclass implements :meth:`output`.

    Attributes:
        price: SLO-violation penalty that the network is told, in energies of a mean request at max
            clock; None: it takes none.
        margin: fraction of the bound that is kept free. In prefill the network is shown the tighter
            bound; in decode its clock is raised to the lowest one at which the next iteration keeps
            within it.
        trained_on: GPU, LLM, model and clocks of the training plant, as far as the checkpoint says.
    """

    def __init__(
        self,
        plant: ControlledPlant,
        actions: ActionMap,
        member: int = -1,
        price: float | None = None,
        margin: float = 0.0,
        trained_on: Mapping[str, Any] | None = None,
    ) -> None:
        """Bind the features to a plant.

        Args:
            plant: gives phase, observation, clocks and model.
            actions: what the network's output means.
            member: coefficients of the model that the features use; -1 nominal.
            price: checked penalty of :func:`check_price`.
            margin: see the class.
            trained_on: see the class.

        Raises:
            BiscaleError: an impossible margin.
        """
        self.price, self.margin = price, check_margin(margin)
        self.spec, self.actions, self.trained_on = plant.spec, actions, dict(trained_on or {})
        self._features = FeatureMap(plant.phase, plant.spec)
        self._nominal = _nominal(plant, member)

    def output(
        self, features: Floats32, state: Any, episode_start: Bools | None, deterministic: bool
    ) -> tuple[NDArray[Any], Any]:
        """Output of the network for features (n, F), and its memory."""
        raise NotImplementedError

    def predict(
        self,
        observation: Floats32,
        state: Any = None,
        episode_start: Bools | None = None,
        deterministic: bool = True,
    ) -> tuple[Floats32, Any]:
        """Choose clocks; see :class:`biscale_env.contract.Policy`.

        Raises:
            BiscaleError: an observation of another length.
        """
        rows = observation[None] if observation.ndim == 1 else observation
        if rows.shape[-1] != self.spec.dim:
            raise BiscaleError(
                f"observation has {rows.shape[-1]} values, but {self.spec.id} has "
                f"{self.spec.dim}: wrong phase?"
            )
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        tight = tighten(rows, self.spec, self.margin)
        floored = self.margin > 0.0 and self.spec.name == "decode"
        features, rule, _ = self._features(rows if floored else tight, *self._nominal)
        if self.price is not None:
            features = with_price(features, self.price)
        output, state = self.output(features, state, episode_start, deterministic)
        action = self.actions(output, rule)
        if floored:
            action = np.maximum(action, self._features(tight, *self._nominal).rule)
        return (action if observation.ndim == 1 else action[:, None]), state
