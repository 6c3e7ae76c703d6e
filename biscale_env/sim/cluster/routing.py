"""Routers: which instance a request goes to.

The same serve both pools, but for what only one phase knows: there they are `shortest`.
"""

import numpy as np

from biscale_env.core.jit import inlined
from biscale_env.laws.level_search import interval_limit_s, lowest_meeting_level
from biscale_env.sim.cluster.layout import (
    CACHE_AWARE,
    ROUND_ROBIN,
    WEIGHTED,
    WHAT_IF,
    Decodes,
    Floats,
    OfferedWork,
    Prefills,
    Records,
)
from biscale_env.sim.cluster.tier2_rules import BatchWork, WorkAtClocks, capped_latency_s
from biscale_env.sim.prefix_cache import cache_of, cached_prefix, keep_blocks

NOWHERE = -1
BALANCE = 1.5  # queue over the shortest up to which prefixes count; SGLang's balance-rel-threshold


@inlined
def random_fraction(totals: np.record) -> float:
    """Next number in [0, 1) of the router's own stream (SplitMix64; Steele, Lea, Flood 2014)."""
    totals.random += np.uint64(0x9E3779B97F4A7C15)
    z: np.uint64 = totals.random  # type: ignore[assignment]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return float(np.float64(z >> np.uint64(11)) * (1.0 / 9007199254740992.0))


@inlined
def is_open(meta: np.record, now_s: float) -> bool:
    """Whether the router may choose an instance now."""
    return bool(meta.accepting == 1 and meta.ready_s <= now_s)


@inlined
def first_ready(metas: Records) -> int:
    """With no instance open: the accepting one that is ready first."""
    best = NOWHERE
    for i in range(metas.size):
        if metas[i].accepting == 1 and (best == NOWHERE or metas[i].ready_s < metas[best].ready_s):
            best = i
    return best


@inlined
def weighted(totals: np.record, metas: Records, now_s: float) -> int:
    """Random choice with probabilities in proportion to the weights."""
    total = 0.0
    for i in range(metas.size):
        if is_open(metas[i], now_s):
            total += metas[i].weight
    left = random_fraction(totals) * total
    chosen = NOWHERE
    for i in range(metas.size):
        if is_open(metas[i], now_s):
            chosen = i
            left -= metas[i].weight
            if left < 0.0:
                break
    return chosen


@inlined
def in_turn(metas: Records, turn: int, now_s: float) -> int:
    """The first open instance from ``turn`` on."""
    for k in range(metas.size):
        i = (turn + k) % metas.size
        if is_open(metas[i], now_s):
            return i
    return NOWHERE


@inlined
def shortest_prefill(pool: Prefills, now_s: float) -> int:
    """The open instance with the shortest queue by tokens over speed."""
    chosen, least = NOWHERE, np.inf
    for i in range(pool.meta.size):
        if is_open(pool.meta[i], now_s):
            length = pool.meta[i].load_tokens / pool.meta[i].weight
            if length < least:
                chosen, least = i, length
    return chosen


@inlined
def knows_prefix(pool: Prefills, i: int, work: OfferedWork) -> bool:
    """Whether prefill instance ``i`` has a prefix cache that the requests on offer can use."""
    return bool(pool.meta[i].cache_tokens > 0 and work.blocks.starts.size > 0)


@inlined
def find_and_keep(pool: Prefills, i: int, work: OfferedWork, k: int) -> int:
    """Tokens of request ``k`` on offer in the prefix cache of instance ``i``, which keeps it.

    The instance admits requests in the order in which they come to it.
    """
    if not knows_prefix(pool, i, work):
        return 0
    cache = cache_of(pool.cache, i)
    found = cached_prefix(cache, work.blocks, k, work.prompt[k])
    keep_blocks(cache, work.blocks, k, work.prompt[k], pool.meta[i].cache_tokens)
    return found


