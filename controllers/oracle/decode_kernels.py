"""Compiled runs of a decode instance under a clock per time window, for the search of
:mod:`controllers.oracle_decode`.
"""

from typing import Any

from biscale_env.core.jit import compiled
from biscale_env.sim.decode import decode_reset, decode_step


@compiled
def decode_windows(
    st: Any, c: Any, p: Any, arrival_s: Any, prompt: Any, output: Any, start_s: Any, finish_s: Any, slots: Any, ring: Any, tree: Any,
    stack: Any, plan_ghz: Any, window_s: float, window_cost: Any, clocks_ghz: Any, start_ghz: float,
) -> int:  # fmt: skip
    """Run the whole workload; a decision takes the clock of the window in which it falls.

    Args:
        st: state.
        c: coefficients.
        p: engine parameters.
        arrival_s: arrivals.
        prompt: prompt lengths.
        output: output lengths.
        start_s: scratch or empty.
        finish_s: completion times, written if not empty.
        slots: scratch.
        ring: scratch.
        tree: scratch.
        stack: scratch.
        plan_ghz: clock of each window, GHz; the last one stays.
        window_s: length of a window, s.
        window_cost: energy of the steps that begin in each window, J; written.
        clocks_ghz: clock of every decision, GHz; written as far as it reaches.
        start_ghz: clock before the first decision, GHz.

    Returns:
        Decisions made.
    """
    decode_reset(
        st,
        c,
        p,
        arrival_s,
        prompt,
        output,
        start_s,
        slots,
        ring,
        tree,
        stack,
        0,
        arrival_s.size,
        start_ghz,
    )
    window_cost[:] = 0.0
    decision = 0
    while st.done == 0:
        w = min(int(st.time_s / window_s), plan_ghz.size - 1)
        if decision < clocks_ghz.size:
            clocks_ghz[decision] = plan_ghz[w]
        decision += 1
        decode_step(
            st,
            c,
            p,
            arrival_s,
            prompt,
            output,
            start_s,
            finish_s,
            slots,
            ring,
            tree,
            stack,
            plan_ghz[w],
        )
        window_cost[w] += st.step_energy_j
    return decision
