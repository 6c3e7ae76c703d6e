"""Fixed, physics-based features of the observation: what a small network sees instead of it.

A feature is a fixed function of the observation and of the fitted latency model (the same knowledge
that MPC and slack use), never of the simulator's state. The network sees, per clock level, how the
projected work would stand against its deadlines if that level were asked for now (the delay of a
clock change is counted, requests that are late already have no deadline any more), and what it
would cost. So one network can serve any LLM on any GPU that has a model. Nothing is learned here.

The features look at :data:`agents.policy.feature_parts.N_LEVELS` clock levels on every GPU; where
it has another number of control levels, they are spread over those.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from agents.policy.feature_parts import (
    FeatureRows,
    Floats32,
    Records,
    feature_plants,
)
from agents.policy.features_decode import DECODE_NAMES, decode_features
from agents.policy.features_prefill import (
    BATCHES,
    NO_DEADLINE,
    PREFILL_NAMES,
    prefill_features,
)
from biscale_env.contract import ClockRange, ObservationSpec, spec_for
from biscale_env.contract.observation import HORIZON
from biscale_env.core.errors import BiscaleError
from biscale_env.models import COEFFICIENT_DTYPE, IterationModel

VERSION = 2  # raised with any change of a feature; others are refused
PRICE_SCALE = 30.0  # the environments' own weight of a violation, in reference energies
NAMES = {"prefill": PREFILL_NAMES, "decode": DECODE_NAMES}
_REFERENCE_WORK = {
    "prefill": (1024.0, 1024.0**2 / 2, 0.0, 1.0),
    "decode": (64.0, 0.0, 64.0 * 1024, 64.0),
}


def feature_id(phase: str) -> str:
    """Name and version of the features of a phase, stored in checkpoints."""
    return f"{phase}-features-v{VERSION}"


def cheapest_mhz(model: IterationModel, phase: str, member: int) -> float:
    """Clock of least energy for a typical iteration of a phase, MHz.

    Assumed as typical: a prompt of 1024 tokens; 64 requests of 1024 tokens each.
    """
    return float(model.optimal_freq_mhz(*_REFERENCE_WORK[phase], member=member))


def with_price(features: Floats32, price: ArrayLike) -> Floats32:
    """Features with one more column: the SLO-violation penalty on a logarithmic scale.

    Args:
        features: (n, F).
        price: the penalty, one number or one per row, reference energies.
    """
    n, dim = features.shape
    out = np.empty((n, dim + 1), dtype=np.float32)
    out[:, :dim] = features
    out[:, dim] = 0.5 * np.log(np.asarray(price, dtype=np.float32) / PRICE_SCALE)
    return out


def tighten(obs: Floats32, spec: ObservationSpec, margin: float) -> Floats32:
    """The observation under a bound ``(1 - margin)`` times as long, ``(n, dim)``.

    In prefill the same deadlines come earlier by ``margin`` SLOs, as with the margin of MPC. One
    thing stays as it was: which requests can still meet the real bound. Those between the tighter
    bound and the real one show negative slack, so that the rule hurries for them. In decode the
    slack stays that of the real bound: how many intervals a request has had is not observed.
    """
    if margin == 0.0:
        return obs
    out, rest = obs.copy(), np.float32(1.0 - margin)
    if spec.name == "decode":
        out[:, spec.index("slo")] *= rest
        return np.clip(out, spec.low, spec.high)
    for name in ("batch_slack", "batch_slack_alive"):
        at = slice(spec.index(name), spec.index(name) + HORIZON)
        out[:, at] = np.where(
            obs[:, at] < NO_DEADLINE, (obs[:, at] - np.float32(margin)) / rest, obs[:, at]
        )
    out[:, spec.index("oldest_wait")] /= rest
    out[:, spec.index("slo")] *= rest
    return np.clip(out, spec.low, spec.high)


def check_margin(margin: float) -> float:
    """The margin, if it can be one.

    Raises:
        BiscaleError: outside 0 to 1.
    """
    if not 0.0 <= margin < 1.0:
        raise BiscaleError(f"the margin must be at least 0 and below 1 of the bound, got {margin}")
    return float(margin)


class FeaturedPlant(Protocol):
    """What features must know of a plant; `biscale_env.envs.plant.Plant` offers it."""

    @property
    def clocks(self) -> ClockRange:
        """Control range."""
        ...

    @property
    def model(self) -> IterationModel:
        """Latency and energy model that the features take for granted."""
        ...

    def parked_power_w(self, member: int) -> float | None:
        """Power of a GPU of a parked instance, W; None: never parked."""
        ...


class NominalPlants(NamedTuple):
    """What the features take the plants of some rows to be.

    Attributes:
        coefs: coefficients, one record for all rows or one per row.
        plants: clocks and idle power, records of `FEATURE_PLANT_DTYPE`, as many as coefs.
    """

    coefs: Records
    plants: Records


def nominal_plants(
    phase: str,
    model: IterationModel,
    clocks: ClockRange,
    members: Iterable[int],
    parked_w: Iterable[float | None],
) -> NominalPlants:
    """What features take plants of some members of a model to be, one each.

    Args:
        phase: ``prefill`` or ``decode``.
        model: gives coefficients.
        clocks: of the GPU.
        members: of the ensemble; -1 nominal.
        parked_w: per member, power of a GPU while it is parked, W; None: never parked.
    """
    ks = [int(k) for k in members]
    coefs = np.array([tuple(model.member(k)) for k in ks], dtype=COEFFICIENT_DTYPE)
    cheapest = [cheapest_mhz(model, phase, k) * 1e-3 for k in ks]
    return NominalPlants(coefs, feature_plants(clocks, cheapest, list(parked_w)))


def plants_of(plant: FeaturedPlant, phase: str, members: Iterable[int]) -> NominalPlants:
    """What features take a plant to be in some members of its ensemble, one each; -1 nominal."""
    ks = [int(k) for k in members]
    parked_w = [plant.parked_power_w(k) for k in ks]
    return nominal_plants(phase, plant.model, plant.clocks, ks, parked_w)


class FeatureMap:
    """Observation to features and to the rule's action, for any number of rows."""

    def __init__(self, phase: str, spec: ObservationSpec) -> None:
        """Choose the kernel.

        Args:
            phase: ``prefill`` or ``decode``.
            spec: observation of that phase.

        Raises:
            BiscaleError: no such phase, or another observation than the features are made of.
        """
        if phase not in NAMES:
            raise BiscaleError(f"unknown phase '{phase}': choose prefill or decode")
        spec.check(spec_for(phase).id, "the feature map")
        self.phase, self.dim = phase, len(NAMES[phase])
        self._kernel: Callable[..., None] = (
            partial(prefill_features, np.empty(BATCHES)) if phase == "prefill" else decode_features
        )

    def __call__(self, obs: Floats32, coefs: Records, plants: Records) -> FeatureRows:
        """Features, the rule's actions and how many requests are late at any clock.

        Args:
            obs: encoded observations (n, spec.dim), contiguous.
            coefs: coefficients, one record for all rows or one per row.
            plants: clocks and idle power, as many as coefs.
        """
        n = len(obs)
        out = np.empty((n, self.dim), dtype=np.float32)
        rule, lost = np.empty(n, dtype=np.float32), np.empty(n, dtype=np.float32)
        self._kernel(obs, coefs, plants, out, rule, lost)
        return FeatureRows(out, rule, lost)