@inlined
def longest_prefix(pool: Prefills, work: OfferedWork, k: int, now_s: float) -> int:
    """The open instance that has the longest prefix of request ``k``, unless its queue is long.

    As the cache-aware router of SGLang: an instance is passed over whose queue (tokens over speed)
    is longer than 1.5 times the shortest one. A queue of one batch never counts as long (assumed),
    else an idle cluster would find nothing. Among equals the shortest queue.
    """
    least = np.inf
    for i in range(pool.meta.size):
        if is_open(pool.meta[i], now_s):
            least = min(least, pool.meta[i].load_tokens / pool.meta[i].weight)
    chosen, most, shortest = NOWHERE, -1, np.inf
    for i in range(pool.meta.size):
        meta = pool.meta[i]
        if not is_open(meta, now_s):
            continue
        length = meta.load_tokens / meta.weight
        if length > max(BALANCE * least, least + pool.params[i].token_budget / meta.weight):
            continue
        found = 0
        if knows_prefix(pool, i, work):
            found = cached_prefix(cache_of(pool.cache, i), work.blocks, k, work.prompt[k])
        if found > most or (found == most and length < shortest):
            chosen, most, shortest = i, found, length
    return chosen


@inlined
def route_prefill(totals: np.record, pool: Prefills, work: OfferedWork, now_s: float) -> int:
    """Prefill instance for the next request on offer, which arrives now."""
    if totals.router_prefill == WEIGHTED:
        chosen = weighted(totals, pool.meta, now_s)
    elif totals.router_prefill == ROUND_ROBIN:
        chosen = in_turn(pool.meta, totals.turn_prefill, now_s)
        totals.turn_prefill = chosen + 1
    elif totals.router_prefill == CACHE_AWARE:
        chosen = longest_prefix(pool, work, totals.next, now_s)
    else:
        chosen = shortest_prefill(pool, now_s)
    return chosen if chosen != NOWHERE else first_ready(pool.meta)


@inlined
def level_with(pool: Decodes, j: int, levels_ghz: Floats, requests: int, tokens: int) -> float:
    """Lowest level at which decode instance ``j`` meets its bound with so many more, GHz.

    Args:
        pool: decode instances.
        j: which.
        levels_ghz: clocks, rising.
        requests: more requests than it has.
        tokens: more KV tokens than it has.
    """
    st, p, meta = pool.states[j], pool.params[j], pool.meta[j]
    batch = min(st.batch + (st.end - st.head) + requests, p.max_seqs)
    cached = min(st.cached + meta.load_tokens + tokens, p.kv_capacity)
    at = WorkAtClocks(pool.coefs[j], p, BatchWork(batch, 0.0, cached, batch), levels_ghz)
    limit = interval_limit_s(p.slo_s, meta.margin)
    return float(levels_ghz[lowest_meeting_level(capped_latency_s, at, levels_ghz.size, limit)])


@inlined
def shortest_decode(
    pool: Decodes, levels_ghz: Floats, prompt: int, now_s: float, what_if: bool
) -> int:
    """The open instance with the shortest queue by KV tokens over speed.

    With ``what_if``: among those whose lowest feasible clock rises least by the request.
    """
    chosen, least, least_rise = NOWHERE, np.inf, np.inf
    for j in range(pool.meta.size):
        if is_open(pool.meta[j], now_s):
            length = (pool.states[j].cached + pool.meta[j].load_tokens) / pool.meta[j].weight
            rise = 0.0
            if what_if:
                before = level_with(pool, j, levels_ghz, 0, 0)
                rise = level_with(pool, j, levels_ghz, 1, prompt) - before
            if rise < least_rise or (rise == least_rise and length < least):
                chosen, least, least_rise = j, length, rise
    return chosen


@inlined
def route_decode(
    totals: np.record, pool: Decodes, levels_ghz: Floats, prompt: int, now_s: float
) -> int:
    """Decode instance for a request whose prefill is done now.

    The what-if router is VoltanaLLM's EcoRoute (arXiv 2509.04827).
    """
    if totals.router_decode == WEIGHTED:
        chosen = weighted(totals, pool.meta, now_s)
    elif totals.router_decode == ROUND_ROBIN:
        chosen = in_turn(pool.meta, totals.turn_decode, now_s)
        totals.turn_decode = chosen + 1
    else:
        what_if = totals.router_decode == WHAT_IF
        chosen = shortest_decode(pool, levels_ghz, prompt, now_s, what_if)
    return chosen if chosen != NOWHERE else first_ready(pool.meta)
