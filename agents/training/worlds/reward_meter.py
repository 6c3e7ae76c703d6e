"""From what a step left in the simulator's records to the reward of training, for any rows.

The training environment and the public wrapper ask this one place.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agents.training.train_config import AgentConfig
from agents.training.worlds.duals import Duals
from agents.training.worlds.group_plants import GroupPlants
from agents.training.worlds.mixture import WorkloadGroup
from agents.training.worlds.reward import Effects, RewardShaper

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]
PRICE_BINS = 4


class PricedWorkloads(Protocol):
    """What rewards must know of the workloads; a `WorkloadSet` offers it."""

    @property
    def request_cost(self) -> Floats:
        """Mean energy of a request at max clock per group, reference energies."""
        ...

    def refund(self, before: Ints, after: Ints) -> Floats:
        """See :meth:`agents.training.worlds.workload_set.WorkloadSet.refund`."""
        ...


class RewardMeter:
    """Rewards of a run's rows.

    Attributes:
        duals: multipliers, and the cost rates that are measured here.
        shaper: makes the rewards.
    """

    def __init__(
        self,
        config: AgentConfig,
        groups: Sequence[WorkloadGroup],
        plants: GroupPlants,
        workloads: PricedWorkloads,
    ) -> None:
        """Prepare the baselines.

        Args:
            config: the run.
            groups: families at loads.
            plants: of the groups.
            workloads: what is run, and what max clock does on it.
        """
        self._config, self._workloads = config, workloads
        n_cells = len(groups) * PRICE_BINS
        self.duals = Duals(config.constraint, len(groups), n_cells, config.price is not None)
        gamma = float(config.hyper.get("gamma", 0.99))
        self.shaper = RewardShaper(groups, plants, n_cells, gamma=gamma, scale=config.reward_scale)
        self._nominal = config.randomise.nominal_share > 0.0

    def violation_weight(self, group: Ints, price: Floats) -> Floats:
        """Reward lost per violation, in reference energies, (n,).

        The penalty of the episode, or the multiplier of its group.
        """
        if self._config.price is None:
            return self.duals.multipliers[group]
        return price * self._workloads.request_cost[group]

    def cells(self, group: Ints, price: Floats) -> Ints:
        """Cell of each row: its group, and where its penalty stands in the range."""
        if self._config.price is None:
            return group * PRICE_BINS
        low, high = np.log(self._config.price)
        place = (np.log(price) - low) / max(high - low, 1e-9)
        bins = np.clip((place * PRICE_BINS).astype(np.int64), 0, PRICE_BINS - 1)
        return np.asarray(group * PRICE_BINS + bins)

    def effects(
        self, states: Any, arrived: tuple[Ints, Ints], late: tuple[Floats32, Floats32]
    ) -> Effects:
        """What the last step did.

        Args:
            states: records of the rows.
            arrived: place of each row's newest request in the table of workloads, before and after.
            late: requests late even at the highest clock, before and after.
        """
        decode = self._config.phase == "decode"
        iterations = np.maximum(states["step_iterations"], 1) if decode else 1
        return Effects(
            energy_j=states["step_energy_j"].copy(),
            elapsed_s=states["time_s"] - states["step_start_s"],
            work=states["step_tokens"] * iterations,
            violations=states["step_violations"].astype(np.float64),
            refund=self._workloads.refund(*arrived),
            late_before=late[0],
            late_now=late[1],
        )

    def reward(
        self, effects: Effects, finished: Ints, group: Ints, member: Ints, price: Floats
    ) -> Floats:
        """Tally the effects, and reward them, (n,).

        Args:
            effects: of :meth:`effects`.
            finished: requests that each row finished.
            group: of each row.
            member: ensemble member of each row's plant.
            price: SLO-violation penalty of each row.
        """
        tally, weight, cell = (
            self.duals.tally,
            self.violation_weight(group, price),
            self.cells(group, price),
        )
        excess = self.shaper.excess(effects, group, member)
        rows = member < 0 if self._nominal else np.ones(len(member), dtype=bool)
        done = finished.astype(np.float64)
        tally.count_requests(group[rows], done[rows], effects.violations[rows])
        cost = excess + weight * (effects.violations - effects.refund)
        tally.count_cost(cell, cost, effects.elapsed_s)
        return self.shaper(effects, excess, weight, self.duals.cost_rate[cell], cell)
