"""Compiled event loop of a disaggregated cluster.

Router, prefill instances, KV transfer, decode instances.

Events happen in order of time: a request arrives, a prefill batch ends, a decode iteration ends.
The transitions of an instance are the parts of the single instances
(:mod:`biscale_env.sim.prefill`, :mod:`biscale_env.sim.decode`); an instance that has nothing to do
sleeps and draws idle power. At equal times arrivals come first, then prefill, then decode.

KV transfer. When a prompt is done its first token is out, and its KV travels to the decode instance
that the router chose: the link of the prefill instance sends one request at a time, ``latency +
bytes / bandwidth``, where the slower of the two ends sets the bandwidth; a fraction of the bytes
may have travelled while prefill was still computing. TPOT counts from the first token, so the
transfer is part of it.

Backpressure. The prefill instance keeps a request's KV until decode has admitted it. If the prompts
of the next batch do not fit beside what it keeps, it waits. (The time of the transfer itself is
counted once, at hand-over, even if decode admits later.)
"""

import numpy as np

from biscale_env.core.jit import compiled, inlined
from biscale_env.sim.arrivals import admit_arrivals
from biscale_env.sim.clock import begin_step, end_step, request_clock, run_idle, run_work, snap_ghz
from biscale_env.sim.cluster.decode_parts import admit, finish, preempt
from biscale_env.sim.cluster.layout import (
    EXTERNAL,
    ClusterArrays,
    Decodes,
    FinishedRequest,
    Floats,
    Prefills,
    QueuedRequest,
)
from biscale_env.sim.cluster.queues import (
    append_prompt,
    insert_ready,
    log_finishing,
    prompts_of,
    write_log,
)
from biscale_env.sim.cluster.routing import find_and_keep, route_decode, route_prefill
from biscale_env.sim.cluster.tier2_rules import BatchWork, decode_ghz, prefill_ghz
from biscale_env.sim.prefill import finish_requests, form_batch

UNTIL = -1  # advance() has reached its end; any other value: an instance that waits for a decision


@inlined
def count_prompt(totals: np.record, output: int) -> None:
    """A request has its first token."""
    totals.prefilled += 1
    totals.prefilled_tokens += output
    totals.produced_tokens += 1


@inlined
def send_kv(a: ClusterArrays, i: int, j: int, prompt: int, now_s: float) -> float:
    """Put the KV of a prompt on the link from prefill ``i`` to decode ``j``.

    Returns:
        When it has arrived, s.
    """
    t, meta = a.totals, a.prefills.meta[i]
    bandwidth = min(meta.link_bytes_per_s, a.decodes.meta[j].link_bytes_per_s)
    sending = (1.0 - t.transfer_overlap) * prompt * t.kv_bytes_per_token / bandwidth
    meta.link_free_s = max(meta.link_free_s, now_s) + sending
    meta.held_tokens += prompt
    return float(meta.link_free_s + t.transfer_latency_s)


@inlined
def hand_over(a: ClusterArrays, i: int, r: int) -> None:
    """Row ``r`` of prefill instance ``i`` has its first token now.

    Log it if that was all, else send its KV to decode.
    """
    now_s, q = a.prefills.states[i].time_s, a.prefills.queue
    cached, output, request = q.prefix[i, r], q.output[i, r], q.request[i, r]
    prompt = q.prompt[i, r] + cached  # its KV travels whole
    arrival_s = q.arrival_s[i, r]
    count_prompt(a.totals, output)
    if output == 1:
        done = FinishedRequest(request, arrival_s, now_s, now_s, prompt, output, cached, i, -1)
        write_log(a.totals, a.log, done)
        return
    j = route_decode(a.totals, a.decodes, a.levels_ghz, prompt, now_s)
    ready_s = send_kv(a, i, j, prompt, now_s)
    new = QueuedRequest(ready_s, now_s, arrival_s, prompt, output, cached, request, i)
    insert_ready(a.decodes, j, new)


