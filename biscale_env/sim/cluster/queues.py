"""Queues of the instances of a cluster.

Filling them, logging what is over, dropping rows that nobody needs any more.
"""

from typing import Any

from biscale_env.core.jit import inlined
from biscale_env.sim.decode import NO_SLOT


@inlined
def append_prompt(
    pool: Any, i: int, arrival_s: float, prompt: int, output: int, request: int
) -> None:
    """Put a request behind the queue of prefill instance ``i`` and wake it if it sleeps."""
    st = pool.states[i]
    row = st.end
    pool.arrival_s[i, row] = arrival_s
    pool.prompt[i, row] = prompt
    pool.output[i, row] = output
    pool.request[i, row] = request
    pool.cumulative[i, row + 1] = pool.cumulative[i, row] + prompt
    st.end += 1
    pool.meta[i].routed += 1
    pool.meta[i].load_tokens += prompt
    if pool.meta[i].running == 0:
        pool.next_s[i] = max(arrival_s, pool.meta[i].ready_s)


@inlined
def copy_row(pool: Any, j: int, to: int, row: int) -> None:
    """Copy a row within the queue of decode instance ``j``."""
    pool.ready_s[j, to] = pool.ready_s[j, row]
    pool.first_s[j, to] = pool.first_s[j, row]
    pool.arrival_s[j, to] = pool.arrival_s[j, row]
    pool.prompt[j, to] = pool.prompt[j, row]
    pool.output[j, to] = pool.output[j, row]
    pool.request[j, to] = pool.request[j, row]
    pool.source[j, to] = pool.source[j, row]


@inlined
def insert_ready(
    pool: Any, j: int, ready_s: float, first_s: float, arrival_s: float, prompt: int, output: int, request: int, source: int
) -> None:  # fmt: skip
    """Put a request into the queue of decode instance ``j``, in order of readiness, and wake it in
    time if it sleeps.
    """
    st = pool.states[j]
    row = st.end
    while row > st.tail and pool.ready_s[j, row - 1] > ready_s:
        copy_row(pool, j, row, row - 1)
        row -= 1
    pool.ready_s[j, row] = ready_s
    pool.first_s[j, row] = first_s
    pool.arrival_s[j, row] = arrival_s
    pool.prompt[j, row] = prompt
    pool.output[j, row] = output
    pool.request[j, row] = request
    pool.source[j, row] = source
    st.end += 1
    for r in range(row, st.end):
        pool.cumulative[j, r + 1] = pool.cumulative[j, r] + pool.prompt[j, r]
    st.incoming = st.end - st.tail
    pool.meta[j].routed += 1
    pool.meta[j].load_tokens += prompt
    if pool.meta[j].running == 0:
        pool.next_s[j] = min(pool.next_s[j], max(ready_s, pool.meta[j].ready_s))


@inlined
def write_log(
    cluster: Any, log: Any, request: int, arrival_s: float, first_s: float, finish_s: float, prompt: int, output: int, prefill: int,
    decode: int,
) -> None:  # fmt: skip
    """Note a finished request."""
    row = log[cluster.logged]
    row.request = request
    row.arrival_s = arrival_s
    row.first_token_s = first_s
    row.finish_s = finish_s
    row.prompt_tokens = prompt
    row.output_tokens = output
    row.prefill = prefill
    row.decode = decode
    cluster.logged += 1
    cluster.finished += 1


@inlined
def log_finishing(cluster: Any, pool: Any, j: int, log: Any) -> None:
    """Note every request whose last token has just come (they hang at this iteration of the ring)."""
    st = pool.states[j]
    slot = pool.ring[j, st.iterations % pool.ring.shape[1]]
    while slot != NO_SLOT:
        r = pool.slots[j, slot].request
        write_log(
            cluster, log, pool.request[j, r], pool.arrival_s[j, r], pool.first_s[j, r], st.time_s, pool.prompt[j, r],
            pool.output[j, r], pool.source[j, r], j,
        )  # fmt: skip
        slot = pool.slots[j, slot].ring_next


@inlined
def drop_prompts(pool: Any, i: int) -> None:
    """Drop the rows of prefill instance ``i`` that are over."""
    st = pool.states[i]
    gone = st.head
    before = pool.cumulative[i, gone]
    for r in range(gone, st.end):
        pool.arrival_s[i, r - gone] = pool.arrival_s[i, r]
        pool.prompt[i, r - gone] = pool.prompt[i, r]
        pool.output[i, r - gone] = pool.output[i, r]
        pool.request[i, r - gone] = pool.request[i, r]
    for r in range(gone, st.end + 1):
        pool.cumulative[i, r - gone] = pool.cumulative[i, r] - before
    pool.meta[i].next_head -= gone
    st.begin = 0
    st.head = 0
    st.tail -= gone
    st.end -= gone


@inlined
def drop_finished(pool: Any, j: int) -> None:
    """Drop the rows of decode instance ``j`` that lie before every request still alive there."""
    st = pool.states[j]
    gone = st.head
    slot = st.admitted_last
    while slot != NO_SLOT:
        gone = min(gone, pool.slots[j, slot].request)
        slot = pool.slots[j, slot].older
    for k in range(st.preempted):
        gone = min(gone, pool.stack[j, k, 0])
    slot = st.admitted_last
    while slot != NO_SLOT:
        pool.slots[j, slot].request -= gone
        slot = pool.slots[j, slot].older
    for k in range(st.preempted):
        pool.stack[j, k, 0] -= gone
    before = pool.cumulative[j, gone]
    for r in range(gone, st.end):
        copy_row(pool, j, r - gone, r)
    for r in range(gone, st.end + 1):
        pool.cumulative[j, r - gone] = pool.cumulative[j, r] - before
    pool.meta[j].next_head -= gone
    st.begin = 0
    st.head -= gone
    st.tail -= gone
    st.end -= gone
