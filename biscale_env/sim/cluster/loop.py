"""Compiled event loop of a disaggregated cluster.

Router, prefill instances, KV transfer, decode instances.

Events happen in order of time: a request arrives, a prefill batch ends, a decode iteration ends.
The transitions of an instance are the parts of the single instances
(:mod:`biscale_env.sim.prefill`, :mod:`biscale_env.sim.decode`); an instance that has nothing to do
sleeps and draws idle power. At equal times arrivals come first, then prefill, then decode.

KV transfer. When a prompt is done its first token is out, and its KV travels to the decode instance
that the router chose: the link of the prefill instance sends one request at a time, ``latency +
bytes / bandwidth``, where the slower of the two ends sets the bandwidth; a share of the bytes may
have travelled while prefill was still computing. TPOT counts from the first token, so the transfer
is part of it.

Backpressure. The prefill instance keeps a request's KV until decode has admitted it. If the prompts
of the next batch do not fit beside what it keeps, it waits. (The time of the transfer itself is
counted once, at hand-over, even if decode admits later.)
"""

from typing import Any

import numpy as np

from biscale_env.core.jit import compiled, inlined
from biscale_env.sim.arrivals import admit_arrivals
from biscale_env.sim.clock import begin_step, end_step, request_clock, run_idle, run_work, snap_ghz
from biscale_env.sim.cluster.layout import EXTERNAL
from biscale_env.sim.cluster.queues import (
    append_prompt,
    drop_finished,
    drop_prompts,
    insert_ready,
    log_finishing,
    write_log,
)
from biscale_env.sim.cluster.routing import route_decode, route_prefill
from biscale_env.sim.cluster.tier2_rules import decode_ghz, prefill_ghz
from biscale_env.sim.decode import admit_waiting, decode_reset, make_room
from biscale_env.sim.decode import finish_requests as finish_decoding
from biscale_env.sim.prefill import finish_requests as finish_prompts
from biscale_env.sim.prefill import form_batch, prefill_reset

UNTIL = (
    -1
)  # advance() has reached its end; any other value is an instance that waits for a decision


@inlined
def count_prompt(cluster: Any, output: int) -> None:
    """A request has its first token."""
    cluster.prefilled += 1
    cluster.prefilled_tokens += output
    cluster.produced_tokens += 1


@inlined
def hand_over(cluster: Any, pf: Any, dc: Any, log: Any, levels_ghz: Any, i: int, r: int) -> None:
    """Row ``r`` of prefill instance ``i`` has its first token now.

    Log it if that was all, else send its KV to decode.
    """
    now = pf.states[i].time_s
    prompt, output = pf.prompt[i, r], pf.output[i, r]
    count_prompt(cluster, output)
    if output == 1:
        write_log(
            cluster, log, pf.request[i, r], pf.arrival_s[i, r], now, now, prompt, output, i, -1
        )
        return
    j = route_decode(cluster, dc, levels_ghz, prompt, now)
    meta = pf.meta[i]
    bandwidth = min(meta.link_bytes_per_s, dc.meta[j].link_bytes_per_s)
    sending = (1.0 - cluster.transfer_overlap) * prompt * cluster.kv_bytes_per_token / bandwidth
    meta.link_free_s = max(meta.link_free_s, now) + sending
    meta.held_tokens += prompt
    ready = meta.link_free_s + cluster.transfer_latency_s
    insert_ready(dc, j, ready, now, pf.arrival_s[i, r], prompt, output, pf.request[i, r], i)


@inlined
def end_batch(
    cluster: Any, pf: Any, dc: Any, log: Any, levels_ghz: Any, nothing: Any, i: int
) -> None:
    """The batch of prefill instance ``i`` is over: first tokens, KV on its way."""
    st, meta = pf.states[i], pf.meta[i]
    first = st.head
    for r in range(first, meta.next_head):
        hand_over(cluster, pf, dc, log, levels_ghz, i, r)
    finish_prompts(st, pf.params[i], pf.arrival_s[i], nothing, meta.next_head)
    st.head_done = meta.next_head_done
    meta.load_tokens -= st.step_tokens
    meta.running = 0
    end_step(st)


@inlined
def kv_spoken_for(dc: Any) -> float:
    """Share of the decode pool's KV in use or promised."""
    used = 0.0
    room = 0.0
    for j in range(dc.meta.size):
        if dc.meta[j].accepting == 1:
            used += dc.states[j].cached + dc.meta[j].load_tokens
            room += dc.params[j].kv_capacity
    return min(used / room, 1.0) if room > 0.0 else 0.0


