"""The one definition of the service level objective; reward, MPC, placement and reports all use it."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from biscale_env.config.loader import Config, load_named


class Slo(Config):
    """Service level objective.

    Attributes:
        name: short name used in tables.
        ttft_s: bound on the time to first token (prefill completes minus arrival), s.
        tpot_s: bound on the time per output token of a request, (last - first) / (tokens - 1), s.
        attainment: share of requests that must meet the bound: 0.99 is "P99".
        statistic: ``each``: TTFT and TPOT must each be met by that share; ``joint``: by the same requests.
        source: where the figures come from.
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
        """Share of requests within the bound; a request without a latency (NaN: never finished) is a violation.

        An empty sample attains 1.0: nothing was asked, nothing was missed.
        """
        values = np.asarray(latency_s, dtype=np.float64)
        return float(np.mean(values <= self.bound_s(phase))) if values.size else 1.0

    def is_met(self, latency_s: NDArray[np.float64], phase: str) -> bool:
        """Whether the required share of requests is within the bound."""
        return self.attained(latency_s, phase) >= self.attainment


def load_slo(name: str = "biscale") -> Slo:
    """Load a named SLO (``biscale``, ``mlperf-interactive``, ``mlperf-server``, ``distserve``) or a YAML file."""
    return load_named("slos", name, Slo)
