"""Which batches a prefill instance runs for prompts that all wait already."""

import numpy as np
from numpy.typing import NDArray

from biscale_env.sim.prefill import form_batch


def prefill_batches(
    prompt: NDArray[np.int32], token_budget: int, max_seqs: int, prefix: int = 0
) -> list[tuple[float, float, float, float]]:
    """Work (tokens, attn_work, cached, n_seq) of every batch, in order.

    Args:
        prompt: new tokens per request, shape (requests,), first come first served.
        token_budget: new tokens per batch; longer prompts run in chunks.
        max_seqs: requests per batch.
        prefix: tokens per request that are cached already: each new token attends to them too.
    """
    works = []
    head = head_done = 0
    cached = np.full(len(prompt), prefix, dtype=np.int32)
    while head < len(prompt):
        b = form_batch(prompt, cached, head, head_done, len(prompt), token_budget, max_seqs)
        works.append((float(b.tokens), float(b.attn_work), 0.0, float(b.n_seq)))
        head, head_done = b.head, b.head_done
    return works


def equal_prompts(tokens: int, requests: int) -> NDArray[np.int32]:
    """Lengths of prompts as equal as whole tokens allow, the longer ones first.

    Args:
        tokens: of all of them together.
        requests: how many.
    """
    lengths = np.full(requests, tokens // requests, dtype=np.int32)
    lengths[: tokens % requests] += 1
    return lengths
