"""Compiled observers: read the state of an instance into its observation vector.

Every index comes from the tables in :mod:`biscale_env.contract.observation`.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biscale_env.contract.observation import (
    DECODE_SPEC,
    HORIZON,
    PREFILL_SPEC,
    ObservationSpec,
)
from biscale_env.core.jit import inlined
from biscale_env.sim.arrivals import N_WINDOWS, decay_rates, rate_scale
from biscale_env.sim.clock import running_ghz, time_to_apply_s
from biscale_env.sim.decode import slacks
from biscale_env.sim.prefill import form_batch
from biscale_env.sim.slo_classes import bound_s
from biscale_env.sim.state import (
    RATE_WINDOWS_S,
    TOKEN_RATE_WINDOW_S,
    Floats,
    Requests,
    RunningRequests,
)

NO_DEADLINE = 10.0  # encoded slack when no request completes in a projected batch


class Encoding(NamedTuple):
    """How physical values become an observation, ``(dim,)`` each; see :func:`encode`."""

    scale: Floats
    low: Floats
    high: Floats
    physical: Floats  # scratch, written by the observers

    @classmethod
    def of(cls, spec: ObservationSpec) -> "Encoding":
        """The encoding of a specification, with scratch of its own."""
        low, high = spec.low.astype(np.float64), spec.high.astype(np.float64)
        return cls(spec.scale, low, high, np.zeros(spec.dim))


class RateIndices(NamedTuple):
    """Where the arrival rates are; one field per window of ``RATE_WINDOWS_S``, then tokens."""

    arrival_rate_1s: int
    arrival_rate_10s: int
    arrival_rate_60s: int
    token_rate_10s: int


class ClockIndices(NamedTuple):
    """Where the clock and the last iteration are."""

    freq_current: int
    freq_pending: int
    time_to_apply: int
    actuation_delay: int
    last_time: int
    last_power: int


class PrefillIndices(NamedTuple):
    """Where the values of prefill only are; of projected ones, batch 0."""

    batch_tokens: int
    batch_attn: int
    batch_requests: int
    batch_completing: int
    batch_slack: int
    batch_slack_alive: int
    queue_requests: int
    queue_tokens: int
    oldest_wait: int
    slo: int
    kv_backpressure: int


class DecodeIndices(NamedTuple):
    """Where the values of decode only are."""

    batch: int
    cached_tokens: int
    kv_use: int
    recompute_tokens: int
    waiting_requests: int
    waiting_tokens: int
    oldest_wait: int
    incoming_requests: int
    tpot_slack_min: int
    tpot_slack_mean: int
    slo: int


P = PrefillIndices(*map(PREFILL_SPEC.index, PrefillIndices._fields))
P_RATES = RateIndices(*map(PREFILL_SPEC.index, RateIndices._fields))
P_CLOCK = ClockIndices(*map(PREFILL_SPEC.index, ClockIndices._fields))
D = DecodeIndices(*map(DECODE_SPEC.index, DecodeIndices._fields))
D_RATES = RateIndices(*map(DECODE_SPEC.index, RateIndices._fields))
D_CLOCK = ClockIndices(*map(DECODE_SPEC.index, ClockIndices._fields))


@inlined
def observe_rates(st: Any, out: Floats, at: RateIndices) -> None:
    """Arrival rates, since the instance is in service."""
    decay_rates(st, st.time_s)
    counted_s = st.time_s - st.rate_start_s
    for k in range(N_WINDOWS):
        scale = rate_scale(counted_s, RATE_WINDOWS_S[k])
        out[at[k]] = st.rate_sum[k] * scale
        if RATE_WINDOWS_S[k] == TOKEN_RATE_WINDOW_S:
            out[at.token_rate_10s] = st.token_rate_sum * scale


@inlined
def observe_clock(st: Any, p: Any, out: Floats, at: ClockIndices) -> None:
    """Clock and last iteration."""
    out[at.freq_current] = running_ghz(st, p) * 1e3
    out[at.freq_pending] = st.requested_ghz * 1e3
    out[at.time_to_apply] = time_to_apply_s(st, p)
    out[at.actuation_delay] = p.delay_s
    out[at.last_time] = st.last_time_s
    out[at.last_power] = st.last_power_w


@inlined
def observe_projected(st: Any, p: Any, requests: Requests, out: Floats) -> int:
    """The next ``HORIZON`` prefill batches, if nothing more arrived.

    Returns:
        The first request that does not complete in them.
    """
    head = st.head
    head_done = st.head_done
    prompt, prefix = requests.prompt, requests.prefix
    slo_s, plain = p.slo_s, p.classes == 0  # looked up once, not for every request
    for k in range(HORIZON):
        first = head
        batch = form_batch(prompt, prefix, head, head_done, st.tail, p.token_budget, p.max_seqs)
        head, head_done = batch.head, batch.head_done
        slack = NO_DEADLINE
        alive = NO_DEADLINE
        for r in range(first, head):
            bound = slo_s if plain else bound_s(p, requests, r)
            s = (requests.arrival_s[r] + bound - st.time_s) / slo_s
            slack = min(slack, s)
            if s > 0.0:
                alive = min(alive, s)
        out[P.batch_tokens + k] = batch.tokens
        out[P.batch_attn + k] = batch.attn_work
        out[P.batch_requests + k] = batch.n_seq
        out[P.batch_completing + k] = head - first
        out[P.batch_slack + k] = slack
        out[P.batch_slack_alive + k] = alive
    return head


@inlined
def longest_wait_from(st: Any, p: Any, requests: Requests, stop: int) -> float:
    """Since when the request that is nearest to its deadline waits, s.

    With one bound for all that is the first. A request of another class counts as if it had come so
    much later (or earlier) as its bound is wider (or tighter); those up to ``stop`` are looked at.
    """
    if st.head >= st.tail:
        return st.time_s
    if p.classes == 0:
        return requests.arrival_s[st.head]
    oldest = np.inf
    for r in range(st.head, min(stop + 1, st.tail)):
        oldest = min(oldest, requests.arrival_s[r] + (bound_s(p, requests, r) - p.slo_s))
    return oldest


@inlined
def observe_prefill(st: Any, p: Any, requests: Requests, out: Floats) -> None:
    """Physical values of the prefill observation."""
    stop = observe_projected(st, p, requests, out)
    oldest = longest_wait_from(st, p, requests, stop)
    out[P.queue_requests] = st.tail - st.head
    out[P.queue_tokens] = st.queue_tokens - st.head_done
    out[P.oldest_wait] = (st.time_s - oldest) / p.slo_s
    observe_rates(st, out, P_RATES)
    observe_clock(st, p, out, P_CLOCK)
    out[P.slo] = p.slo_s
    out[P.kv_backpressure] = st.backpressure


@inlined
def observe_decode(st: Any, p: Any, requests: Requests, run: RunningRequests, out: Floats) -> None:
    """Physical values of the decode observation.

    With SLO classes the bound is the tightest of those that run, and slacks are in units of it.

    Of what runs, the root of the tree and the stack are read.
    """
    waiting_tokens = st.queue_tokens + (st.tail - st.head)
    oldest = st.time_s
    if st.head < st.tail:
        oldest = requests.arrival_s[st.head]
    for k in range(st.preempted):
        waiting_tokens += requests.prompt[run.stack[k, 0]] + run.stack[k, 1]
        oldest = min(oldest, requests.arrival_s[run.stack[k, 0]])
    out[D.batch] = st.batch
    out[D.cached_tokens] = st.cached
    out[D.kv_use] = st.cached / p.kv_capacity
    out[D.recompute_tokens] = st.recompute_tokens
    out[D.waiting_requests] = st.tail - st.head + st.preempted
    out[D.waiting_tokens] = waiting_tokens
    out[D.oldest_wait] = st.time_s - oldest
    out[D.incoming_requests] = st.incoming
    out[D.tpot_slack_min] = 0.0
    out[D.tpot_slack_mean] = 0.0
    out[D.slo] = p.slo_s
    if st.batch > 0:
        now = slacks(st, p, requests, run)
        out[D.tpot_slack_min] = now.least_s / now.bound_s
        out[D.tpot_slack_mean] = now.mean_s / now.bound_s
        out[D.slo] = now.bound_s
    observe_rates(st, out, D_RATES)
    observe_clock(st, p, out, D_CLOCK)


@inlined
def encode(how: Encoding, out: NDArray[np.float32]) -> None:
    """Scale the physical values and clip them into the float32 observation."""
    for i in range(how.physical.size):
        scaled = how.physical[i] / how.scale[i]
        out[i] = np.float32(min(max(scaled, how.low[i]), how.high[i]))
