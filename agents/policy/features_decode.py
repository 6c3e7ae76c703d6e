"""Compiled decode features: the next iteration's time against the TPOT SLO at each clock level.

The *rule* is the lowest clock at which the next iteration takes at most::

    SLO (1 - RULE_MARGIN) (1 + min(tightest slack / LOOKAHEAD, 0))

linearly between two levels, and never below the clock of least energy. What a clock costs is told
by the energy of the next iteration at each level, relative to the highest, and by the power of a
waiting GPU at the lowest and the highest clock, relative to the busy one's.
"""

from typing import Any, NamedTuple

from agents.policy.feature_parts import (
    N_LEVELS,
    Floats32,
    Records,
    between_levels,
    idle_share,
    range_share,
    squash,
    symmetric_log,
)
from biscale_env.contract.observation import DECODE_SPEC
from biscale_env.core.jit import compiled, inlined
from biscale_env.models.physics import Coefficients, iteration_under_cap
from controllers.columns import DECODE

RULE_MARGIN = 0.05  # assumed: fraction of the SLO that the rule keeps free
# assumed: intervals over which the rule spends saved slack, as in controllers.decode.slack
LOOKAHEAD = 16.0

DECODE_NAMES = (
    *(f"time_at_level_{k}" for k in range(N_LEVELS)),
    *(f"energy_at_level_{k}" for k in range(N_LEVELS)),
    "idle_at_lowest", "idle_at_highest",
    "rule", "batch", "batch_log", "cached", "kv_use", "waiting", "waiting_tokens", "oldest_wait",
    "incoming", "recompute", "slack_min", "slack_mean", "rate_1s", "rate_10s", "rate_60s",
    "token_rate", "rate_trend", "freq_current", "freq_pending", "time_to_apply", "delay",
    "last_time", "slo", "cheapest", "time_at_lowest",
)  # fmt: skip
"""Names of the features, in order; changing one makes checkpoints of before unreadable."""


class DecodeMade(NamedTuple):
    """Columns of the features behind those of the levels."""

    idle_at_lowest: int
    idle_at_highest: int
    rule: int
    batch: int
    batch_log: int
    cached: int
    kv_use: int
    waiting: int
    waiting_tokens: int
    oldest_wait: int
    incoming: int
    recompute: int
    slack_min: int
    slack_mean: int
    rate_1s: int
    rate_10s: int
    rate_60s: int
    token_rate: int
    rate_trend: int
    freq_current: int
    freq_pending: int
    time_to_apply: int
    delay: int
    last_time: int
    slo: int
    cheapest: int
    time_at_lowest: int


MADE = DecodeMade(*(DECODE_NAMES.index(name) for name in DecodeMade._fields))
SCALE = DECODE_SPEC.scale


@inlined
def seen(x: Floats32, at: int) -> float:
    """Physical value of one observed quantity."""
    return x[at] * SCALE[at]


@inlined
def cost_at(x: Floats32, c: Coefficients, f: float, fmin: float) -> tuple[float, float]:
    """Duration, s, and energy per GPU, J, of the next iteration at clock ``f`` (GHz)."""
    batch, redo = seen(x, DECODE.batch), seen(x, DECODE.recompute_tokens)
    tokens = max(batch + redo, 1.0)
    attn, cached = 0.5 * redo * redo, seen(x, DECODE.cached_tokens)
    _, time, joules = iteration_under_cap(c, tokens, attn, cached, batch, f, fmin)
    return time, joules


@inlined
def write_requests(x: Floats32, slo: float, out: Floats32) -> None:
    """Running and waiting requests of one observation, and their slack."""
    out[MADE.batch] = seen(x, DECODE.batch) / 256.0
    out[MADE.batch_log] = squash(seen(x, DECODE.batch), 16.0)
    out[MADE.cached] = seen(x, DECODE.cached_tokens) / 2e5
    out[MADE.kv_use] = x[DECODE.kv_use]
    out[MADE.waiting] = squash(seen(x, DECODE.waiting_requests), 8.0)
    out[MADE.waiting_tokens] = squash(seen(x, DECODE.waiting_tokens), 16384.0)
    out[MADE.oldest_wait] = squash(seen(x, DECODE.oldest_wait) / slo, 10.0)
    out[MADE.incoming] = squash(seen(x, DECODE.incoming_requests), 8.0)
    out[MADE.recompute] = squash(seen(x, DECODE.recompute_tokens), 2048.0)
    out[MADE.slack_min] = 0.5 * symmetric_log(seen(x, DECODE.tpot_slack_min))
    out[MADE.slack_mean] = 0.5 * symmetric_log(seen(x, DECODE.tpot_slack_mean))


