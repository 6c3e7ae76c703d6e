"""Queues of the instances of a cluster.

Filling them, logging what is over, dropping rows that nobody needs any more.
"""

import numpy as np

from biscale_env.core.jit import inlined
from biscale_env.sim.cluster.layout import (
    ClusterArrays,
    Decodes,
    FinishedRequest,
    Prefills,
    QueuedRequest,
    ReadyQueue,
    Records,
)
from biscale_env.sim.decode import NO_SLOT
from biscale_env.sim.state import NO_CLASSES, Requests


@inlined
def prompts_of(pool: Prefills, i: int) -> Requests:
    """The queue of prefill instance ``i``."""
    q = pool.queue
    return Requests(q.arrival_s[i], q.prompt[i], q.output[i], q.prefix[i], NO_CLASSES)


@inlined
def append_prompt(pool: Prefills, i: int, arrived: QueuedRequest) -> None:
    """Put a request behind the queue of prefill instance ``i`` and wake it if it sleeps.

    Only what the prefix cache lacks is to be computed.
    """
    st, q = pool.states[i], pool.queue
    row = st.end
    new = arrived.prompt - arrived.cached
    q.arrival_s[i, row] = arrived.arrival_s
    q.prompt[i, row] = new
    q.output[i, row] = arrived.output
    q.prefix[i, row] = arrived.cached
    q.request[i, row] = arrived.request
    st.end += 1
    pool.meta[i].routed += 1
    pool.meta[i].load_tokens += new
    if pool.meta[i].running == 0:
        pool.next_s[i] = max(arrived.arrival_s, pool.meta[i].ready_s)


@inlined
def copy_row(q: ReadyQueue, j: int, to: int, row: int) -> None:
    """Copy a row within the queue of decode instance ``j``."""
    q.ready_s[j, to] = q.ready_s[j, row]
    q.first_s[j, to] = q.first_s[j, row]
    q.arrival_s[j, to] = q.arrival_s[j, row]
    q.prompt[j, to] = q.prompt[j, row]
    q.output[j, to] = q.output[j, row]
    q.cached[j, to] = q.cached[j, row]
    q.request[j, to] = q.request[j, row]
    q.source[j, to] = q.source[j, row]


@inlined
def insert_ready(pool: Decodes, j: int, new: QueuedRequest) -> None:
    """Put a request into the queue of decode instance ``j``, in order of readiness.

    Wakes the instance in time if it sleeps.
    """
    st, q = pool.states[j], pool.queue
    row = st.end
    while row > st.tail and q.ready_s[j, row - 1] > new.ready_s:
        copy_row(q, j, row, row - 1)
        row -= 1
    q.ready_s[j, row] = new.ready_s
    q.first_s[j, row] = new.first_s
    q.arrival_s[j, row] = new.arrival_s
    q.prompt[j, row] = new.prompt
    q.output[j, row] = new.output
    q.cached[j, row] = new.cached
    q.request[j, row] = new.request
    q.source[j, row] = new.source
    st.end += 1
    st.incoming = st.end - st.tail
    pool.meta[j].routed += 1
    pool.meta[j].load_tokens += new.prompt
    if pool.meta[j].running == 0:
        pool.next_s[j] = min(pool.next_s[j], max(new.ready_s, pool.meta[j].ready_s))


@inlined
def write_log(totals: np.record, log: Records, done: FinishedRequest) -> None:
    """Log a finished request."""
    row = log[totals.logged]
    row.request = done.request
    row.arrival_s = done.arrival_s
    row.first_token_s = done.first_token_s
    row.finish_s = done.finish_s
    row.prompt_tokens = done.prompt_tokens
    row.output_tokens = done.output_tokens
    row.cached_tokens = done.cached_tokens
    row.prefill = done.prefill
    row.decode = done.decode
    totals.logged += 1
    totals.finished += 1


@inlined
def log_finishing(a: ClusterArrays, j: int) -> None:
    """Log every request of decode instance ``j`` whose last token has just come.

    They are linked at this iteration of the timing wheel.
    """
    st, q, run = a.decodes.states[j], a.decodes.queue, a.decodes.running
    slot = run.wheel[j, st.iterations % run.wheel.shape[1]]
    while slot != NO_SLOT:
        r = run.slots[j, slot].request
        done = FinishedRequest(
            q.request[j, r],
            q.arrival_s[j, r],
            q.first_s[j, r],
            st.time_s,
            q.prompt[j, r],
            q.output[j, r],
            q.cached[j, r],
            q.source[j, r],
            j,
        )
        write_log(a.totals, a.log, done)
        slot = run.slots[j, slot].wheel_next


@inlined
def drop_prompts(pool: Prefills, i: int) -> None:
    """Drop the rows of prefill instance ``i`` that are over."""
    st, q = pool.states[i], pool.queue
    gone = st.head
    for r in range(gone, st.end):
        q.arrival_s[i, r - gone] = q.arrival_s[i, r]
        q.prompt[i, r - gone] = q.prompt[i, r]
        q.output[i, r - gone] = q.output[i, r]
        q.prefix[i, r - gone] = q.prefix[i, r]
        q.request[i, r - gone] = q.request[i, r]
    pool.meta[i].next_head -= gone
    st.begin = 0
    st.head = 0
    st.tail -= gone
    st.end -= gone


@inlined
def first_row_alive(pool: Decodes, j: int) -> int:
    """First row of decode instance ``j`` that a waiting, running or preempted request is in."""
    st, run = pool.states[j], pool.running
    first = st.head
    slot = st.admitted_last
    while slot != NO_SLOT:
        first = min(first, run.slots[j, slot].request)
        slot = run.slots[j, slot].older
    for k in range(st.preempted):
        first = min(first, run.stack[j, k, 0])
    return int(first)


@inlined
def drop_finished(pool: Decodes, j: int) -> None:
    """Drop the rows of decode instance ``j`` that lie before every request still alive there."""
    st, q, run = pool.states[j], pool.queue, pool.running
    gone = first_row_alive(pool, j)
    slot = st.admitted_last
    while slot != NO_SLOT:
        run.slots[j, slot].request -= gone
        slot = run.slots[j, slot].older
    for k in range(st.preempted):
        run.stack[j, k, 0] -= gone
    for r in range(gone, st.end):
        copy_row(q, j, r - gone, r)
    pool.meta[j].next_head -= gone
    st.begin = 0
    st.head -= gone
    st.tail -= gone
    st.end -= gone
