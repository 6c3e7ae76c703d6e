"""throttLL'eM's laws (HPCA 2025): project the instance ahead, take the lowest clock that holds."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.jit import inlined
from biscale_env.laws.level_search import LatencyAt, lowest_meeting_level


class DecodeOutlook(NamedTuple):
    """What a decode instance has and what will join it.

    Attributes:
        running: requests in the batch.
        joining: requests that wait or are on their way.
        cached: KV tokens of both together.
        recompute_tokens: tokens whose KV the next iteration must rebuild.
        recompute_attn: attention work of that, token^2.
    """

    running: float
    joining: float
    cached: float
    recompute_tokens: float
    recompute_attn: float


class Projection(NamedTuple):
    """The mean iteration of a projection.

    Attributes:
        rows: GEMM rows.
        attn_work: attention work, token^2.
        cached: KV tokens read.
        n_seq: requests in the batch.
        overflows: whether the KV cache cannot hold it.
    """

    rows: float
    attn_work: float
    cached: float
    n_seq: float
    overflows: bool


@inlined
def project_decode(
    now: DecodeOutlook, steps: float, kv_capacity: float, max_seqs: float
) -> Projection:
    """Mean iteration over the next ``steps``: all that joins is admitted, every request grows.

    What must be recomputed is spread over the steps.
    """
    batch = min(now.running + now.joining, max_seqs)
    cached = now.cached + 0.5 * steps * batch
    rows, attn_work = batch, 0.0
    if now.recompute_tokens > 0.0:
        spread = max(steps, 1.0)
        rows = batch + now.recompute_tokens / spread
        attn_work = now.recompute_attn / spread
    return Projection(rows, attn_work, cached, batch, cached > kv_capacity)


@inlined
def throttllem_level(
    latency_at: LatencyAt, source: Any, n_levels: int, limit_s: float, overflows: bool
) -> int:
    """Lowest clock at which the projected mean interval is within the limit.

    A projection that overflows the KV cache meets it at no clock: the highest.

    Returns:
        Index of the clock.
    """
    if overflows:
        return n_levels - 1
    return lowest_meeting_level(latency_at, source, n_levels, limit_s)


@inlined
def queue_meets(latency: NDArray[np.float64], deadline_s: NDArray[np.float64], clock: int) -> bool:
    """Whether every projected batch completes by its deadline at one clock.

    Args:
        latency: of each batch at each clock, (K, N), s; 0 where there is no batch.
        deadline_s: of each batch, (K,), s from now.
        clock: index of the clock.
    """
    t = 0.0
    for k in range(deadline_s.size):
        t += latency[k, clock]
        if latency[k, clock] > 0.0 and t > deadline_s[k]:
            return False
    return True


@inlined
def lowest_level_for_queue(latency: NDArray[np.float64], deadline_s: NDArray[np.float64]) -> int:
    """Binary search for the lowest single clock at which the whole queue meets its deadlines.

    The highest if none does. Arguments as in :func:`queue_meets`.

    Returns:
        Index of the clock.
    """
    low, high = 0, latency.shape[1] - 1
    while low < high:
        middle = (low + high) // 2
        if queue_meets(latency, deadline_s, middle):
            high = middle
        else:
            low = middle + 1
    return high
