"""The reward that agents are trained with, see :mod:`agents.training.worlds.reward`."""

from typing import Any

import gymnasium as gym
import numpy as np

from agents.training.train_config import AgentConfig
from agents.training.worlds.group_plants import GroupPlants
from agents.training.worlds.mixture import WorkloadGroup, targets
from agents.training.worlds.reward_meter import RewardMeter
from agents.training.worlds.workload_set import WorkloadSet
from agents.wrappers.agent_features import features_below
from biscale_env.core.errors import BiscaleError
from biscale_env.wrappers.last_step import phase_env

GROUP = np.zeros(1, dtype=np.int64)
UPDATE_EVERY = 16_384  # steps between updates: a rollout of PPO's configs


class TrainingReward(gym.Wrapper[Any, Any, Any, Any]):
    """Energy above what no policy can change, violations when they become certain, cost per second.

    The reward of the environment is in ``info["env_reward"]``. The average cost per second that
    every second earns (the differential reward) is measured here, and taken over every
    ``update_every`` steps; so is the multiplier, where the config has no price.
    """

    def __init__(
        self, env: "gym.Env[Any, Any]", config: AgentConfig, update_every: int = UPDATE_EVERY
    ) -> None:
        """Run max clock on every workload of the environment, once.

        Args:
            env: with :class:`agents.wrappers.agent_features.AgentFeatures` among its wrappers.
            config: gives discount, scale, range of prices and constraint.
            update_every: steps between updates of the cost rate.

        Raises:
            BiscaleError: of the other phase, or without features, or without a price where the
                config has a range.
        """
        super().__init__(env)
        self._inner = phase_env(env, "TrainingReward")
        self._features = features_below(env, "TrainingReward")
        plant, options = self._inner.plant, self._inner.options
        if config.phase != plant.phase:
            raise BiscaleError(f"the config is for {config.phase}, the environment {plant.phase}")
        if (config.price is None) != (self._features.observation_space.shape == (self._plain,)):
            raise BiscaleError("give AgentFeatures the price of the config, and none without one")
        slo_s = plant.slo.bound_s(plant.phase)
        group = WorkloadGroup("environment", plant, options.source, slo_s, plant.slo.attainment)
        self.workloads = WorkloadSet(plant, [group], [options.n_workloads])
        interval_s = plant.settings.min_decision_interval_s
        plants = GroupPlants([group], interval_s)
        self.meter = RewardMeter(config, [group], plants, self.workloads)
        self._goals = targets(config, [group], self.workloads.late_at_max)
        self._start, self._every, self._steps = config.constraint.start, update_every, 0

    @property
    def _plain(self) -> int:
        return self._features._map.dim

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One decision."""
        states, features = self._inner.batch.states, self._features
        before, late = states["tail"].copy(), features.late
        observation, own, terminated, truncated, info = self.env.step(action)
        first = self.workloads.table.begins[int(info["workload"])]
        arrived = (first + before, first + states["tail"])
        effects = self.meter.effects(states, arrived, (late, features.late))
        member = np.array([int(info["ensemble_member"])])
        price = np.array([self._start if features.price is None else features.price])
        finished = states["step_finished"]
        reward = self.meter.reward(effects, finished, GROUP, member, price)
        self._steps += 1
        if self._steps % self._every == 0:
            self.meter.duals.update(self._goals)
        told = {**info, "env_reward": float(own)}
        return observation, float(reward[0]), terminated, truncated, told
