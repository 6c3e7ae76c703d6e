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


def attention_work(prompt: NDArray[Any], batch_tokens: Floats) -> Floats:
    """Attention work of prefill batches that take prompts in order, token^2, one per batch.

    A chunk of ``n`` tokens behind ``d`` adds ``n (n / 2 + d) = ((d + n)^2 - d^2) / 2``, so up to
    token ``x`` of the queue it is the squares of whole prompts and of the part of the next, halved.

    Args:
        prompt: prompt lengths in order of arrival.
        batch_tokens: new tokens of each batch; together those of all prompts.
    """
    lengths = prompt.astype(np.float64)
    ends = np.cumsum(lengths)
    before = np.concatenate([[0.0], ends])
    squares = np.concatenate([[0.0], np.cumsum(0.5 * lengths**2)])
    upto = np.concatenate([[0.0], np.cumsum(batch_tokens)])
    whole = np.searchsorted(ends, upto, side="right")
    return np.diff(squares[whole] + 0.5 * (upto - before[whole]) ** 2)


def busy_at_max_clock_j(
    plant: Plant, steps: Mapping[str, Floats], prompt: NDArray[Any], member: int
) -> float:
    """Energy of a run's iterations had each run at the highest clock, under the power cap, J.

    NaN where a decision stands for several iterations, or no steps were recorded. Tokens that a
    decode iteration recomputes count as one prompt.

    Args:
        plant: what was run.
        steps: columns of the timeline, one entry per iteration.
        prompt: prompt lengths in order of arrival.
        member: ensemble member of the plant.
    """
    if plant.settings.min_decision_interval_s > 0 or not len(steps["time_s"]):
        return math.nan
    tokens, n_seq = steps["batch_tokens"], steps["batch_requests"]
    if plant.phase == "prefill":
        attn, cached = attention_work(prompt, tokens), np.zeros(len(tokens))
    else:
        attn = 0.5 * (tokens - n_seq) ** 2
        cached = np.rint(steps["kv_use"] * plant.kv_capacity_tokens)
    top_mhz = plant.gpu.freq_max_mhz
    return float(plant.model.energy_j(tokens, attn, cached, n_seq, top_mhz, member).sum())
