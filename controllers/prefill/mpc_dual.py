"""The fast prefill MPC: the problem of `mpc_problem` solved exactly by its dual, compiled.

Law: in the time a batch takes, its energy is convex (from the energy-optimal clock up), so the
problem is a convex allocation of time with nested deadlines. A batch that sees a price of time
``w`` (J/s, the dual variable of its deadlines) runs at the clock of zero marginal cost::

    dE/df + w dL/df = 0

The price falls from batch to batch, and only where a deadline is tight. So: find the lowest price
at which every deadline of the rest of the horizon is met; it is exact up to the (last) deadline
that is tight; go on behind it with the rest. Deadlines that even the cap clock misses (the
infeasible prefix) are met as fast as possible first, which is what the exact penalty asks for. No
linear algebra, no starting point, no failure.
"""

from typing import NamedTuple

import numpy as np

from biscale_env.core.jit import compiled, inlined
from biscale_env.core.roots import bracket, false_position, narrowed
from biscale_env.models.physics import Coefficients, idle_power_w, iteration_energy_j
from controllers.base import Floats
from controllers.prefill.mpc_controller import MpcController
from controllers.prefill.mpc_problem import LATE_W, Stage, stage_latency_s
from controllers.records import Records

DIFF_GHZ = 1e-5  # central differences of the formula: relative error about 1e-9
CLOCK_TOL_GHZ = 1e-6
TIME_TOL_S = 1e-9


class DualRange(NamedTuple):
    """Range of the price of time, W, and the lowest clock, GHz."""

    low_w: float
    high_w: float
    freq_min_ghz: float


class Start(NamedTuple):
    """Where the rest of the horizon begins: its first stage, and when it starts, s."""

    stage: int
    time_s: float


class Lateness(NamedTuple):
    """Worst lateness of a plan, s, and the last stage that has it."""

    worst_s: float
    stage: int


@inlined
def marginal_cost(c: Coefficients, st: Stage, price_w: float, f: float) -> float:
    """Derivative of energy + price x time of a batch by its clock, J/GHz.

    The wait behind the batch counts too.
    """
    hi, lo = f + DIFF_GHZ, f - DIFF_GHZ
    t_hi, t_lo = stage_latency_s(c, st, hi), stage_latency_s(c, st, lo)
    e_hi = iteration_energy_j(c, st.tokens, st.attn_work, 0.0, st.n_seq, t_hi, hi)
    e_lo = iteration_energy_j(c, st.tokens, st.attn_work, 0.0, st.n_seq, t_lo, lo)
    idle = st.idle_s / st.share * (idle_power_w(c, hi) - idle_power_w(c, lo))
    return (c.n_gpus * (e_hi - e_lo + idle) + price_w * (t_hi - t_lo)) / (2.0 * DIFF_GHZ)


@inlined
def clock_at_price(c: Coefficients, st: Stage, price_w: float, freq_min_ghz: float) -> float:
    """Best clock of a batch at a price of time: the root of its marginal cost, GHz."""
    lo, hi = freq_min_ghz, st.cap_ghz
    if hi <= lo:
        return hi
    at_hi = marginal_cost(c, st, price_w, hi)
    if at_hi <= 0.0:
        return hi
    at_lo = marginal_cost(c, st, price_w, lo)
    if at_lo >= 0.0:
        return lo
    b = bracket(lo, at_lo, hi, at_hi)
    f = lo
    for _ in range(60):
        f = false_position(b)
        at = marginal_cost(c, st, price_w, f)
        if b.hi - b.lo < CLOCK_TOL_GHZ or abs(at) < 1e-6:
            break
        b = narrowed(b, f, at)
    return f


@inlined
def duration_s(c: Coefficients, st: Stage, f: float) -> float:
    """Time that a stage adds at a clock, s."""
    if st.share <= 0.0:
        return st.lead_s
    return st.lead_s + st.share * stage_latency_s(c, st, f)


@inlined
def plan_at_price(
    c: Coefficients, stages: Records, start: Start, price_w: float, dual: DualRange, plan: Floats
) -> Lateness:
    """Plan the rest of the horizon at one price of time."""
    worst, at = -np.inf, start.stage
    t = start.time_s
    for k in range(start.stage, stages.size):
        st = stages[k]
        if st.share > 0.0:
            plan[k] = clock_at_price(c, st, price_w / st.weight, dual.freq_min_ghz)
        t += duration_s(c, st, plan[k])
        late = t - st.deadline_s
        if (st.share > 0.0 or st.lead_s > 0.0) and late >= worst - TIME_TOL_S:
            worst, at = max(late, worst), k
    return Lateness(worst, at)