@inlined
def prefill_event(
    cluster: Any, pf: Any, dc: Any, log: Any, levels_ghz: Any, nothing: Any, i: int
) -> bool:
    """A batch of instance ``i`` ends or a request reaches it while it sleeps. False.

    It waits for an external decision.
    """
    st, c, p, meta = pf.states[i], pf.coefs[i], pf.params[i], pf.meta[i]
    if meta.running == 1:
        end_batch(cluster, pf, dc, log, levels_ghz, nothing, i)
    elif st.time_s < pf.next_s[i]:
        run_idle(st, c, p, pf.next_s[i])
    admit_arrivals(st, pf.arrival_s[i], pf.prompt[i])
    pf.next_s[i] = np.inf
    meta.stalled = 0
    if st.head == st.tail:
        return True
    tokens, attn_work, n_seq, head, head_done = form_batch(
        pf.prompt[i], st.head, st.head_done, st.tail, p.token_budget, p.max_seqs
    )
    if meta.held_tokens > 0 and meta.held_tokens + st.head_done + tokens > p.kv_capacity:
        meta.stalled = 1
        cluster.stalls += 1
        return True
    st.backpressure = kv_spoken_for(dc)
    if meta.policy == EXTERNAL and meta.decided_ghz == 0.0:
        pf.next_s[i] = st.time_s
        return False
    freq = prefill_ghz(
        st, c, p, meta, levels_ghz, pf.arrival_s[i], pf.prompt[i], tokens, attn_work, n_seq, pf.batch_time_s[i],
        pf.batch_energy_j[i], pf.batch_slack_s[i], pf.batch_level[i],
    )  # fmt: skip
    meta.decided_ghz = 0.0
    begin_step(st)
    request_clock(st, p, snap_ghz(p, freq))
    st.step_requests = n_seq
    st.step_tokens = tokens
    run_work(st, c, p, tokens, attn_work, 0.0, n_seq)
    meta.next_head = head
    meta.next_head_done = head_done
    meta.running = 1
    pf.next_s[i] = st.time_s
    return True


@inlined
def release_kv(pf: Any, dc: Any, j: int, first: int, last: int, now_s: float) -> None:
    """Decode instance ``j`` has admitted rows ``first .. last - 1``.

    Their prefill instances may forget them.
    """
    for r in range(first, last):
        i = dc.source[j, r]
        pf.meta[i].held_tokens -= dc.prompt[j, r]
        dc.meta[j].load_tokens -= dc.prompt[j, r]
        if pf.meta[i].stalled == 1:
            pf.next_s[i] = now_s


@inlined
def run_iteration(dc: Any, j: int, freq_ghz: float) -> None:
    """Start an iteration of decode instance ``j``."""
    st, p = dc.states[j], dc.params[j]
    begin_step(st)
    request_clock(st, p, snap_ghz(p, freq_ghz))
    st.step_requests = st.batch
    st.step_tokens = st.batch + st.recompute_tokens
    run_work(st, dc.coefs[j], p, st.step_tokens, st.recompute_attn, st.cached, st.batch)
    dc.meta[j].decided_ghz = 0.0
    dc.meta[j].running = 1
    dc.next_s[j] = st.time_s


@inlined
def end_iteration(cluster: Any, dc: Any, log: Any, nothing: Any, j: int) -> None:
    """The iteration of decode instance ``j`` is over: one more token for everyone in its batch."""
    st = dc.states[j]
    st.recompute_tokens = 0
    st.recompute_attn = 0.0
    st.cached += st.batch
    cluster.produced_tokens += st.batch
    log_finishing(cluster, dc, j, log)
    finish_decoding(
        st,
        dc.params[j],
        dc.first_s[j],
        dc.prompt[j],
        dc.output[j],
        nothing,
        dc.slots[j],
        dc.ring[j],
        dc.tree[j],
    )
    dc.meta[j].running = 0
    end_step(st)


@inlined
def decode_event(
    cluster: Any, pf: Any, dc: Any, log: Any, levels_ghz: Any, nothing: Any, j: int
) -> bool:
    """An iteration of instance ``j`` ends or KV reaches it while it sleeps. False.

    It waits for an external decision.
    """
    st, c, p, meta = dc.states[j], dc.coefs[j], dc.params[j], dc.meta[j]
    if meta.running == 1:
        end_iteration(cluster, dc, log, nothing, j)
    elif st.time_s < dc.next_s[j]:
        run_idle(st, c, p, dc.next_s[j])
    admit_arrivals(st, dc.ready_s[j], dc.prompt[j])
    st.incoming = st.end - st.tail
    first = st.head
    admit_waiting(
        st,
        p,
        dc.first_s[j],
        dc.prompt[j],
        dc.output[j],
        nothing,
        dc.slots[j],
        dc.ring[j],
        dc.tree[j],
        dc.stack[j],
    )
    release_kv(pf, dc, j, first, st.head, st.time_s)
    if st.batch == 0:
        dc.next_s[j] = max(dc.ready_s[j, st.tail], meta.ready_s) if st.tail < st.end else np.inf
        return True
    make_room(st, p, dc.prompt[j], dc.output[j], dc.slots[j], dc.ring[j], dc.tree[j], dc.stack[j])
    if meta.policy == EXTERNAL and meta.decided_ghz == 0.0:
        dc.next_s[j] = st.time_s
        return False
    run_iteration(dc, j, decode_ghz(st, c, p, meta, levels_ghz))
    return True


