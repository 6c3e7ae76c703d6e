"""Plans of a decode instance, and runs of one workload under many of them.

A plan is a rule per time window, with the workload known: a clock while fewer than ``crowd``
requests run, another from then on, raised until the iteration takes at most a target time. One
clock, two clocks, one iteration time and a clock per window are special cases.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant
from biscale_env.models import COEFFICIENT_DTYPE
from biscale_env.sim.decode import running_of
from biscale_env.traces import Trace
from controllers.oracle.allowed_misses import AllowedMisses, missed_by_class
from controllers.oracle.decode_kernels import PlanArrays, decode_planned
from controllers.oracle.plan_replay import member_of, oracle_plant

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
NO_CROWD = 1  # all that run are a crowd: one clock


@dataclass(frozen=True)
class WindowPlan:
    """A rule per time window.

    Attributes:
        quiet: clock of each window while fewer than ``crowd`` requests run, index into the grid.
        busy: clock from then on, likewise.
        target_s: the clock is raised until an iteration takes at most this, s; infinite: never.
        crowd: requests.
        window_s: length of a window, s; the last one stays.
    """

    quiet: Ints
    busy: Ints
    target_s: Floats
    crowd: int = NO_CROWD
    window_s: float = np.inf

    @classmethod
    def single(
        cls, quiet: int, busy: int | None = None, target_s: float = np.inf, crowd: int = NO_CROWD
    ) -> "WindowPlan":
        """The same rule all the time."""
        both = np.array([quiet]), np.array([quiet if busy is None else busy])
        return cls(*both, np.array([target_s]), crowd)

    def spread(self, window_s: float, horizon_s: float) -> "WindowPlan":
        """The same plan with windows of another length, which a longer one is a multiple of."""
        n = max(int(np.ceil(horizon_s / window_s)), 1)
        old = np.minimum(
            (np.arange(n) * (window_s / self.window_s)).astype(int), len(self.target_s) - 1
        )
        return replace(
            self,
            quiet=self.quiet[old],
            busy=self.busy[old],
            target_s=self.target_s[old],
            window_s=window_s,
        )

    def where(self, chosen: NDArray[np.bool_], other: "WindowPlan") -> "WindowPlan":
        """The other plan's rule in the chosen windows, this one's elsewhere."""
        return replace(
            self,
            quiet=np.where(chosen, other.quiet, self.quiet),
            busy=np.where(chosen, other.busy, self.busy),
            target_s=np.where(chosen, other.target_s, self.target_s),
        )

    def differs(self, other: "WindowPlan") -> NDArray[np.bool_]:
        """Windows whose rules differ."""
        return (
            (self.quiet != other.quiet)
            | (self.busy != other.busy)
            | (self.target_s != other.target_s)
        )


@dataclass(frozen=True)
class PlanRun:
    """A run under a plan.

    Attributes:
        energy_j: energy of the whole run, J.
        violations: requests that missed the SLO.
        missed: how many of each SLO class; one number where there is one bound for all.
        weight: what the misses weigh together; their number where there is one bound for all.
        window_j: energy by window, J.
        window_missed: SLO-violating requests by window of arrival, each with its weight.
    """

    energy_j: float
    violations: int
    missed: Ints
    weight: float
    window_j: Floats
    window_missed: Ints | Floats

    def cost(self, ref_j: float, price: float) -> float:
        """Cost in reference energies."""
        return self.energy_j / ref_j + price * self.weight

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
        self.grid_ghz = plant.clocks.grid_mhz / 1e3
        self.everything = AllowedMisses.of(plant.slo, self.batch.pool, None)
        self.horizon_s = max(trace.duration_s, 1e-9)
        self.runs = 0

    def run(self, plan: WindowPlan, clocks_ghz: Floats | None = None) -> tuple[PlanRun, int]:
        """Run a plan; the clocks of the decisions go into ``clocks_ghz``.

        Returns the run and its number of decisions.
        """
        b, pool, n = self.batch, self.batch.pool, len(plan.target_s)
        b.finish_s[:] = np.nan
        self.runs += 1
        arrays = PlanArrays(
            np.ascontiguousarray(plan.quiet, dtype=np.int64),
            np.ascontiguousarray(plan.busy, dtype=np.int64),
            np.ascontiguousarray(plan.target_s, dtype=np.float64),
            int(plan.crowd),
            float(plan.window_s),
            self.grid_ghz,
            np.zeros(n),
            np.zeros(0) if clocks_ghz is None else clocks_ghz,
        )
        running = running_of(b.running, 0)
        decisions = decode_planned(
            b.states[0], self.coefs, self.params, pool.requests, b.times, running, arrays
        )
        missed, of_class = missed_by_class(self.plant.slo, "decode", pool, b.finish_s)
        window = np.minimum((pool.arrival_s / plan.window_s).astype(np.int64), n - 1)
        weights = (
            self.everything.weights[pool.slo_class[missed]] if self.plant.slo.classes else None
        )
        by_window = np.bincount(window[missed], weights, minlength=n)
        state = b.states[0]
        found = PlanRun(
            float(state["energy_j"]),
            int(state["violations"]),
            of_class,
            self.everything.weigh(of_class),
            arrays.window_j,
            by_window,
        )
        return found, int(decisions)

    def clocks_mhz(self, plan: WindowPlan) -> Floats:
        """Clock of every decision under a plan, MHz."""
        _, decisions = self.run(plan)
        clocks_ghz = np.zeros(decisions)
        self.run(plan, clocks_ghz)
        return clocks_ghz * 1e3
