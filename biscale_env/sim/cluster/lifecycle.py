"""Instances entering and leaving service, and the upkeep between two pieces of work."""

import numpy as np

from biscale_env.core.jit import compiled, inlined
from biscale_env.sim.clock import run_idle, snap_ghz
from biscale_env.sim.cluster.decode_parts import reset
from biscale_env.sim.cluster.layout import ClusterArrays, Decodes, Floats, Ints, Prefills
from biscale_env.sim.cluster.queues import drop_finished, drop_prompts, prompts_of
from biscale_env.sim.prefill import prefill_reset
from biscale_env.sim.prefix_cache import cache_of, forget
from biscale_env.sim.state import Span


@inlined
def enter_service(st: np.record, now_s: float) -> None:
    """A reset record, whose parameters end its episode at 0, is in service from ``now_s`` on."""
    st.done = 0
    st.time_s = now_s
    st.rate_time_s = now_s
    st.rate_start_s = now_s


@compiled
def open_prefill(pool: Prefills, i: int, now_s: float, freq_ghz: float) -> None:
    """Put prefill instance ``i`` into service, empty, at a settled clock."""
    st, p = pool.states[i], pool.params[i]
    prefill_reset(st, pool.coefs[i], p, prompts_of(pool, i), Span(0, 0), snap_ghz(p, freq_ghz))
    enter_service(st, now_s)
    pool.next_s[i] = np.inf
    forget(cache_of(pool.cache, i))


@compiled
def open_decode(pool: Decodes, j: int, now_s: float, freq_ghz: float, no_times: Floats) -> None:
    """Put decode instance ``j`` into service, empty, at a settled clock."""
    reset(pool, no_times, j, snap_ghz(pool.params[j], freq_ghz))
    enter_service(pool.states[j], now_s)
    pool.next_s[j] = np.inf


@compiled
def compact(a: ClusterArrays) -> None:
    """Drop what is over from all queues, so that new work can be offered."""
    for i in range(a.prefills.meta.size):
        drop_prompts(a.prefills, i)
    for j in range(a.decodes.meta.size):
        drop_finished(a.decodes, j)
    a.totals.next = 0
    a.totals.logged = 0


@compiled
def settle(pool: Prefills | Decodes, until_s: float, alive: Ints) -> None:
    """Let instances that sleep draw their idle power up to ``until_s``.

    One that takes no more work retires when empty.

    Args:
        pool: prefill or decode instances.
        until_s: time that every event has been processed to.
        alive: per instance, requests it still has or keeps KV for.
    """
    for i in range(pool.meta.size):
        st, meta = pool.states[i], pool.meta[i]
        if np.isfinite(meta.retired_s) or meta.running == 1:
            continue
        if meta.accepting == 0 and alive[i] == 0:
            meta.retired_s = st.time_s
        elif st.time_s < until_s:
            run_idle(st, pool.coefs[i], pool.params[i], until_s)
