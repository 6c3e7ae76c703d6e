"""The hindsight optimum of a prefill instance.

What could have been done, had the whole workload been known.

Plant of the oracle. The workload is known, clocks change at once, a decision is due at every batch;
everything else (first come first served batches under the token budget, no waiting on purpose,
idling under the plant's idle rule, power cap, all supported clocks) is the simulator's own,
through its own functions. The objective is the environment's: energy in reference energies plus
``price`` (the SLO-violation penalty, a dual variable) per request that violates the SLO; it is the
plant's ``violation_weight``, or is found so that the required fraction of requests is within it.

Method. Forward dynamic programming over batch starts ``(request, tokens of it done, time)``, see
:mod:`controllers.oracle.prefill_kernels`. Time is divided into cells, and three runs bracket the
optimum:

* ``EXACT``: a label keeps its true time, and of the labels in one cell the cheapest goes on. Its
  path is a plan that the simulator repeats to the last digit, so its cost is an *upper* bound on
  the optimum.
* ``CELLS``: a label may be anywhere in its cell, each transition from it may use whichever place
  suits it, and a batch may contain any of the requests that arrive within the cell. Every path of
  the true problem is then a path here and costs no less there: a *lower* bound for every policy
  without actuation delay. Idle periods end at a true arrival, so the error does not build up beyond
  one busy period; the distance to the upper bound is the discretisation error and is reported as
  ``gap``.
* ``CELLS_ANY_DELAY``: delay is not always a loss. A clock that takes effect within a batch makes a
  mix of two clocks that no single supported clock makes, and one that takes effect in an idle
  period saves idle power, which a plant without delay cannot do since the clock changes only at a
  batch start. Here a batch may take any duration at the
  energy on the lower convex hull over the clocks (every mix, in any order, lies on or above it),
  and waiting costs the idle power of the lowest clock (parked: the parked power). No delay,
  constant or random, and no decision interval can do better: a lower bound for every policy in
  every delayed plant.

Pruning. In plans a label is dropped when it is dearer, energy counted above the lowest idle power,
by ``margin`` reference energies than an earlier label of the same position. Being later rarely
helps (more requests to batch, an end of the episode before the next batch), but it can: pruning may
cost a plan a little, and would take the proof from a bound. Bounds therefore keep every label, and
widen the window of cells that a position has when one falls out of it. Only for workloads far
beyond what the instance can serve this is too much work; their bounds are pruned, too, which is
checked, not proven, and said (``bound_pruned``). If even then labels fall out of the widest window,
``dropped`` counts them and there is no bound (NaN).

SLO classes. Every request has the bound of its class, and a violation costs what it weighs; see
:mod:`controllers.oracle.allowed_misses` for an attainment of every class.

Attainment. Minimum energy subject to at most ``m`` violations is bounded from below by ``L(price) -
price * m`` for every price, where L is the bound above (weak duality); the plan is the cheapest one
met by bisection that satisfies the constraint.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant
from biscale_env.traces import Trace
from controllers.oracle import prefill_records as records
from controllers.oracle.allowed_misses import AllowedMisses
from controllers.oracle.plan_replay import OraclePolicy, PlanReplay, replay
from controllers.oracle.prefill_problem import PrefillProblem

CELL_S = 1e-3
MARGIN = 1.0  # reference energies
PRICE_MAX = 1e4  # a violation at this price outweighs all energy of thousands of requests
PRICE_MIN = 1e-3
PRICE_TOLERANCE = 0.02
PRICE_STEP = 1.2
SAME_ROOM = 1.25  # labels that do not fit at a price do not fit at prices up to this times it
COARSE = 4  # the price is first sought on cells and clock steps this many times as wide


@dataclass(frozen=True)
class PrefillOracle:
    """The optimum of one workload, bracketed.

    Costs are those of the environment, in reference energies, without the idle energy before the
    first request; energies include it.

    Attributes:
        plan_mhz: clock of every batch, MHz.
        replay: the plan in the simulator.
        price: cost of a violation that was used; the multiplier when an attainment was asked for.
        upper_bound: cost of the plan at this price.
        lower_bound: no policy without actuation delay costs less at this price.
        lower_bound_any_delay: no policy at any delay costs less at this price.
        energy_bound_j: no policy without delay that has at most ``violations_allowed`` violations
            uses less energy, J.
        energy_bound_any_delay_j: the same at any delay, J.
        violations_allowed: violations that the constraint allows; without a constraint, those of
            the plan.
        feasible: False when not even the plan with the fewest violations meets the constraint,
            which was then widened to that number.
        gap: ``upper_bound / lower_bound - 1``: the discretisation error.
        duality_gap: ``energy of the plan / energy_bound_j - 1``.
        cell_s: width of the time cells, s.
        bound_pruned: the workload was too much for a bound without pruning: it is checked, not
            proven.
        dropped: transitions of the bounding programmes that fell out of the widest window; the
            bounds are NaN unless it is 0.
        programmes: dynamic programmes solved.
        seconds: wall time.
    """

    plan_mhz: NDArray[np.float64]
    replay: PlanReplay
    price: float
    upper_bound: float
    lower_bound: float
    lower_bound_any_delay: float
    energy_bound_j: float
    energy_bound_any_delay_j: float
    violations_allowed: int
    feasible: bool
    gap: float
    duality_gap: float
    cell_s: float
    bound_pruned: bool
    dropped: int
    programmes: int
    seconds: float

    def policy(self, plant: Plant) -> OraclePolicy:
        """The plan as a policy for :func:`controllers.oracle.plan_replay.oracle_plant`."""
        return OraclePolicy(plant.clocks, self.plan_mhz)


class _Search:
    """Solves programmes at prices and remembers the best plan.

    A plan's cells are widened when they would hold too many labels.
    """

    def __init__(self, problem: PrefillProblem, cell_s: float, margin: float) -> None:
        self.problem, self.cell_s, self.margin = problem, cell_s, margin
        self.coarse = 1
        self.programmes, self.dropped, self.pruned = 0, 0, False
        self.best: tuple[float, PlanReplay, NDArray[np.float64]] | None = None
        self._plans: dict[tuple[int, float], tuple[PlanReplay, NDArray[np.float64]]] = {}
        self._too_fine: list[tuple[int, float, float]] = []

    def plan(self, price: float) -> tuple[PlanReplay, NDArray[np.float64]]:
        """Cheapest plan at a price, and its replay; each is made once."""
        key = self.coarse, price
        if key not in self._plans:
            self._plans[key] = self._new_plan(price)
        return self._plans[key]

    def _new_plan(self, price: float) -> tuple[PlanReplay, NDArray[np.float64]]:
        """A plan on the finest cells that have room; a lower price keeps more labels."""
        cell_s = self.cell_s * self.coarse
        for coarse, at, width_s in self._too_fine:
            if coarse == self.coarse and price <= SAME_ROOM * at:
                cell_s = max(cell_s, 2.0 * width_s)
        while True:
            self.programmes += 1
            run, plan = self.problem.run(records.EXACT, price, cell_s, self.margin, self.coarse)
            if run["status"] == records.OK:
                return replay(
                    self.problem.plant, self.problem.trace, plan, self.problem.member
                ), plan
            self._too_fine.append((self.coarse, price, cell_s))
            cell_s *= 2.0

    def bound(self, mode: int, price: float) -> float:
        """Lower bound at a price, without pruning if it can be done.

        NaN when labels fell out of the widest window.
        """
        margin = np.inf
        while True:
            self.programmes += 1
            run, _ = self.problem.run(mode, price, self.cell_s, margin)
            if run["status"] == records.OK and not run["late"]:
                return float(run["best_cost"])
            if run["status"] == records.OK and self.problem.widen():
                continue
            if not np.isinf(margin):
                break
            margin, self.pruned = self.margin, True
        if run["status"] != records.OK:
            raise BiscaleError(
                f"the oracle ran out of room for {self.problem.trace.name}: use wider cells than "
                f"{self.cell_s:g} s"
            )
        self.dropped = max(self.dropped, int(run["late"]))
        return float("nan")

    def keep(self, price: float, allowed: AllowedMisses) -> PlanReplay:
        """Plan at a price; remember it if it is allowed and needs less energy.

        Returns its run.
        """
        done, plan = self.plan(price)
        if allowed.holds(done.missed) and (
            self.best is None or done.energy_j <= self.best[1].energy_j
        ):
            self.best = price, done, plan
        return done

    def holds(self, price: float, allowed: AllowedMisses) -> bool:
        """Whether the plan at a price, kept as above, misses no more than is allowed."""
        return allowed.holds(self.keep(price, allowed).missed)

    def bisect(self, low: float, high: float, allowed: AllowedMisses) -> tuple[float, float]:
        """Shrink an interval of prices: too many violations at its low end, few enough above."""
        while high / low > 1.0 + PRICE_TOLERANCE:
            middle = float(np.sqrt(low * high))
            missed = self.keep(middle, allowed).missed
            low, high = (low, middle) if allowed.holds(missed) else (middle, high)
            if allowed.uses_all(missed):
                break
        return low, high

    def constrain(self, allowed: AllowedMisses) -> tuple[AllowedMisses, bool]:
        """Find the least price at which the plan has no more violations than allowed.

        ``(allowed, feasible)``.

        The search is done on a coarse grid of times and clocks first, then around its answer on the
        fine one.
        """
        self.coarse = COARSE
        free = self.holds(0.0, allowed)
        beyond = not self.holds(PRICE_MAX, allowed)
        self.coarse = 1
        if free and self.holds(0.0, allowed):
            return allowed, True
        feasible = True
        if beyond:
            fewest = self.keep(PRICE_MAX, allowed).missed
            feasible = allowed.holds(fewest)
            if not feasible:
                allowed = allowed.or_these(fewest)
                self.keep(PRICE_MAX, allowed)
        self.coarse = COARSE
        _, high = self.bisect(PRICE_MIN, PRICE_MAX, allowed)
        self.coarse = 1
        step = PRICE_STEP
        while not self.holds(high, allowed) and high < PRICE_MAX:
            high, step = min(high * step, PRICE_MAX), step * step
        low, step = high / PRICE_STEP, PRICE_STEP
        while low > PRICE_MIN and self.holds(low, allowed):
            step *= step
            low, high = low / step, low
        self.bisect(low, high, allowed)
        return allowed, feasible


def solve_prefill_oracle(
    plant: Plant,
    trace: Trace,
    attainment: float | None = None,
    member: int | None = None,
    cell_s: float = CELL_S,
    clock_step_mhz: float | None = None,
    margin: float = MARGIN,
) -> PrefillOracle:
    """Solve for the hindsight optimum of a workload.

    Args:
        plant: a prefill plant; ``drain`` decides whether it runs on after the end, delay and
            decision interval are ignored.
        trace: the workload.
        attainment: fraction of requests that must meet the SLO at least energy; None minimises the
            environment's objective with the plant's ``violation_weight``.
        member: ensemble member, None that of the plant.
        cell_s: width of the time cells, s; must be less than the shortest batch. A plan that needs
            too many labels doubles it for itself.
        clock_step_mhz: clock grid of the plan; None is every supported clock.
        margin: of pruning plans, reference energies; see the module's paragraph.
    """
    begin = time.perf_counter()
    problem = PrefillProblem(plant, trace, member, clock_step_mhz)
    search = _Search(problem, cell_s, margin)
    allowed, feasible = AllowedMisses.of(plant.slo, problem.pool, attainment), True
    if attainment is None:
        search.keep(plant.settings.violation_weight, allowed)
    else:
        allowed, feasible = search.constrain(allowed)
    assert search.best is not None  # some plan is always allowed
    price, done, plan = search.best
    ref = plant.energy_ref_j
    allowed = allowed.exactly(done.missed) if attainment is None else allowed
    upper = (done.energy_j - problem.energy_before_j) / ref + price * allowed.weigh(done.missed)
    lower = search.bound(records.CELLS, price)
    lower_any = search.bound(records.CELLS_ANY_DELAY, price)
    energy, energy_any = (
        (x - price * allowed.weighted) * ref + problem.energy_before_j for x in (lower, lower_any)
    )
    return PrefillOracle(
        plan_mhz=plan,
        replay=done,
        price=price,
        upper_bound=upper,
        lower_bound=lower,
        lower_bound_any_delay=lower_any,
        energy_bound_j=energy,
        energy_bound_any_delay_j=energy_any,
        violations_allowed=allowed.total,
        feasible=feasible,
        gap=upper / lower - 1.0,
        duality_gap=done.energy_j / energy - 1.0,
        cell_s=search.cell_s,
        bound_pruned=search.pruned,
        dropped=search.dropped,
        programmes=search.programmes,
        seconds=time.perf_counter() - begin,
    )
