"""The simulator's transitions, cut where real time comes in.

Requests arrive unannounced and the clock belongs to somebody else.

``landings`` are clock changes ``(time in s, clock in GHz)`` in order; everything else is as in
:mod:`biscale_env.sim`.
"""

from typing import Any

import numpy as np

from biscale_env.core.jit import compiled, inlined
from biscale_env.models.physics import idle_power_w
from biscale_env.sim import decode, prefill
from biscale_env.sim.arrivals import admit_arrivals
from biscale_env.sim.clock import under_cap
from biscale_env.sim.episode import start_episode
from biscale_env.sim.state import Requests, RequestTimes, RunningRequests, Span


@inlined
def work(
    st: Any,
    c: Any,
    p: Any,
    tokens: float,
    attn_work: float,
    cached: float,
    n_seq: float,
    landings: Any,
    n: int,
) -> None:
    """Run one iteration to its end under a known history of clocks (compare
    ``sim.clock.run_work``).
    """
    start = st.time_s
    remaining = 1.0
    energy = 0.0
    cycles = 0.0
    k = 0
    while True:
        freq, duration, joules = under_cap(c, p, tokens, attn_work, cached, n_seq, st.freq_ghz)
        change_s = landings[k, 0] if k < n else np.inf
        if st.time_s + remaining * duration <= change_s:
            break
        share = max(change_s - st.time_s, 0.0) / duration
        energy += share * joules
        cycles += share * duration * freq
        remaining -= share
        st.time_s = max(change_s, st.time_s)
        st.freq_ghz = landings[k, 1]
        k += 1
    energy += remaining * joules
    cycles += remaining * duration * freq
    st.time_s += remaining * duration
    elapsed = st.time_s - start
    st.last_time_s = elapsed
    st.last_power_w = energy / elapsed
    st.energy_j += energy * c.n_gpus
    st.busy_s += elapsed
    st.step_freq_mean_ghz = cycles / elapsed
    st.iterations += 1


@compiled
def idle(st: Any, c: Any, until_s: Any, landings: Any, n: Any) -> None:
    """Wait until a time, drawing idle power at the clocks in force."""
    joules = 0.0
    for k in range(n):
        if landings[k, 0] > until_s:
            break
        joules += idle_power_w(c, st.freq_ghz) * max(landings[k, 0] - st.time_s, 0.0)
        st.time_s = max(landings[k, 0], st.time_s)
        st.freq_ghz = landings[k, 1]
    joules += idle_power_w(c, st.freq_ghz) * (until_s - st.time_s)
    st.time_s = until_s
    st.energy_j += joules * c.n_gpus
    st.energy_idle_j += joules * c.n_gpus


@compiled
def prefill_start(st: Any, freq_ghz: Any) -> None:
    """An empty prefill instance."""
    start_episode(st, Span(0, 0), freq_ghz)
    st.head_done = 0


@compiled
def prefill_form(st: Any, p: Any, arrival_s: Any, prompt: Any, batch: Any) -> None:
    """Take in what has arrived and form a batch.

    ``(tokens, attn_work, n_seq, new head, its tokens done)`` into ``batch``.
    """
    admit_arrivals(st, arrival_s, prompt)
    tokens, attn_work, n_seq, head, done = prefill.form_batch(
        prompt, st.head, st.head_done, st.tail, p.token_budget, p.max_seqs
    )
    batch[0] = tokens
    batch[1] = attn_work
    batch[2] = n_seq
    batch[3] = head
    batch[4] = done


@compiled
def prefill_work(st: Any, c: Any, p: Any, batch: Any, landings: Any, n: Any) -> None:
    """Run the formed batch."""
    work(st, c, p, batch[0], batch[1], 0.0, batch[2], landings, n)


@compiled
def prefill_end(st: Any, p: Any, arrival_s: Any, first_token_s: Any, batch: Any) -> None:
    """The batch is done: its requests have their first token."""
    prefill.finish_requests(st, p, arrival_s, first_token_s, int(batch[3]))
    st.head_done = int(batch[4])


@compiled
def decode_start(st: Any, slots: Any, ring: Any, tree: Any, freq_ghz: Any) -> None:
    """An empty decode instance."""
    start_episode(st, Span(0, 0), freq_ghz)
    st.admitted_last = decode.NO_SLOT
    for k in range(slots.size):
        slots[k].wheel_next = k + 1 if k + 1 < slots.size else decode.NO_SLOT
    ring[:] = decode.NO_SLOT
    tree[:] = np.inf


@compiled
def decode_form(
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
    """Take in what has arrived, admit what fits, preempt what does not."""
    admit_arrivals(st, arrival_s, prompt)
    requests, run = Requests(arrival_s, prompt, output), RunningRequests(slots, ring, tree, stack)
    decode.admit_waiting(st, p, requests, RequestTimes(start_s, start_s), run)
    decode.make_room(st, p, requests, run)


@compiled
def decode_work(st: Any, c: Any, p: Any, landings: Any, n: Any) -> None:
    """Run the batch."""
    work(
        st,
        c,
        p,
        st.batch + st.recompute_tokens,
        st.recompute_attn,
        st.cached,
        st.batch,
        landings,
        n,
    )


@compiled
def decode_end(
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
    """The iteration is done: every running request has a token more, some their last."""
    st.recompute_tokens = 0
    st.recompute_attn = 0.0
    st.cached += st.batch
    requests, run = Requests(arrival_s, prompt, output), RunningRequests(slots, ring, tree, slots)
    decode.finish_requests(st, p, requests, RequestTimes(finish_s, finish_s), run)
