"""Compiled prefill features.

The projected queue against its TTFT deadlines at each clock level, arrivals, clocks.
"""

from typing import Any

import numpy as np

from biscale_env.contract.observation import HORIZON, PREFILL_SPEC
from biscale_env.core.jit import compiled, inlined
from biscale_env.models.physics import effective_freq_ghz, latency_s

N_LEVELS = 7
NO_DEADLINE = 9.99  # encoded slacks from here on mean that no request completes in the batch
SLACK_CLIP = 1.5
RULE_MARGIN = 0.05  # assumed: share of the SLO that the rule keeps free for what it cannot see
LOST_SPREAD_S = 0.3  # assumed: lateness at which every request of a late batch is counted as lost

PREFILL_NAMES = (
    *(f"slack_at_level_{k}" for k in range(N_LEVELS)),
    "drain_at_cheapest", "drain_at_max", "rule", "needed", "lost_at_max", "lost_at_cheapest",
    "queue_requests", "queue_tokens", "batch_tokens", "batch_requests", "next_tokens", "oldest_wait",
    "rate_1s", "rate_10s", "rate_60s", "token_rate", "mean_prompt", "utilisation", "utilisation_60s",
    "freq_current", "freq_pending", "time_to_apply", "delay", "first_batch_s", "slo", "backpressure", "cheapest",
)  # fmt: skip

_B_TOKENS, _B_ATTN, _B_SEQ = (
    PREFILL_SPEC.index(n) for n in ("batch_tokens", "batch_attn", "batch_requests")
)
_B_DONE, _B_SLACK, _B_ALIVE = (
    PREFILL_SPEC.index(n) for n in ("batch_completing", "batch_slack", "batch_slack_alive")
)
_QUEUE, _QTOKENS, _OLDEST = (
    PREFILL_SPEC.index(n) for n in ("queue_requests", "queue_tokens", "oldest_wait")
)
_RATES, _TOKEN_RATE = PREFILL_SPEC.index("arrival_rate_1s"), PREFILL_SPEC.index("token_rate_10s")
_CURRENT, _PENDING = PREFILL_SPEC.index("freq_current"), PREFILL_SPEC.index("freq_pending")
_APPLY, _DELAY = PREFILL_SPEC.index("time_to_apply"), PREFILL_SPEC.index("actuation_delay")
_SLO, _BACK = PREFILL_SPEC.index("slo"), PREFILL_SPEC.index("kv_backpressure")
_REFERENCE_TOKENS = 1024.0
_MEAN_PROMPT = 1155.0  # Azure conversation trace: used where no prompt has arrived yet


@inlined
def physical(x: Any, scale: Any, i: int, at: int) -> float:
    """Physical value of one observed quantity."""
    return x[i, at] * scale[at]


@inlined
def queue_at(
    x: Any,
    scale: Any,
    i: int,
    c: Any,
    f: float,
    before: float,
    lead: float,
    fmin: float,
    fmax: float,
) -> Any:
    """Walk the projected batches at clock ``f`` (GHz), in force after ``lead`` seconds at clock
    ``before``.

    Returns:
        ``(tightest slack of what can still be met, s; time to drain, s; requests late; duration of
        the first batch, s)``.
    """
    slo = physical(x, scale, i, _SLO)
    t, slack, late, first = 0.0, SLACK_CLIP * slo, 0.0, 0.0
    for k in range(HORIZON):
        tokens = physical(x, scale, i, _B_TOKENS + k)
        if tokens <= 0.0:
            break
        attn, seqs = physical(x, scale, i, _B_ATTN + k), physical(x, scale, i, _B_SEQ + k)
        cap = effective_freq_ghz(c, tokens, attn, 0.0, seqs, fmax, fmin)
        duration = latency_s(c, tokens, attn, 0.0, seqs, min(f, cap))
        if lead > t:
            slow = latency_s(c, tokens, attn, 0.0, seqs, min(before, cap))
            share = min((lead - t) / slow, 1.0)
            duration = share * slow + (1.0 - share) * duration
        t += duration
        if k == 0:
            first = t
        alive, tightest = x[i, _B_ALIVE + k], x[i, _B_SLACK + k]
        if alive < NO_DEADLINE:
            slack = min(slack, alive * slo - t)
        if tightest < NO_DEADLINE and t > tightest * slo:
            done = physical(x, scale, i, _B_DONE + k)
            late += 1.0 + max(done - 1.0, 0.0) * min((t - tightest * slo) / LOST_SPREAD_S, 1.0)
    return slack, t, late, first


@inlined
def squash(value: float, scale: float) -> float:
    """Logarithm that is about linear below ``scale``."""
    return np.log1p(max(value, 0.0) / scale)


