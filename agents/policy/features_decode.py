"""Compiled decode features: the next iteration's time against the TPOT SLO at each clock level,
slack, waiting, arrivals, clocks.
"""

from typing import Any

import numpy as np

from agents.policy.features_prefill import N_LEVELS, physical, squash
from biscale_env.contract.observation import DECODE_SPEC
from biscale_env.core.jit import compiled, inlined
from biscale_env.models.physics import effective_freq_ghz, latency_s

RULE_MARGIN = 0.05  # assumed: share of the SLO that the rule keeps free
# assumed: intervals over which the rule spends saved slack, as in controllers.decode.slack
LOOKAHEAD = 16.0

DECODE_NAMES = (
    *(f"time_at_level_{k}" for k in range(N_LEVELS)),
    "rule", "batch", "batch_log", "cached", "kv_use", "waiting", "waiting_tokens", "oldest_wait", "incoming", "recompute",
    "slack_min", "slack_mean", "rate_1s", "rate_10s", "rate_60s", "token_rate", "rate_trend",
    "freq_current", "freq_pending", "time_to_apply", "delay", "last_time", "slo", "cheapest", "time_at_lowest",
)  # fmt: skip

_BATCH, _CACHED, _KV, _RECOMPUTE, _WAITING, _WTOKENS, _OLDEST, _INCOMING, _MIN, _MEAN = (
    DECODE_SPEC.index(n)
    for n in (
        "batch", "cached_tokens", "kv_use", "recompute_tokens", "waiting_requests", "waiting_tokens", "oldest_wait",
        "incoming_requests", "tpot_slack_min", "tpot_slack_mean",
    )
)  # fmt: skip
_RATES, _TOKEN_RATE = DECODE_SPEC.index("arrival_rate_1s"), DECODE_SPEC.index("token_rate_10s")
_CURRENT, _PENDING = DECODE_SPEC.index("freq_current"), DECODE_SPEC.index("freq_pending")
_APPLY, _DELAY, _LAST, _SLO = (
    DECODE_SPEC.index(n) for n in ("time_to_apply", "actuation_delay", "last_time", "slo")
)


@inlined
def time_at(x: Any, scale: Any, i: int, c: Any, f: float, fmin: float) -> float:
    """Duration of the next iteration at clock ``f`` (GHz), s."""
    batch, redo = physical(x, scale, i, _BATCH), physical(x, scale, i, _RECOMPUTE)
    tokens = max(batch + redo, 1.0)
    attn, cached = 0.5 * redo * redo, physical(x, scale, i, _CACHED)
    return latency_s(
        c, tokens, attn, cached, batch, effective_freq_ghz(c, tokens, attn, cached, batch, f, fmin)
    )


@inlined
def symmetric_log(value: float) -> float:
    """Signed logarithm, linear near 0."""
    return np.log1p(value) if value >= 0.0 else -np.log1p(-value)


@inlined
def write_rest(x: Any, scale: Any, i: int, fmin: float, out: Any, at: int) -> None:
    """Batch, slack, arrivals and clocks, from column ``at`` on."""
    slo = physical(x, scale, i, _SLO)
    out[i, at] = physical(x, scale, i, _BATCH) / 256.0
    out[i, at + 1] = squash(physical(x, scale, i, _BATCH), 16.0)
    out[i, at + 2] = physical(x, scale, i, _CACHED) / 2e5
    out[i, at + 3] = x[i, _KV]
    out[i, at + 4] = squash(physical(x, scale, i, _WAITING), 8.0)
    out[i, at + 5] = squash(physical(x, scale, i, _WTOKENS), 16384.0)
    out[i, at + 6] = squash(physical(x, scale, i, _OLDEST) / slo, 10.0)
    out[i, at + 7] = squash(physical(x, scale, i, _INCOMING), 8.0)
    out[i, at + 8] = squash(physical(x, scale, i, _RECOMPUTE), 2048.0)
    out[i, at + 9] = 0.5 * symmetric_log(physical(x, scale, i, _MIN))
    out[i, at + 10] = 0.5 * symmetric_log(physical(x, scale, i, _MEAN))
    for k in range(3):
        out[i, at + 11 + k] = squash(physical(x, scale, i, _RATES + k), 10.0)
    out[i, at + 14] = squash(physical(x, scale, i, _TOKEN_RATE), 2e4)
    out[i, at + 15] = out[i, at + 11] - out[i, at + 13]
    out[i, at + 16] = physical(x, scale, i, _CURRENT) * 1e-3 - fmin
    out[i, at + 17] = physical(x, scale, i, _PENDING) * 1e-3 - fmin
    out[i, at + 18] = min(physical(x, scale, i, _APPLY) / slo, 4.0)
    out[i, at + 19] = min(physical(x, scale, i, _DELAY) / slo, 4.0)
    out[i, at + 20] = min(physical(x, scale, i, _LAST) / slo, 4.0)
    out[i, at + 21] = min(10.0 * slo, 4.0)


@compiled
def decode_features(
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
    """Fill features (n, F), the rule's actions (n,) and the requests lost (n,; not foreseen in
    decode, 0) of observations (n, dim).
    """
    fmin, fmax = range_ghz[0], range_ghz[1]
    for i in range(x.shape[0]):
        j = i if coefs.size > 1 else 0
        c, best = coefs[j], cheapest_ghz[j]
        slo = physical(x, scale, i, _SLO)
        limit = (
            slo * (1.0 - RULE_MARGIN) * (1.0 + min(physical(x, scale, i, _MIN) / LOOKAHEAD, 0.0))
        )
        need, last = fmax, 0.0
        for k in range(N_LEVELS):
            t = time_at(x, scale, i, c, levels_ghz[k], fmin)
            out[i, k] = min(t / slo, 3.0)
            spare = limit - t
            if need == fmax and spare >= 0.0:
                share = -last / (spare - last) if k > 0 and spare > last else 0.0
                need = (
                    levels_ghz[k - 1] + share * (levels_ghz[k] - levels_ghz[k - 1])
                    if k > 0
                    else levels_ghz[0]
                )
            last = spare
        rule[i] = 2.0 * (max(need, best) - fmin) / (fmax - fmin) - 1.0
        lost[i] = 0.0
        out[i, N_LEVELS] = rule[i]
        write_rest(x, scale, i, fmin, out, N_LEVELS + 1)
        out[i, N_LEVELS + 23] = best - fmin
        out[i, N_LEVELS + 24] = min(time_at(x, scale, i, c, fmin, fmin) / slo, 3.0)
