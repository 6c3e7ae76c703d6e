"""What the iterations of a run would have cost at the highest clock: the same work, another clock.

:mod:`biscale_env.evaluation.stats.decomposition` says what it is needed for.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.envs.plant import Plant

Floats = NDArray[np.float64]


def attention_work(prompt: NDArray[Any], prefix: NDArray[Any], batch_tokens: Floats) -> Floats:
    """Attention work of prefill batches that take prompts in order, token^2, one per batch.

    A chunk of ``n`` tokens behind ``d`` adds ``n (n / 2 + d)``, so the chunks of the first ``x``
    new tokens of a prompt add up to ``x (x / 2 + prefix)``, and up to a token of the queue it is
    that of whole prompts and of the part of the next.

    Args:
        prompt: new tokens of each prompt, in order of arrival.
        prefix: cached tokens before them.
        batch_tokens: new tokens of each batch; together those of all prompts.
    """
    lengths = prompt.astype(np.float64)
    cached = np.concatenate([prefix.astype(np.float64), [0.0]])
    ends = np.cumsum(lengths)
    before = np.concatenate([[0.0], ends])
    pairs = np.concatenate([[0.0], np.cumsum(lengths * (0.5 * lengths + cached[:-1]))])
    upto = np.concatenate([[0.0], np.cumsum(batch_tokens)])
    whole = np.searchsorted(ends, upto, side="right")
    part = upto - before[whole]
    return np.diff(pairs[whole] + part * (0.5 * part + cached[whole]))


def busy_at_max_clock_j(
    plant: Plant,
    steps: Mapping[str, Floats],
    prompt: NDArray[Any],
    prefix: NDArray[Any],
    member: int,
) -> float:
    """Energy of a run's iterations had each run at the highest clock, under the power cap, J.

    NaN where a decision stands for several iterations, or no steps were recorded. Tokens that a
    decode iteration recomputes count as one prompt.

    Args:
        plant: what was run.
        steps: columns of the timeline, one entry per iteration.
        prompt: new tokens of each prompt, in order of arrival.
        prefix: cached tokens before them.
        member: ensemble member of the plant.
    """
    if plant.settings.min_decision_interval_s > 0 or not len(steps["time_s"]):
        return math.nan
    tokens, n_seq = steps["batch_tokens"], steps["batch_requests"]
    if plant.phase == "prefill":
        attn, cached = attention_work(prompt, prefix, tokens), np.zeros(len(tokens))
    else:
        attn = 0.5 * (tokens - n_seq) ** 2
        cached = np.rint(steps["kv_use"] * plant.kv_capacity_tokens)
    top_mhz = plant.gpu.freq_max_mhz
    return float(plant.model.energy_j(tokens, attn, cached, n_seq, top_mhz, member).sum())