@inlined
def end_batch(a: ClusterArrays, i: int) -> None:
    """The batch of prefill instance ``i`` is over: first tokens, KV on its way."""
    pf = a.prefills
    st, meta = pf.states[i], pf.meta[i]
    for r in range(st.head, meta.next_head):
        hand_over(a, i, r)
    finish_requests(st, pf.params[i], prompts_of(pf, i), a.no_times, meta.next_head)
    st.head_done = meta.next_head_done
    meta.load_tokens -= st.step_tokens
    meta.running = 0
    end_step(st)


@inlined
def kv_spoken_for(dc: Decodes) -> float:
    """Fraction of the decode pool's KV in use or promised."""
    used = 0.0
    room = 0.0
    for j in range(dc.meta.size):
        if dc.meta[j].accepting == 1:
            used += dc.states[j].cached + dc.meta[j].load_tokens
            room += dc.params[j].kv_capacity
    return min(used / room, 1.0) if room > 0.0 else 0.0


@inlined
def run_batch(pf: Prefills, i: int, work: BatchWork, freq_ghz: float) -> None:
    """Start a batch of prefill instance ``i``."""
    st, p, meta = pf.states[i], pf.params[i], pf.meta[i]
    meta.decided_ghz = 0.0
    begin_step(st)
    request_clock(st, p, snap_ghz(p, freq_ghz))
    st.step_requests = work.n_seq
    st.step_tokens = work.tokens
    meta.work_tokens += work.tokens
    run_work(st, pf.coefs[i], p, work.tokens, work.attn_work, 0.0, work.n_seq)
    meta.running = 1
    pf.next_s[i] = st.time_s


@inlined
def reused_tokens(pf: Prefills, i: int, head: int, head_done: int) -> int:
    """Cached prefixes of the requests of a batch that ends at ``head``, tokens."""
    tokens = 0
    for r in range(pf.states[i].head, head + 1 if head_done > 0 else head):
        tokens += pf.queue.prefix[i, r]
    return tokens


@inlined
def prefill_event(a: ClusterArrays, i: int) -> bool:
    """A batch of instance ``i`` ends or a request reaches it while it sleeps.

    Returns:
        False: it waits for an external decision.
    """
    pf = a.prefills
    st, p, meta = pf.states[i], pf.params[i], pf.meta[i]
    if meta.running == 1:
        end_batch(a, i)
    elif st.time_s < pf.next_s[i]:
        run_idle(st, pf.coefs[i], p, pf.next_s[i])
    admit_arrivals(st, pf.queue.arrival_s[i], pf.queue.prompt[i])
    pf.next_s[i] = np.inf
    meta.stalled = 0
    if st.head == st.tail:
        return True
    tokens, attn_work, n_seq, head, head_done = form_batch(
        pf.queue.prompt[i],
        pf.queue.prefix[i],
        st.head,
        st.head_done,
        st.tail,
        p.token_budget,
        p.max_seqs,
    )
    if meta.held_tokens > 0:
        needed = reused_tokens(pf, i, head, head_done) + st.head_done + tokens
        if meta.held_tokens + needed > p.kv_capacity:
            meta.stalled = 1
            a.totals.stalls += 1
            return True
    st.backpressure = kv_spoken_for(a.decodes)
    if meta.policy == EXTERNAL and meta.decided_ghz == 0.0:
        pf.next_s[i] = st.time_s
        return False
    work = BatchWork(tokens, attn_work, 0.0, n_seq)
    run_batch(pf, i, work, prefill_ghz(pf, i, a.levels_ghz, work))
    meta.next_head = head
    meta.next_head_done = head_done
    return True


@inlined
def release_kv(a: ClusterArrays, j: int, first: int, last: int, now_s: float) -> None:
    """Decode instance ``j`` has admitted rows ``first .. last - 1``.

    Their prefill instances may forget them.
    """
    pf, dc = a.prefills, a.decodes
    for r in range(first, last):
        i = dc.queue.source[j, r]
        pf.meta[i].held_tokens -= dc.queue.prompt[j, r]
        dc.meta[j].load_tokens -= dc.queue.prompt[j, r]
        if pf.meta[i].stalled == 1:
            pf.next_s[i] = now_s