@inlined
def write_load_and_clocks(x: Floats32, slo: float, g: Any, out: Floats32) -> None:
    """Arrival rates and clocks of one observation."""
    for k in range(3):
        out[MADE.rate_1s + k] = squash(seen(x, DECODE.arrival_rate_1s + k), 10.0)
    out[MADE.token_rate] = squash(seen(x, DECODE.token_rate_10s), 2e4)
    out[MADE.rate_trend] = out[MADE.rate_1s] - out[MADE.rate_60s]
    out[MADE.freq_current] = range_share(g, seen(x, DECODE.freq_current) * 1e-3)
    out[MADE.freq_pending] = range_share(g, seen(x, DECODE.freq_pending) * 1e-3)
    out[MADE.time_to_apply] = min(seen(x, DECODE.time_to_apply) / slo, 4.0)
    out[MADE.delay] = min(seen(x, DECODE.actuation_delay) / slo, 4.0)
    out[MADE.last_time] = min(seen(x, DECODE.last_time) / slo, 4.0)
    out[MADE.slo] = min(10.0 * slo, 4.0)


@inlined
def fill_row(x: Floats32, c: Coefficients, g: Any, made: Floats32) -> float:
    """Features of one observation; returns the rule's action."""
    fmin, slo = g.freq_min_ghz, seen(x, DECODE.slo)
    tightest = min(seen(x, DECODE.tpot_slack_min) / LOOKAHEAD, 0.0)
    limit = slo * (1.0 - RULE_MARGIN) * (1.0 + tightest)
    fastest_s, most_j = cost_at(x, c, g.levels_ghz[N_LEVELS - 1], fmin)
    need, last = g.freq_max_ghz, 0.0
    for k in range(N_LEVELS):
        time, joules = cost_at(x, c, g.levels_ghz[k], fmin)
        made[k] = min(time / slo, 3.0)
        made[N_LEVELS + k] = min(joules / most_j, 2.0)
        spare = limit - time
        if need == g.freq_max_ghz and spare >= 0.0:
            need = between_levels(g.levels_ghz, k, last, spare)
        last = spare
    made[MADE.idle_at_lowest] = idle_share(c, g, fmin, most_j / fastest_s)
    made[MADE.idle_at_highest] = idle_share(c, g, g.freq_max_ghz, most_j / fastest_s)
    rule = 2.0 * range_share(g, max(need, g.cheapest_ghz)) - 1.0
    made[MADE.rule] = rule
    write_requests(x, slo, made)
    write_load_and_clocks(x, slo, g, made)
    made[MADE.cheapest] = range_share(g, g.cheapest_ghz)
    made[MADE.time_at_lowest] = min(cost_at(x, c, fmin, fmin)[0] / slo, 3.0)
    return rule


@compiled
def decode_features(
    x: Floats32,
    coefs: Records,
    plants: Records,
    out: Floats32,
    rule: Floats32,
    lost: Floats32,
) -> None:
    """Fill the parts of :class:`agents.policy.feature_parts.FeatureRows` from encoded observations.

    Args:
        x: observations (n, dim).
        coefs: coefficients, one record for all rows or one per row.
        plants: clocks and idle power, as many records of `FEATURE_PLANT_DTYPE` as coefs.
        out: features (n, F), written.
        rule: the rule's actions (n,), written.
        lost: late requests are not foreseen in decode: 0 (n,), written.
    """
    for i in range(x.shape[0]):
        j = i if coefs.size > 1 else 0
        rule[i], lost[i] = fill_row(x[i], coefs[j], plants[j], out[i]), 0.0
