"""Traces whose prompts share blocks, and a prefix cache as slow and plain as can be."""

from collections import OrderedDict
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from biscale_env.traces import Trace
from biscale_env.traces.prompts.prompt_blocks import PromptBlocks


def blocks_of(prompts, contents, block_tokens):
    """Blocks of prompts whose k-th block holds ``contents[r][k]``: equal prefixes, equal ids."""
    numbers, ids, starts = {}, [], [0]
    for prompt, content in zip(prompts, contents, strict=True):
        for k in range(-(-int(prompt) // block_tokens)):
            size = min(block_tokens, int(prompt) - k * block_tokens)
            path = (*(content[j % len(content)] for j in range(k + 1)), -size)
            ids.append(numbers.setdefault(path, len(numbers)))
        starts.append(len(ids))
    return PromptBlocks.of(np.array(ids), np.array(starts), block_tokens)


def with_blocks(trace: Trace, contents, block_tokens: int) -> Trace:
    """The trace with blocks of this content."""
    return replace(trace, blocks=blocks_of(trace.prompt_tokens, contents, block_tokens))


def contents_of(n):
    """Contents of ``n`` prompts: so few different ones that prefixes of any length are shared."""
    letters = st.lists(st.integers(0, 1), min_size=1, max_size=4)
    return st.lists(letters, min_size=n, max_size=n)


def slow_hits(trace: Trace, capacity: float) -> list[int]:
    """Cached prefix of every request, from a cache that is an ordered dictionary."""
    cache: OrderedDict[int, int] = OrderedDict()  # block: tokens; the newest last
    hits, b = [], trace.blocks
    for r, prompt in enumerate(trace.prompt_tokens.tolist()):
        ids = b.ids[b.starts[r] : b.starts[r + 1]].tolist()
        known = 0
        while known < len(ids) and ids[known] in cache:
            known += 1
        hits.append(min(known * b.block_tokens, prompt - 1))
        for k in reversed(range(len(ids))):
            cache.setdefault(ids[k], min(b.block_tokens, prompt - k * b.block_tokens))
            cache.move_to_end(ids[k])
        while sum(cache.values()) > capacity:
            cache.popitem(last=False)
    return hits
