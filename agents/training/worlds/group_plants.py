"""The plants of a mixture's groups, any LLM on any GPU, as kernels and features take them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agents.policy.features import NominalPlants, plants_of
from agents.training.worlds.mixture import WorkloadGroup
from biscale_env.envs.batch import InstanceRecords
from biscale_env.envs.plant import Plant
from biscale_env.sim.state import PARAMS_DTYPE

Ints = NDArray[np.int64]


class GroupPlants:
    """Plants of the groups in every member of their ensembles, as kernels and features take them.

    Attributes:
        n_members: members of each group's ensemble, (groups,).
        energy_ref_j: unit of energy of each group, J, (groups,).
    """

    def __init__(
        self,
        groups: Sequence[WorkloadGroup],
        decision_interval_s: float,
        nominal_only: bool = False,
    ) -> None:
        """Lay out one record per group and member.

        Args:
            groups: families at loads.
            decision_interval_s: how long a decision stands at least, s.
            nominal_only: leave the members of the ensembles out.
        """
        made = [_records(g.plant, 0 if nominal_only else g.plant.model.n_members) for g in groups]
        sizes = np.array([len(records.coefs) for records, _ in made])
        self.n_members = sizes - 1
        self.energy_ref_j = np.array([g.plant.energy_ref_j for g in groups])
        self._first = np.cumsum(sizes) - sizes + 1
        self._records = InstanceRecords(
            *(np.concatenate([r[k] for r, _ in made]) for k in range(2))
        )
        self._records.params["min_interval_s"] = decision_interval_s
        self._plants = np.concatenate([n.plants for _, n in made])

    def _at(self, group: Ints, member: Ints) -> Ints:
        return np.asarray(self._first[group] + member)

    def records(self, group: Ints, member: Ints) -> InstanceRecords:
        """Records of some rows' plants; member -1 is the nominal one."""
        at = self._at(group, member)
        return InstanceRecords(self._records.coefs[at], self._records.params[at])

    def nominal(self, group: Ints, member: Ints) -> NominalPlants:
        """What features take some rows' plants to be."""
        at = self._at(group, member)
        return NominalPlants(self._records.coefs[at], self._plants[at])

    def cheapest_ghz(self, group: int) -> NDArray[np.float64]:
        """Cheapest clocks of a group, nominal and in every member, GHz."""
        first = self._first[group] - 1
        return np.asarray(self._plants["cheapest_ghz"][first : first + self.n_members[group] + 1])


def _records(plant: Plant, n_members: int) -> tuple[InstanceRecords, NominalPlants]:
    members = range(-1, n_members)
    nominal = plants_of(plant, plant.phase, members)
    params = np.array([plant.params(k, 0.0) for k in members], dtype=PARAMS_DTYPE)
    return InstanceRecords(nominal.coefs, params), nominal
