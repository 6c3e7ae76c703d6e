"""The transitions of a single decode instance, applied to one instance of a pool."""

from biscale_env.core.jit import inlined
from biscale_env.sim.cluster.layout import Decodes
from biscale_env.sim.decode import (
    admit_waiting,
    decode_reset,
    enter,
    finish_requests,
    make_room,
    running_of,
)
from biscale_env.sim.state import NO_CLASSES, Floats, Requests, RequestTimes, Span


@inlined
def requests_of(pool: Decodes, j: int) -> Requests:
    """The queue of instance ``j``; TPOT counts from the first token."""
    q = pool.queue
    return Requests(q.first_s[j], q.prompt[j], q.output[j], q.cached[j], NO_CLASSES)


@inlined
def admit(pool: Decodes, no_times: Floats, j: int) -> None:
    """Fill the batch of instance ``j`` from its preempted requests, then from its queue."""
    times = RequestTimes(no_times, no_times)
    run = running_of(pool.running, j)
    admit_waiting(pool.states[j], pool.params[j], requests_of(pool, j), times, run)


@inlined
def preempt(pool: Decodes, j: int) -> None:
    """Preempt the newest requests of instance ``j`` until the next iteration fits into its KV."""
    run = running_of(pool.running, j)
    make_room(pool.states[j], pool.params[j], requests_of(pool, j), run)


@inlined
def start_decoding(pool: Decodes, j: int, row: int) -> None:
    """The request in a row of instance ``j`` has its first token now and runs on."""
    st, output = pool.states[j], pool.queue.output[j, row]
    st.cached += pool.queue.prompt[j, row] + 1
    enter(st, pool.params[j], running_of(pool.running, j), st.time_s, row, 1, output)


@inlined
def finish(pool: Decodes, no_times: Floats, j: int) -> None:
    """Requests of instance ``j`` whose last token has just come leave."""
    times = RequestTimes(no_times, no_times)
    run = running_of(pool.running, j)
    finish_requests(pool.states[j], pool.params[j], requests_of(pool, j), times, run)


@inlined
def reset(pool: Decodes, no_times: Floats, j: int, freq_ghz: float) -> None:
    """Clear instance ``j``: no requests, a settled clock."""
    st, c, p = pool.states[j], pool.coefs[j], pool.params[j]
    times = RequestTimes(no_times, no_times)
    run = running_of(pool.running, j)
    decode_reset(st, c, p, requests_of(pool, j), times, run, Span(0, 0), freq_ghz)
