"""Compiled prefill features: the projected queue against its TTFT deadlines at each clock level.

For every level f the projected batches are walked at f (before the delay is over, at the clock
asked for before)::

    slack(f) = min over batches with a request that can still be met of (deadline - completion)

The *rule* is the lowest clock whose slack leaves :data:`RULE_MARGIN` of the SLO free, linearly
between two levels, and never below the clock of least energy.
"""

from typing import NamedTuple

from agents.policy.feature_parts import (
    N_LEVELS,
    FeatureClocks,
    Floats32,
    Floats64,
    Records,
    between_levels,
    squash,
)
from biscale_env.contract.observation import HORIZON, PREFILL_SPEC
from biscale_env.core.jit import compiled, inlined
from biscale_env.models.physics import Coefficients, effective_freq_ghz, latency_s
from controllers.columns import PREFILL

NO_DEADLINE = 9.99  # encoded slacks from here on mean that no request completes in the batch
SLACK_CLIP = 1.5
RULE_MARGIN = 0.05  # assumed: fraction of the SLO that the rule keeps free for what it cannot see
LOST_SPREAD_S = 0.3  # assumed: lateness from which on every request of a late batch counts as late
REFERENCE_TOKENS = 1024.0
MEAN_PROMPT = 1155.0  # Azure conversation trace: used where no prompt has arrived yet

PREFILL_NAMES = (
    *(f"slack_at_level_{k}" for k in range(N_LEVELS)),
    "drain_at_cheapest", "drain_at_max", "rule", "needed", "lost_at_max", "lost_at_cheapest",
    "queue_requests", "queue_tokens", "batch_tokens", "batch_requests", "next_tokens",
    "oldest_wait", "rate_1s", "rate_10s", "rate_60s", "token_rate", "mean_prompt", "utilisation",
    "utilisation_60s", "freq_current", "freq_pending", "time_to_apply", "delay", "first_batch_s",
    "slo", "backpressure", "cheapest",
)  # fmt: skip
"""Names of the features, in order; changing one makes checkpoints of before unreadable."""


class PrefillMade(NamedTuple):
    """Columns of the features behind those of the levels."""

    drain_at_cheapest: int
    drain_at_max: int
    rule: int
    needed: int
    lost_at_max: int
    lost_at_cheapest: int
    queue_requests: int
    queue_tokens: int
    batch_tokens: int
    batch_requests: int
    next_tokens: int
    oldest_wait: int
    rate_1s: int
    rate_10s: int
    rate_60s: int
    token_rate: int
    mean_prompt: int
    utilisation: int
    utilisation_60s: int
    freq_current: int
    freq_pending: int
    time_to_apply: int
    delay: int
    first_batch_s: int
    slo: int
    backpressure: int
    cheapest: int


MADE = PrefillMade(*(PREFILL_NAMES.index(name) for name in PrefillMade._fields))
SCALE = PREFILL_SPEC.scale


class PendingClock(NamedTuple):
    """A clock change: until ``lead_s`` from now the clock is ``before_ghz``."""

    before_ghz: float
    lead_s: float


class QueueWalk(NamedTuple):
    """The projected queue walked at one clock.

    Attributes:
        slack_s: tightest slack of the requests that can still be met.
        drain_s: time until the queue is empty.
        late: requests that miss their deadline.
        first_s: duration of the first batch.
    """

    slack_s: float
    drain_s: float
    late: float
    first_s: float


@inlined
def seen(x: Floats32, at: int) -> float:
    """Physical value of one observed quantity."""
    return x[at] * SCALE[at]


@inlined
def walk_queue(
    x: Floats32, c: Coefficients, f: float, change: PendingClock, clocks: FeatureClocks
) -> QueueWalk:
    """Walk the projected batches of one observation at clock ``f`` (GHz)."""
    slo = seen(x, PREFILL.slo)
    fmin, fmax = clocks.freq_min_ghz, clocks.freq_max_ghz
    t, slack, late, first = 0.0, SLACK_CLIP * slo, 0.0, 0.0
    for k in range(HORIZON):
        tokens = seen(x, PREFILL.batch_tokens + k)
        if tokens <= 0.0:
            break
        attn, seqs = seen(x, PREFILL.batch_attn + k), seen(x, PREFILL.batch_requests + k)
        cap = effective_freq_ghz(c, tokens, attn, 0.0, seqs, fmax, fmin)
        duration = latency_s(c, tokens, attn, 0.0, seqs, min(f, cap))
        if change.lead_s > t:
            slow = latency_s(c, tokens, attn, 0.0, seqs, min(change.before_ghz, cap))
            fraction = min((change.lead_s - t) / slow, 1.0)
            duration = fraction * slow + (1.0 - fraction) * duration
        t += duration
        if k == 0:
            first = t
        alive, tightest = x[PREFILL.batch_slack_alive + k], x[PREFILL.batch_slack + k]
        if alive < NO_DEADLINE:
            slack = min(slack, alive * slo - t)
        if tightest < NO_DEADLINE and t > tightest * slo:
            done = seen(x, PREFILL.batch_completing + k)
            late += 1.0 + max(done - 1.0, 0.0) * min((t - tightest * slo) / LOST_SPREAD_S, 1.0)
    return QueueWalk(slack, t, late, first)


