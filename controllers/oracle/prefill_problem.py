"""One workload in one plant, made ready for the prefill oracle's dynamic programme."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import RequestTable
from biscale_env.envs.plant import Plant
from biscale_env.models import COEFFICIENT_DTYPE
from biscale_env.models.physics import latency_s
from biscale_env.traces import Trace
from controllers.oracle import prefill_records as records
from controllers.oracle.plan_replay import member_of, oracle_plant
from controllers.oracle.prefill_kernels import prefill_oracle

WINDOW_CELLS = 4096
MOST_WINDOW_CELLS = 65_536
# labels of a bounding programme: about 10 s, ten times what the busiest evaluation workload needs
MOST_EXPANDED = 4_000_000
SLOTS = 4096
# beyond, the cells of that programme are doubled: an overloaded hour would take minutes
MAX_LABELS = 8_000_000


class PrefillProblem:
    """One workload in one plant, prepared for the dynamic programme."""

    def __init__(
        self,
        plant: Plant,
        trace: Trace,
        member: int | None = None,
        clock_step_mhz: float | None = None,
        slots: int = SLOTS,
        window_cells: int = WINDOW_CELLS,
    ) -> None:
        """Prepare arrays.

        Args:
            plant: a prefill plant; its delay and decision interval are ignored.
            trace: the workload.
            member: ensemble member, None that of the plant.
            clock_step_mhz: coarser clock grid for plans, a multiple of the GPU's step; None uses
                every supported clock. Bounds always use every clock.
            slots: positions that may be open at a time.
            window_cells: a batch may start this many cells after the earliest possible time of its
                position.

        Raises:
            BiscaleError: a decode plant.
        """
        self.slots, self.window_cells = slots, window_cells
        if plant.phase != "prefill":
            raise BiscaleError(f"the prefill oracle needs a prefill plant, got {plant.phase}")
        self.plant, self.trace = oracle_plant(plant), trace
        self.member = member_of(plant, member)
        self.pool = RequestTable.of(self.plant, [trace])
        coefficients = plant.model.member(self.member)
        self.coefs: Any = np.array(tuple(coefficients), dtype=COEFFICIENT_DTYPE)[()]
        self.params = self.plant.params(self.member, trace.duration_s)[()]
        self.grid_ghz = plant.clocks.grid_mhz / 1e3
        stride = (
            1
            if clock_step_mhz is None
            else max(round(clock_step_mhz / plant.clocks.freq_step_mhz), 1)
        )
        self.plan_grid_ghz = np.ascontiguousarray(self.grid_ghz[::-1][::stride][::-1])
        tokens = np.arange(1.0, float(self.params["token_budget"]) + 1.0)
        fastest = (
            latency_s(coefficients, tokens, 0.0, 0.0, 1.0, self.params["freq_max_ghz"]) / tokens
        )
        self.s_per_token = float(
            fastest.min()
        )  # no batch is faster: attention, requests and the cap only add
        longest = tokens[-1] * float((self.pool.prompt + self.pool.prefix).max())
        low_ghz, most = self.params["freq_min_ghz"], self.params["max_seqs"]
        self.slowest_s = float(latency_s(coefficients, tokens[-1], longest, 0.0, most, low_ghz))
        shortest_s = float(latency_s(coefficients, 1.0, 0.0, 0.0, 1.0, low_ghz))
        self.long_ramp = bool(self.params["parked"] and self.params["parked_ramp_s"] > shortest_s)
        lowest_mhz, highest_mhz = plant.clocks.freq_min_mhz, plant.clocks.freq_max_mhz
        floor_w = plant.waiting_power_w(self.member, lowest_mhz)
        self.floor_w = floor_w / plant.energy_ref_j
        start_w = plant.waiting_power_w(self.member, highest_mhz)
        self.energy_before_j = start_w * float(self.pool.arrival_s[0])
        self.earliest_s = self._earliest()
        self._cells: NDArray[Any] | None = None

    def _earliest(self) -> NDArray[np.float64]:
        """Lower bound on when all requests before r can be complete.

        A server without batching losses at the highest clock.
        """
        earliest, now = np.zeros(len(self.pool.prompt)), 0.0
        for r, (arrival, prompt) in enumerate(
            zip(self.pool.arrival_s[:-1], self.pool.prompt[:-1], strict=True)
        ):
            now = max(now, float(arrival)) + self.s_per_token * float(prompt)
            earliest[r + 1] = now
        return earliest

    def widen(self) -> bool:
        """Give every position a window four times as wide for the next programmes.

        False when it has the widest already.
        """
        if self.window_cells >= MOST_WINDOW_CELLS:
            return False
        self.window_cells, self._cells = min(4 * self.window_cells, MOST_WINDOW_CELLS), None
        return True

    def run(
        self, mode: int, price: float, cell_s: float, margin: float, stride: int = 1
    ) -> tuple[Any, NDArray[np.float64]]:
        """One dynamic programme: ``(run record, plan in MHz)``.

        The plan is empty in the bounding modes.

        Args:
            mode: ``EXACT`` or one of the bounds. Where a ramp may outlast a batch, the bound
                without delay, which does not follow what is left of it, becomes that for every
                delay.
            price: cost of a violation, reference energies.
            cell_s: width of the time cells, s.
            margin: pruning, reference energies; infinite for none, and then a bound gives up on a
                workload that is far too much.
            stride: plan with every so-many-th clock of the plan's grid, counted from the highest.
        """
        if mode == records.CELLS and self.long_ramp:
            mode = records.CELLS_ANY_DELAY
        n = len(self.pool.prompt)
        run = np.zeros((), records.RUN_DTYPE)
        run["mode"], run["cell_s"], run["price"], run["margin"] = mode, cell_s, price, margin
        run["most_expanded"] = MOST_EXPANDED if np.isinf(margin) else np.iinfo(np.int64).max
        run["floor_w"], run["best_cost"], run["clocks"] = self.floor_w, np.inf, 1
        slots = np.zeros(self.slots, records.SLOT_DTYPE)
        slots["next"] = np.append(np.arange(1, self.slots), -1)
        if self._cells is None:
            self._cells = np.zeros((self.slots, self.window_cells), records.CELL_DTYPE)
        idle = np.full(n, np.array((np.inf, -1, 0), dtype=records.IDLE_DTYPE))
        idle["cost"][0] = 0.0
        exact = mode == records.EXACT
        grid = (
            np.ascontiguousarray(self.plan_grid_ghz[::-1][::stride][::-1])
            if exact
            else self.grid_ghz
        )
        options = np.zeros(max(len(grid), int(self.slowest_s / cell_s) + 8), records.OPTION_DTYPE)
        labels = np.empty(MAX_LABELS if exact else 0, records.LABEL_DTYPE)
        workload = records.PlannedWorkload(
            c=self.coefs,
            p=self.params,
            arrival_s=self.pool.arrival_s,
            prompt=self.pool.prompt,
            prefix=self.pool.prefix,
            slo_class=self.pool.requests.slo_class,
            earliest_s=self.earliest_s,
            s_per_token=self.s_per_token,
        )
        hull, batch = np.zeros(len(grid), records.OPTION_DTYPE), np.zeros(8, dtype=np.int64)
        prefill_oracle(
            run[()],
            workload,
            records.OpenLabels(slots, np.full(n, -1), self._cells, idle),
            records.Scratch(grid, hull, options, batch),
            labels,
        )
        if run["status"] != records.OK:
            # a finished programme leaves every cell empty, an abandoned one does not
            self._cells = None
            return run, grid[:0]
        return run, trace_back(run, labels, grid) if exact else grid[:0]


def trace_back(
    run: Any, labels: NDArray[Any], grid_ghz: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Clocks of the cheapest path, in order, MHz."""
    clocks, k = [int(run["best_clock"])], int(run["best_parent"])
    parent, clock = labels["parent"], labels["clock"]
    while parent[k] >= 0:
        clocks.append(int(clock[k]))
        k = int(parent[k])
    return grid_ghz[np.array(clocks[::-1])] * 1e3
