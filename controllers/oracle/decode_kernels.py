"""Compiled runs of a decode instance under a clock per time window.

For the search of :mod:`controllers.oracle.decode_search`.
"""

from typing import Any, NamedTuple

from biscale_env.core.jit import compiled
from biscale_env.sim.decode import decode_reset, decode_step
from biscale_env.sim.state import Floats, Requests, RequestTimes, RunningRequests, Span


class WindowPlan(NamedTuple):
    """A clock per time window, and what it costs."""

    plan_ghz: Floats  # clock of each window, GHz; the last one stays
    window_s: float  # length of a window, s
    window_cost: Floats  # energy of the steps that begin in each window, J; written
    clocks_ghz: Floats  # clock of every decision, GHz; written as far as it reaches
    start_ghz: float  # clock before the first decision, GHz


@compiled
def decode_windows(
    st: Any,
    c: Any,
    p: Any,
    requests: Requests,
    times: RequestTimes,
    run: RunningRequests,
    plan: WindowPlan,
) -> int:
    """Run the whole workload; a decision takes the clock of the window in which it falls.

    Args:
        st: state.
        c: coefficients.
        p: engine parameters.
        requests: the workload.
        times: written if not empty.
        run: scratch.
        plan: the clocks; its costs are written.

    Returns:
        Decisions made.
    """
    everything = Span(0, requests.arrival_s.size)
    decode_reset(st, c, p, requests, times, run, everything, plan.start_ghz)
    plan.window_cost[:] = 0.0
    decision = 0
    while st.done == 0:
        w = min(int(st.time_s / plan.window_s), plan.plan_ghz.size - 1)
        if decision < plan.clocks_ghz.size:
            plan.clocks_ghz[decision] = plan.plan_ghz[w]
        decision += 1
        decode_step(st, c, p, requests, times, run, plan.plan_ghz[w])
        plan.window_cost[w] += st.step_energy_j
    return decision
