"""A prefill controller that knows the arrivals of the next seconds, and nothing beyond.

At every decision of the simulator, actuation delay and all, the programme of
:mod:`controllers.oracle.prefill_kernels` is solved for what waits and what arrives within the
horizon; the first clock of its plan is asked for, and the next decision solves anew. With a horizon
of 0 it knows what every controller knows; as the horizon grows it becomes the hindsight optimum.
What follows the known requests is taken for an empty instance until ``1 / rate`` after the horizon,
at the workload's mean rate: a second beyond that is worth the least power of a waiting instance,
which is paid at any time.

What it is not: a bound on all policies with that foresight. It is the best that plans without a
model of what comes after the horizon; at short horizons a policy that has learned what to expect
may do better. Its free parameters (:class:`PlanWeights`) are chosen with hindsight, per workload.

In its plans a change takes the delay from every batch start, and what is left of it when a batch
ends first is forgotten; time and clocks are on a coarse grid, and the cheapest label of a cell goes
on. So it is feasible and nearly optimal, not optimal: the simulator says what it costs.
"""

import time
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch
from biscale_env.envs.plant import Plant
from biscale_env.traces import Trace
from controllers.base import Amount
from controllers.oracle import prefill_records as records
from controllers.oracle.plan_replay import ROW, OraclePolicy, PlanReplay
from controllers.oracle.prefill_kernels import prefill_oracle
from controllers.oracle.prefill_problem import PrefillProblem, trace_back

Floats = NDArray[np.float64]
CELL_S = 0.01
CLOCK_STEP_MHZ = 90.0
MARGIN = 0.5  # of pruning, reference energies
WINDOW_S, SLOTS, MOST_LABELS = 4.0, 256, 2_000_000


@dataclass(frozen=True)
class PlanWeights:
    """How a plan weighs lateness.

    Attributes:
        price: penalty of a request that completes after its bound, reference energies.
        reserve: fraction of the bound; completing within it of the bound costs ``price`` as well,
            once more: room for arrivals that are not known yet.
    """

    price: float
    reserve: float


PRICES: Final = (3.0, 12.0)
RESERVES: Final = (0.0, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75)


