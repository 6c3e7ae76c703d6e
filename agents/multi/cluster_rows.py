"""Several clusters at once: the agents of a phase in all of them as the rows of one array.

Nothing is simulated here: the clusters are PettingZoo environments
(:class:`biscale_env.envs.cluster.parallel_env.ClusterParallelEnv`), and rows are what they say.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.multi.multi_config import PHASES, MultiConfig
from agents.policy.action_map import ActionMap
from agents.policy.features import FeatureMap, NominalPlants, plants_of
from agents.training.train_config import AgentConfig
from biscale_env.envs.cluster.parallel_env import ClusterParallelEnv, Observations

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]
TOLD = ("energy_j", "cost", "finished", "tokens")  # of an agent's info


@dataclass(frozen=True)
class PhaseRows:
    """The agents of one phase in all clusters, a row each.

    Attributes:
        config: of the phase's network.
        agents: cluster and name of each.
        cluster: the same number as an array, (rows,).
        group: scenario and load of each, (rows,).
        features: observation to features.
        actions: output of the network to action.
        plants: what the features take each row's instance to be.
    """

    config: AgentConfig
    agents: tuple[tuple[int, str], ...]
    cluster: Ints
    group: Ints
    features: FeatureMap
    actions: ActionMap
    plants: NominalPlants


@dataclass(frozen=True)
class Outcome:
    """What an interval brought to the rows of a phase, arrays (rows,).

    Attributes:
        reward: of the environments themselves.
        energy_j: energy, J.
        missed: requests that ended beyond the phase's bound.
        finished: requests that ended.
        tokens: work begun.
    """

    reward: Floats
    energy_j: Floats
    missed: Floats
    finished: Floats
    tokens: Floats


class ClusterRows:
    """Clusters that play one episode after the other in step.

    Attributes:
        envs: the clusters.
        group_names: scenarios and loads.
        group: of each cluster, (clusters,).
        rows: agents per phase.
    """

    def __init__(self, config: MultiConfig) -> None:
        """Make all clusters; what placements serve is measured (seconds).

        Raises:
            BiscaleError: an option of an environment that does not exist, or an impossible value.
        """
        self.config = config
        self.envs: list[ClusterParallelEnv] = []
        self.group_names: list[str] = []
        groups: list[int] = []
        for scenario in config.scenarios:
            goodput_rps = scenario.goodput_rps()
            for load in scenario.loads:
                options = {
                    "rate_rps": load * goodput_rps,
                    "n_workloads": config.n_workloads,
                    "workload_seed": config.seed,
                }
                groups += [len(self.group_names)] * config.copies
                self.group_names.append(f"{scenario.name}-{round(100 * load)}")
                for _ in range(config.copies):
                    made = scenario.make_env(config.interval_s, config.episode_s, **options)
                    self.envs.append(made)
        self.group = np.array(groups)
        self.rows = {phase: self._rows_of(phase) for phase in PHASES}
        self._seen: list[Observations] = []

    def _rows_of(self, phase: str) -> PhaseRows:
        config = self.config.agent(phase)
        agents = [
            (k, agent)
            for k, env in enumerate(self.envs)
            for agent in env.possible_agents
            if agent.startswith(phase)
        ]
        plants = []
        for k, agent in agents:
            plant = self.envs[k].options.plant
            tp = self.envs[k].tp_of(agent)
            member = plant.settings.ensemble_member
            plants.append(plants_of(plant.plant(phase, tp), phase, [member]))
        cluster = np.array([k for k, _ in agents])
        clocks = self.envs[0].clocks
        return PhaseRows(
            config,
            tuple(agents),
            cluster,
            self.group[cluster],
            FeatureMap(phase, self.envs[0].spec_of(phase)),
            ActionMap.of(config.action, config.span, clocks),
            NominalPlants(*(np.concatenate(parts) for parts in zip(*plants, strict=True))),
        )

    def reset(self, seed: int) -> None:
        """Start an episode in every cluster; the seed decides which."""
        seeds = np.random.SeedSequence(seed).generate_state(len(self.envs))
        self._seen = [
            env.reset(seed=int(one))[0] for env, one in zip(self.envs, seeds, strict=True)
        ]

    def observations(self, phase: str) -> Floats32:
        """Latest observations of a phase's rows, (rows, dim)."""
        return np.stack([self._seen[k][agent] for k, agent in self.rows[phase].agents])

    def step(self, actions: Mapping[str, Floats32]) -> tuple[dict[str, Outcome], bool]:
        """All agents choose, then an interval passes in every cluster.

        Args:
            actions: per phase, (rows,) in [-1, 1].

        Returns:
            Outcome per phase, and whether the episodes are over.
        """
        chosen: list[dict[str, NDArray[np.float32]]] = [{} for _ in self.envs]
        for phase, rows in self.rows.items():
            for (k, agent), action in zip(rows.agents, actions[phase], strict=True):
                chosen[k][agent] = np.array([action], dtype=np.float32)
        steps = [env.step(mine) for env, mine in zip(self.envs, chosen, strict=True)]
        self._seen = [seen for seen, *_ in steps]
        outcomes = {}
        for phase, rows in self.rows.items():
            told = np.array(
                [[steps[k][4][agent][name] for name in TOLD] for k, agent in rows.agents]
            )
            reward = np.array([steps[k][1][agent] for k, agent in rows.agents])
            outcomes[phase] = Outcome(reward, *told.T)
        return outcomes, not self.envs[0].agents
