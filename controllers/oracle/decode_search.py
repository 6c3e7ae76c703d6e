"""The best offline search for a decode instance.

A clock per time window, improved by coordinate descent with the workload known.

A search, not an optimum: it only shows that a cost can be reached.
:mod:`controllers.oracle.decode_bound` says what cannot be beaten.

Start: the best single clock. Then windows are halved again and again, and at each width the clocks
of every k-th window are moved at once by the same number of steps, each window being judged by what
happens up to the next one that moves (energy of the steps, and requests that arrive there and
violate the SLO). The windows that gained keep their moves, if the whole run agrees. The result
depends on the number of runs allowed, never on wall time.

With an attainment asked for, an SLO violation has a penalty (price) that is raised while there are
too many and lowered while there are few enough; the plan that meets the attainment at least energy
is kept.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant
from biscale_env.models import COEFFICIENT_DTYPE
from biscale_env.sim.decode import running_of
from biscale_env.traces import Trace
from controllers.oracle.decode_kernels import WindowPlan, decode_windows
from controllers.oracle.plan_replay import member_of, oracle_plant

Floats = NDArray[np.float64]
# assumed: how long the consequences of a move are felt; moving windows are at least this far apart
REACH_S = 60.0
MOVES = (-8, 8, -3, 3, -1, 1)  # clock steps
FIRST_WINDOW_S, LAST_WINDOW_S = 120.0, 4.0
STALE = 1e-4  # relative gain of a sweep below which the windows are halved
MAX_RUNS = 1000
# the better half, quarter, ... of the windows that gained is tried when all together do not gain
MOVE_ATTEMPTS = 4
PRICE_UP, PRICE_DOWN = 1.5, 0.8


@dataclass(frozen=True)
class WindowRun:
    """A run under a clock per window.

    Attributes:
        energy_j: energy of the whole run, J.
        violations: requests that missed the SLO.
        window_j: energy by window, J.
        window_missed: SLO-violating requests by window of arrival.
    """

    energy_j: float
    violations: int
    window_j: Floats
    window_missed: NDArray[np.int64]

    def cost(self, ref_j: float, price: float) -> float:
        """Cost in reference energies."""
        return self.energy_j / ref_j + price * self.violations

    def local(self, ref_j: float, price: float, spacing: int) -> Floats:
        """Cost of each window together with the ones up to the next that moves."""
        total = np.concatenate(
            [[0.0], np.cumsum(self.window_j / ref_j + price * self.window_missed)]
        )
        end = np.minimum(np.arange(len(self.window_j)) + spacing, len(self.window_j))
        return np.asarray(total[end] - total[:-1])


class DecodeRunner:
    """One workload in one decode plant without delay, ready to be run under many plans."""

    def __init__(self, plant: Plant, trace: Trace, member: int | None = None) -> None:
        """Prepare arrays.

        Raises:
            BiscaleError: a prefill plant.
        """
        if plant.phase != "decode":
            raise BiscaleError(f"the decode search needs a decode plant, got {plant.phase}")
        self.plant = oracle_plant(plant)
        k = member_of(plant, member)
        self.batch = Batch(self.plant, 1, RequestTable.of(self.plant, [trace]), record=True)
        self.coefs = np.array(tuple(plant.model.member(k)), dtype=COEFFICIENT_DTYPE)[()]
        self.params = self.plant.params(k, trace.duration_s)[()]
        self.horizon_s = max(trace.duration_s, 1e-9)
        self.runs = 0

    def run(
        self, plan_mhz: Floats, window_s: float, clocks_ghz: Floats | None = None
    ) -> tuple[WindowRun, int]:
        """Run a plan; the clocks of the decisions go into ``clocks_ghz``.

        Returns the run and its number of decisions.
        """
        b, pool = self.batch, self.batch.pool
        b.finish_s[:] = np.nan
        energy = np.zeros(len(plan_mhz))
        self.runs += 1
        kept = np.zeros(0) if clocks_ghz is None else clocks_ghz
        top_ghz = float(self.params["freq_max_ghz"])
        plan = WindowPlan(plan_mhz / 1e3, float(window_s), energy, kept, top_ghz)
        run = running_of(b.running, 0)
        decisions = decode_windows(
            b.states[0], self.coefs, self.params, pool.requests, b.times, run, plan
        )
        missed = b.finish_s - pool.arrival_s > self.params["slo_s"] * (pool.output - 1)
        window = np.minimum((pool.arrival_s / window_s).astype(np.int64), len(plan_mhz) - 1)
        by_window = np.bincount(window[missed], minlength=len(plan_mhz))
        state = b.states[0]
        return WindowRun(
            float(state["energy_j"]), int(state["violations"]), energy, by_window
        ), int(decisions)

    def clocks(self, plan_mhz: Floats, window_s: float) -> Floats:
        """Clock of every decision under a plan, MHz."""
        _, decisions = self.run(plan_mhz, window_s)
        clocks_ghz = np.zeros(decisions)
        self.run(plan_mhz, window_s, clocks_ghz)
        return clocks_ghz * 1e3


@dataclass(frozen=True)
class DecodePlan:
    """The best plan found.

    Attributes:
        window_mhz: clock per window, MHz.
        window_s: length of a window, s.
        clocks_mhz: clock of every decision, MHz: what
            :class:`controllers.oracle.plan_replay.OraclePolicy` repeats.
        energy_j: energy of the run, J.
        violations: requests that completed too late.
        violations_allowed: violations that the attainment asked for allows; all requests without
            one.
        attainment: fraction of all requests within the SLO.
        cost: energy in reference energies plus ``price`` per violation.
        price: the plant's ``violation_weight``, or the last price of a search for an attainment.
        feasible: whether the attainment asked for is met (True without one).
        static_mhz: the best single clock, where the search began.
        static_j: its energy, J.
        runs: runs of the simulator.
        seconds: wall time.
    """

    window_mhz: Floats
    window_s: float
    clocks_mhz: Floats
    energy_j: float
    violations: int
    violations_allowed: int
    attainment: float
    cost: float
    price: float
    feasible: bool
    static_mhz: float
    static_j: float
    runs: int
    seconds: float


class _Descent:
    """Coordinate descent over the clocks of the windows."""

    def __init__(
        self, runner: DecodeRunner, price: float, allowed: int | None, max_runs: int
    ) -> None:
        self.runner, self.price, self.allowed, self.max_runs = runner, price, allowed, max_runs
        self.ref_j, self.grid = runner.plant.energy_ref_j, runner.plant.clocks.grid_mhz
        statics = [(runner.run(np.array([f]), np.inf)[0], float(f)) for f in self.grid]
        self.static, self.static_mhz = min(statics, key=lambda x: self.rank(x[0]))
        if allowed is not None:
            self.price = self.static.energy_j / self.ref_j / max(len(runner.batch.pool.prompt), 1)
        self.window_s = FIRST_WINDOW_S
        self.plan = np.full(max(int(np.ceil(runner.horizon_s / self.window_s)), 1), self.static_mhz)
        self.now, _ = runner.run(self.plan, self.window_s)
        self.best = (self.now, self.plan, self.window_s)

    def rank(self, run: WindowRun) -> tuple[int, float]:
        """Order of preference of the answer: misses beyond what is allowed, then energy.

        Without a constraint the cost.
        """
        if self.allowed is None:
            return 0, run.cost(self.ref_j, self.price)
        return max(run.violations - self.allowed, 0), run.energy_j

    def cost(self, run: WindowRun) -> float:
        return run.cost(self.ref_j, self.price)

    def accept(self, plan: Floats) -> bool:
        """Take a plan if the whole run gains."""
        run, _ = self.runner.run(plan, self.window_s)
        if self.rank(run) < self.rank(self.best[0]):
            self.best = (run, plan, self.window_s)
        if self.cost(run) >= self.cost(self.now):
            return False
        self.now, self.plan = run, plan
        return True

    def move(self, steps: int, offset: int, spacing: int) -> None:
        """Move every ``spacing``-th window; keep the moves that gain."""
        span = self.runner.plant.clocks
        moved = np.clip(self.plan + steps * span.freq_step_mhz, self.grid[0], self.grid[-1])
        chosen = np.zeros(len(self.plan), dtype=bool)
        chosen[offset::spacing] = True
        chosen &= moved != self.plan
        if not chosen.any():
            return
        run, _ = self.runner.run(np.where(chosen, moved, self.plan), self.window_s)
        gain = self.now.local(self.ref_j, self.price, spacing) - run.local(
            self.ref_j, self.price, spacing
        )
        order = np.flatnonzero(chosen & (gain > 0.0))
        order = order[np.argsort(-gain[order], kind="stable")]
        for attempt in range(MOVE_ATTEMPTS):
            keep = order[: int(np.ceil(len(order) / 2**attempt))]
            plan = self.plan.copy()
            plan[keep] = moved[keep]
            if not len(keep) or self.accept(plan) or len(keep) == 1:
                return

    def sweep(self) -> float:
        """All moves of all windows once; returns the relative gain."""
        before = self.cost(self.now)
        spacing = min(max(4, int(np.ceil(REACH_S / self.window_s))), len(self.plan))
        for steps in MOVES:
            for offset in range(spacing):
                if self.runner.runs >= self.max_runs:
                    return 0.0
                self.move(steps, offset, spacing)
        return 1.0 - self.cost(self.now) / before

    def reprice(self) -> None:
        """Raise the penalty while too many requests violate the SLO, else lower it."""
        if self.allowed is not None:
            self.price *= PRICE_UP if self.now.violations > self.allowed else PRICE_DOWN

    def halve(self) -> None:
        """Go on from the best plan with windows of half the length."""
        _, plan, window_s = self.best
        while window_s > 0.6 * self.window_s:
            plan, window_s = np.repeat(plan, 2), 0.5 * window_s
        self.window_s = window_s
        self.plan = plan[: max(int(np.ceil(self.runner.horizon_s / window_s)), 1)]
        self.now, _ = self.runner.run(self.plan, window_s)

    def solve(self) -> None:
        """Sweep and halve until the windows are short or the runs are used up."""
        while self.runner.runs < self.max_runs:
            gain = self.sweep()
            self.reprice()
            if gain < STALE:
                if 0.5 * self.window_s < LAST_WINDOW_S:
                    return
                self.halve()


def search_decode_plan(
    plant: Plant,
    trace: Trace,
    attainment: float | None = None,
    member: int | None = None,
    max_runs: int = MAX_RUNS,
) -> DecodePlan:
    """Search for a good plan.

    Args:
        plant: a decode plant; its delay and decision interval are ignored, ``drain`` is not.
        trace: the workload.
        attainment: fraction of requests that must meet the SLO at least energy; None minimises the
            environment's objective.
        member: ensemble member, None that of the plant.
        max_runs: runs of the simulator that may be spent (an hour at 25 requests/s takes 25 ms
            each).
    """
    begin = time.perf_counter()
    runner = DecodeRunner(plant, trace, member)
    n = len(runner.batch.pool.prompt)
    allowed = None if attainment is None else int(np.floor((1.0 - attainment) * n + 1e-9))
    descent = _Descent(runner, plant.settings.violation_weight, allowed, max_runs)
    descent.solve()
    run, plan, window_s = descent.best
    clocks = runner.clocks(plan, window_s)
    latency = (runner.batch.finish_s - runner.batch.pool.arrival_s) / (runner.batch.pool.output - 1)
    return DecodePlan(
        window_mhz=plan,
        window_s=window_s,
        clocks_mhz=clocks,
        energy_j=run.energy_j,
        violations=run.violations,
        violations_allowed=n if allowed is None else allowed,
        attainment=plant.slo.attained(latency, "decode"),
        cost=descent.cost(run),
        price=descent.price,
        feasible=allowed is None or run.violations <= allowed,
        static_mhz=descent.static_mhz,
        static_j=descent.static.energy_j,
        runs=runner.runs,
        seconds=time.perf_counter() - begin,
    )
