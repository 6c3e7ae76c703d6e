"""Search for the lowest clock that meets a limit, and the limits on TPOT and TTFT.

A law does not ask where a latency comes from: it calls ``latency_at(source, k)`` for the latency
of the work at clock ``k`` (clocks rise), which a table holds or a simulator computes on demand.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.jit import inlined

LatencyAt = Callable[[Any, int], float]  # (source, index of a clock) -> latency, s


@inlined
def table_latency_s(row: NDArray[np.float64], k: int) -> float:
    """Latency at clock ``k`` out of a table row (clocks,), s."""
    return float(row[k])


@inlined
def lowest_meeting_level(latency_at: LatencyAt, source: Any, n_levels: int, limit_s: float) -> int:
    """Lowest clock whose latency is at most ``limit_s``; the highest where none is.

    Args:
        latency_at: latency of the work at a clock, s; NaN meets no limit.
        source: what ``latency_at`` reads from.
        n_levels: number of clocks, rising.
        limit_s: longest latency allowed, s.

    Returns:
        Index of the clock.
    """
    k = 0
    while k < n_levels - 1 and not latency_at(source, k) <= limit_s:
        k += 1
    return k


@inlined
def interval_limit_s(slo_s: Any, margin: Any) -> Any:
    """Longest interval between tokens under a TPOT SLO with a fraction ``margin`` kept free, s.

    Arguments are numbers or arrays.
    """
    return slo_s * (1.0 - margin)


@inlined
def first_token_limit_s(slo_s: Any, margin: Any, waited: Any) -> Any:
    """Longest batch under a TTFT SLO for requests that have waited, s.

    Arguments are numbers or arrays.

    Args:
        slo_s: TTFT bound, s.
        margin: fraction of the bound kept free.
        waited: how long the oldest request of the batch has waited, as a fraction of the bound.
    """
    return slo_s * (1.0 - margin - waited)
