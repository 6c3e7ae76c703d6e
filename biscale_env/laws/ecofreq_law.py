"""EcoFreq's law, of VoltanaLLM (arXiv 2509.04827), for both phases."""

from typing import Any

import numpy as np

from biscale_env.core.jit import inlined
from biscale_env.laws.level_search import LatencyAt, lowest_meeting_level


@inlined
def ecofreq_level(
    latency_at: LatencyAt, source: Any, n_levels: int, limit_s: float, waiting: bool
) -> int:
    """First clock, scanning upward, whose predicted latency is within the limit.

    Requests waiting behind the batch: the highest.

    Args:
        latency_at: predicted latency of the batch at a clock, s.
        source: what ``latency_at`` reads from.
        n_levels: number of clocks, rising.
        limit_s: longest latency allowed, s.
        waiting: whether requests wait behind this batch.

    Returns:
        Index of the clock.
    """
    if waiting:
        return n_levels - 1
    return lowest_meeting_level(latency_at, source, n_levels, limit_s)


@inlined
def binned_requests(n_seq: float, bin_requests: float) -> float:
    """Decode batch rounded up to whole bins, as EcoFreq's predictor is binned."""
    return float(np.ceil(n_seq / bin_requests - 1e-9) * bin_requests)
