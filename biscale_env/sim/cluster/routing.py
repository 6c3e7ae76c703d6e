"""Routers: which instance a request goes to. The same four serve both pools."""

from typing import Any

import numpy as np

from biscale_env.core.jit import inlined
from biscale_env.sim.cluster.layout import ROUND_ROBIN, WEIGHTED, WHAT_IF
from biscale_env.sim.cluster.tier2_rules import lowest_level_ghz

NOWHERE = -1


@inlined
def random_share(cluster: Any) -> float:
    """Next number in [0, 1) of the router's own stream (SplitMix64; Steele, Lea, Flood 2014)."""
    cluster.random += np.uint64(0x9E3779B97F4A7C15)
    z = cluster.random
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@inlined
def is_open(meta: Any, now_s: float) -> bool:
    """Whether the router may choose an instance now."""
    return meta.accepting == 1 and meta.ready_s <= now_s


@inlined
def first_ready(metas: Any) -> int:
    """With no instance open: the accepting one that is ready first."""
    best = NOWHERE
    for i in range(metas.size):
        if metas[i].accepting == 1 and (best == NOWHERE or metas[i].ready_s < metas[best].ready_s):
            best = i
    return best


@inlined
def weighted(cluster: Any, metas: Any, now_s: float) -> int:
    """Random choice with probabilities in proportion to the weights."""
    total = 0.0
    for i in range(metas.size):
        if is_open(metas[i], now_s):
            total += metas[i].weight
    left = random_share(cluster) * total
    chosen = NOWHERE
    for i in range(metas.size):
        if is_open(metas[i], now_s):
            chosen = i
            left -= metas[i].weight
            if left < 0.0:
                break
    return chosen


@inlined
def in_turn(metas: Any, turn: int, now_s: float) -> int:
    """The first open instance from ``turn`` on."""
    for k in range(metas.size):
        i = (turn + k) % metas.size
        if is_open(metas[i], now_s):
            return i
    return NOWHERE


@inlined
def route_prefill(cluster: Any, pool: Any, now_s: float) -> int:
    """Prefill instance for a request that arrives now.

    Shortest queue by tokens over speed unless told otherwise.
    """
    chosen = NOWHERE
    if cluster.router_prefill == WEIGHTED:
        chosen = weighted(cluster, pool.meta, now_s)
    elif cluster.router_prefill == ROUND_ROBIN:
        chosen = in_turn(pool.meta, cluster.turn_prefill, now_s)
        cluster.turn_prefill = chosen + 1
    else:
        least = np.inf
        for i in range(pool.meta.size):
            if is_open(pool.meta[i], now_s):
                length = pool.meta[i].load_tokens / pool.meta[i].weight
                if length < least:
                    chosen, least = i, length
    return chosen if chosen != NOWHERE else first_ready(pool.meta)


@inlined
def level_with(pool: Any, j: int, levels_ghz: Any, requests: int, tokens: int) -> float:
    """Lowest level at which decode instance ``j`` meets its bound with ``requests`` and ``tokens``
    more than it has.
    """
    st = pool.states[j]
    meta = pool.meta[j]
    batch = min(st.batch + (st.end - st.head) + requests, pool.params[j].max_seqs)
    cached = min(st.cached + meta.load_tokens + tokens, pool.params[j].kv_capacity)
    bound = pool.params[j].slo_s * (1.0 - meta.margin)
    return lowest_level_ghz(
        pool.coefs[j], pool.params[j], levels_ghz, batch, 0.0, cached, batch, bound
    )


@inlined
def route_decode(cluster: Any, pool: Any, levels_ghz: Any, prompt: int, now_s: float) -> int:
    """Decode instance for a request whose prefill is done now.

    The what-if router (VoltanaLLM's EcoRoute) takes the instance whose lowest feasible clock rises
    least by the request, and among equals the shortest queue.
    """
    chosen = NOWHERE
    if cluster.router_decode == WEIGHTED:
        chosen = weighted(cluster, pool.meta, now_s)
    elif cluster.router_decode == ROUND_ROBIN:
        chosen = in_turn(pool.meta, cluster.turn_decode, now_s)
        cluster.turn_decode = chosen + 1
    else:
        least, least_rise = np.inf, np.inf
        for j in range(pool.meta.size):
            if is_open(pool.meta[j], now_s):
                length = (pool.states[j].cached + pool.meta[j].load_tokens) / pool.meta[j].weight
                rise = 0.0
                if cluster.router_decode == WHAT_IF:
                    rise = level_with(pool, j, levels_ghz, 1, prompt) - level_with(
                        pool, j, levels_ghz, 0, 0
                    )
                if rise < least_rise or (rise == least_rise and length < least):
                    chosen, least, least_rise = j, length, rise
    return chosen if chosen != NOWHERE else first_ready(pool.meta)
