"""The reward of training: that of the environments, with changes that leave the best policy as is.

Per decision, with penalty weight ``w`` of the episode::

    excess  = (energy - marginal energy x work - idle power x elapsed) / reference energy      (a)
    charged = violations + gamma late_now - late_before                                        (b)
              - refund                                                                         (c)
    reward  = scale (cost_rate x elapsed                                                       (d)
                     - excess - w charged) / spread                                            (e)

(a) What no policy can change is taken off: the marginal energy per token and idle power per second
at the cheapest clock; without it, the size of the next batch is most of the variance. (b)
Potential-based shaping (Ng, Harada and Russell, ICML 1999): a request is charged when it is late
even at the highest clock, not when it completes late. (c) Prefill: requests that max clock loses on
the same workload are refunded when they arrive. They are the same for every policy, and most of all
violations. (d) Every second earns the average cost rate of its group (and penalty): decisions
differ in length, and without it a discounted sum prefers short steps, that is high clocks (the
differential reward of average-reward learning). (e) Rewards are divided by the spread of their
group.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from agents.training.worlds.group_plants import GroupPlants
from agents.training.worlds.mixture import WorkloadGroup

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
SPREAD_MEMORY = 0.9995  # per step: some thousand steps
# two typical iterations of each phase (assumed); their difference is what one more token costs
MARGINAL_WORK = {
    "prefill": ((1024.0, 1024.0**2 / 2, 0.0, 1.0), (2048.0, 1024.0**2, 0.0, 2.0)),
    "decode": ((64.0, 0.0, 64.0 * 1024, 64.0), (256.0, 0.0, 256.0 * 1024, 256.0)),
}


class Effects(NamedTuple):
    """What one decision did in every row, arrays (n,).

    Attributes:
        energy_j: energy, J.
        elapsed_s: time, s.
        work: tokens made.
        violations: requests that completed too late.
        refund: see :meth:`agents.training.worlds.workload_set.WorkloadSet.refund`.
        late_before: requests late even at the highest clock, before the decision.
        late_now: after it.
    """

    energy_j: Floats
    elapsed_s: Floats
    work: Floats
    violations: Floats
    refund: Floats
    late_before: NDArray[np.float32]
    late_now: NDArray[np.float32]


class Spread:
    """Root mean square of the reward per cell, running.

    Groups with few violations then count as much as those with many.
    """

    def __init__(self, n_cells: int) -> None:
        """Start at 1 with a little weight."""
        self.squares, self.weight = np.full(n_cells, 10.0), np.full(n_cells, 10.0)

    def __call__(self, cell: Ints, values: Floats) -> Floats:
        """Take in the values of one step and return the spread of each one's cell."""
        n = len(self.squares)
        self.squares = SPREAD_MEMORY * self.squares + np.bincount(cell, values**2, n)
        self.weight = SPREAD_MEMORY * self.weight + np.bincount(cell, minlength=n)
        return np.sqrt(self.squares / self.weight)[cell] + 1e-3


def marginal_cost(group: WorkloadGroup, member: int, freq_ghz: float) -> tuple[float, float]:
    """Marginal energy per token (J) and idle power (W) of a group at a clock.

    Args:
        group: gives the model.
        member: of the ensemble; -1 nominal.
        freq_ghz: the clock, GHz.
    """
    model, work = group.plant.model, MARGINAL_WORK[group.plant.phase]
    idle_w = group.plant.waiting_power_w(member, freq_ghz * 1e3)
    joules = [float(model.energy_j(*w, freq_ghz * 1e3, member)) for w in work]
    seconds = [float(model.latency_s(*w, freq_ghz * 1e3, member)) for w in work]
    above_idle = joules[1] - joules[0] - idle_w * (seconds[1] - seconds[0])
    return above_idle / (work[1][0] - work[0][0]), idle_w


class RewardShaper:
    """Changes (a) to (e) of this module.

    Attributes:
        baseline: marginal energy per token (J) and idle power (W) per group and member + 1,
            (groups, members + 1, 2); NaN where a group has fewer members than another.
        spread: divides the rewards.
    """

    def __init__(
        self,
        groups: Sequence[WorkloadGroup],
        plants: GroupPlants,
        n_cells: int,
        *,
        gamma: float,
        scale: float,
    ) -> None:
        """Prepare the baselines.

        Args:
            groups: families at loads.
            plants: of the groups.
            n_cells: groups times bins of penalties.
            gamma: discount of the algorithm.
            scale: factor on the reward.
        """
        self.baseline = np.full((len(groups), int(plants.n_members.max()) + 1, 2), np.nan)
        for k, group in enumerate(groups):
            for j, freq_ghz in enumerate(plants.cheapest_ghz(k)):
                self.baseline[k, j] = marginal_cost(group, j - 1, freq_ghz)
        self.spread = Spread(n_cells)
        self._ref_j, self._gamma, self._scale = plants.energy_ref_j, gamma, scale

    def excess(self, effects: Effects, group: Ints, member: Ints) -> Floats:
        """Energy above what no policy can change, reference energies, (n,)."""
        base = self.baseline[group, member + 1]
        above = effects.energy_j - base[:, 0] * effects.work - base[:, 1] * effects.elapsed_s
        return np.asarray(above / self._ref_j[group])

    def __call__(
        self, effects: Effects, excess: Floats, weight: Floats, cost_rate: Floats, cell: Ints
    ) -> Floats:
        """Rewards (n,).

        Args:
            effects: what the decisions did.
            excess: of :meth:`excess`.
            weight: penalty per violation, reference energies, (n,).
            cost_rate: average cost per second of each row's cell, (n,).
            cell: of each row.
        """
        e = effects
        charged = e.violations + self._gamma * e.late_now - e.late_before - e.refund
        reward = cost_rate * e.elapsed_s - excess - weight * charged
        return np.asarray(self._scale * reward / self.spread(cell, reward))
