"""The one definition of the service level objective.

Reward, MPC, placement and reports all use it.
"""

from typing import Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from biscale_env.config.loader import Config, load_named

TIME_RESOLUTION_S: Final = 1e-9
"""Differences of float64 instants carry rounding: 1.6 s - 1.0 s is more than 0.6 s.

A nanosecond is no violation.
"""


def within(latency_s: ArrayLike, bound_s: ArrayLike) -> NDArray[np.bool_]:
    """Whether latencies keep their bounds, up to rounding; NaN (never finished) does not.

    Every judgement of requests is this one. The compiled transitions (``finish_requests`` of the
    simulator) count violations while they run, by the same comparison without the nanosecond; a
    test holds the two together.

    Args:
        latency_s: TTFT, TPOT, or the span of a request, s.
        bound_s: the bound, or for a span the bound times its intervals, s.
    """
    return (
        np.asarray(latency_s, dtype=np.float64)
        <= np.asarray(bound_s, dtype=np.float64) + TIME_RESOLUTION_S
    )


class Slo(Config):
    """Service level objective.

    Attributes:
        name: short name used in tables.
        ttft_s: bound on the time to first token (prefill completes minus arrival), s.
        tpot_s: bound on the time per output token of a request, (last - first) / (tokens - 1), s.
        attainment: fraction of requests that must meet the bound: 0.99 is "P99".
        statistic: ``each``: TTFT and TPOT must each be met by that fraction; ``joint``: by the same
            requests.
        source: where the numbers come from.
    """

    name: str
    ttft_s: float = Field(gt=0)
    tpot_s: float = Field(gt=0)
    attainment: float = Field(gt=0, le=1)
    statistic: Literal["each", "joint"] = "each"
    source: str = ""

    def bound_s(self, phase: str) -> float:
        """Bound that applies to one phase: TTFT for ``prefill``, TPOT for ``decode``, s."""
        return self.ttft_s if phase == "prefill" else self.tpot_s

    def attained(self, latency_s: NDArray[np.float64], phase: str) -> float:
        """Fraction of requests within the bound.

        A request without a latency (NaN: never finished) is a violation. An empty sample attains
        1.0: nothing was asked, nothing was missed.
        """
        met = within(latency_s, self.bound_s(phase))
        return float(np.mean(met)) if met.size else 1.0


def load_slo(name: str = "biscale") -> Slo:
    """Load an SLO by name (``configs/slos``) or YAML file."""
    return load_named("slos", name, Slo)
