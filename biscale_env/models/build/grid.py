"""Points at which the kernels of an LLM are timed: batches of prompts, and of running requests."""

from dataclasses import dataclass
from typing import Final

from biscale_env.core.errors import BiscaleError

MAX_PREFILL_TOKENS: Final = 16384  # new tokens per prefill batch
PREFILL_BATCHES: Final = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
PROMPTS: Final = (
    *(16, 32, 64, 128, 192, 256, 384, 512, 768),
    *(1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384),
)
PREFIXES: Final = (1024, 2048, 4096, 8192, 16384, 32768)
CHUNKS: Final = (256, 512, 1024, 2048, 4096, 8192)  # new tokens after a prefix
DECODE_BATCHES: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
CONTEXTS: Final = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
MIN_POINTS: Final = 12  # decode points below which no model can be fitted


@dataclass(frozen=True, order=True)
class WorkPoint:
    """One iteration.

    Attributes:
        batch: requests.
        new_tokens: prompt tokens per request; 0 in decode.
        prefix: tokens per request that are cached already; 0 in decode.
        context: KV tokens per request in decode; 0 in prefill.
    """

    batch: int
    new_tokens: int
    prefix: int
    context: int


def prefill_points(kv_tokens: int, max_context: int) -> list[WorkPoint]:
    """Prefill batches that fit, sorted.

    Args:
        kv_tokens: tokens that the KV cache of the instance holds.
        max_context: longest context of the LLM.
    """
    plain = [
        WorkPoint(b, n, 0, 0)
        for b in PREFILL_BATCHES
        for n in PROMPTS
        if b * n <= min(MAX_PREFILL_TOKENS, kv_tokens) and n <= max_context
    ]
    longest = min(kv_tokens, max_context)
    prefixed = [WorkPoint(1, n, p, 0) for p in PREFIXES for n in CHUNKS if n + p <= longest]
    return sorted(plain + prefixed)


def decode_points(kv_tokens: int, max_context: int) -> list[WorkPoint]:
    """Decode batches that fit, sorted; arguments as in :func:`prefill_points`.

    Raises:
        BiscaleError: the KV cache has no room for enough of them.
    """
    points = sorted(
        WorkPoint(b, 0, 0, c)
        for b in DECODE_BATCHES
        for c in CONTEXTS
        if b * c <= kv_tokens and c <= max_context
    )
    if len(points) < MIN_POINTS:
        raise BiscaleError(
            f"only {kv_tokens} tokens of KV cache fit beside the weights: use a larger TP, a "
            "smaller number format, or a GPU with more memory"
        )
    return points
