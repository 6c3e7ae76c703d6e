"""Held-out evaluation: a policy on workloads other than those of training, per group.

Energy against max clock, and attainment.

Generated workloads share no request with those of training. Windows of a trace are others, of the
same half: most of their time lies inside some training window too. Only the second half, which
tables are made of, is never seen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.training.train_config import AgentConfig
from agents.training.worlds.group_plants import GroupPlants
from agents.training.worlds.mixture import HELD_OUT, WorkloadGroup, plant_of
from biscale_env.envs.batch import Batch, RequestTable

Act = Callable[[NDArray[np.float32], bool], NDArray[np.float32]]
"""Actions in [-1, 1], (n,), of encoded observations (n, dim); the flag: all episodes begin."""

DELAY_S = 0.05  # of the frozen scenarios
# what an attainment missed by 1.0 costs in units of the energy ratio, when policies are ranked
# (assumed)
SHORTFALL_PRICE = 30.0


@dataclass(frozen=True)
class HeldoutMetrics:
    """Result of one evaluation, arrays over groups.

    Attributes:
        energy_ratio: energy relative to max clock on the same workloads.
        attainment: fraction of requests within the SLO.
    """

    energy_ratio: NDArray[np.float64]
    attainment: NDArray[np.float64]

    def score(self, targets: NDArray[np.float64]) -> float:
        """What is minimised: mean energy ratio plus a penalty on missed attainment."""
        return float(
            np.mean(
                self.energy_ratio + SHORTFALL_PRICE * np.maximum(targets - self.attainment, 0.0)
            )
        )


class HeldOut:
    """A fixed set of held-out workloads in the nominal plant; the run at max clock is made once.

    Attributes:
        targets: attainment that each group is held to here, by the rule of training (see
            ``Constraint``; not quite that of tuning).
        nominal: what features take the plant of every row to be.
    """

    def __init__(
        self, config: AgentConfig, groups: Sequence[WorkloadGroup], workloads: int
    ) -> None:
        """Make the workloads.

        Args:
            config: the run.
            groups: families at loads.
            workloads: per group.
        """
        self.plant = plant_of(config.model_copy(update={"decision_interval_s": 0.0}), drain=True)
        traces = [g.source.workload(HELD_OUT + k) for g in groups for k in range(workloads)]
        owner = np.repeat(np.arange(len(groups)), workloads)
        self._pool = RequestTable.of(
            self.plant, traces, owners=[groups[int(g)].plant for g in owner]
        )
        plants, member = GroupPlants(groups, 0.0), np.full(len(owner), -1)
        self._records, self.nominal = plants.records(owner, member), plants.nominal(owner, member)
        self._records.params["drain"] = 1
        self._shape = (len(groups), workloads)
        self._reference, best = self._run(lambda obs, start: np.ones(len(obs), dtype=np.float32))
        c = config.constraint
        asked = np.array([g.attainment for g in groups]) + c.reserve
        self.targets = np.maximum(np.minimum(asked, best - c.below_max), 0.0)

    def _run(self, act: Act) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        n = len(self._records.coefs)
        batch, rows = Batch(self.plant, n, self._pool), np.arange(n)
        delay = {"delay_s": np.full(n, DELAY_S)}
        batch.reset(rows, rows, np.full(n, -1), delay, self._records)
        start = True
        while not batch.done.all():
            batch.step(np.ascontiguousarray(act(batch.obs.copy(), start), dtype=np.float32))
            start = False
        st = batch.states
        energy = st["energy_j"].reshape(self._shape).sum(axis=1)
        return energy, 1.0 - st["violations"].reshape(self._shape).sum(axis=1) / st[
            "finished"
        ].reshape(self._shape).sum(axis=1)

    def __call__(self, act: Act) -> HeldoutMetrics:
        """Run a policy over all workloads to their last request."""
        energy, attainment = self._run(act)
        return HeldoutMetrics(energy / self._reference, attainment)
