"""The native batch as a Stable-Baselines3 ``VecEnv`` (SB3 is imported only here)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from biscale_env.envs.vector import PhaseVectorEnv


class SB3VecEnv(VecEnv):
    """Adapter to SB3's vector interface.

    Four return values, automatic reset in the same step, ``terminal_observation`` and
    ``TimeLimit.truncated``.
    """

    def __init__(self, env: PhaseVectorEnv) -> None:
        """Wrap a native vector environment."""
        self.env = env
        self._actions: NDArray[Any] = np.zeros(0)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> NDArray[np.float32]:
        """Start all episodes, with the seeds given by ``seed()`` if any."""
        seeds = self._seeds if any(s is not None for s in self._seeds) else None
        obs, _ = self.env.reset(seed=seeds)
        self._reset_seeds()
        return obs

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep the actions for ``step_wait``."""
        self._actions = actions

    def step_wait(
        self,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Step; infos carry cost and energy of each environment."""
        obs, reward, _, truncated, infos = self.env.step(self._actions)
        cost, energy = infos["cost"], infos["energy_j"]
        if truncated.any():  # the last step of an episode is told in final_info
            final = infos["final_info"]
            cost = np.where(truncated, final["cost"], cost)
            energy = np.where(truncated, final["energy_j"], energy)
        rows: list[dict[str, Any]] = [
            {"cost": c, "energy_j": e} for c, e in zip(cost.tolist(), energy.tolist(), strict=True)
        ]
        for i in np.flatnonzero(truncated):
            rows[i]["terminal_observation"] = infos["final_obs"][i]
            rows[i]["TimeLimit.truncated"] = True
        return obs, reward.astype(np.float32), truncated, rows

    def close(self) -> None:
        """Nothing to release."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute of the shared environment, once per environment asked for."""
        return [getattr(self.env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the shared environment."""
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method of the shared environment once."""
        result = getattr(self.env, method_name)(*args, **kwargs)
        return [result] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Environments of the native batch are never wrapped one by one."""
        return [False] * len(list(self._get_indices(indices)))

    def get_images(self) -> Sequence[Any]:
        """There are no images."""
        return [None] * self.num_envs


def make_sb3(phase: str, n_envs: int = 64, **options: Any) -> SB3VecEnv:
    """A native vector environment for SB3; options as for the single environment."""
    return SB3VecEnv(PhaseVectorEnv(phase, n_envs, **options))
