"""Dynamics of one prefill instance.

First come first served batches under a token budget, long prompts in chunks.

A decision is due whenever a batch is about to start. One step requests a clock, runs one batch (or
as many as fit into ``min_interval_s``), and, when the queue is then empty, idles until the next
arrival.
"""

from typing import Any, NamedTuple

from biscale_env.core.jit import inlined
from biscale_env.sim.arrivals import admit_arrivals
from biscale_env.sim.clock import begin_step, end_step, request_clock, run_work, snap_ghz
from biscale_env.sim.episode import idle_or_end, out_of_time, start_episode
from biscale_env.sim.slo_classes import bound_s, count_violation
from biscale_env.sim.state import Floats, Requests, RequestTimes, ShortInts, Span


class PrefillBatch(NamedTuple):
    """Work of a batch, and where the queue begins after it."""

    tokens: int  # new tokens
    attn_work: float  # attention token-pairs, token^2
    n_seq: int  # requests in it
    head: int  # requests from the old head up to here complete in this batch
    head_done: int  # new tokens of request ``head`` that are done then


@inlined
def form_batch(
    prompt: ShortInts,
    prefix: ShortInts,
    head: int,
    head_done: int,
    tail: int,
    budget: int,
    max_seqs: int,
) -> PrefillBatch:
    """Take requests from the head of the queue until the token budget is full.

    The last may be taken in part. New tokens attend to the cached prefix too.

    Args:
        prompt: new tokens of each request, behind its cached prefix.
        prefix: cached tokens of each request; empty where nothing is cached.
        head: first request of the queue.
        head_done: new tokens of it that are done.
        tail: behind the last request of the queue.
        budget: new tokens that a batch may have.
        max_seqs: requests that it may have.
    """
    tokens = 0
    attn_work = 0.0
    n_seq = 0
    while head < tail and tokens < budget and n_seq < max_seqs:
        left = prompt[head] - head_done
        take = min(left, budget - tokens)
        before = head_done + prefix[head] if prefix.size > 0 else head_done
        attn_work += take * (0.5 * take + before)
        tokens += take
        n_seq += 1
        if take < left:
            head_done += take
            break
        head += 1
        head_done = 0
    return PrefillBatch(tokens, attn_work, n_seq, head, head_done)


@inlined
def next_batch(st: Any, p: Any, requests: Requests) -> PrefillBatch:
    """The batch that an instance would start now."""
    return form_batch(
        requests.prompt,
        requests.prefix,
        st.head,
        st.head_done,
        st.tail,
        p.token_budget,
        p.max_seqs,
    )


@inlined
def finish_requests(
    st: Any, p: Any, requests: Requests, first_token_s: Floats, new_head: int
) -> None:
    """Requests ``head .. new_head - 1`` have their first token now."""
    for r in range(st.head, new_head):
        st.queue_tokens -= requests.prompt[r]
        if first_token_s.size > 0:
            first_token_s[r] = st.time_s
        if st.time_s - requests.arrival_s[r] > bound_s(p, requests, r):
            count_violation(st, p, requests, r)
    st.step_finished += new_head - st.head
    st.finished += new_head - st.head
    st.head = new_head


@inlined
def wait_for_work(st: Any, c: Any, p: Any, requests: Requests) -> None:
    """Idle until a request waits or the episode is over."""
    admit_arrivals(st, requests.arrival_s, requests.prompt)
    if st.head < st.tail:
        if out_of_time(st, p):
            st.done = 1
    elif idle_or_end(st, c, p, requests.arrival_s):
        admit_arrivals(st, requests.arrival_s, requests.prompt)


@inlined
def prefill_reset(st: Any, c: Any, p: Any, requests: Requests, span: Span, freq_ghz: float) -> None:
    """Start an episode on some rows at a supported clock and wait for the first request."""
    start_episode(st, span, freq_ghz)
    st.head_done = 0
    wait_for_work(st, c, p, requests)


@inlined
def run_batches(
    st: Any, c: Any, p: Any, requests: Requests, times: RequestTimes, until_s: float
) -> None:
    """Run at least one batch, and so on to a time or the end of the episode; wait for work."""
    while True:
        batch = next_batch(st, p, requests)
        st.step_requests = batch.n_seq
        st.step_tokens = batch.tokens
        st.step_queue = st.tail - st.head - batch.n_seq
        st.step_kv_use = st.backpressure
        run_work(st, c, p, batch.tokens, batch.attn_work, 0.0, batch.n_seq)
        finish_requests(st, p, requests, times.finish_s, batch.head)
        st.head_done = batch.head_done
        wait_for_work(st, c, p, requests)
        if st.done == 1 or st.time_s >= until_s:
            break


@inlined
def prefill_step(
    st: Any, c: Any, p: Any, requests: Requests, times: RequestTimes, freq_ghz: float
) -> None:
    """One decision: request a clock, run at least one batch, wait for work."""
    begin_step(st)
    request_clock(st, p, snap_ghz(p, freq_ghz))
    run_batches(st, c, p, requests, times, st.time_s + p.min_interval_s)
    end_step(st)