class LookaheadPlanner:
    """Plans from any state of a prefill instance with the next seconds known."""

    def __init__(
        self,
        plant: Plant,
        trace: Trace,
        seconds: float,
        member: int | None = None,
        cell_s: float = CELL_S,
        clock_step_mhz: float | None = CLOCK_STEP_MHZ,
        window_s: float = WINDOW_S,
        slots: int = SLOTS,
        *,
        share: "LookaheadPlanner | None" = None,
    ) -> None:
        """Prepare arrays that every plan uses again.

        Args:
            plant: a prefill plant; its delay counts.
            trace: the workload.
            seconds: horizon, s; infinite for all of it.
            member: ensemble member, None that of the plant.
            cell_s: width of the time cells, s.
            clock_step_mhz: clock grid of plans, None for every supported clock.
            window_s: a batch may start this long after the earliest possible time of its position.
            slots: positions that may be open at a time.
            share: another planner whose labels are written over; not both at once.

        Raises:
            BiscaleError: a decode plant, or a negative horizon.
        """
        if not seconds >= 0.0:
            raise BiscaleError(f"lookahead: seconds must not be below 0, got {seconds:g}")
        problem = PrefillProblem(plant, trace, member, clock_step_mhz)
        self.problem, self.plant, self.seconds = problem, plant, seconds
        self.cell_s, self.pool, self.grid_ghz = cell_s, problem.pool, problem.plan_grid_ghz
        self.duration_s = trace.duration_s
        self.gap_s = trace.duration_s / len(trace.arrival_s)
        self.params = problem.params.copy()
        self.params["delay_s"] = plant.delay_s(problem.member)
        delayed = float(self.params["delay_s"]) > 0.0
        self.clocks = len(self.grid_ghz) if delayed else 1
        width = int(np.ceil(window_s / cell_s)) * self.clocks
        self._cells = np.zeros((slots, width), records.CELL_DTYPE)
        labels = MOST_LABELS if np.isfinite(seconds) else 8 * MOST_LABELS
        self._labels: NDArray[Any] = (
            share._labels
            if share is not None and len(share._labels) >= labels
            else np.empty(labels, records.LABEL_DTYPE)
        )
        options = np.zeros(len(self.grid_ghz) + 1, records.OPTION_DTYPE)
        hull = np.zeros(len(self.grid_ghz), records.OPTION_DTYPE)
        batch = np.zeros(8, dtype=np.int64)
        self._scratch = records.Scratch(self.grid_ghz, hull, options, batch)
        self.failures, self.margin = 0, MARGIN

    def plan(self, state: Any, weights: PlanWeights) -> Floats:
        """Clocks of the next batches, MHz; empty when no plan fits the arrays.

        Args:
            state: record of the instance, a batch about to start.
            weights: of lateness.
        """
        workload = self._known(state)
        run = self._run(weights)
        labels = self._start(state, run, len(workload.arrival_s))
        prefill_oracle(run[()], workload, labels, self._scratch, self._labels)
        if run["status"] != records.OK or not np.isfinite(run["best_cost"]):
            self._cells[:] = np.zeros((), records.CELL_DTYPE)
            self.failures += 1
            return np.empty(0)
        return trace_back(run, self._labels, self.grid_ghz)

    def _known(self, state: Any) -> records.PlannedWorkload:
        """What waits and what arrives within the horizon, as a workload that begins now."""
        now, head, done = float(state["time_s"]), int(state["head"]), int(state["head_done"])
        arrivals = self.pool.arrival_s
        last = max(int(np.searchsorted(arrivals, now + self.seconds, "right")), int(state["tail"]))
        arrival_s = arrivals[head:last]
        prompt = self.pool.prompt[head:last].copy()
        prefix = self.pool.prefix[head:last].copy()
        prompt[0] -= done
        prefix[0] += done
        if last < len(arrivals):
            self.params["end_s"] = min(now + self.seconds + self.gap_s, self.duration_s)
            self.params["drain"] = 1
        else:
            self.params["end_s"] = self.duration_s
            self.params["drain"] = self.plant.settings.drain
        work_s = self.problem.s_per_token * prompt[:-1].astype(np.float64)
        behind = np.concatenate([[0.0], np.cumsum(work_s)])
        ready = np.maximum(arrival_s, now)
        earliest = behind[1:] + np.maximum.accumulate(ready[:-1] - behind[:-1])
        return records.PlannedWorkload(
            c=self.problem.coefs,
            p=self.params[()],
            arrival_s=arrival_s,
            prompt=prompt,
            prefix=prefix,
            slo_class=self.pool.requests.slo_class[head:last],
            earliest_s=np.concatenate([[now], earliest]),
            s_per_token=self.problem.s_per_token,
        )

    def _run(self, weights: PlanWeights) -> NDArray[Any]:
        run = np.zeros((), records.RUN_DTYPE)
        run["mode"], run["cell_s"], run["margin"] = records.EXACT, self.cell_s, self.margin
        run["price"] = weights.price
        run["early_price"] = weights.price if weights.reserve > 0.0 else 0.0
        run["early_share"] = 1.0 - weights.reserve
        run["clocks"], run["floor_w"] = self.clocks, self.problem.floor_w
        run["beyond_w"] = self.problem.floor_w
        run["most_expanded"], run["best_cost"] = np.iinfo(np.int64).max, np.inf
        return run

    def _start(self, state: Any, run: NDArray[Any], known: int) -> records.OpenLabels:
        """One label: now, at the clock that is in effect next."""
        slots = np.zeros(len(self._cells), records.SLOT_DTYPE)
        slots["next"] = np.append(np.arange(1, len(slots)), -1)
        flying = np.isfinite(state["apply_at_s"])
        ghz = float(state["inflight_ghz"] if flying else state["freq_ghz"])
        clock = int(np.abs(self.grid_ghz - ghz).argmin())
        now = float(state["time_s"])
        cell = self.clocks + (clock if self.clocks > 1 else 0)
        slots[0] = (0, 0, int(np.floor(now / self.cell_s)) - 1, cell, cell, -1)
        # no cost of 0, which marks an empty cell
        self._cells[0, cell] = (1e-12, now, float(state["ramp_until_s"]), -1, clock)
        run["free_slot"] = 1
        first = np.full(known, -1)
        first[0] = 0
        idle = np.full(known, np.array((np.inf, -1, 0), dtype=records.IDLE_DTYPE))
        return records.OpenLabels(slots, first, self._cells, idle)


