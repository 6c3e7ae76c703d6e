"""Compiled event loop of co-located servers.

Prompts are prefilled in chunks inside decode iterations (chunked prefill).

The baseline that disaggregation is measured against (Sarathi-Serve, OSDI 2024; vLLM's default). An
iteration holds every running request and, in what is left of the token budget, a chunk of the
prompts in order of arrival. KV for a prompt is reserved when its first chunk is scheduled. Running
requests have priority; preempted ones are recomputed before new prompts are taken.
"""

from typing import Any

import numpy as np

from biscale_env.core.jit import compiled, inlined
from biscale_env.sim.arrivals import admit_arrivals
from biscale_env.sim.clock import begin_step, request_clock, run_idle, run_work, snap_ghz
from biscale_env.sim.cluster.loop import count_prompt, end_iteration, soonest
from biscale_env.sim.cluster.queues import insert_ready, write_log
from biscale_env.sim.cluster.routing import route_decode
from biscale_env.sim.cluster.tier2_rules import decode_ghz
from biscale_env.sim.decode import admit_waiting, enter, make_room
from biscale_env.sim.prefill import form_batch


@inlined
def end_chunk(cluster: Any, dc: Any, log: Any, j: int) -> None:
    """Prompts whose last chunk was in the iteration that just ended have their first token and
    start to decode.
    """
    st, meta, p = dc.states[j], dc.meta[j], dc.params[j]
    now = st.time_s
    for r in range(st.head, meta.next_head):
        prompt, output = dc.prompt[j, r], dc.output[j, r]
        dc.first_s[j, r] = now
        meta.reserved_tokens -= prompt
        count_prompt(cluster, output)
        if output == 1:
            write_log(
                cluster, log, dc.request[j, r], dc.arrival_s[j, r], now, now, prompt, output, -1, j
            )
        else:
            st.cached += prompt + 1
            enter(st, p, dc.slots[j], dc.ring[j], dc.tree[j], now, r, 1, output)
    st.head = meta.next_head


@inlined
def reserve(dc: Any, j: int) -> int:
    """Give KV room to waiting prompts in order of arrival.

    Returns the row behind the last that has room.
    """
    st, meta, p = dc.states[j], dc.meta[j], dc.params[j]
    room = p.kv_capacity * (1.0 - p.kv_watermark)
    limit = st.head
    tokens = 0
    started = meta.next_head_done > 0
    while limit < st.tail and limit - st.head + st.batch < p.max_seqs and tokens < p.token_budget:
        prompt = dc.prompt[j, limit]
        has_room = limit == st.head and started
        if not has_room:
            alone = st.batch == 0 and meta.reserved_tokens == 0
            if (
                not alone
                and st.cached + meta.reserved_tokens + tokens + prompt + 2 * st.batch + 1 > room
            ):
                break
        tokens += prompt
        limit += 1
    return limit


@inlined
def take_chunk(dc: Any, j: int) -> Any:
    """Schedule the next chunk: ``(tokens, attention work, requests)``.

    The record remembers where it ends.
    """
    st, meta, p = dc.states[j], dc.meta[j], dc.params[j]
    done = meta.next_head_done
    limit = reserve(dc, j) if st.preempted == 0 else st.head
    budget = max(p.token_budget - st.batch - st.recompute_tokens, 0)
    tokens, attn_work, n_seq, head, head_done = form_batch(
        dc.prompt[j], st.head, done, limit, budget, p.max_seqs - st.batch
    )
    touched = head + 1 if head_done > 0 else head
    for r in range(st.head + (1 if done > 0 else 0), touched):
        meta.reserved_tokens += dc.prompt[j, r]
    meta.next_head = head
    meta.next_head_done = head_done if n_seq > 0 else done
    meta.load_tokens -= tokens
    return tokens, attn_work, n_seq


@inlined
def readmit(dc: Any, nothing: Any, j: int) -> None:
    """Preempted requests come back as room allows; prompts in progress keep theirs."""
    st, p = dc.states[j], dc.params[j]
    tail = st.tail
    reserved = dc.meta[j].reserved_tokens
    st.tail = st.head  # no new requests this way: they must be prefilled first
    st.cached += reserved
    make_room(st, p, dc.prompt[j], dc.output[j], dc.slots[j], dc.ring[j], dc.tree[j], dc.stack[j])
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
    st.cached -= reserved
    st.tail = tail


@inlined
def server_event(cluster: Any, dc: Any, log: Any, levels_ghz: Any, nothing: Any, j: int) -> None:
    """An iteration of server ``j`` ends, or a request reaches it while it sleeps."""
    st, c, p, meta = dc.states[j], dc.coefs[j], dc.params[j], dc.meta[j]
    if meta.running == 1:
        end_iteration(cluster, dc, log, nothing, j)
        end_chunk(cluster, dc, log, j)
    elif st.time_s < dc.next_s[j]:
        run_idle(st, c, p, dc.next_s[j])
    admit_arrivals(st, dc.ready_s[j], dc.prompt[j])
    readmit(dc, nothing, j)
    tokens, attn_work, n_seq = take_chunk(dc, j)
    if st.batch == 0 and n_seq == 0:
        dc.next_s[j] = np.inf
        return
    freq = decode_ghz(st, c, p, meta, levels_ghz)
    begin_step(st)
    request_clock(st, p, snap_ghz(p, freq))
    rows = st.batch + st.recompute_tokens + tokens
    run_work(st, c, p, rows, st.recompute_attn + attn_work, st.cached, st.batch + n_seq)
    meta.running = 1
    dc.next_s[j] = st.time_s


@compiled
def advance_colocated(
    cluster: Any, dc: Any, work: Any, log: Any, levels_ghz: Any, nothing: Any, until_s: float
) -> None:
    """Process every event of a cluster of co-located servers before ``until_s``."""
    while True:
        j = soonest(dc.next_s)
        arrival = work.arrival_s[cluster.next] if cluster.next < work.arrival_s.size else np.inf
        now = min(arrival, dc.next_s[j])
        if now >= until_s:
            return
        cluster.clock_s = now
        if arrival <= now:
            k = cluster.next
            cluster.next += 1
            cluster.arrived += 1
            prompt = work.prompt[k]
            j = route_decode(cluster, dc, levels_ghz, prompt, now)
            insert_ready(
                dc, j, arrival, np.nan, arrival, prompt, work.output[k], work.first + k, -1
            )
        else:
            server_event(cluster, dc, log, levels_ghz, nothing, j)