@inlined
def soonest(next_s: Any) -> int:
    """The instance whose next event comes first."""
    best = 0
    for i in range(1, next_s.size):
        if next_s[i] < next_s[best]:
            best = i
    return best


@compiled
def advance(
    cluster: Any,
    pf: Any,
    dc: Any,
    work: Any,
    log: Any,
    levels_ghz: Any,
    nothing: Any,
    until_s: float,
) -> int:
    """Process every event before ``until_s``.

    Returns:
        ``UNTIL`` when done; else the number of an instance (prefill first, then decode) whose
        external policy must
        decide: write ``decided_ghz`` into its record and call again.
    """
    while True:
        i = soonest(pf.next_s)
        j = soonest(dc.next_s)
        arrival = work.arrival_s[cluster.next] if cluster.next < work.arrival_s.size else np.inf
        now = min(arrival, pf.next_s[i], dc.next_s[j])
        if now >= until_s:
            return UNTIL
        cluster.clock_s = now
        if arrival <= now:
            k = cluster.next
            cluster.next += 1
            cluster.arrived += 1
            i = route_prefill(cluster, pf, now)
            append_prompt(pf, i, arrival, work.prompt[k], work.output[k], work.first + k)
        elif pf.next_s[i] <= now:
            if not prefill_event(cluster, pf, dc, log, levels_ghz, nothing, i):
                return i
        elif not decode_event(cluster, pf, dc, log, levels_ghz, nothing, j):
            return pf.next_s.size + j


@inlined
def enter_service(st: Any, now_s: float) -> None:
    """A reset record, whose parameters end its episode at 0, starts to live at ``now_s``."""
    st.done = 0
    st.time_s = now_s
    st.rate_time_s = now_s


@compiled
def compact(cluster: Any, pf: Any, dc: Any) -> None:
    """Drop what is over from all queues, so that new work can be offered."""
    for i in range(pf.meta.size):
        drop_prompts(pf, i)
    for j in range(dc.meta.size):
        drop_finished(dc, j)
    cluster.next = 0
    cluster.logged = 0


@compiled
def settle(pool: Any, until_s: float, alive: Any) -> None:
    """Let instances that sleep member their idle power up to ``until_s``.

    One that takes no more work retires when empty.

    Args:
        pool: prefill or decode instances.
        until_s: time that every event has been processed to.
        alive: per instance, requests it still has or keeps KV for.
    """
    for i in range(pool.meta.size):
        st, meta = pool.states[i], pool.meta[i]
        if np.isfinite(meta.retired_s) or meta.running == 1:
            continue
        if meta.accepting == 0 and alive[i] == 0:
            meta.retired_s = st.time_s
        elif st.time_s < until_s:
            run_idle(st, pool.coefs[i], pool.params[i], until_s)


@compiled
def open_prefill(pool: Any, i: int, now_s: float, freq_ghz: float) -> None:
    """Put prefill instance ``i`` into service, empty, at a settled clock."""
    st, c, p = pool.states[i], pool.coefs[i], pool.params[i]
    prefill_reset(st, c, p, pool.arrival_s[i], pool.prompt[i], 0, 0, snap_ghz(p, freq_ghz))
    enter_service(st, now_s)
    pool.next_s[i] = np.inf
    pool.cumulative[i, 0] = 0


@compiled
def open_decode(pool: Any, j: int, now_s: float, freq_ghz: float, nothing: Any) -> None:
    """Put decode instance ``j`` into service, empty, at a settled clock."""
    st, c, p = pool.states[j], pool.coefs[j], pool.params[j]
    decode_reset(
        st, c, p, pool.ready_s[j], pool.prompt[j], pool.output[j], nothing, pool.slots[j], pool.ring[j], pool.tree[j],
        pool.stack[j], 0, 0, snap_ghz(p, freq_ghz),
    )  # fmt: skip
    enter_service(st, now_s)
    pool.next_s[j] = np.inf
    pool.cumulative[j, 0] = 0