@inlined
def infeasible_prefix(c: Coefficients, stages: Records, start: Start) -> int:
    """First stage behind the last deadline that is missed even at the cap clock.

    The first of the rest when all can be met.
    """
    t = start.time_s
    behind = start.stage
    for k in range(start.stage, stages.size):
        st = stages[k]
        t += duration_s(c, st, st.cap_ghz)
        if t > st.deadline_s + TIME_TOL_S and (st.share > 0.0 or st.lead_s > 0.0):
            behind = k + 1
    return behind


@inlined
def dual_search(
    c: Coefficients, stages: Records, start: Start, dual: DualRange, plan: Floats
) -> int:
    """Plan the rest at the lowest price that meets its deadlines.

    Returns the last stage with a tight one, the last stage if none is.
    """
    at_low = plan_at_price(c, stages, start, dual.low_w, dual, plan)
    if at_low.worst_s <= 0.0:
        return stages.size - 1
    at_high = plan_at_price(c, stages, start, dual.high_w, dual, plan)
    tight = at_high.stage
    if at_high.worst_s >= -TIME_TOL_S:
        return tight
    b = bracket(dual.low_w, -at_low.worst_s, dual.high_w, -at_high.worst_s)
    for _ in range(100):
        w = false_position(b)
        if not b.lo < w < b.hi:
            w = 0.5 * (b.lo + b.hi)
        late = plan_at_price(c, stages, start, w, dual, plan)
        tight = late.stage
        if abs(late.worst_s) < TIME_TOL_S or b.hi - b.lo < 1e-9 * b.hi:
            break
        b = narrowed(b, w, -late.worst_s)
    return tight


@inlined
def plan_row(c: Coefficients, stages: Records, dual: DualRange, plan: Floats) -> int:
    """Clocks of all stages of one row, GHz; returns how many prices were searched for."""
    start, searches = Start(0, 0.0), 0
    for k in range(stages.size):
        plan[k] = max(stages[k].cap_ghz, dual.freq_min_ghz)
    while start.stage < stages.size:
        behind = infeasible_prefix(c, stages, start)
        if behind == start.stage:
            behind = dual_search(c, stages, start, dual, plan) + 1
            searches += 1
        else:
            for k in range(start.stage, behind):
                plan[k] = stages[k].cap_ghz
        t = start.time_s
        for k in range(start.stage, behind):
            t += duration_s(c, stages[k], plan[k])
        start = Start(behind, t)
    return searches


@compiled
def plan_all(
    coef: Records,
    stages: Records,
    credit_w: float,
    late_w: float,
    freq_min_ghz: float,
    plan: Floats,
) -> int:
    """Plans (n, K) in GHz of stages (n, K); returns how many prices were searched for in all.

    Args:
        coef: coefficients, one record.
        stages: of every row.
        credit_w: terminal cost per second saved, W: prices begin at minus this.
        late_w: highest price, W.
        freq_min_ghz: lowest clock, GHz.
        plan: written.
    """
    searches = 0
    dual = DualRange(-credit_w, late_w, freq_min_ghz)
    for i in range(stages.shape[0]):
        searches += plan_row(coef[0], stages[i], dual, plan[i])
    return searches


class FastMpcController(MpcController):
    """BiScale's prefill MPC (arXiv 2602.18755) with the extras of `MpcOptions`, in microseconds.

    The same problem as :class:`controllers.prefill.mpc_dompc.DoMpcController`, to the same clocks
    (tested). Changed to fit: as there. Its counters: decisions, failures (there are none) and
    prices searched for.
    """

    def plan_ghz(self, stages: Records) -> Floats:
        """Plans (n, K) in GHz of stages (n, K)."""
        plan = np.empty(stages.shape)
        p = self.problem
        self._counts["iterations"] += plan_all(
            p.coef, stages, p.credit_w, LATE_W, p.freq_min_ghz, plan
        )
        self._counts["decisions"] += len(stages)
        return plan

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """Plan every row."""
        stages = self.problem.stages(x)
        return self.problem.to_clock_mhz(stages, self.plan_ghz(stages)), None
