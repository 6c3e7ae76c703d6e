"""Compiled runs at one constant clock.

What capacity searches, tables of static clocks and the speed measurements use. The transitions are
those of the environments; only the loop around them is compiled too.
"""

from typing import Any

from biscale_env.core.jit import compiled
from biscale_env.sim.clock import snap_ghz
from biscale_env.sim.decode import decode_reset, decode_step
from biscale_env.sim.prefill import prefill_reset, prefill_step
from biscale_env.sim.state import Requests, RequestTimes, RunningRequests, Span


@compiled
def prefill_static(
    st: Any, c: Any, p: Any, requests: Requests, times: RequestTimes, freq_ghz: float
) -> None:
    """Run one prefill instance over the whole workload at one clock.

    The clock is settled before the first request.
    """
    everything = Span(0, requests.arrival_s.size)
    prefill_reset(st, c, p, requests, everything, snap_ghz(p, freq_ghz))
    while st.done == 0:
        prefill_step(st, c, p, requests, times, freq_ghz)


@compiled
def decode_static(
    st: Any,
    c: Any,
    p: Any,
    requests: Requests,
    times: RequestTimes,
    run: RunningRequests,
    freq_ghz: float,
) -> None:
    """Run one decode instance over the whole workload at one clock.

    The clock is settled before the first request.
    """
    everything = Span(0, requests.arrival_s.size)
    decode_reset(st, c, p, requests, times, run, everything, snap_ghz(p, freq_ghz))
    while st.done == 0:
        decode_step(st, c, p, requests, times, run, freq_ghz)