@inlined
def run_iteration(dc: Decodes, j: int, freq_ghz: float) -> None:
    """Start an iteration of decode instance ``j``."""
    st, p = dc.states[j], dc.params[j]
    begin_step(st)
    request_clock(st, p, snap_ghz(p, freq_ghz))
    st.step_requests = st.batch
    st.step_tokens = st.batch + st.recompute_tokens
    dc.meta[j].work_tokens += st.step_tokens
    run_work(st, dc.coefs[j], p, st.step_tokens, st.recompute_attn, st.cached, st.batch)
    dc.meta[j].decided_ghz = 0.0
    dc.meta[j].running = 1
    dc.next_s[j] = st.time_s


@inlined
def end_iteration(a: ClusterArrays, j: int) -> None:
    """The iteration of decode instance ``j`` is over: one more token for everyone in its batch."""
    st = a.decodes.states[j]
    st.recompute_tokens = 0
    st.recompute_attn = 0.0
    st.cached += st.batch
    a.totals.produced_tokens += st.batch
    log_finishing(a, j)
    finish(a.decodes, a.no_times, j)
    a.decodes.meta[j].running = 0
    end_step(st)


@inlined
def decode_event(a: ClusterArrays, j: int) -> bool:
    """An iteration of instance ``j`` ends or KV reaches it while it sleeps.

    Returns:
        False: it waits for an external decision.
    """
    dc = a.decodes
    st, p, meta, ready_s = dc.states[j], dc.params[j], dc.meta[j], dc.queue.ready_s
    if meta.running == 1:
        end_iteration(a, j)
    elif st.time_s < dc.next_s[j]:
        run_idle(st, dc.coefs[j], p, dc.next_s[j])
    admit_arrivals(st, ready_s[j], dc.queue.prompt[j])
    st.incoming = st.end - st.tail
    first = st.head
    admit(dc, a.no_times, j)
    release_kv(a, j, first, st.head, st.time_s)
    if st.batch == 0:
        dc.next_s[j] = max(ready_s[j, st.tail], meta.ready_s) if st.tail < st.end else np.inf
        return True
    preempt(dc, j)
    if meta.policy == EXTERNAL and meta.decided_ghz == 0.0:
        dc.next_s[j] = st.time_s
        return False
    run_iteration(dc, j, decode_ghz(dc, j, a.levels_ghz))
    return True


@inlined
def soonest(next_s: Floats) -> int:
    """The instance whose next event comes first."""
    best = 0
    for i in range(1, next_s.size):
        if next_s[i] < next_s[best]:
            best = i
    return best


@inlined
def next_arrival_s(a: ClusterArrays) -> float:
    """When the next request on offer arrives, s; inf: never."""
    k = a.totals.next
    return float(a.work.arrival_s[k]) if k < a.work.arrival_s.size else np.inf


@inlined
def take_arrival(a: ClusterArrays, cached: int) -> QueuedRequest:
    """The next request on offer arrives, in no queue yet; so many tokens of it are cached."""
    k = a.totals.next
    a.totals.next += 1
    a.totals.arrived += 1
    now_s, number = a.work.arrival_s[k], a.work.first + k
    prompt, output = a.work.prompt[k], a.work.output[k]
    return QueuedRequest(now_s, np.nan, now_s, prompt, output, cached, number, -1)


@compiled
def advance(a: ClusterArrays, until_s: float) -> int:
    """Process every event before ``until_s``.

    Returns:
        ``UNTIL`` when done; else the number of an instance (prefill first, then decode) whose
        external policy must decide: write ``decided_ghz`` into its record and call again.
    """
    pf_next_s, dc_next_s = a.prefills.next_s, a.decodes.next_s
    while True:
        i = soonest(pf_next_s)
        j = soonest(dc_next_s)
        arrival_s = next_arrival_s(a)
        now_s = min(arrival_s, pf_next_s[i], dc_next_s[j])
        if now_s >= until_s:
            return UNTIL
        a.totals.clock_s = now_s
        if arrival_s <= now_s:
            i = route_prefill(a.totals, a.prefills, a.work, now_s)
            cached = find_and_keep(a.prefills, i, a.work, a.totals.next)
            append_prompt(a.prefills, i, take_arrival(a, cached))
        elif pf_next_s[i] <= now_s:
            if not prefill_event(a, i):
                return i
        elif not decode_event(a, j):
            return pf_next_s.size + j
