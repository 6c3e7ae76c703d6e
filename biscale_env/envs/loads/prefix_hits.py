"""Which part of every prompt an instance finds in its prefix cache, known before the run."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.sim.prefix_cache import NO_LIMIT, Blocks, find_prefixes
from biscale_env.traces import Trace

if TYPE_CHECKING:  # not without need: it loads the readers
    from biscale_env.traces import TraceWindow

LOGGER: Final = logging.getLogger("biscale_env.traces.prefix_cache")  # commands print what it says


def cached_prefixes(trace: Trace, capacity_tokens: int | None) -> NDArray[np.int32]:
    """Tokens of each prompt that are in the cache of one instance that serves the whole trace.

    Exact, since a prefill instance admits requests in the order of their arrival; the cache is
    empty at the start.

    Args:
        trace: the requests.
        capacity_tokens: room of the cache, tokens; 0: no cache, None: nothing is ever given up.

    Returns:
        Shape (n,); all 0 where nobody says what the prompts share.
    """
    prefix = np.zeros(len(trace), dtype=np.int32)
    shared = trace.blocks
    if shared is None or capacity_tokens == 0:
        return prefix
    room = NO_LIMIT if capacity_tokens is None else capacity_tokens
    blocks = Blocks(shared.ids, shared.starts, shared.block_tokens)
    touched = np.zeros(shared.n_ids, dtype=np.int32)
    find_prefixes(touched, blocks, trace.prompt_tokens, room, prefix)
    return prefix


def with_cache(rule: str, trace: Trace) -> Trace:
    """The trace as instances with this prefix cache see it; which cache that is, is logged.

    Without a cache nobody looks at what prompts share: loads are then made of single requests.

    Args:
        rule: ``prefix_cache`` of the instance.
        trace: the requests.
    """
    LOGGER.info(cache_sentence(rule, trace))
    return trace.without_blocks() if rule == "off" else trace


def windows_with_cache(rule: str, windows: "Sequence[TraceWindow]") -> "list[TraceWindow]":
    """The same for windows of one trace, which is said once."""
    if windows:
        LOGGER.info(cache_sentence(rule, windows[0].trace))
    if rule != "off":
        return list(windows)
    return [replace(window, trace=window.trace.without_blocks()) for window in windows]


def cache_label(rule: str, trace: Trace) -> str:
    """The prefix cache of a run in a word: ``off`` where nobody says what prompts share."""
    return "off" if trace.blocks is None else rule


def cache_sentence(rule: str, trace: Trace) -> str:
    """Which prefix cache prefill instances have, in words."""
    if rule == "off":
        return "prefix cache: off"
    if trace.blocks is None:
        return f"prefix cache: off, since {trace.name} does not say what prompts share"
    if rule == "infinite":
        return "prefix cache: infinite, nothing is given up"
    _, _, tokens = rule.partition(":")
    room = f"{int(tokens):,} tokens" if tokens else "the KV room"
    return f"prefix cache: lru, {room} of each prefill instance"
