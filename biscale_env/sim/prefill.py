"""Dynamics of one prefill instance.

First come first served batches under a token budget, long prompts in chunks.

A decision is due whenever a batch is about to start. One step requests a clock, runs one batch (or
as many as fit into ``min_interval_s``), and, when the queue is then empty, idles until the next
arrival.
"""

from typing import Any

from biscale_env.core.jit import inlined
from biscale_env.sim.arrivals import admit_arrivals
from biscale_env.sim.clock import begin_step, end_step, request_clock, run_work, snap_ghz
from biscale_env.sim.episode import idle_or_end, out_of_time, start_episode


@inlined
def form_batch(
    prompt: Any, head: int, head_done: int, tail: int, budget: int, max_seqs: int
) -> Any:
    """Take requests from the head of the queue until the token budget is full.

    The last may be taken in part.

    Returns:
        ``(tokens, attn_work, n_seq, new_head, new_head_done)``; requests ``head .. new_head - 1``
        complete in this batch.
    """
    tokens = 0
    attn_work = 0.0
    n_seq = 0
    while head < tail and tokens < budget and n_seq < max_seqs:
        left = prompt[head] - head_done
        take = min(left, budget - tokens)
        attn_work += take * (0.5 * take + head_done)
        tokens += take
        n_seq += 1
        if take < left:
            head_done += take
            break
        head += 1
        head_done = 0
    return tokens, attn_work, n_seq, head, head_done


@inlined
def finish_requests(st: Any, p: Any, arrival_s: Any, first_token_s: Any, new_head: int) -> None:
    """Requests ``head .. new_head - 1`` have their first token now."""
    for r in range(st.head, new_head):
        if first_token_s.size > 0:
            first_token_s[r] = st.time_s
        if st.time_s - arrival_s[r] > p.slo_s:
            st.step_violations += 1
            st.violations += 1
    st.step_finished += new_head - st.head
    st.finished += new_head - st.head
    st.head = new_head


@inlined
def wait_for_work(st: Any, c: Any, p: Any, arrival_s: Any, prompt: Any) -> None:
    """Idle until a request waits or the episode is over."""
    admit_arrivals(st, arrival_s, prompt)
    if st.head < st.tail:
        if out_of_time(st, p):
            st.done = 1
    elif idle_or_end(st, c, p, arrival_s):
        admit_arrivals(st, arrival_s, prompt)


@inlined
def prefill_reset(
    st: Any, c: Any, p: Any, arrival_s: Any, prompt: Any, begin: int, end: int, freq_ghz: float
) -> None:  # fmt: skip
    """Start an episode on workload rows ``[begin, end)`` at a supported clock and wait for the
    first request.
    """
    start_episode(st, begin, end, freq_ghz)
    st.head_done = 0
    wait_for_work(st, c, p, arrival_s, prompt)


@inlined
def prefill_step(
    st: Any, c: Any, p: Any, arrival_s: Any, prompt: Any, first_token_s: Any, freq_ghz: float
) -> None:
    """One decision: request a clock, run at least one batch, wait for work."""
    begin_step(st)
    request_clock(st, p, snap_ghz(p, freq_ghz))
    until = st.time_s + p.min_interval_s
    while True:
        tokens, attn_work, n_seq, head, head_done = form_batch(
            prompt, st.head, st.head_done, st.tail, p.token_budget, p.max_seqs
        )
        st.step_requests = n_seq
        st.step_tokens = tokens
        st.step_queue = st.tail - st.head - n_seq
        st.step_kv_use = st.backpressure
        run_work(st, c, p, tokens, attn_work, 0.0, n_seq)
        finish_requests(st, p, arrival_s, first_token_s, head)
        st.head_done = head_done
        wait_for_work(st, c, p, arrival_s, prompt)
        if st.done == 1 or st.time_s >= until:
            break
    end_step(st)
