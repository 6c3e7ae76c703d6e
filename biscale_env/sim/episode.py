"""What both phases share at the edges of an episode.

A clean start, and waiting when there is nothing to do.
"""

from typing import Any

import numpy as np

from biscale_env.core.jit import inlined
from biscale_env.sim.clock import begin_step, run_idle, start_clock
from biscale_env.sim.state import Floats, Span


@inlined
def start_episode(st: Any, span: Span, freq_ghz: float) -> None:
    """Clear the record of one instance and point it at some rows, settled at a supported clock."""
    st.time_s = 0.0
    st.begin = span.begin
    st.end = span.end
    st.head = span.begin
    st.tail = span.begin
    st.done = 0
    st.rate_sum[:] = 0.0
    st.token_rate_sum = 0.0
    st.rate_time_s = 0.0
    st.rate_start_s = 0.0
    st.queue_tokens = 0.0
    st.last_time_s = 0.0
    st.last_power_w = 0.0
    st.energy_j = 0.0
    st.energy_idle_j = 0.0
    st.busy_s = 0.0
    st.iterations = 0
    st.finished = 0
    st.violations = 0
    st.backpressure = 0.0
    start_clock(st, freq_ghz)
    begin_step(st)


@inlined
def out_of_time(st: Any, p: Any) -> bool:
    """Whether an episode that does not drain its queue ends here."""
    return st.time_s >= p.end_s and p.drain == 0


@inlined
def idle_or_end(st: Any, c: Any, p: Any, arrival_s: Floats) -> bool:
    """With nothing to run, idle until the next arrival or to the end of the episode.

    Returns:
        False at the end of the episode, where ``done`` is set.
    """
    next_s = arrival_s[st.head] if st.head < st.end else np.inf
    if next_s <= p.end_s or (p.drain == 1 and st.head < st.end):
        run_idle(st, c, p, next_s)
        return True
    if st.time_s < p.end_s:
        run_idle(st, c, p, p.end_s)
    st.done = 1
    return False