@inlined
def write_queue(x: Floats32, out: Floats32) -> None:
    """Queue, next batches, clocks and their timing of one observation."""
    slo = seen(x, PREFILL.slo)
    out[MADE.queue_requests] = squash(seen(x, PREFILL.queue_requests), 4.0)
    out[MADE.queue_tokens] = squash(seen(x, PREFILL.queue_tokens), 2048.0)
    out[MADE.batch_tokens] = seen(x, PREFILL.batch_tokens) / 2048.0
    out[MADE.batch_requests] = squash(seen(x, PREFILL.batch_requests), 4.0)
    out[MADE.next_tokens] = seen(x, PREFILL.batch_tokens + 1) / 2048.0
    out[MADE.oldest_wait] = min(x[PREFILL.oldest_wait], 3.0)
    out[MADE.time_to_apply] = min(seen(x, PREFILL.time_to_apply) / slo, 1.0)
    out[MADE.delay] = min(seen(x, PREFILL.actuation_delay) / slo, 1.0)
    out[MADE.slo] = min(slo, 4.0)
    out[MADE.backpressure] = x[PREFILL.kv_backpressure]


@inlined
def write_arrivals(x: Floats32, c: Coefficients, fmin: float, fmax: float, out: Floats32) -> None:
    """Arrival rates, the load they make at the highest clock, and the clocks of one observation."""
    for k in range(3):
        out[MADE.rate_1s + k] = squash(seen(x, PREFILL.arrival_rate_1s + k), 2.0)
    token_rate = seen(x, PREFILL.token_rate_10s)
    rate_10, rate_60 = seen(x, PREFILL.arrival_rate_10s), seen(x, PREFILL.arrival_rate_60s)
    mean = token_rate / rate_10 if rate_10 > 1e-3 else MEAN_PROMPT
    attn = 0.5 * REFERENCE_TOKENS**2
    cap = effective_freq_ghz(c, REFERENCE_TOKENS, attn, 0.0, 1.0, fmax, fmin)
    per_token = latency_s(c, REFERENCE_TOKENS, attn, 0.0, 1.0, cap) / REFERENCE_TOKENS
    out[MADE.token_rate] = squash(token_rate, 4000.0)
    out[MADE.mean_prompt] = squash(mean, 1024.0)
    out[MADE.utilisation] = min(token_rate * per_token, 2.0)
    out[MADE.utilisation_60s] = min(rate_60 * MEAN_PROMPT * per_token, 2.0)
    out[MADE.freq_current] = seen(x, PREFILL.freq_current) * 1e-3 - fmin
    out[MADE.freq_pending] = seen(x, PREFILL.freq_pending) * 1e-3 - fmin


@compiled
def prefill_features(
    x: Floats32,
    coefs: Records,
    cheapest_ghz: Floats64,
    clocks: Records,
    out: Floats32,
    rule: Floats32,
    lost: Floats32,
) -> None:
    """Fill the parts of :class:`agents.policy.feature_parts.FeatureRows` from encoded observations.

    Args:
        x: observations (n, dim).
        coefs: coefficients, one record for all rows or one per row.
        cheapest_ghz: clock of least energy, as many as coefs.
        clocks: the GPU's, one record of `CLOCKS_DTYPE`.
        out: features (n, F), written.
        rule: the rule's actions (n,), written.
        lost: requests late even at the highest level (n,), written.
    """
    g = clocks[0]
    fmin, fmax = g.freq_min_ghz, g.freq_max_ghz
    for i in range(x.shape[0]):
        j = i if coefs.size > 1 else 0
        row, made, c, best = x[i], out[i], coefs[j], cheapest_ghz[j]
        slo = seen(row, PREFILL.slo)
        change = PendingClock(
            max(seen(row, PREFILL.freq_pending) * 1e-3, fmin),
            seen(row, PREFILL.actuation_delay) + seen(row, PREFILL.time_to_apply),
        )
        need, last = fmax, 0.0
        at = QueueWalk(0.0, 0.0, 0.0, 0.0)
        for k in range(N_LEVELS):
            at = walk_queue(row, c, g.levels_ghz[k], change, g)
            made[k] = min(max(at.slack_s / slo, -SLACK_CLIP), SLACK_CLIP)
            spare = at.slack_s - RULE_MARGIN * slo
            if need == fmax and spare >= 0.0:
                need = between_levels(g.levels_ghz, k, last, spare)
            last = spare
        at_best = walk_queue(row, c, best, change, g)
        rule[i] = 2.0 * (max(need, best) - fmin) / (fmax - fmin) - 1.0
        lost[i] = at.late
        made[MADE.drain_at_cheapest] = squash(at_best.drain_s / slo, 1.0)
        made[MADE.drain_at_max] = squash(at.drain_s / slo, 1.0)
        made[MADE.rule] = rule[i]
        made[MADE.needed] = need - fmin
        made[MADE.lost_at_max] = squash(at.late, 1.0)
        made[MADE.lost_at_cheapest] = squash(at_best.late, 1.0)
        write_queue(row, made)
        write_arrivals(row, c, fmin, fmax, made)
        made[MADE.first_batch_s] = min(at_best.first_s / slo, 3.0)
        made[MADE.cheapest] = best - fmin
