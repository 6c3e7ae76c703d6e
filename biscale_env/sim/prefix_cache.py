"""Prefix cache of a prefill instance: least recently used blocks go first.

As in vLLM's automatic prefix caching: the blocks of a prompt are kept once its prefill has begun, a
later prompt finds the longest run of its first blocks that are still there, and only the rest is
computed. Blocks of a prompt are touched from its last to its first, so that the end of a prefix is
given up before its beginning. The prompts under way are the most recent ones, so the room is that
of all KV. Requests are admitted in the order in which they come to an instance, hence what each of
them finds is known when it comes.

Looking up and keeping costs O(1) a block: a doubly linked list in order of use, in arrays indexed
by block number; entry 0 is its end. Where one instance serves a whole workload, nothing but the
order of its requests is needed (:func:`find_prefixes`).
"""

from typing import Final, NamedTuple

import numpy as np

from biscale_env.core.jit import compiled, inlined
from biscale_env.sim.state import Ints, ShortInts

NO_LIMIT: Final = 1 << 62  # tokens of a cache that gives nothing up


class PrefixCache(NamedTuple):
    """Blocks that an instance keeps; of several instances, with a leading axis."""

    newer: ShortInts  # (n_ids + 1,): neighbours in order of use; of entry 0, the oldest block
    older: ShortInts  # likewise; of entry 0, the newest
    tokens: ShortInts  # (n_ids + 1,): of a block that is kept, 0 of one that is not
    used: Ints  # (1,): tokens kept in all


class Blocks(NamedTuple):
    """Block numbers of the prompts of a workload."""

    ids: ShortInts
    starts: Ints  # (requests + 1,)
    block_tokens: int


def empty_cache(lead: tuple[int, ...], n_ids: int) -> PrefixCache:
    """Memory for a cache of each instance; ``lead`` is the shape before it."""
    shape = (*lead, n_ids + 1)
    newer, older, tokens = (np.zeros(shape, dtype=np.int32) for _ in range(3))
    return PrefixCache(newer, older, tokens, np.zeros((*lead, 1), dtype=np.int64))


@inlined
def cache_of(caches: PrefixCache, i: int) -> PrefixCache:
    """The cache of instance ``i`` of several."""
    return PrefixCache(caches.newer[i], caches.older[i], caches.tokens[i], caches.used[i])


@inlined
def forget(cache: PrefixCache) -> None:
    """Give up everything."""
    cache.newer[0] = 0
    cache.older[0] = 0
    cache.tokens[:] = 0
    cache.used[0] = 0


@inlined
def cached_prefix(cache: PrefixCache, blocks: Blocks, r: int, prompt: int) -> int:
    """Tokens of the prompt of request ``r`` that are in the cache; at least one is always new."""
    first, stop = blocks.starts[r], blocks.starts[r + 1]
    k = first
    while k < stop and cache.tokens[blocks.ids[k] + 1] > 0:
        k += 1
    return int(min((k - first) * blocks.block_tokens, prompt - 1))


@inlined
def unlink(cache: PrefixCache, b: int) -> None:
    """Take block entry ``b`` out of the order of use."""
    cache.newer[cache.older[b]] = cache.newer[b]
    cache.older[cache.newer[b]] = cache.older[b]


@inlined
def keep_blocks(cache: PrefixCache, blocks: Blocks, r: int, prompt: int, capacity: int) -> None:
    """Keep the blocks of the prompt of request ``r`` as the newest, within ``capacity`` tokens."""
    first, stop = blocks.starts[r], blocks.starts[r + 1]
    for k in range(stop - 1, first - 1, -1):
        b = blocks.ids[k] + 1
        if cache.tokens[b] > 0:
            unlink(cache, b)
        else:
            size = min(blocks.block_tokens, prompt - (k - first) * blocks.block_tokens)
            cache.tokens[b] = size
            cache.used[0] += size
        newest = cache.older[0]
        cache.older[b] = newest
        cache.newer[b] = 0
        cache.newer[newest] = b
        cache.older[0] = b
    while cache.used[0] > capacity:
        b = cache.newer[0]
        unlink(cache, b)
        cache.used[0] -= cache.tokens[b]
        cache.tokens[b] = 0


@inlined
def size_of(blocks: Blocks, prompt: ShortInts, r: int, k: int) -> int:
    """Tokens of the block at ``k`` of all block numbers, which is one of request ``r``."""
    before = (k - blocks.starts[r]) * blocks.block_tokens
    return int(min(blocks.block_tokens, prompt[r] - before))


@compiled
def find_prefixes(
    touched: ShortInts, blocks: Blocks, prompt: ShortInts, capacity: int, prefix: ShortInts
) -> None:
    """Cached prefix of every request of one instance, which admits them in order.

    The same as :func:`cached_prefix` and :func:`keep_blocks` for one request after the other, in
    half the time: where all requests are known, their own order is that of use. What is given up
    next is the last block of the oldest request that no later one has touched.

    Args:
        touched: latest request that has each block, counted from 1, (n_ids,); all 0.
        blocks: of the requests.
        prompt: lengths of the prompts, (requests,).
        capacity: room, tokens.
        prefix: written, (requests,).
    """
    ids, starts, used = blocks.ids, blocks.starts, 0
    oldest, last = 0, starts[1] - 1 if prompt.size > 0 else 0
    for r in range(prompt.size):
        first, stop = starts[r], starts[r + 1]
        k = first
        while k < stop and touched[ids[k]] > 0:
            k += 1
        prefix[r] = min((k - first) * blocks.block_tokens, prompt[r] - 1)
        for j in range(first, stop):
            if touched[ids[j]] == 0:
                used += size_of(blocks, prompt, r, j)
            touched[ids[j]] = r + 1
        while used > capacity:
            while last < starts[oldest]:
                oldest += 1
                last = starts[oldest + 1] - 1
            if touched[ids[last]] == oldest + 1:
                touched[ids[last]] = 0
                used -= size_of(blocks, prompt, oldest, last)
            last -= 1
