"""The fast prefill MPC: the problem of `mpc_model` solved exactly by prices, compiled.

In the time a batch takes, its energy is convex (from the energy-optimal clock up), so the problem
is a convex allocation of time with nested deadlines. A batch that sees a price of time ``w`` (J/s)
runs at the clock where ``dE/df + w dL/df = 0``. The price falls from batch to batch, and only where
a deadline is tight. So: find the lowest price at which every deadline of the rest of the horizon is
met; it is exact up to the (last) deadline that is tight; go on behind it with the rest. Deadlines
that even the cap clock misses are met as fast as possible first, which is what the exact penalty
asks for. No linear algebra, no starting point, no failure.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.jit import compiled, inlined
from biscale_env.core.roots import bracket, false_position, narrowed
from biscale_env.models.physics import idle_power_w, iteration_energy_j, latency_s
from controllers.base import MARGINS, Amount, Controller, Floats, PolicyContext, Share
from controllers.prefill.mpc_options import MpcOptions
from controllers.prefill.mpc_problem import LATE_W, MpcProblem

DIFF_GHZ = 1e-5  # central differences of the formula: relative error about 1e-9
CLOCK_TOL_GHZ = 1e-6
TIME_TOL_S = 1e-9


@inlined
def slope(c: Any, st: Any, price_w: float, f: float) -> float:
    """Derivative of energy + price x time of a batch (and of the wait behind it) by its clock,
    J/GHz.
    """
    hi, lo = f + DIFF_GHZ, f - DIFF_GHZ
    t_hi = latency_s(c, st.tokens, st.attn_work, 0.0, st.n_seq, hi)
    t_lo = latency_s(c, st.tokens, st.attn_work, 0.0, st.n_seq, lo)
    e_hi = iteration_energy_j(c, st.tokens, st.attn_work, 0.0, t_hi, hi)
    e_lo = iteration_energy_j(c, st.tokens, st.attn_work, 0.0, t_lo, lo)
    idle = st.idle_s / st.share * (idle_power_w(c, hi) - idle_power_w(c, lo))
    return (c.n_gpus * (e_hi - e_lo + idle) + price_w * (t_hi - t_lo)) / (2.0 * DIFF_GHZ)


@inlined
def clock_at_price(c: Any, st: Any, price_w: float, freq_min_ghz: float) -> float:
    """Best clock of a batch at a price of time.

    The root of the slope, by false position (Illinois), GHz.
    """
    lo, hi = freq_min_ghz, st.cap_ghz
    if hi <= lo:
        return hi
    at_hi = slope(c, st, price_w, hi)
    if at_hi <= 0.0:
        return hi
    at_lo = slope(c, st, price_w, lo)
    if at_lo >= 0.0:
        return lo
    b = bracket(lo, at_lo, hi, at_hi)
    f = lo
    for _ in range(60):
        f = false_position(b)
        at = slope(c, st, price_w, f)
        if b.hi - b.lo < CLOCK_TOL_GHZ or abs(at) < 1e-6:
            break
        b = narrowed(b, f, at)
    return f


@inlined
def duration_s(c: Any, st: Any, f: float) -> float:
    """Time that a stage adds at a clock, s."""
    if st.share <= 0.0:
        return st.lead_s
    return st.lead_s + st.share * latency_s(c, st.tokens, st.attn_work, 0.0, st.n_seq, f)


@inlined
def price_stages(
    c: Any, stages: Any, start: int, t0: float, price_w: float, freq_min_ghz: float, plan: Any
) -> Any:
    """Plan the stages from ``start`` on at one price; returns (worst lateness, s; last stage that
    has it).
    """
    worst, at = -np.inf, start
    t = t0
    for k in range(start, stages.size):
        st = stages[k]
        if st.share > 0.0:
            plan[k] = clock_at_price(c, st, price_w / st.weight, freq_min_ghz)
        t += duration_s(c, st, plan[k])
        late = t - st.deadline_s
        if (st.share > 0.0 or st.lead_s > 0.0) and late >= worst - TIME_TOL_S:
            worst, at = max(late, worst), k
    return worst, at


@inlined
def hopeless_until(c: Any, stages: Any, start: int, t0: float) -> int:
    """First stage behind the last deadline that is missed even at the cap clock.

    ``start`` when all can be met.
    """
    t = t0
    behind = start
    for k in range(start, stages.size):
        t += duration_s(c, stages[k], stages[k].cap_ghz)
        if t > stages[k].deadline_s + TIME_TOL_S and (
            stages[k].share > 0.0 or stages[k].lead_s > 0.0
        ):
            behind = k + 1
    return behind


@inlined
def lowest_price(
    c: Any,
    stages: Any,
    start: int,
    t0: float,
    base_w: float,
    late_w: float,
    freq_min_ghz: float,
    plan: Any,
) -> int:
    """Plan the rest at the lowest price that meets its deadlines.

    Returns the last stage with a tight one, the last stage if none is.
    """
    lo, hi = base_w, late_w
    late_lo, _ = price_stages(c, stages, start, t0, lo, freq_min_ghz, plan)
    if late_lo <= 0.0:
        return stages.size - 1
    late_hi, tight = price_stages(c, stages, start, t0, hi, freq_min_ghz, plan)
    if late_hi >= -TIME_TOL_S:
        return tight
    b = bracket(lo, -late_lo, hi, -late_hi)
    for _ in range(100):
        w = false_position(b)
        if not b.lo < w < b.hi:
            w = 0.5 * (b.lo + b.hi)
        late, tight = price_stages(c, stages, start, t0, w, freq_min_ghz, plan)
        if abs(late) < TIME_TOL_S or b.hi - b.lo < 1e-9 * b.hi:
            break
        b = narrowed(b, w, -late)
    return tight


@inlined
def plan_row(
    c: Any, stages: Any, base_w: float, late_w: float, freq_min_ghz: float, plan: Any
) -> int:
    """Clocks of all stages of one row, GHz; returns how many prices were searched for."""
    start, t, searches = 0, 0.0, 0
    for k in range(stages.size):
        plan[k] = max(stages[k].cap_ghz, freq_min_ghz)
    while start < stages.size:
        behind = hopeless_until(c, stages, start, t)
        if behind == start:
            behind = lowest_price(c, stages, start, t, base_w, late_w, freq_min_ghz, plan) + 1
            searches += 1
        else:
            for k in range(start, behind):
                plan[k] = stages[k].cap_ghz
        for k in range(start, behind):
            t += duration_s(c, stages[k], plan[k])
        start = behind
    return searches


@compiled
def plan_all(
    coef: Any, stages: Any, credit_w: float, late_w: float, freq_min_ghz: float, plan: Any
) -> int:
    """Plans (n, K) in GHz of stages (n, K); returns how many prices were searched for in all."""
    searches = 0
    for i in range(stages.shape[0]):
        searches += plan_row(coef[0], stages[i], -credit_w, late_w, freq_min_ghz, plan[i])
    return searches


class FastMpcController(Controller):
    """BiScale's prefill MPC (arXiv 2602.18755) with the extras of :class:`MpcOptions`, solved by
    prices in microseconds.

    The same problem as :class:`controllers.prefill.mpc_dompc.DoMpcController`, to the same clocks
    (tested). Changed to fit: as there.
    """

    phases: ClassVar[tuple[str, ...]] = ("prefill",)
    TUNABLE: ClassVar[Mapping[str, tuple[Any, ...]]] = MARGINS

    def __init__(
        self,
        context: PolicyContext,
        margin: Share = 0.0,
        give_up: bool = False,
        forecast: Amount = 0.0,
        delay_aware: bool = False,
        idle_credit: Amount = 0.0,
        idle_clock: Amount = 0.0,
    ) -> None:
        """Prepare the problem; the parameters are those of :class:`MpcOptions`."""
        super().__init__(context)
        self.problem = MpcProblem(
            context, MpcOptions(margin, give_up, forecast, delay_aware, idle_credit, idle_clock)
        )
        self._counts = {"decisions": 0, "solver_failures": 0, "iterations": 0}

    def stats(self) -> dict[str, float]:
        """Decisions, failures (there are none) and prices searched for."""
        return dict(self._counts)

    def plan_ghz(self, stages: NDArray[np.void]) -> Floats:
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
