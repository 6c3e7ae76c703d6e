"""The transitions of a single decode instance, applied to one instance of a pool."""

from biscale_env.core.jit import inlined
from biscale_env.sim.cluster.layout import Decodes, Floats
from biscale_env.sim.decode import admit_waiting, decode_reset, enter, finish_requests, make_room


@inlined
def admit(pool: Decodes, no_times: Floats, j: int) -> None:
    """Fill the batch of instance ``j`` from its preempted requests, then from its queue."""
    q, run = pool.queue, pool.running
    admit_waiting(
        pool.states[j],
        pool.params[j],
        q.first_s[j],
        q.prompt[j],
        q.output[j],
        no_times,
        run.slots[j],
        run.wheel[j],
        run.tree[j],
        run.stack[j],
    )


@inlined
def preempt(pool: Decodes, j: int) -> None:
    """Preempt the newest requests of instance ``j`` until the next iteration fits into its KV."""
    q, run = pool.queue, pool.running
    make_room(
        pool.states[j],
        pool.params[j],
        q.prompt[j],
        q.output[j],
        run.slots[j],
        run.wheel[j],
        run.tree[j],
        run.stack[j],
    )


@inlined
def start_decoding(pool: Decodes, j: int, row: int) -> None:
    """The request in a row of instance ``j`` has its first token now and runs on."""
    st, run = pool.states[j], pool.running
    output = pool.queue.output[j, row]
    st.cached += pool.queue.prompt[j, row] + 1
    enter(
        st,
        pool.params[j],
        run.slots[j],
        run.wheel[j],
        run.tree[j],
        st.time_s,
        row,
        1,
        output,
    )


@inlined
def finish(pool: Decodes, no_times: Floats, j: int) -> None:
    """Requests of instance ``j`` whose last token has just come leave."""
    q, run = pool.queue, pool.running
    finish_requests(
        pool.states[j],
        pool.params[j],
        q.first_s[j],
        q.prompt[j],
        q.output[j],
        no_times,
        run.slots[j],
        run.wheel[j],
        run.tree[j],
    )


@inlined
def reset(pool: Decodes, no_times: Floats, j: int, freq_ghz: float) -> None:
    """Clear instance ``j``: no requests, a settled clock."""
    q, run = pool.queue, pool.running
    decode_reset(
        pool.states[j],
        pool.coefs[j],
        pool.params[j],
        q.ready_s[j],
        q.prompt[j],
        q.output[j],
        no_times,
        run.slots[j],
        run.wheel[j],
        run.tree[j],
        run.stack[j],
        0,
        0,
        freq_ghz,
    )
