"""The simulator's transitions, cut where real time comes in.

Requests arrive unannounced and the clock belongs to somebody else: ``changes`` are clock changes
``(time in s, clock in GHz)`` in order, of which the first ``n`` are known. Everything else is done
by :mod:`biscale_env.sim`.
"""

from typing import Any

from biscale_env.core.jit import compiled, inlined
from biscale_env.models.physics import idle_power_w
from biscale_env.sim import decode, prefill
from biscale_env.sim.arrivals import admit_arrivals
from biscale_env.sim.clock import WorkDone, begin_step, end_step, finish_work, under_cap, work_until
from biscale_env.sim.episode import start_episode
from biscale_env.sim.state import Floats, Requests, RequestTimes, RunningRequests, Span


@inlined
def work(
    st: Any,
    c: Any,
    p: Any,
    load: tuple[float, float, float, float],
    changes: Floats,
    n: int,
) -> None:
    """Run one iteration to its end under known clock changes.

    ``load`` is (tokens, attention token-pairs, cached tokens, sequences).
    """
    tokens, attn_work, cached, n_seq = load
    begin_step(st)
    start = st.time_s
    pace = under_cap(c, p, tokens, attn_work, cached, n_seq, st.freq_ghz)
    done = WorkDone(1.0, 0.0, 0.0)
    for k in range(n):
        if st.time_s + done.remaining * pace[1] <= changes[k, 0]:
            break
        done = work_until(st, done, pace, changes[k, 0])
        st.freq_ghz = changes[k, 1]
        pace = under_cap(c, p, tokens, attn_work, cached, n_seq, st.freq_ghz)
    finish_work(st, c, start, done, pace)
    end_step(st)


@compiled
def idle(st: Any, c: Any, until_s: float, changes: Floats, n: int) -> None:
    """Wait until a time, drawing idle power at the applied clocks."""
    joules = 0.0
    for k in range(n):
        if changes[k, 0] > until_s:
            break
        joules += idle_power_w(c, st.freq_ghz) * max(changes[k, 0] - st.time_s, 0.0)
        st.time_s = max(changes[k, 0], st.time_s)
        st.freq_ghz = changes[k, 1]
    joules += idle_power_w(c, st.freq_ghz) * (until_s - st.time_s)
    st.time_s = until_s
    st.energy_j += joules * c.n_gpus
    st.energy_idle_j += joules * c.n_gpus


@compiled
def prefill_start(st: Any, freq_ghz: float) -> None:
    """An empty prefill instance."""
    start_episode(st, Span(0, 0), freq_ghz)
    st.head_done = 0


@compiled
def prefill_form(st: Any, p: Any, requests: Requests, batch: Floats) -> None:
    """Take in what has arrived and form a batch.

    ``(tokens, attention token-pairs, n_seq, new head, its tokens done)`` into ``batch``.
    """
    admit_arrivals(st, requests.arrival_s, requests.prompt)
    formed = prefill.next_batch(st, p, requests)
    batch[0] = formed.tokens
    batch[1] = formed.attn_work
    batch[2] = formed.n_seq
    batch[3] = formed.head
    batch[4] = formed.head_done


@compiled
def prefill_work(st: Any, c: Any, p: Any, batch: Floats, changes: Floats, n: int) -> None:
    """Run the formed batch."""
    work(st, c, p, (batch[0], batch[1], 0.0, batch[2]), changes, n)


@compiled
def prefill_end(st: Any, p: Any, requests: Requests, first_token_s: Floats, batch: Floats) -> None:
    """The batch is done: its requests have their first token."""
    prefill.finish_requests(st, p, requests, first_token_s, int(batch[3]))
    st.head_done = int(batch[4])


@compiled
def decode_start(st: Any, run: RunningRequests, freq_ghz: float) -> None:
    """An empty decode instance."""
    start_episode(st, Span(0, 0), freq_ghz)
    decode.clear_running(st, run)


@compiled
def decode_form(
    st: Any, p: Any, requests: Requests, times: RequestTimes, run: RunningRequests
) -> None:
    """Take in what has arrived, admit what fits, preempt what does not."""
    admit_arrivals(st, requests.arrival_s, requests.prompt)
    decode.admit_waiting(st, p, requests, times, run)
    decode.make_room(st, p, requests, run)


@compiled
def decode_work(st: Any, c: Any, p: Any, changes: Floats, n: int) -> None:
    """Run the batch."""
    tokens, n_seq = float(st.batch + st.recompute_tokens), float(st.batch)
    work(st, c, p, (tokens, st.recompute_attn, float(st.cached), n_seq), changes, n)


@compiled
def decode_end(
    st: Any, p: Any, requests: Requests, times: RequestTimes, run: RunningRequests
) -> None:
    """The iteration is done: every running request has a token more, some their last."""
    decode.end_iteration(st, p, requests, times, run)
