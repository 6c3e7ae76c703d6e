"""Rewards of the agents of one phase: as a single instance learns, shared within the cluster.

The reward of every agent is that of :mod:`agents.training.worlds.reward`, of its own energy, work
and late requests. A part ``team`` of it is the mean over the agents of its phase in its cluster:
the router sends requests where queues are short, so an agent that slows down leaves work to its
neighbours, and only their sum says what that cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agents.multi.cluster_rows import ClusterRows, Floats, Floats32, Ints, Outcome
from agents.training.worlds.group_plants import GroupPlants
from agents.training.worlds.mixture import WorkloadGroup
from agents.training.worlds.reward import Effects
from agents.training.worlds.reward_meter import RewardMeter
from biscale_env.config.cluster_layout import Placement
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.parallel_env import ClusterParallelEnv
from biscale_env.envs.cluster.whole_run import run_cluster


@dataclass(frozen=True)
class MaxClockCosts:
    """What a request costs at max clock.

    Attributes:
        request_cost: per group, mean energy of a request, reference energies.
    """

    request_cost: Floats

    def refund(self, before: Ints, after: Ints) -> Floats:
        """None: at max clock other instances would get other requests."""
        return np.zeros(len(before))


def at_max_clock(placement: Placement, freq_mhz: float) -> Placement:
    """The placement with all its instances at one clock."""
    groups = [g.model_copy(update={"freq_mhz": freq_mhz}) for g in placement.groups]
    return placement.model_copy(update={"groups": tuple(groups)})


def request_energy_j(env: ClusterParallelEnv, phase: str) -> float:
    """Mean energy of a request in a phase at max clock, waiting included, J."""
    placement = at_max_clock(env.placement, env.clocks.freq_max_mhz)
    run = run_cluster(env.options.plant, placement, env.options.source.workload(0))
    energy_j = run.energy.prefill_j if phase == "prefill" else run.energy.decode_j
    return energy_j / len(run.requests)


def _group(env: ClusterParallelEnv, name: str, phase: str) -> WorkloadGroup:
    tps = {g.tp for g in env.placement.groups if g.phase == phase}
    if len(tps) > 1:
        raise BiscaleError(
            f"placement '{env.placement.name}' has {phase} instances of several TP degrees: "
            "training takes one per phase"
        )
    plant = env.options.plant.plant(phase, tps.pop())
    slo = env.options.plant.slo
    return WorkloadGroup(name, plant, env.options.source, slo.bound_s(phase), slo.attainment)


class TeamReward:
    """Rewards of a phase's rows.

    Attributes:
        meter: the reward of every row, and what is measured for it.
    """

    def __init__(self, clusters: ClusterRows, phase: str) -> None:
        """Measure what requests cost at max clock.

        Raises:
            BiscaleError: instances of a phase that differ in their TP.
        """
        rows = clusters.rows[phase]
        first = [int(np.argmax(clusters.group == g)) for g in range(len(clusters.group_names))]
        envs = [clusters.envs[k] for k in first]
        groups = [
            _group(env, name, phase) for env, name in zip(envs, clusters.group_names, strict=True)
        ]
        costs = [
            request_energy_j(env, phase) / group.plant.energy_ref_j
            for env, group in zip(envs, groups, strict=True)
        ]
        plants = GroupPlants(groups, clusters.config.interval_s, nominal_only=True)
        self.meter = RewardMeter(rows.config, groups, plants, MaxClockCosts(np.array(costs)))
        self._rows, self._interval_s = rows, clusters.config.interval_s
        self._team, self._attainment = clusters.config.team, [g.attainment for g in groups]

    def __call__(
        self, outcome: Outcome, late: tuple[Floats32, Floats32], price: Floats
    ) -> Floats32:
        """Rewards (rows,).

        Args:
            outcome: of an interval.
            late: requests late even at the highest clock, before and after it.
            price: SLO-violation penalty of each row.
        """
        n = len(price)
        effects = Effects(
            energy_j=outcome.energy_j,
            elapsed_s=np.full(n, self._interval_s),
            work=outcome.tokens,
            violations=outcome.missed,
            refund=np.zeros(n),
            late_before=late[0],
            late_now=late[1],
        )
        nominal = np.full(n, -1)
        own = self.meter.reward(
            effects, outcome.finished.astype(np.int64), self._rows.group, nominal, price
        )
        return shared(own, self._rows.cluster, self._team).astype(np.float32)

    def end_of_round(self) -> None:
        """Take what was measured into the cost rates of the next round."""
        self.meter.duals.update(np.array(self._attainment))

    def state(self) -> dict[str, Floats]:
        """What is measured while it runs, for a resumed run."""
        spread, duals = self.meter.shaper.spread, self.meter.duals
        names = ("cost_rate", "attainment")
        kept = {name: np.array(getattr(duals, name)) for name in names}
        return {
            "squares": spread.squares,
            "weight": spread.weight,
            **kept,
            "updates": np.array(float(duals.updates)),
        }

    def restore(self, state: dict[str, Floats]) -> None:
        """Go on from :meth:`state`."""
        spread, duals = self.meter.shaper.spread, self.meter.duals
        spread.squares, spread.weight = state["squares"].copy(), state["weight"].copy()
        duals.cost_rate, duals.attainment = state["cost_rate"].copy(), state["attainment"].copy()
        duals.updates = int(state["updates"])


def shared(own: Floats, cluster: Ints | Sequence[int], team: float) -> Floats:
    """A part ``team`` of every row's reward exchanged for the mean over its cluster, (rows,)."""
    at = np.asarray(cluster)
    mean = np.bincount(at, own) / np.maximum(np.bincount(at), 1)
    return np.asarray((1.0 - team) * own + team * mean[at])
