"""Compiled prefill features: the projected queue against its TTFT deadlines at each clock level.

For every level f the projected batches are walked at f (before the delay is over, at the clock
asked for before)::

    slack(f) = min over batches with a request that can still be met of (deadline - completion)

The *rule* is the lowest clock whose slack leaves :data:`RULE_MARGIN` of the SLO free, linearly
between two levels, and never below the clock of least energy. What a clock costs is told by the
energy of the next batch at each level, relative to the highest, and by the power of a waiting GPU
at the lowest and the highest clock, relative to the busy one's.
"""

from typing import Any, NamedTuple

from agents.policy.feature_parts import (
    N_LEVELS,
    Floats32,
    Floats64,
    Records,
    between_levels,
    idle_share,
    range_share,
    squash,
)
from biscale_env.contract.observation import HORIZON, PREFILL_SPEC
from biscale_env.core.jit import compiled, inlined
from biscale_env.models.physics import (
    ClockTerms,
    Coefficients,
    TimeParts,
    clock_terms,
    duration_of,
    effective_freq_ghz,
    energy_of,
    latency_s,
    time_parts,
    work_energy_j,
)
from controllers.columns import PREFILL

NO_DEADLINE = 9.99  # encoded slacks from here on mean that no request completes in the batch
SLACK_CLIP = 1.5
RULE_MARGIN = 0.05  # assumed: fraction of the SLO that the rule keeps free for what it cannot see
LOST_SPREAD_S = 0.3  # assumed: lateness from which on every request of a late batch counts as late
REFERENCE_TOKENS = 1024.0
CAP = len(TimeParts._fields)
BATCHES = (HORIZON, CAP + 1)
"""Shape of what a kernel notes of projected batches: time parts, highest clock under the cap."""
MEAN_PROMPT = 1155.0  # Azure conversation trace: used where no prompt has arrived yet

PREFILL_NAMES = (
    *(f"slack_at_level_{k}" for k in range(N_LEVELS)),
    *(f"energy_at_level_{k}" for k in range(N_LEVELS)),
    "idle_at_lowest", "idle_at_highest",
    "drain_at_cheapest", "drain_at_max", "rule", "needed", "lost_at_max", "lost_at_cheapest",
    "queue_requests", "queue_tokens", "batch_tokens", "batch_requests", "next_tokens",
    "oldest_wait", "rate_1s", "rate_10s", "rate_60s", "token_rate", "mean_prompt", "utilisation",
    "utilisation_60s", "freq_current", "freq_pending", "time_to_apply", "delay", "first_batch_s",
    "slo", "backpressure", "cheapest",
)  # fmt: skip
"""Names of the features, in order; changing one makes checkpoints of before unreadable."""


class PrefillMade(NamedTuple):
    """Columns of the features behind those of the levels."""

    idle_at_lowest: int
    idle_at_highest: int
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
    """A clock change: until ``lead_s`` from now the clock is ``before``."""

    before: ClockTerms
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
def project(x: Floats32, c: Coefficients, g: Any, batches: Floats64) -> int:
    """Fill in the projected batches of one observation; returns how many there are."""
    n = 0
    for k in range(HORIZON):
        tokens = seen(x, PREFILL.batch_tokens + k)
        if tokens <= 0.0:
            break
        attn, seqs = seen(x, PREFILL.batch_attn + k), seen(x, PREFILL.batch_requests + k)
        t = time_parts(c, tokens, attn, 0.0, seqs)
        row = batches[k]
        row[0], row[1], row[2], row[3] = t.stream, t.compute, t.expert_stream, t.expert_compute
        row[4], row[5], row[6] = t.clocked, t.memory, t.constant
        batches[k, CAP] = effective_freq_ghz(
            c, tokens, attn, 0.0, seqs, g.freq_max_ghz, g.freq_min_ghz
        )
        n += 1
    return n


@inlined
def duration_under_cap(c: Coefficients, batches: Floats64, k: int, at: ClockTerms) -> float:
    """Duration of projected batch ``k`` at a clock, or at its cap, s."""
    row = batches[k]
    t = TimeParts(row[0], row[1], row[2], row[3], row[4], row[5], row[6])
    if at.freq_ghz > batches[k, CAP]:
        return duration_of(c, t, clock_terms(c, batches[k, CAP]))
    return duration_of(c, t, at)