@inlined
def write_rest(
    x: Any, scale: Any, i: int, c: Any, fmax: float, fmin: float, out: Any, at: int
) -> None:
    """Queue, arrivals and clocks, from column ``at`` on."""
    slo = physical(x, scale, i, _SLO)
    out[i, at] = squash(physical(x, scale, i, _QUEUE), 4.0)
    out[i, at + 1] = squash(physical(x, scale, i, _QTOKENS), 2048.0)
    out[i, at + 2] = physical(x, scale, i, _B_TOKENS) / 2048.0
    out[i, at + 3] = squash(physical(x, scale, i, _B_SEQ), 4.0)
    out[i, at + 4] = physical(x, scale, i, _B_TOKENS + 1) / 2048.0
    out[i, at + 5] = min(x[i, _OLDEST], 3.0)
    for k in range(3):
        out[i, at + 6 + k] = squash(physical(x, scale, i, _RATES + k), 2.0)
    token_rate = physical(x, scale, i, _TOKEN_RATE)
    rate_10, rate_60 = physical(x, scale, i, _RATES + 1), physical(x, scale, i, _RATES + 2)
    mean = token_rate / rate_10 if rate_10 > 1e-3 else _MEAN_PROMPT
    cap = effective_freq_ghz(c, _REFERENCE_TOKENS, 0.5 * _REFERENCE_TOKENS**2, 0.0, 1.0, fmax, fmin)
    per_token = (
        latency_s(c, _REFERENCE_TOKENS, 0.5 * _REFERENCE_TOKENS**2, 0.0, 1.0, cap)
        / _REFERENCE_TOKENS
    )
    out[i, at + 9] = squash(token_rate, 4000.0)
    out[i, at + 10] = squash(mean, 1024.0)
    out[i, at + 11] = min(token_rate * per_token, 2.0)
    out[i, at + 12] = min(rate_60 * _MEAN_PROMPT * per_token, 2.0)
    out[i, at + 13] = physical(x, scale, i, _CURRENT) * 1e-3 - fmin
    out[i, at + 14] = physical(x, scale, i, _PENDING) * 1e-3 - fmin
    out[i, at + 15] = min(physical(x, scale, i, _APPLY) / slo, 1.0)
    out[i, at + 16] = min(physical(x, scale, i, _DELAY) / slo, 1.0)
    out[i, at + 18] = min(slo, 4.0)
    out[i, at + 19] = x[i, _BACK]


@compiled
def prefill_features(
    x: Any,
    scale: Any,
    coefs: Any,
    cheapest_ghz: Any,
    levels_ghz: Any,
    range_ghz: Any,
    out: Any,
    rule: Any,
    lost: Any,
) -> None:
    """Fill features (n, F), the rule's actions (n,) and the requests lost at the highest clock (n,)
    of observations (n, dim).
    """
    fmin, fmax = range_ghz[0], range_ghz[1]
    for i in range(x.shape[0]):
        j = i if coefs.size > 1 else 0
        c, best = coefs[j], cheapest_ghz[j]
        slo = physical(x, scale, i, _SLO)
        before = max(physical(x, scale, i, _PENDING) * 1e-3, fmin)
        lead = physical(x, scale, i, _DELAY) + physical(x, scale, i, _APPLY)
        need, drain, late, first, last = fmax, 0.0, 0.0, 0.0, 0.0
        for k in range(N_LEVELS):
            slack, drain, late, first = queue_at(
                x, scale, i, c, levels_ghz[k], before, lead, fmin, fmax
            )
            out[i, k] = min(max(slack / slo, -SLACK_CLIP), SLACK_CLIP)
            spare = slack - RULE_MARGIN * slo
            if need == fmax and spare >= 0.0:
                share = -last / (spare - last) if k > 0 and spare > last else 0.0
                need = (
                    levels_ghz[k - 1] + share * (levels_ghz[k] - levels_ghz[k - 1])
                    if k > 0
                    else levels_ghz[0]
                )
            last = spare
        _, drain_best, late_best, first = queue_at(x, scale, i, c, best, before, lead, fmin, fmax)
        rule_ghz = max(need, best)
        rule[i] = 2.0 * (rule_ghz - fmin) / (fmax - fmin) - 1.0
        lost[i] = late
        out[i, N_LEVELS] = squash(drain_best / slo, 1.0)
        out[i, N_LEVELS + 1] = squash(drain / slo, 1.0)
        out[i, N_LEVELS + 2] = rule[i]
        out[i, N_LEVELS + 3] = need - fmin
        out[i, N_LEVELS + 4] = squash(late, 1.0)
        out[i, N_LEVELS + 5] = squash(late_best, 1.0)
        write_rest(x, scale, i, c, fmax, fmin, out, N_LEVELS + 6)
        out[i, N_LEVELS + 6 + 17] = min(first / slo, 3.0)
        out[i, N_LEVELS + 6 + 20] = best - fmin