@dataclass(frozen=True)
class Lookahead:
    """What a run with foresight did.

    Attributes:
        plan_mhz: clocks it asked for, one per decision of the delayed plant.
        replay: its energy and violations in that plant.
        weights: of its plans.
        feasible: whether the required attainment was met.
        failures: decisions without a plan, at which max clock was asked for.
        runs: how many settings were run.
        seconds: wall time.
    """

    plan_mhz: Floats
    replay: PlanReplay
    weights: PlanWeights
    feasible: bool
    failures: int
    runs: int
    seconds: float


def run_lookahead(planner: LookaheadPlanner, weights: PlanWeights) -> tuple[Floats, PlanReplay]:
    """Run the workload in the plant itself, with a new plan at every decision.

    Returns:
        The clocks asked for, MHz, and what they cost.
    """
    plant = planner.plant
    batch = Batch(plant, 1, planner.pool, record=True)
    batch.reset(ROW, ROW, np.array([planner.problem.member]))
    asked: list[float] = []
    cost = 0.0
    while not batch.done[0]:
        plan = planner.plan(batch.states[0], weights)
        asked.append(float(plan[0]) if len(plan) else plant.clocks.freq_max_mhz)
        batch.step(plant.clocks.to_action(np.array(asked[-1:])))
        cost -= float(batch.reward[0])
    return np.array(asked), PlanReplay.of(batch, cost, len(asked))


class _Best:
    """The cheapest run that meets the attainment, or the one that comes nearest to it."""

    def __init__(self, planner: LookaheadPlanner, attainment: float | None) -> None:
        self.planner, self.attainment, self.runs = planner, attainment, 0
        self._best: tuple[tuple[bool, float], Lookahead] | None = None

    def met(self, weights: PlanWeights) -> bool:
        """Run a setting, remember it if it is better, say whether it meets the attainment."""
        self.runs, self.planner.failures = self.runs + 1, 0
        plan, done = run_lookahead(self.planner, weights)
        met = self.attainment is None or done.attainment >= self.attainment - 1e-9
        amount = done.cost if self.attainment is None else done.energy_j
        rank = (False, amount) if met else (True, -done.attainment)
        if self._best is None or rank < self._best[0]:
            made = Lookahead(plan, done, weights, met, self.planner.failures, 0, 0.0)
            self._best = rank, made
        return met

    def found(self, seconds: float) -> Lookahead:
        """The best so far, with the time that it all took."""
        assert self._best is not None
        return replace(self._best[1], runs=self.runs, seconds=seconds)


def search_lookahead(
    plant: Plant,
    trace: Trace,
    seconds: float,
    attainment: float | None = None,
    member: int | None = None,
) -> Lookahead:
    """The least energy with some seconds of foresight, weights chosen with hindsight.

    For each price the least reserve that meets the attainment is found by bisection.

    Args:
        plant: a prefill plant, delay and decision interval as they are.
        trace: the workload, as it will be run.
        seconds: horizon, s.
        attainment: fraction of requests that must meet the SLO; None minimises the environment's
            objective at the plant's own price.
        member: ensemble member, None that of the plant.

    Raises:
        BiscaleError: a decode plant, or a negative horizon.
    """
    begin = time.perf_counter()
    best = _Best(LookaheadPlanner(plant, trace, seconds, member), attainment)
    if attainment is None:
        for reserve in RESERVES:
            best.met(PlanWeights(plant.settings.violation_weight, reserve))
    else:
        for price in PRICES:
            weights = [PlanWeights(price, reserve) for reserve in RESERVES]
            bisect_left(weights, True, key=best.met)
    return best.found(time.perf_counter() - begin)


def make_lookahead(
    plant: Plant,
    trace: Trace,
    target_attainment: float | None = None,
    member: int | None = None,
    seconds: Amount = 0.5,
) -> tuple[OraclePolicy, dict[str, float]]:
    """Run a workload with some seconds of foresight, as a plan to be repeated in ``plant``.

    Returns:
        The policy, and a dictionary of floats: ``replay_j``, ``violations``, ``attainment``,
        ``feasible`` (1: the target is met), ``price`` and ``reserve`` of its plans, ``failures``
        (decisions without a plan), ``seconds`` (wall time).
    """
    found = search_lookahead(plant, trace, seconds, target_attainment, member)
    return OraclePolicy(plant.clocks, found.plan_mhz), {
        "replay_j": found.replay.energy_j,
        "violations": float(found.replay.violations),
        "attainment": found.replay.attainment,
        "feasible": float(found.feasible),
        "price": found.weights.price,
        "reserve": found.weights.reserve,
        "failures": float(found.failures),
        "seconds": found.seconds,
    }
