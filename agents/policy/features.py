"""Fixed, physics-based features of the observation: what a small network sees instead of it.

A feature is a fixed function of the observation and of the fitted latency model (the same knowledge
that MPC and slack use), never of the simulator's state. The network sees, per clock level, how the
projected work would stand against its deadlines if that level were asked for now: the delay of a
clock change is counted, requests that are late already have no deadline any more. Nothing is
learned here.

The features look at :data:`agents.policy.feature_parts.N_LEVELS` clock levels on every GPU; where
it has another number of control levels, they are spread over those.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from agents.policy.feature_parts import (
    FeatureRows,
    Floats32,
    Floats64,
    Records,
    feature_clocks,
)
from agents.policy.features_decode import DECODE_NAMES, decode_features
from agents.policy.features_prefill import NO_DEADLINE, PREFILL_NAMES, prefill_features
from biscale_env.contract import ClockRange, ObservationSpec, spec_for
from biscale_env.contract.observation import HORIZON
from biscale_env.core.errors import BiscaleError
from biscale_env.models import COEFFICIENT_DTYPE, IterationModel

VERSION = 1  # raised with any change of a feature; others are refused
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
    """The prefill observation under a TTFT bound ``(1 - margin)`` times as long, ``(n, dim)``.

    The same deadlines come earlier by ``margin`` SLOs, as with the margin of MPC. One thing stays
    as it was: which requests can still meet the real bound. Those between the tighter bound and
    the real one show negative slack, so that the rule hurries for them.
    """
    if margin == 0.0:
        return obs
    out, rest = obs.copy(), np.float32(1.0 - margin)
    for name in ("batch_slack", "batch_slack_alive"):
        at = slice(spec.index(name), spec.index(name) + HORIZON)
        out[:, at] = np.where(
            obs[:, at] < NO_DEADLINE, (obs[:, at] - np.float32(margin)) / rest, obs[:, at]
        )
    out[:, spec.index("oldest_wait")] /= rest
    out[:, spec.index("slo")] *= rest
    return np.clip(out, spec.low, spec.high)


def check_margin(margin: float, phase: str) -> float:
    """The margin, if the phase can have it.

    Raises:
        BiscaleError: outside 0 to 1, or in decode, where the observation does not say how many
            intervals a request has had.
    """
    if margin != 0.0 and phase != "prefill":
        raise BiscaleError(
            "a margin is for prefill agents: leave it out, decode agents have a price"
        )
    if not 0.0 <= margin < 1.0:
        raise BiscaleError(
            f"the margin must be at least 0 and below 1 of the TTFT bound, got {margin}"
        )
    return float(margin)


class NominalModel(NamedTuple):
    """What the features take the plants of some rows to be.

    Attributes:
        coefs: coefficients, one record for all rows or one per row.
        cheapest_ghz: clock of least energy for a typical iteration, as many as coefs.
    """

    coefs: Records
    cheapest_ghz: Floats64


class FeatureMap:
    """Observation to features and to the rule's action, for any number of rows."""

    def __init__(self, phase: str, spec: ObservationSpec, clocks: ClockRange) -> None:
        """Prepare the levels.

        Args:
            phase: ``prefill`` or ``decode``.
            spec: observation of that phase.
            clocks: control range, with any number of levels.

        Raises:
            BiscaleError: no such phase, or another observation than the features are made of.
        """
        if phase not in NAMES:
            raise BiscaleError(f"unknown phase '{phase}': choose prefill or decode")
        spec.check(spec_for(phase).id, "the feature map")
        self.phase, self.dim = phase, len(NAMES[phase])
        self._kernel = prefill_features if phase == "prefill" else decode_features
        self._clocks = feature_clocks(clocks)

    def nominal_model(self, model: IterationModel, members: Iterable[int]) -> NominalModel:
        """Coefficients and cheapest clocks for some members of a model, one each; -1 nominal."""
        ks = [int(k) for k in members]
        coefs = np.array([tuple(model.member(k)) for k in ks], dtype=COEFFICIENT_DTYPE)
        cheapest = [cheapest_mhz(model, self.phase, k) * 1e-3 for k in ks]
        return NominalModel(coefs, np.array(cheapest))

    def __call__(self, obs: Floats32, coefs: Records, cheapest_ghz: Floats64) -> FeatureRows:
        """Features, the rule's actions and how many requests are late at any clock.

        Args:
            obs: encoded observations (n, spec.dim), contiguous.
            coefs: coefficients, one record for all rows or one per row.
            cheapest_ghz: energy-optimal clock, as many as coefs.
        """
        n = len(obs)
        out = np.empty((n, self.dim), dtype=np.float32)
        rule, lost = np.empty(n, dtype=np.float32), np.empty(n, dtype=np.float32)
        self._kernel(obs, coefs, cheapest_ghz, self._clocks, out, rule, lost)
        return FeatureRows(out, rule, lost)
