"""The agents of one phase as SB3's ``VecEnv``: one network for all rows, the other phase's held."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from agents.multi.cluster_rows import ClusterRows, Floats, Floats32
from agents.multi.multi_config import PHASES
from agents.multi.team_reward import TeamReward
from agents.policy.action_map import within_range
from agents.policy.feature_parts import FeatureRows
from agents.policy.features import with_price
from agents.policy.numpy_policy import Network
from agents.training.worlds.shared_vec_env import SharedVecEnv

NOTHING: dict[str, Any] = {}


class PhaseVecEnv(SharedVecEnv):
    """Rows of one phase in all clusters; episodes of all begin and end together.

    SuperSuit's conversion wants one observation for all agents and knows no features; this does the
    same in a few lines with what a shipped agent sees and does.

    Attributes:
        clusters: the PettingZoo environments.
        phase: whose agents learn.
        networks: per phase, the network that acts for the phase that does not learn.
        reward: of the rows.
        price: SLO-violation penalty of every cluster's episode per phase, (clusters,).
    """

    def __init__(self, clusters: ClusterRows, phase: str) -> None:
        """Take a phase of some clusters, which several such environments may share."""
        self.clusters, self.phase = clusters, phase
        self.networks: dict[str, Network] = {}
        self.reward = TeamReward(clusters, phase)
        rows = clusters.rows[phase]
        self._seed = 0
        self._episode = 0
        self.price: dict[str, Floats] = {}
        self._rows: dict[str, FeatureRows] = {}
        self._outputs: NDArray[Any] = np.zeros(len(rows.agents), dtype=np.float32)
        space = gym.spaces.Box(-np.inf, np.inf, (rows.features.dim + 1,), dtype=np.float32)
        super().__init__(len(rows.agents), space, gym.spaces.Box(-1.0, 1.0, (1,), dtype=np.float32))

    def begin(self, seed: int, networks: Mapping[str, Network]) -> None:
        """Episodes from now on follow this seed; the other phase acts with its network."""
        self._seed, self._episode, self.networks = seed, 0, dict(networks)

    def reset(self) -> Floats32:
        """Start an episode in every cluster, with prices of its own."""
        entropy = [self._seed, self._episode]
        self._episode += 1
        rng = np.random.default_rng(entropy)
        for phase in PHASES:
            low, high = np.log(self.clusters.rows[phase].config.price or (1.0, 1.0))
            self.price[phase] = np.exp(rng.uniform(low, high, len(self.clusters.envs)))
        self.clusters.reset(int(rng.integers(2**31)))
        return self._observe()

    def _observe(self) -> Floats32:
        for phase, rows in self.clusters.rows.items():
            self._rows[phase] = rows.features(self.clusters.observations(phase), *rows.plants)
        return self._input(self.phase)

    def _input(self, phase: str) -> Floats32:
        """What the network of a phase is shown, (rows, F + 1)."""
        return with_price(self._rows[phase].features, self.row_price(phase))

    def row_price(self, phase: str) -> Floats:
        """SLO-violation penalty of every row of a phase."""
        return self.price[phase][self.clusters.rows[phase].cluster]

    def _actions(self, phase: str) -> Floats32:
        if phase == self.phase:
            output = self._outputs
        else:
            output = within_range(self.networks[phase].forward(self._input(phase))[:, 0])
        return self.clusters.rows[phase].actions(output, self._rows[phase].rule)

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep the outputs of the network for ``step_wait``."""
        self._outputs = actions

    def step_wait(self) -> tuple[Floats32, Floats32, NDArray[np.bool_], list[dict[str, Any]]]:
        """One interval in every cluster; finished episodes restart, all together."""
        late_before = self._rows[self.phase].lost.copy()
        price = self.row_price(self.phase)
        outcomes, over = self.clusters.step({p: self._actions(p) for p in PHASES})
        features = self._observe()
        late = (late_before, self._rows[self.phase].lost)
        reward = self.reward(outcomes[self.phase], late, price)
        infos = [NOTHING] * self.num_envs
        if over:
            infos = [{"terminal_observation": x, "TimeLimit.truncated": True} for x in features]
            features = self.reset()
        return features, reward, np.full(self.num_envs, over), infos
