"""Dynamics of one decode instance.

Continuous batching with KV capacity, waiting, and preemption by recompute.

An iteration costs O(1) amortised. Every running request gains one token per iteration, so the
cached tokens grow by the batch; when a request will finish is known on admission (the simulator
knows its length, no controller does), so it is linked into a timing wheel (a bucket queue) by
iteration number; and the tightest TPOT slack is the root of a tournament tree over keys that are
fixed on admission. That is so where all requests have one bound; with SLO classes the slacks are
looked up one by one (:func:`slacks`), once a decision.

The first token of a request comes from the prefill pool: ``arrival_s`` here is when the request
(with its KV) reaches the decode pool, and TPOT counts from there, waiting included.
"""

from typing import Any, NamedTuple

import numpy as np

from biscale_env.core.jit import inlined
from biscale_env.sim.arrivals import admit_arrivals
from biscale_env.sim.clock import begin_step, end_step, request_clock, run_work, snap_ghz
from biscale_env.sim.episode import idle_or_end, out_of_time, start_episode
from biscale_env.sim.slo_classes import bound_s, count_violation
from biscale_env.sim.state import Floats, Requests, RequestTimes, RunningRequests, Span

NO_SLOT = -1


@inlined
def set_key(tree: Floats, slot: int, key: float) -> None:
    """Put a key at a leaf of the tournament tree and propagate it to the root ``tree[1]``.

    ``inf`` is an empty leaf.
    """
    node = slot + tree.size // 2
    tree[node] = key
    node //= 2
    while node >= 1:
        best = min(tree[2 * node], tree[2 * node + 1])
        if tree[node] == best:
            break
        tree[node] = best
        node //= 2


@inlined
def running_of(pool: RunningRequests, i: int) -> RunningRequests:
    """The running requests of instance ``i`` of several."""
    return RunningRequests(pool.slots[i], pool.wheel[i], pool.tree[i], pool.stack[i])


@inlined
def enter(
    st: Any, p: Any, run: RunningRequests, start_s: float, request: int, had: int, total: int
) -> None:
    """A request that has ``had`` of ``total`` tokens starts to run."""
    slot = st.free_slot
    s = run.slots[slot]
    st.free_slot = s.wheel_next
    s.request = request
    s.origin = st.iterations - had
    s.key_s = start_s - p.slo_s * s.origin
    s.older = st.admitted_last
    s.newer = NO_SLOT
    if st.admitted_last != NO_SLOT:
        run.slots[st.admitted_last].newer = slot
    st.admitted_last = slot
    at = (s.origin + total) % run.wheel.size
    s.wheel_prev = NO_SLOT
    s.wheel_next = run.wheel[at]
    if run.wheel[at] != NO_SLOT:
        run.slots[run.wheel[at]].wheel_prev = slot
    run.wheel[at] = slot
    set_key(run.tree, slot, s.key_s)
    st.key_sum += s.key_s
    st.batch += 1


@inlined
def leave(st: Any, run: RunningRequests, slot: int, total: int) -> None:
    """A running request ends or is preempted: it is unlinked everywhere."""
    slots, wheel = run.slots, run.wheel
    s = slots[slot]
    if s.wheel_prev != NO_SLOT:
        slots[s.wheel_prev].wheel_next = s.wheel_next
    else:
        wheel[(s.origin + total) % wheel.size] = s.wheel_next
    if s.wheel_next != NO_SLOT:
        slots[s.wheel_next].wheel_prev = s.wheel_prev
    if s.older != NO_SLOT:
        slots[s.older].newer = s.newer
    if s.newer != NO_SLOT:
        slots[s.newer].older = s.older
    else:
        st.admitted_last = s.older
    set_key(run.tree, slot, np.inf)
    st.key_sum = st.key_sum - s.key_s if st.batch > 1 else 0.0
    st.batch -= 1
    s.wheel_next = st.free_slot
    st.free_slot = slot


@inlined
def admit_waiting(
    st: Any, p: Any, requests: Requests, times: RequestTimes, run: RunningRequests
) -> None:
    """Fill the batch while slots and KV room last: preempted requests first, then the queue.

    A request alone in the instance is always admitted: its length was checked against the capacity
    when the workload was read.
    """
    room = p.kv_capacity * (1.0 - p.kv_watermark)
    while st.batch < p.max_seqs:
        recompute = st.preempted > 0
        if recompute:
            request = run.stack[st.preempted - 1, 0]
            had = run.stack[st.preempted - 1, 1]
        elif st.head < st.tail:
            request = st.head
            had = 1
        else:
            break
        tokens = requests.prompt[request] + had
        if st.batch > 0 and st.cached + tokens + st.batch + 1 > room:
            break
        if recompute:
            st.preempted -= 1
            st.recompute_tokens += tokens
            st.recompute_attn += 0.5 * tokens * tokens
        else:
            st.head += 1
            st.queue_tokens -= requests.prompt[request]
            if times.start_s.size > 0:
                times.start_s[request] = st.time_s
        st.cached += tokens
        enter(st, p, run, requests.arrival_s[request], request, had, requests.output[request])


@inlined
def make_room(st: Any, p: Any, requests: Requests, run: RunningRequests) -> None:
    """Preempt the newest requests until one more token for every running request fits."""
    while st.batch > 1 and st.cached + st.batch > p.kv_capacity:
        slot = st.admitted_last
        request = run.slots[slot].request
        had = st.iterations - run.slots[slot].origin
        run.stack[st.preempted, 0] = request
        run.stack[st.preempted, 1] = had
        st.preempted += 1
        st.preemptions += 1
        st.cached -= requests.prompt[request] + had
        leave(st, run, slot, requests.output[request])


