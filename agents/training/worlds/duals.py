"""The dual variables of the constraint, and what they are moved by.

One multiplier per group, moved by plain SGD on the attainment measured since the last move::

    attainment <- memory attainment + (1 - memory) measured
    multiplier <- clip(multiplier + rate (target - attainment), 0, maximum)

(the Lagrangian of constrained RL; Adam on a scalar would make steps of constant size).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.training.train_config import Constraint

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Tally:
    """Sums since the last reading.

    Attributes:
        finished: requests per group, in the plants that are counted.
        lost: those of them that violated the SLO.
        cost: per cell, in reference energies.
        time_s: per cell.
    """

    def __init__(self, n_groups: int, n_cells: int) -> None:
        """Start from nothing."""
        self.finished, self.lost = np.zeros(n_groups), np.zeros(n_groups)
        self.cost, self.time_s = np.zeros(n_cells), np.zeros(n_cells)

    def count_requests(self, group: Ints, finished: Floats, lost: Floats) -> None:
        """Count the requests of one step of some rows."""
        n = len(self.finished)
        self.finished += np.bincount(group, finished, n)
        self.lost += np.bincount(group, lost, n)

    def count_cost(self, cell: Ints, cost: Floats, time_s: Floats) -> None:
        """Count cost and time of one step of all rows."""
        n = len(self.cost)
        self.cost += np.bincount(cell, cost, n)
        self.time_s += np.bincount(cell, time_s, n)


class Duals:
    """Multipliers and measured cost rates of a run.

    Attributes:
        multipliers: reward lost per violation, per group; fixed where the network is told a
            penalty instead.
        cost_rate: average cost per second, per cell (group and bin of penalties).
        attainment: running mean per group; NaN before the first measurement.
        tally: what happened since the last update, in episodes of the nominal plant if there are
            any: the constraint is stated there, other members may be slower than any policy can
            make up for.
        updates: how often they were moved.
    """

    def __init__(self, constraint: Constraint, n_groups: int, n_cells: int, fixed: bool) -> None:
        """Start at the config's multiplier.

        Args:
            constraint: rate, bounds and memory.
            n_groups: groups.
            n_cells: groups times bins of penalties.
            fixed: keep the multipliers, measure only.
        """
        self._constraint, self._fixed = constraint, fixed
        self.multipliers = np.full(n_groups, constraint.start)
        self.cost_rate = np.zeros(n_cells)
        self.attainment = np.full(n_groups, np.nan)
        self.tally = Tally(n_groups, n_cells)
        self.updates = 0

    def update(self, targets: Floats) -> None:
        """One SGD step on what was tallied, towards the targets (groups,); a new tally begins."""
        c, tally = self._constraint, self.tally
        seen = tally.finished > 0
        now = np.where(seen, 1.0 - tally.lost / np.maximum(tally.finished, 1.0), self.attainment)
        old = np.where(np.isnan(self.attainment), now, self.attainment)
        self.attainment = c.memory * old + (1.0 - c.memory) * now
        step = c.rate * np.nan_to_num(targets - self.attainment)
        if not self._fixed:
            self.multipliers = np.clip(self.multipliers + step, 0.0, c.maximum)
        spent = tally.time_s > 0
        rate = np.where(spent, tally.cost / np.maximum(tally.time_s, 1e-9), self.cost_rate)
        first = self.updates == 0
        self.cost_rate = rate if first else c.memory * self.cost_rate + (1.0 - c.memory) * rate
        self.updates += 1
        self.tally = Tally(len(tally.finished), len(tally.cost))

    def state(self) -> dict[str, Any]:
        """Everything, for a resumed run."""
        names = ("multipliers", "cost_rate", "attainment")
        arrays = {name: getattr(self, name).copy() for name in names}
        tally = {name: value.copy() for name, value in vars(self.tally).items()}
        return {**arrays, "tally": tally, "updates": self.updates}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        for name in ("multipliers", "cost_rate", "attainment"):
            setattr(self, name, state[name].copy())
        for name, value in state["tally"].items():
            setattr(self.tally, name, value.copy())
        self.updates = int(state["updates"])
