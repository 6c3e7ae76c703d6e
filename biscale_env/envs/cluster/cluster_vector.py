"""The vector form of ``BiScale/Cluster-v1``: Gymnasium's ``SyncVectorEnv`` over shared settings."""

import copy
from functools import partial
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_env import ClusterEnv
from biscale_env.envs.options import whole
from biscale_env.envs.plain_spec import PlainSpec
from biscale_env.envs.vector import autoreset_mode_of


def _another(first: ClusterEnv, max_episode_steps: int | None) -> "gym.Env[Any, Any]":
    """An environment before its first reset that shares what does not change."""
    env = copy.copy(first)
    env.action_space = copy.deepcopy(first.action_space)
    env._screen = copy.deepcopy(first._screen)
    return env if max_episode_steps is None else TimeLimit(env, max_episode_steps)


class ClusterVectorEnv(PlainSpec, SyncVectorEnv):
    """``num_envs`` clusters, one after the other: a step runs a whole window in compiled code.

    Plants, placements and capacities are loaded once. Sub-environment i, seeded with ``seed + i``,
    is the single environment with that seed. For a process per sub-environment:
    ``gym.make_vec("BiScale/Cluster-v1", vectorization_mode="async")``.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        max_episode_steps: int | None = None,
        **options: Any,
    ) -> None:
        """Make the sub-environments.

        Args:
            num_envs: how many.
            autoreset_mode: Gymnasium's mode or its name.
            max_episode_steps: an episode is truncated after so many windows.
            **options: as for :class:`biscale_env.envs.cluster.cluster_env.ClusterEnv`.

        Raises:
            OptionError: an unknown option or render mode.
            BiscaleError: an impossible value.
        """
        if num_envs < 1:
            raise BiscaleError(f"num_envs must be at least 1, got {num_envs}")
        if max_episode_steps is not None and whole(max_episode_steps, "max_episode_steps") < 1:
            raise BiscaleError(f"max_episode_steps must be at least 1, got {max_episode_steps}")
        make = partial(_another, ClusterEnv(**options), max_episode_steps)
        super().__init__([make] * num_envs, autoreset_mode=autoreset_mode_of(autoreset_mode))
