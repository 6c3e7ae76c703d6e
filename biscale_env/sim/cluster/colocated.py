"""Compiled event loop of co-located servers.

Prompts are prefilled in chunks inside decode iterations (chunked prefill).

The baseline that disaggregation is measured against (Sarathi-Serve, OSDI 2024; vLLM's default). An
iteration holds every running request and, in what is left of the token budget, a chunk of the
prompts in order of arrival. KV for a prompt is reserved when its first chunk is scheduled. Running
requests have priority; preempted ones are recomputed before new prompts are taken. There is no
prefix cache here.
"""

import numpy as np

from biscale_env.core.jit import compiled, inlined
from biscale_env.sim.arrivals import admit_arrivals
from biscale_env.sim.clock import begin_step, request_clock, run_idle, run_work, snap_ghz
from biscale_env.sim.cluster.decode_parts import admit, preempt, start_decoding
from biscale_env.sim.cluster.layout import ClusterArrays, Decodes, FinishedRequest, Floats
from biscale_env.sim.cluster.loop import (
    count_prompt,
    end_iteration,
    next_arrival_s,
    soonest,
    take_arrival,
)
from biscale_env.sim.cluster.queues import insert_ready, write_log
from biscale_env.sim.cluster.routing import route_decode
from biscale_env.sim.cluster.tier2_rules import BatchWork, decode_ghz
from biscale_env.sim.prefill import form_batch


@inlined
def end_chunk(a: ClusterArrays, j: int) -> None:
    """Prompts whose last chunk was in the iteration that just ended have their first token.

    They start to decode.
    """
    dc = a.decodes
    st, meta, q = dc.states[j], dc.meta[j], dc.queue
    now_s = st.time_s
    for r in range(st.head, meta.next_head):
        prompt, output = q.prompt[j, r], q.output[j, r]
        q.first_s[j, r] = now_s
        meta.reserved_tokens -= prompt
        st.queue_tokens -= prompt
        count_prompt(a.totals, output)
        if output == 1:
            request, arrival_s = q.request[j, r], q.arrival_s[j, r]
            done = FinishedRequest(request, arrival_s, now_s, now_s, prompt, output, 0, -1, j)
            write_log(a.totals, a.log, done)
        else:
            start_decoding(dc, j, r)
    st.head = meta.next_head


@inlined
def reserve(dc: Decodes, j: int) -> int:
    """Give KV room to waiting prompts in order of arrival.

    Returns:
        The row behind the last that has room.
    """
    st, meta, p = dc.states[j], dc.meta[j], dc.params[j]
    room = p.kv_capacity * (1.0 - p.kv_watermark)
    limit = st.head
    tokens = 0
    started = meta.next_head_done > 0
    while limit < st.tail and limit - st.head + st.batch < p.max_seqs and tokens < p.token_budget:
        prompt = dc.queue.prompt[j, limit]
        has_room = limit == st.head and started
        if not has_room:
            alone = st.batch == 0 and meta.reserved_tokens == 0
            needed = st.cached + meta.reserved_tokens + tokens + prompt + 2 * st.batch + 1
            if not alone and needed > room:
                break
        tokens += prompt
        limit += 1
    return int(limit)


@inlined
def take_chunk(dc: Decodes, j: int) -> BatchWork:
    """Schedule the next chunk of instance ``j``; the record remembers where it ends."""
    st, meta, p, prompt = dc.states[j], dc.meta[j], dc.params[j], dc.queue.prompt
    done = meta.next_head_done
    limit = reserve(dc, j) if st.preempted == 0 else st.head
    budget = max(p.token_budget - st.batch - st.recompute_tokens, 0)
    tokens, attn_work, n_seq, head, head_done = form_batch(
        prompt[j], dc.queue.cached[j], st.head, done, limit, budget, p.max_seqs - st.batch
    )
    touched = head + 1 if head_done > 0 else head
    for r in range(st.head + (1 if done > 0 else 0), touched):
        meta.reserved_tokens += prompt[j, r]
    meta.next_head = head
    meta.next_head_done = head_done if n_seq > 0 else done
    meta.load_tokens -= tokens
    return BatchWork(tokens, attn_work, 0.0, n_seq)


@inlined
def readmit(dc: Decodes, no_times: Floats, j: int) -> None:
    """Preempted requests come back as room allows; prompts in progress keep theirs."""
    st = dc.states[j]
    tail = st.tail
    reserved = dc.meta[j].reserved_tokens
    st.tail = st.head  # no new requests this way: they must be prefilled first
    st.cached += reserved
    preempt(dc, j)
    admit(dc, no_times, j)
    st.cached -= reserved
    st.tail = tail


@inlined
def server_event(a: ClusterArrays, j: int) -> None:
    """An iteration of server ``j`` ends, or a request reaches it while it sleeps."""
    dc = a.decodes
    st, c, p, meta = dc.states[j], dc.coefs[j], dc.params[j], dc.meta[j]
    if meta.running == 1:
        end_iteration(a, j)
        end_chunk(a, j)
    elif st.time_s < dc.next_s[j]:
        run_idle(st, c, p, dc.next_s[j])
    admit_arrivals(st, dc.queue.ready_s[j], dc.queue.prompt[j])
    readmit(dc, a.no_times, j)
    chunk = take_chunk(dc, j)
    if st.batch == 0 and chunk.n_seq == 0:
        dc.next_s[j] = np.inf
        return
    freq = decode_ghz(dc, j, a.levels_ghz)
    begin_step(st)
    request_clock(st, p, snap_ghz(p, freq))
    rows = st.batch + st.recompute_tokens + chunk.tokens
    attn_work = st.recompute_attn + chunk.attn_work
    run_work(st, c, p, rows, attn_work, st.cached, st.batch + chunk.n_seq)
    meta.running = 1
    dc.next_s[j] = st.time_s


@compiled
def advance_colocated(a: ClusterArrays, until_s: float) -> None:
    """Process every event of a cluster of co-located servers before ``until_s``."""
    next_s = a.decodes.next_s
    while True:
        j = soonest(next_s)
        arrival_s = next_arrival_s(a)
        now_s = min(arrival_s, next_s[j])
        if now_s >= until_s:
            return
        a.totals.clock_s = now_s
        if arrival_s <= now_s:
            new = take_arrival(a, 0)
            j = route_decode(a.totals, a.decodes, a.levels_ghz, new.prompt, now_s)
            insert_ready(a.decodes, j, new)
        else:
            server_event(a, j)