@inlined
def walk_queue(
    x: Floats32, c: Coefficients, at: ClockTerms, change: PendingClock, batches: Floats64, n: int
) -> QueueWalk:
    """Walk the ``n`` projected batches of one observation at a clock."""
    slo = seen(x, PREFILL.slo)
    t, slack, late, first = 0.0, SLACK_CLIP * slo, 0.0, 0.0
    for k in range(n):
        duration = duration_under_cap(c, batches, k, at)
        if change.lead_s > t:
            slow = duration_under_cap(c, batches, k, change.before)
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
def write_costs(x: Floats32, c: Coefficients, g: Any, batches: Floats64, out: Floats32) -> None:
    """Energy of the next batch at each level, and idle power, of one observation."""
    tokens = max(seen(x, PREFILL.batch_tokens), 1.0)
    seqs = max(seen(x, PREFILL.batch_requests), 1.0)
    attn = seen(x, PREFILL.batch_attn)
    t = time_parts(c, tokens, attn, 0.0, seqs)
    core, fixed = work_energy_j(c, tokens, attn, 0.0, seqs)
    joules, seconds = 1.0, 1.0
    for k in range(N_LEVELS - 1, -1, -1):
        freq = g.levels_ghz[k]
        if seen(x, PREFILL.batch_tokens) > 0.0:
            freq = min(freq, batches[0, CAP])
        at = clock_terms(c, freq)
        time = duration_of(c, t, at)
        energy = energy_of(c, core, fixed, time, at)
        if k == N_LEVELS - 1:
            joules, seconds = energy, time
        out[N_LEVELS + k] = min(energy / joules, 2.0)
    busy_w = joules / seconds
    out[MADE.idle_at_lowest] = idle_share(c, g, g.freq_min_ghz, busy_w)
    out[MADE.idle_at_highest] = idle_share(c, g, g.freq_max_ghz, busy_w)


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
def write_arrivals(x: Floats32, c: Coefficients, g: Any, out: Floats32) -> None:
    """Arrival rates, the load they make at the highest clock, and the clocks of one observation."""
    for k in range(3):
        out[MADE.rate_1s + k] = squash(seen(x, PREFILL.arrival_rate_1s + k), 2.0)
    token_rate = seen(x, PREFILL.token_rate_10s)
    rate_10, rate_60 = seen(x, PREFILL.arrival_rate_10s), seen(x, PREFILL.arrival_rate_60s)
    mean = token_rate / rate_10 if rate_10 > 1e-3 else MEAN_PROMPT
    attn = 0.5 * REFERENCE_TOKENS**2
    cap = effective_freq_ghz(c, REFERENCE_TOKENS, attn, 0.0, 1.0, g.freq_max_ghz, g.freq_min_ghz)
    per_token = latency_s(c, REFERENCE_TOKENS, attn, 0.0, 1.0, cap) / REFERENCE_TOKENS
    out[MADE.token_rate] = squash(token_rate, 4000.0)
    out[MADE.mean_prompt] = squash(mean, 1024.0)
    out[MADE.utilisation] = min(token_rate * per_token, 2.0)
    out[MADE.utilisation_60s] = min(rate_60 * MEAN_PROMPT * per_token, 2.0)
    out[MADE.freq_current] = range_share(g, seen(x, PREFILL.freq_current) * 1e-3)
    out[MADE.freq_pending] = range_share(g, seen(x, PREFILL.freq_pending) * 1e-3)


@inlined
def fill_row(
    x: Floats32, c: Coefficients, g: Any, batches: Floats64, made: Floats32
) -> tuple[float, float]:
    """Features of one observation; returns the rule's action and the requests late at any clock."""
    n = project(x, c, g, batches)
    slo = seen(x, PREFILL.slo)
    before = clock_terms(c, max(seen(x, PREFILL.freq_pending) * 1e-3, g.freq_min_ghz))
    change = PendingClock(before, seen(x, PREFILL.actuation_delay) + seen(x, PREFILL.time_to_apply))
    need, last = g.freq_max_ghz, 0.0
    at = QueueWalk(0.0, 0.0, 0.0, 0.0)
    for k in range(N_LEVELS):
        at = walk_queue(x, c, clock_terms(c, g.levels_ghz[k]), change, batches, n)
        made[k] = min(max(at.slack_s / slo, -SLACK_CLIP), SLACK_CLIP)
        spare = at.slack_s - RULE_MARGIN * slo
        if need == g.freq_max_ghz and spare >= 0.0:
            need = between_levels(g.levels_ghz, k, last, spare)
        last = spare
    at_best = walk_queue(x, c, clock_terms(c, g.cheapest_ghz), change, batches, n)
    made[MADE.drain_at_cheapest] = squash(at_best.drain_s / slo, 1.0)
    made[MADE.drain_at_max] = squash(at.drain_s / slo, 1.0)
    made[MADE.needed] = range_share(g, need)
    made[MADE.lost_at_max] = squash(at.late, 1.0)
    made[MADE.lost_at_cheapest] = squash(at_best.late, 1.0)
    made[MADE.first_batch_s] = min(at_best.first_s / slo, 3.0)
    made[MADE.cheapest] = range_share(g, g.cheapest_ghz)
    rule = 2.0 * range_share(g, max(need, g.cheapest_ghz)) - 1.0
    made[MADE.rule] = rule
    write_costs(x, c, g, batches, made)
    write_queue(x, made)
    write_arrivals(x, c, g, made)
    return rule, at.late


@compiled
def prefill_features(
    batches: Floats64,
    x: Floats32,
    coefs: Records,
    plants: Records,
    out: Floats32,
    rule: Floats32,
    lost: Floats32,
) -> None:
    """Fill the parts of :class:`agents.policy.feature_parts.FeatureRows` from encoded observations.

    Args:
        batches: scratch of shape :data:`BATCHES`, overwritten.
        x: observations (n, dim).
        coefs: coefficients, one record for all rows or one per row.
        plants: clocks and idle power, as many records of `FEATURE_PLANT_DTYPE` as coefs.
        out: features (n, F), written.
        rule: the rule's actions (n,), written.
        lost: requests late even at the highest level (n,), written.
    """
    for i in range(x.shape[0]):
        j = i if coefs.size > 1 else 0
        rule[i], lost[i] = fill_row(x[i], coefs[j], plants[j], batches, out[i])
