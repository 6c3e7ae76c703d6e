"""The best offline search for a decode instance.

It gives the best plan found, with the workload known; a search, not an optimum: it shows that a
cost can be reached. :mod:`controllers.oracle.decode_bound` says what cannot be beaten.

*Starts* (:mod:`controllers.oracle.decode_starts`): the best plans of one rule for the whole run,
among them every single clock, two clocks by the number of running requests, and iterations of one
length, which is what the energy of a decode instance is about (the slower it iterates, the more
requests share an iteration, and the SLO bounds how slow it may be).

*Descent*: windows are halved again and again, and at each width the rules of every k-th window are
moved at once, each window being judged by what happens up to the next one that moves (energy of the
steps, and requests that arrive there and violate the SLO). The windows that gained keep their
moves, if the whole run agrees. The result depends on the number of runs allowed, never on wall
time.

With an attainment asked for, an SLO violation has a penalty (price) that is raised while there are
too many and lowered while there are few enough; the plan that meets the attainment at least energy
is kept.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from biscale_env.envs.plant import Plant
from biscale_env.traces import Trace
from controllers.oracle.allowed_misses import AllowedMisses
from controllers.oracle.decode_plans import DecodeRunner, Floats, Ints, PlanRun, WindowPlan
from controllers.oracle.decode_starts import best_starts

# assumed: how long the consequences of a move are felt; moving windows are at least this far apart
REACH_S = 60.0
CLOCK_MOVES = (-8, 8, -3, 3, -1, 1)  # steps of the grid
TARGET_MOVES = (0.85, 1.18, 0.95, 1.05, 0.98, 1.02)  # factors
FIRST_WINDOW_S, LAST_WINDOW_S = 30.0, 3.0
STALE = 1e-4  # relative gain of a sweep below which the windows are halved
# runs, and requests served in all of them: half a minute at most; twice as many gain 0.1 to 0.2 %
MAX_RUNS, MAX_SERVED = 1500, 120_000_000
LEAST_RUNS = 500  # however large the workload
# the better half, quarter, ... of the windows that gained is tried when all together do not gain
MOVE_ATTEMPTS = 4
PRICE_UP, PRICE_DOWN = 1.2, 0.9  # after each kind of move
Move = Callable[[WindowPlan], WindowPlan]


@dataclass(frozen=True)
class DecodePlan:
    """The best plan found.

    Attributes:
        plan: the rule per window.
        clocks_mhz: clock of every decision, MHz: what
            :class:`controllers.oracle.plan_replay.OraclePolicy` repeats.
        energy_j: energy of the run, J.
        violations: requests that completed too late.
        missed: violations of each SLO class; one number where there is one bound for all.
        violations_allowed: violations that the attainment asked for allows; all requests without
            one.
        allowed: the same of each class.
        attainment: fraction of all requests within the SLO.
        cost: energy in reference energies plus ``price`` per violation.
        price: the plant's ``violation_weight``, or the last price of a search for an attainment.
        feasible: whether the attainment asked for is met (True without one).
        static_mhz: the best single clock.
        static_j: its energy, J.
        runs: runs of the simulator.
        seconds: wall time.
    """

    plan: WindowPlan
    clocks_mhz: Floats
    energy_j: float
    violations: int
    missed: Ints
    violations_allowed: int
    allowed: AllowedMisses
    attainment: float
    cost: float
    price: float
    feasible: bool
    static_mhz: float
    static_j: float
    runs: int
    seconds: float


class _Descent:
    """Coordinate descent over the rules of the windows."""

    def __init__(
        self, runner: DecodeRunner, price: float, allowed: AllowedMisses | None, max_runs: int
    ) -> None:
        self.runner, self.price, self.allowed, self.max_runs = runner, price, allowed, max_runs
        self.ref_j, self.spent = runner.plant.energy_ref_j, False
        starts = best_starts(runner, self.rank, max_runs)
        static_run, static = starts.static
        self.static_j = static_run.energy_j
        self.static_mhz = float(runner.plant.clocks.grid_mhz[static.busy[0]])
        run, start = starts.best
        if allowed is not None:
            self.price = run.energy_j / self.ref_j / max(len(runner.batch.pool.prompt), 1)
        self.best = (run, start)
        self.begin(start.spread(FIRST_WINDOW_S, runner.horizon_s))

    def begin(self, plan: WindowPlan) -> None:
        """Go on from a plan."""
        self.plan = plan
        self.now, _ = self.runner.run(plan)

    def rank(self, run: PlanRun) -> tuple[float, float]:
        """Order of preference of the answer: misses beyond what is allowed, then energy.

        Without a constraint the cost.
        """
        if self.allowed is None:
            return 0.0, run.cost(self.ref_j, self.price)
        return self.allowed.beyond(run.missed), run.energy_j

    def cost(self, run: PlanRun) -> float:
        return run.cost(self.ref_j, self.price)

    def moves(self) -> list[Move]:
        """Changes of a whole plan, of which some windows are then taken."""
        top = len(self.runner.grid_ghz) - 1

        def clock(steps: int, plan: WindowPlan) -> WindowPlan:
            quiet, busy = (np.clip(k + steps, 0, top) for k in (plan.quiet, plan.busy))
            return replace(plan, quiet=quiet, busy=busy)

        def target(factor: float, plan: WindowPlan) -> WindowPlan:
            return replace(plan, target_s=plan.target_s * factor)

        made: list[Move] = [partial(clock, steps) for steps in CLOCK_MOVES]
        if np.isfinite(self.plan.target_s).any():
            made = [*(partial(target, factor) for factor in TARGET_MOVES), *made]
        return made

    def accept(self, plan: WindowPlan) -> bool:
        """Take a plan if the whole run gains."""
        run, _ = self.runner.run(plan)
        if self.rank(run) < self.rank(self.best[0]):
            self.best = (run, plan)
        if self.cost(run) >= self.cost(self.now):
            return False
        self.now, self.plan = run, plan
        return True

    def try_move(self, move: Move, offset: int, spacing: int) -> None:
        """Move every ``spacing``-th window; keep the moves that gain."""
        moved = move(self.plan)
        chosen = np.zeros(len(self.plan.target_s), dtype=bool)
        chosen[offset::spacing] = True
        chosen &= moved.differs(self.plan)
        if not chosen.any():
            return
        run, _ = self.runner.run(self.plan.where(chosen, moved))
        gain = self.now.local(self.ref_j, self.price, spacing) - run.local(
            self.ref_j, self.price, spacing
        )
        order = np.flatnonzero(chosen & (gain > 0.0))
        order = order[np.argsort(-gain[order], kind="stable")]
        for attempt in range(MOVE_ATTEMPTS):
            keep = np.zeros(len(chosen), dtype=bool)
            keep[order[: int(np.ceil(len(order) / 2**attempt))]] = True
            if not keep.any() or self.accept(self.plan.where(keep, moved)) or keep.sum() == 1:
                return

    def sweep(self) -> float:
        """All moves of all windows once; returns the relative gain."""
        price, before = self.price, self.now
        n, window_s = len(self.plan.target_s), self.plan.window_s
        spacing = min(max(4, int(np.ceil(REACH_S / window_s))), n)
        for move in self.moves():
            for offset in range(spacing):
                if self.runner.runs + 1 + MOVE_ATTEMPTS > self.max_runs:
                    self.spent = True
                    return 0.0
                self.try_move(move, offset, spacing)
            self.reprice()
        return 1.0 - self.now.cost(self.ref_j, price) / before.cost(self.ref_j, price)

    def reprice(self) -> None:
        """Raise the penalty while too many requests violate the SLO, else lower it."""
        if self.allowed is not None:
            is_held = self.allowed.holds(self.now.missed)
            self.price *= PRICE_DOWN if is_held else PRICE_UP

    def halve(self) -> None:
        """Go on from the best plan with windows of half the length."""
        self.begin(self.best[1].spread(0.5 * self.plan.window_s, self.runner.horizon_s))

    def solve(self) -> None:
        """Sweep and halve until the windows are short or the runs are used up."""
        while not self.spent:
            gain = self.sweep()
            if gain < STALE:
                if 0.5 * self.plan.window_s < LAST_WINDOW_S:
                    return
                self.halve()


def search_decode_plan(
    plant: Plant,
    trace: Trace,
    attainment: float | None = None,
    member: int | None = None,
    max_runs: int | None = None,
) -> DecodePlan:
    """Search for a good plan.

    Args:
        plant: a decode plant; its delay and decision interval are ignored, ``drain`` is not.
        trace: the workload.
        attainment: fraction of requests that must meet the SLO at least energy; None minimises the
            environment's objective.
        member: ensemble member, None that of the plant.
        max_runs: runs of the simulator that may be spent (ten minutes at 30 requests/s take 4 ms
            each); None: 1500, fewer for large workloads.

    Raises:
        BiscaleError: a prefill plant.
    """
    begin = time.perf_counter()
    runner = DecodeRunner(plant, trace, member)
    n = len(runner.batch.pool.prompt)
    most = AllowedMisses.of(plant.slo, runner.batch.pool, attainment)
    allowed = None if attainment is None else most
    if max_runs is None:
        max_runs = max(min(MAX_RUNS, MAX_SERVED // n), LEAST_RUNS)
    descent = _Descent(runner, plant.settings.violation_weight, allowed, max_runs)
    descent.solve()
    run, plan = descent.best
    clocks_mhz = runner.clocks_mhz(plan)
    pool = runner.batch.pool
    latency = (runner.batch.finish_s - pool.arrival_s) / (pool.output - 1)
    return DecodePlan(
        plan=plan,
        clocks_mhz=clocks_mhz,
        energy_j=run.energy_j,
        violations=run.violations,
        missed=run.missed,
        violations_allowed=most.total,
        allowed=most,
        attainment=plant.slo.attained(latency, "decode", pool.slo_class),
        cost=descent.cost(run),
        price=descent.price,
        feasible=most.holds(run.missed),
        static_mhz=descent.static_mhz,
        static_j=descent.static_j,
        runs=runner.runs,
        seconds=time.perf_counter() - begin,
    )
