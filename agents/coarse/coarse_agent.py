"""The learned coarse policy at work: the placement of least expected cost.

Expected over the loads that the forecast holds possible: energy of the instances, a price for each
request that misses the SLO, and what it costs to get there from the placement in service.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agents.coarse.coarse_checkpoint import CoarseCheckpoint
from agents.coarse.load_forecast import LONGEST
from agents.coarse.window_costs import WindowCosts
from biscale_env.config.cluster_layout import Placement
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_env import FEATURES, SCALE, ClusterEnv
from controllers.placement.coarse_rules import CoarseMemory, remembered
from controllers.placement.ilp import PHASES

Floats = NDArray[np.float64]
IN_FLIGHT: Final = [f[0] for f in FEATURES].index("in_flight")
IN_SERVICE_S: Final = 20.0  # longer than a mean request takes; what is beyond it waits (assumed)


class CoarseAgent:
    """One of the environment's own placements per window, from its observation.

    Before the first window nothing is known and the largest placement is taken; a window without
    requests changes nothing. Placements whose costs are not known are masked: they are never taken.
    """

    def __init__(
        self, checkpoint: CoarseCheckpoint, env: ClusterEnv, price: float | None = None
    ) -> None:
        """Bind a checkpoint to an environment.

        Args:
            checkpoint: forecast, costs, default price.
            env: its placements are the choices; its transitions are what is charged.
            price: of a request that misses the SLO; None: the checkpoint's own.

        Raises:
            BiscaleError: an environment that the costs say nothing about, other windows, or a
                price outside the checkpoint's range.
        """
        low, high = checkpoint.prices
        self.price = checkpoint.price if price is None else price
        if not low <= self.price <= high:
            raise BiscaleError(f"the price must be from {low:g} to {high:g}, got {self.price:g}")
        if env.window_s != checkpoint.window_s:
            raise BiscaleError(
                f"the checkpoint was trained on windows of {checkpoint.window_s:g} s, but the "
                f"environment has {env.window_s:g} s"
            )
        checkpoint.costs.check_made_for(env)
        self.checkpoint, self.placements = checkpoint, env.placements
        self.window_s, self.transitions = env.window_s, env.plant.settings.transitions
        first = env.placements[0].groups[0]
        self._spare_w = env.plant.spare_power_w(env.plant.plant(first.phase, first.tp))
        self.kinds, self.known = _kinds_of(checkpoint.costs, env.placements)
        if not self.known.any():
            raise BiscaleError("the checkpoint knows none of the environment's placements")
        self._first = self.placements[self._largest()]

    def place(
        self, observation: NDArray[np.float32], memory: CoarseMemory | None
    ) -> tuple[Placement, CoarseMemory]:
        """See :class:`controllers.placement.coarse_rules.CoarsePolicy`."""
        rates = remembered(observation, memory, LONGEST + 1)
        if memory is None:
            chosen = self._first
        elif not rates[-1] > 0:
            chosen = memory.placement
        else:
            seen = float(observation[IN_FLIGHT] * SCALE[IN_FLIGHT])
            late = max(seen - IN_SERVICE_S * rates[-1], 0.0)
            chosen = self.placements[self.choose(rates, memory.placement, late)]
        return chosen, CoarseMemory(rates, chosen)

    def choose(self, rates_rps: Sequence[float], before: Placement, backlog: float = 0.0) -> int:
        """Number of the placement of least expected cost; see :meth:`costs_j`."""
        return int(self.costs_j(rates_rps, before, backlog).argmin())

    def costs_j(
        self, rates_rps: Sequence[float], before: Placement, backlog: float = 0.0
    ) -> Floats:
        """Expected cost of every placement of the environment, J; infinite where it is masked.

        Args:
            rates_rps: load of each window so far, requests/s.
            before: placement in service.
            backlog: requests in flight that should have been finished: served in half a window.
        """
        costs = self.checkpoint.costs
        loads = self.checkpoint.forecast.loads_rps(rates_rps) + 2 * backlog / self.window_s
        total = np.full(len(self.placements), np.inf)
        total[self.known] = 0.0
        for column, phase in enumerate(PHASES):
            group = next((g for g in before.groups if g.phase == phase), None)
            now = None if group is None else costs.number(phase, group.tp, group.count)
            used = np.unique(self.kinds[self.known, column])
            each = {kind: self._of_kind(int(kind), now, loads) for kind in used}
            total[self.known] += [each[kind] for kind in self.kinds[self.known, column]]
        return total

    def _of_kind(self, kind: int, now: int | None, loads_rps: Floats) -> float:
        """Expected cost of the instances of one phase over the next window, J."""
        costs = self.checkpoint.costs
        power_w, missed = costs.at(kind, loads_rps)
        _, tp, count = costs.kinds[kind]
        if now is not None and costs.kinds[now][1] != tp:  # all are new, and none is open
            share = min(self.transitions.reshard_s / self.window_s, 1.0)
            missed = missed + share * (1.0 - missed)
        elif now is not None and costs.kinds[now][2] < count:  # until then those of before serve
            share = min(self.transitions.cold_start_s / self.window_s, 1.0)
            missed = missed + share * (costs.at(now, loads_rps)[1] - missed)
        requests = loads_rps * self.window_s
        energy_j = (power_w - self._spare_w * tp * count) * self.window_s
        return float(np.mean(energy_j + self.price * costs.request_j * missed * requests))

    def _largest(self) -> int:
        """Number of the placement that serves most by the capacity table, as DistServe chooses."""
        capacity = self.checkpoint.costs.capacity_rps[self.kinds].min(axis=1)
        gpus = np.array([p.gpus for p in self.placements])
        return int(np.lexsort((gpus, -np.where(self.known, capacity, 0.0)))[0])


def _kinds_of(
    costs: WindowCosts, placements: tuple[Placement, ...]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Kinds of each placement, (n, 2), and whether both are known, (n,).

    Tier 2 chooses the clocks: only placements at the highest base clocks are looked at.
    """
    top = max(g.freq_mhz for p in placements for g in p.groups)
    kinds = np.zeros((len(placements), len(PHASES)), dtype=np.int64)
    known = np.zeros(len(placements), dtype=np.bool_)
    for row, placement in enumerate(placements):
        found = [costs.number(g.phase, g.tp, g.count) for g in placement.groups]
        known[row] = None not in found and all(g.freq_mhz == top for g in placement.groups)
        if known[row]:
            kinds[row] = [k for k in found if k is not None]
    return kinds, known
