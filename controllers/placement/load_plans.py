"""BiScale's placements by load, for one environment of the coarse loop."""

import math
from dataclasses import dataclass, field
from typing import Final

from biscale_env.config import load_slo
from biscale_env.config.cluster_layout import Placement
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_env import ClusterEnv
from controllers.placement.capacity_table import TableRequest, capacity_table
from controllers.placement.ilp import (
    CapacityTable,
    NoPlacementError,
    biscale_plan,
    distserve_plan,
)

GRID: Final = 1.005
"""Loads are rounded up to powers of this, so that few programmes are solved (assumed)."""
LEAST_RPS: Final = 0.05


@dataclass
class LoadPlans:
    """Solutions of the integer programme, kept.

    Attributes:
        table: what instances serve and cost.
        gpus: GPUs of the cluster.
        largest: DistServe's placement, taken where no other serves what is asked.
    """

    table: CapacityTable
    gpus: int
    largest: Placement = field(init=False)
    _found: dict[int, Placement] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.largest = distserve_plan(self.table, 1.0, self.gpus).placement

    @classmethod
    def of_env(cls, env: ClusterEnv) -> "LoadPlans":
        """For an environment: the table is measured on a sample of its workload, once, and kept.

        Raises:
            BiscaleError: an SLO that has no name, or a sample too small for a table.
        """
        settings = env.plant.settings
        if env.plant.slo != load_slo(settings.slo):
            raise BiscaleError(
                "a capacity table needs an SLO by name: write it into a YAML file and name that"
            )
        sample = env.options.capacities.sample
        return cls(capacity_table(TableRequest(settings), sample), settings.gpus)

    def capacity_rps(self, placement: Placement, phase: str) -> float:
        """Load that one phase of a placement serves by the table, requests/s."""
        groups = (g for g in placement.groups if g.phase == phase)
        return sum(g.count * self.table.find(phase, g.tp, g.freq_mhz).rate_rps for g in groups)

    def placement(self, need_rps: float) -> Placement:
        """The programme's placement for a load, headroom included; the largest if there is none."""
        level = math.ceil(math.log(max(need_rps, LEAST_RPS)) / math.log(GRID) - 1e-9)
        if level not in self._found:
            try:
                plan = biscale_plan(self.table, GRID**level, self.gpus, 0.0)
                self._found[level] = plan.placement
            except NoPlacementError:
                self._found[level] = self.largest
        return self._found[level]
