"""Compiled runs of a decode instance under a plan.

For the search of :mod:`controllers.oracle.decode_search`.
"""

from typing import Any, NamedTuple

from biscale_env.core.jit import compiled, inlined
from biscale_env.sim.clock import under_cap
from biscale_env.sim.decode import decode_reset, decode_step
from biscale_env.sim.state import Floats, Ints, Requests, RequestTimes, RunningRequests, Span


class PlanArrays(NamedTuple):
    """A plan as compiled code takes it, and what it costs.

    A decision takes the clock ``quiet`` of its window while fewer than ``crowd`` requests run, else
    ``busy``; from there it is raised until the iteration takes at most ``target_s`` of its window.
    """

    quiet: Ints  # per window, index into the grid
    busy: Ints  # per window, likewise
    target_s: Floats  # per window; infinite: not raised
    crowd: int
    window_s: float  # length of a window, s; the last one stays
    grid_ghz: Floats  # supported clocks, rising, GHz
    window_j: Floats  # energy of the steps that begin in each window, J; written
    clocks_ghz: Floats  # clock of every decision, GHz; written as far as it reaches


@inlined
def takes_s(st: Any, c: Any, p: Any, freq_ghz: float) -> float:
    """Duration of the next iteration at a clock, s."""
    rows = st.batch + st.recompute_tokens
    pace = under_cap(c, p, rows, st.recompute_attn, st.cached, st.batch, freq_ghz)
    return float(pace[1])


@inlined
def chosen_clock(st: Any, c: Any, p: Any, plan: PlanArrays, w: int, last: int) -> int:
    """Index of the clock that the plan takes now; the search begins at the ``last`` one."""
    lowest = plan.quiet[w] if st.batch < plan.crowd else plan.busy[w]
    target_s, top = plan.target_s[w], plan.grid_ghz.size - 1
    if not target_s < 1e300:
        return int(lowest)
    k = max(last, lowest)
    if takes_s(st, c, p, plan.grid_ghz[k]) <= target_s:
        while k > lowest and takes_s(st, c, p, plan.grid_ghz[k - 1]) <= target_s:
            k -= 1
        return int(k)
    while k < top:
        k += 1
        if takes_s(st, c, p, plan.grid_ghz[k]) <= target_s:
            break
    return int(k)


@compiled
def decode_planned(
    st: Any,
    c: Any,
    p: Any,
    requests: Requests,
    times: RequestTimes,
    run: RunningRequests,
    plan: PlanArrays,
) -> int:
    """Run the whole workload under a plan, from the highest clock on.

    Args:
        st: state.
        c: coefficients.
        p: engine parameters.
        requests: the workload.
        times: written if not empty.
        run: scratch.
        plan: the plan; its costs and clocks are written.

    Returns:
        Decisions made.
    """
    everything = Span(0, requests.arrival_s.size)
    decode_reset(st, c, p, requests, times, run, everything, p.freq_max_ghz)
    plan.window_j[:] = 0.0
    decision, last = 0, 0
    while st.done == 0:
        w = min(int(st.time_s / plan.window_s), plan.target_s.size - 1)
        last = chosen_clock(st, c, p, plan, w, last)
        if decision < plan.clocks_ghz.size:
            plan.clocks_ghz[decision] = plan.grid_ghz[last]
        decision += 1
        decode_step(st, c, p, requests, times, run, plan.grid_ghz[last])
        plan.window_j[w] += st.step_energy_j
    return decision
