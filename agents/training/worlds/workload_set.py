"""All training workloads in one table, and what max clock does on each of them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agents.training.worlds.mixture import HELD_OUT, WorkloadGroup, run_at_max
from biscale_env.envs.batch import RequestTable
from biscale_env.envs.plant import Plant

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class WorkloadSet:
    """The workloads of some groups.

    Attributes:
        groups: families at loads.
        table: requests of all workloads, group by group.
        first: number of the first workload of each group, and their total number (groups + 1,).
        late_at_max: per group, which requests violate the SLO at max clock.
        request_cost: mean energy of a request at max clock per group, idle included, in its
            reference energies: the unit of the SLO-violation penalty (price).
    """

    def __init__(
        self,
        plant: Plant,
        groups: Sequence[WorkloadGroup],
        counts: Sequence[int],
        held_out: bool = False,
    ) -> None:
        """Make all workloads and run max clock on each, once.

        Args:
            plant: gives the phase.
            groups: families at loads.
            counts: workloads per group.
            held_out: take the held-out workloads (see :mod:`agents.training.heldout`).
        """
        self.groups = list(groups)
        begin = HELD_OUT if held_out else 0
        owned = [
            (g, self.groups[g].source.workload(begin + k))
            for g, n in enumerate(counts)
            for k in range(n)
        ]
        self.table = RequestTable.of(
            plant,
            [trace for _, trace in owned],
            owners=[self.groups[g].plant for g, _ in owned],
        )
        self.first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        at_max = [(g, *run_at_max(self.groups[g], trace)) for g, trace in owned]
        self.late_at_max = [
            np.concatenate([late for h, late, _ in at_max if h == g])
            for g in range(len(self.groups))
        ]
        energy, requests = np.zeros(len(self.groups)), np.zeros(len(self.groups))
        for g, late, energy_j in at_max:
            energy[g] += energy_j
            requests[g] += len(late)
        refs_j = np.array([g.plant.energy_ref_j for g in self.groups])
        self.request_cost = energy / np.maximum(requests, 1.0) / refs_j
        lost = np.concatenate([late for _, late, _ in at_max])
        refunds = lost if plant.phase == "prefill" else np.zeros(len(self.table.arrival_s))
        self._refunds = np.concatenate([[0.0], np.cumsum(refunds)])

    def refund(self, before: Ints, after: Ints) -> Floats:
        """Refunds of the requests that arrived between two positions in the table, (n,).

        One per request that max clock loses on the same workload; in decode there are none.
        """
        return np.asarray(self._refunds[after] - self._refunds[before])

    @property
    def refunds(self) -> float:
        """All refunds together."""
        return float(self._refunds[-1])
