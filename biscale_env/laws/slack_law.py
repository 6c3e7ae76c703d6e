"""BiScale's slack-aware decode law (arXiv 2602.18755)."""

from typing import Any

from biscale_env.core.jit import inlined
from biscale_env.laws.level_search import LatencyAt, lowest_meeting_level


@inlined
def slack_level(
    latency_at: LatencyAt, source: Any, n_levels: int, limit_s: float, above_guard: bool
) -> int:
    """Lowest clock whose next interval between tokens is within the limit.

    With the KV cache fuller than the guard: the highest, until it has drained.

    Args:
        latency_at: latency of the next iteration at a clock, s.
        source: what ``latency_at`` reads from.
        n_levels: number of clocks, rising.
        limit_s: longest interval allowed, s.
        above_guard: whether more of the KV cache is in use than the guard allows.

    Returns:
        Index of the clock.
    """
    if above_guard:
        return n_levels - 1
    return lowest_meeting_level(latency_at, source, n_levels, limit_s)