@inlined
def finish_requests(
    st: Any, p: Any, requests: Requests, times: RequestTimes, run: RunningRequests
) -> None:
    """Everything linked at this iteration of the timing wheel has its last token now."""
    slot = run.wheel[st.iterations % run.wheel.size]
    while slot != NO_SLOT:
        request = run.slots[slot].request
        following = run.slots[slot].wheel_next
        output = requests.output[request]
        if times.finish_s.size > 0:
            times.finish_s[request] = st.time_s
        if st.time_s - requests.arrival_s[request] > bound_s(p, requests, request) * (output - 1):
            count_violation(st, p, requests, request)
        st.step_finished += 1
        st.finished += 1
        st.cached -= requests.prompt[request] + output
        leave(st, run, slot, output)
        slot = following


class Slacks(NamedTuple):
    """How the running requests stand to their bounds."""

    bound_s: float  # tightest bound of any of them
    least_s: float  # least time ahead of a deadline
    mean_s: float


@inlined
def slacks(st: Any, p: Any, requests: Requests, run: RunningRequests) -> Slacks:
    """Bounds and TPOT slacks of the running requests; there is at least one.

    The slack of a request is the time by which its next token, made now, would be early.
    """
    if p.classes == 0:
        base = p.slo_s * (st.iterations - 1) - st.time_s
        return Slacks(p.slo_s, run.tree[1] + base, st.key_sum / st.batch + base)
    tightest, least, total = np.inf, np.inf, 0.0
    slot = st.admitted_last
    while slot != NO_SLOT:
        s = run.slots[slot]
        bound = bound_s(p, requests, s.request)
        slack = requests.arrival_s[s.request] + bound * (st.iterations - 1 - s.origin) - st.time_s
        tightest = min(tightest, bound)
        least = min(least, slack)
        total += slack
        slot = s.older
    return Slacks(tightest, least, total / st.batch)


@inlined
def end_iteration(
    st: Any, p: Any, requests: Requests, times: RequestTimes, run: RunningRequests
) -> None:
    """Every running request has a token more, some their last."""
    st.recompute_tokens = 0
    st.recompute_attn = 0.0
    st.cached += st.batch
    finish_requests(st, p, requests, times, run)


@inlined
def wait_for_work(
    st: Any, c: Any, p: Any, requests: Requests, times: RequestTimes, run: RunningRequests
) -> None:
    """Admit what can run.

    With nothing to run, idle until the next arrival or the end of the episode.
    """
    admit_arrivals(st, requests.arrival_s, requests.prompt)
    admit_waiting(st, p, requests, times, run)
    if st.batch > 0:
        make_room(st, p, requests, run)
        if out_of_time(st, p):
            st.done = 1
    elif idle_or_end(st, c, p, requests.arrival_s):
        admit_arrivals(st, requests.arrival_s, requests.prompt)
        admit_waiting(st, p, requests, times, run)


@inlined
def clear_running(st: Any, run: RunningRequests) -> None:
    """No request runs or waits to be recomputed."""
    st.batch = 0
    st.cached = 0
    st.recompute_tokens = 0
    st.recompute_attn = 0.0
    st.admitted_last = NO_SLOT
    st.free_slot = 0
    st.preempted = 0
    st.preemptions = 0
    st.key_sum = 0.0
    st.incoming = 0
    for k in range(run.slots.size):
        run.slots[k].wheel_next = k + 1 if k + 1 < run.slots.size else NO_SLOT
    run.wheel[:] = NO_SLOT
    run.tree[:] = np.inf


@inlined
def decode_reset(
    st: Any,
    c: Any,
    p: Any,
    requests: Requests,
    times: RequestTimes,
    run: RunningRequests,
    span: Span,
    freq_ghz: float,
) -> None:
    """Start an episode on some rows at a supported clock and wait for the first request."""
    start_episode(st, span, freq_ghz)
    clear_running(st, run)
    wait_for_work(st, c, p, requests, times, run)


@inlined
def run_iterations(
    st: Any,
    c: Any,
    p: Any,
    requests: Requests,
    times: RequestTimes,
    run: RunningRequests,
    until_s: float,
) -> None:
    """Run at least one iteration, and so on to a time or the end of the episode."""
    while True:
        st.step_requests = st.batch
        st.step_tokens = st.batch + st.recompute_tokens
        run_work(st, c, p, st.step_tokens, st.recompute_attn, st.cached, st.batch)
        end_iteration(st, p, requests, times, run)
        wait_for_work(st, c, p, requests, times, run)
        if st.done == 1 or st.time_s >= until_s:
            break


@inlined
def decode_step(
    st: Any,
    c: Any,
    p: Any,
    requests: Requests,
    times: RequestTimes,
    run: RunningRequests,
    freq_ghz: float,
) -> None:
    """One decision: request a clock, run at least one iteration, admit what has come."""
    begin_step(st)
    request_clock(st, p, snap_ghz(p, freq_ghz))
    st.step_queue = st.tail - st.head + st.preempted
    st.step_kv_use = st.cached / p.kv_capacity
    run_iterations(st, c, p, requests, times, run, st.time_s + p.min_interval_s)
    end_step(st)
