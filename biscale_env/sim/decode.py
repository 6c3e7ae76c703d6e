"""Dynamics of one decode instance.

Continuous batching with KV capacity, waiting, and preemption by recompute.

An iteration costs O(1) amortised. Every running request gains one token per iteration, so the
cached tokens grow by the batch; when a request will finish is known on admission (the simulator
knows its length, no controller does), so it is hung into a ring by iteration number; and the
tightest TPOT slack is the root of a tournament tree over keys that are fixed on admission.

The first token of a request comes from the prefill pool: ``arrival_s`` here is when the request
(with its KV) reaches the decode pool, and TPOT counts from there, waiting included.
"""

from typing import Any

import numpy as np

from biscale_env.core.jit import inlined
from biscale_env.sim.arrivals import admit_arrivals
from biscale_env.sim.clock import begin_step, end_step, request_clock, run_work, snap_ghz
from biscale_env.sim.episode import idle_or_end, out_of_time, start_episode

NO_SLOT = -1


@inlined
def set_key(tree: Any, slot: int, key: float) -> None:
    """Put a key at a leaf of the tournament tree (``inf``: empty) and mend the path to the root
    ``tree[1]``.
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
def enter(
    st: Any,
    p: Any,
    slots: Any,
    ring: Any,
    tree: Any,
    start_s: float,
    request: int,
    had: int,
    total: int,
) -> None:
    """A request that has ``had`` of ``total`` tokens starts to run."""
    slot = st.free_slot
    s = slots[slot]
    st.free_slot = s.ring_next
    s.request = request
    s.base = st.iterations - had
    s.key_s = start_s - p.slo_s * s.base
    s.older = st.admitted_last
    s.newer = NO_SLOT
    if st.admitted_last != NO_SLOT:
        slots[st.admitted_last].newer = slot
    st.admitted_last = slot
    at = (s.base + total) % ring.size
    s.ring_prev = NO_SLOT
    s.ring_next = ring[at]
    if ring[at] != NO_SLOT:
        slots[ring[at]].ring_prev = slot
    ring[at] = slot
    set_key(tree, slot, s.key_s)
    st.key_sum += s.key_s
    st.batch += 1


@inlined
def leave(st: Any, slots: Any, ring: Any, tree: Any, slot: int, total: int) -> None:
    """A running request ends or is preempted: unhang it everywhere."""
    s = slots[slot]
    if s.ring_prev != NO_SLOT:
        slots[s.ring_prev].ring_next = s.ring_next
    else:
        ring[(s.base + total) % ring.size] = s.ring_next
    if s.ring_next != NO_SLOT:
        slots[s.ring_next].ring_prev = s.ring_prev
    if s.older != NO_SLOT:
        slots[s.older].newer = s.newer
    if s.newer != NO_SLOT:
        slots[s.newer].older = s.older
    else:
        st.admitted_last = s.older
    set_key(tree, slot, np.inf)
    st.key_sum = st.key_sum - s.key_s if st.batch > 1 else 0.0
    st.batch -= 1
    s.ring_next = st.free_slot
    st.free_slot = slot


@inlined
def admit_waiting(
    st: Any,
    p: Any,
    arrival_s: Any,
    prompt: Any,
    output: Any,
    start_s: Any,
    slots: Any,
    ring: Any,
    tree: Any,
    stack: Any,
) -> None:
    """Fill the batch from the preempted requests first, then from the queue, while slots and KV
    room last.

    A request alone in the instance is always admitted: its length was checked against the capacity
    when the workload was read.
    """
    room = p.kv_capacity * (1.0 - p.kv_watermark)
    while st.batch < p.max_seqs:
        recompute = st.preempted > 0
        if recompute:
            request = stack[st.preempted - 1, 0]
            had = stack[st.preempted - 1, 1]
        elif st.head < st.tail:
            request = st.head
            had = 1
        else:
            break
        tokens = prompt[request] + had
        if st.batch > 0 and st.cached + tokens + st.batch + 1 > room:
            break
        if recompute:
            st.preempted -= 1
            st.recompute_tokens += tokens
            st.recompute_attn += 0.5 * tokens * tokens
        else:
            st.head += 1
            if start_s.size > 0:
                start_s[request] = st.time_s
        st.cached += tokens
        enter(st, p, slots, ring, tree, arrival_s[request], request, had, output[request])


@inlined
def make_room(
    st: Any, p: Any, prompt: Any, output: Any, slots: Any, ring: Any, tree: Any, stack: Any
) -> None:
    """Preempt the newest requests until one more token for every running request fits."""
    while st.batch > 1 and st.cached + st.batch > p.kv_capacity:
        slot = st.admitted_last
        request = slots[slot].request
        had = st.iterations - slots[slot].base
        stack[st.preempted, 0] = request
        stack[st.preempted, 1] = had
        st.preempted += 1
        st.preemptions += 1
        st.cached -= prompt[request] + had
        leave(st, slots, ring, tree, slot, output[request])


@inlined
def finish_requests(
    st: Any,
    p: Any,
    arrival_s: Any,
    prompt: Any,
    output: Any,
    finish_s: Any,
    slots: Any,
    ring: Any,
    tree: Any,
) -> None:
    """Everything hung at this iteration of the ring has its last token now."""
    slot = ring[st.iterations % ring.size]
    while slot != NO_SLOT:
        request = slots[slot].request
        following = slots[slot].ring_next
        if finish_s.size > 0:
            finish_s[request] = st.time_s
        if st.time_s - arrival_s[request] > p.slo_s * (output[request] - 1):
            st.step_violations += 1
            st.violations += 1
        st.step_finished += 1
        st.finished += 1
        st.cached -= prompt[request] + output[request]
        leave(st, slots, ring, tree, slot, output[request])
        slot = following


@inlined
def wait_for_work(
    st: Any,
    c: Any,
    p: Any,
    arrival_s: Any,
    prompt: Any,
    output: Any,
    start_s: Any,
    slots: Any,
    ring: Any,
    tree: Any,
    stack: Any,
) -> None:
    """Admit what can run; with nothing to run, idle until the next arrival or the end of the
    episode.
    """
    admit_arrivals(st, arrival_s, prompt)
    admit_waiting(st, p, arrival_s, prompt, output, start_s, slots, ring, tree, stack)
    if st.batch > 0:
        make_room(st, p, prompt, output, slots, ring, tree, stack)
        if out_of_time(st, p):
            st.done = 1
    elif idle_or_end(st, c, p, arrival_s):
        admit_arrivals(st, arrival_s, prompt)
        admit_waiting(st, p, arrival_s, prompt, output, start_s, slots, ring, tree, stack)


@inlined
def decode_reset(
    st: Any, c: Any, p: Any, arrival_s: Any, prompt: Any, output: Any, start_s: Any, slots: Any, ring: Any, tree: Any, stack: Any,
    begin: int, end: int, freq_ghz: float,
) -> None:  # fmt: skip
    """Start an episode on workload rows ``[begin, end)`` at a supported clock and wait for the
    first request.
    """
    start_episode(st, begin, end, freq_ghz)
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
    for k in range(slots.size):
        slots[k].ring_next = k + 1 if k + 1 < slots.size else NO_SLOT
    ring[:] = NO_SLOT
    tree[:] = np.inf
    wait_for_work(st, c, p, arrival_s, prompt, output, start_s, slots, ring, tree, stack)


@inlined
def decode_step(
    st: Any, c: Any, p: Any, arrival_s: Any, prompt: Any, output: Any, start_s: Any, finish_s: Any, slots: Any, ring: Any, tree: Any,
    stack: Any, freq_ghz: float,
) -> None:  # fmt: skip
    """One decision: request a clock, run at least one iteration, admit what has come."""
    begin_step(st)
    request_clock(st, p, snap_ghz(p, freq_ghz))
    until = st.time_s + p.min_interval_s
    st.step_queue = st.tail - st.head + st.preempted
    st.step_kv_use = st.cached / p.kv_capacity
    while True:
        st.step_requests = st.batch
        st.step_tokens = st.batch + st.recompute_tokens
        run_work(st, c, p, st.step_tokens, st.recompute_attn, st.cached, st.batch)
        st.recompute_tokens = 0
        st.recompute_attn = 0.0
        st.cached += st.batch
        finish_requests(st, p, arrival_s, prompt, output, finish_s, slots, ring, tree)
        wait_for_work(st, c, p, arrival_s, prompt, output, start_s, slots, ring, tree, stack)
        if st.done == 1 or st.time_s >= until:
            break
    end_step(st)
