"""Compiled runs at one constant clock.

What capacity searches, tables of static clocks and the speed measurements use. The transitions are
those of the environments; the whole run is one step, since nothing is decided on the way.
"""

from typing import Any

import numpy as np

from biscale_env.core.jit import compiled
from biscale_env.sim.clock import snap_ghz
from biscale_env.sim.decode import decode_reset, run_iterations
from biscale_env.sim.prefill import prefill_reset, run_batches
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
    if st.done == 0:
        run_batches(st, c, p, requests, times, np.inf)


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
    if st.done == 0:
        run_iterations(st, c, p, requests, times, run, np.inf)
