"""The native batch as a Stable-Baselines3 ``VecEnv`` (SB3 is imported only here)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorWrapper
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.vector import PhaseVectorEnv

NativeVector = PhaseVectorEnv | VectorWrapper
TOLD = ("cost", "energy_j", "dt")


class SB3VecEnv(VecEnv):
    """Adapter to SB3's vector interface.

    Four return values, automatic reset in the same step, ``terminal_observation`` and
    ``TimeLimit.truncated``.
    """

    def __init__(self, env: NativeVector) -> None:
        """Wrap a native vector environment, or a vector wrapper around one.

        Raises:
            BiscaleError: its autoreset mode is not SAME_STEP.
        """
        mode = env.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise BiscaleError(
                f"Stable-Baselines3 restarts episodes in the same step: make the vector "
                f"environment with autoreset_mode SAME_STEP, not {mode}"
            )
        self.env = env
        self._actions: NDArray[Any] = np.zeros(0)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> NDArray[np.float32]:
        """Start all episodes, with the seeds given by ``seed()`` if any."""
        seeds = self._seeds if any(s is not None for s in self._seeds) else None
        obs, _ = self.env.reset(seed=seeds)  # type: ignore[arg-type]
        self._reset_seeds()
        return obs

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep the actions for ``step_wait``."""
        self._actions = actions

    def step_wait(
        self,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Step; infos carry cost, energy and length of the step of each environment.

        At the end of an episode also ``kpis``, if the environment tells them.
        """
        obs, reward, _, truncated, infos = self.env.step(self._actions)
        told = {name: infos[name] for name in TOLD}
        if truncated.any():  # the last step of an episode is told in final_info
            final = infos["final_info"]
            told = {name: np.where(truncated, final[name], told[name]) for name in TOLD}
        columns = [value.tolist() for value in told.values()]
        rows: list[dict[str, Any]] = [
            dict(zip(TOLD, values, strict=True)) for values in zip(*columns, strict=True)
        ]
        for i in np.flatnonzero(truncated):
            rows[i]["terminal_observation"] = infos["final_obs"][i]
            rows[i]["TimeLimit.truncated"] = True
            if "kpis" in infos["final_info"]:
                kpis = infos["final_info"]["kpis"]
                names = [name for name in kpis if not name.startswith("_")]
                rows[i]["kpis"] = {name: float(kpis[name][i]) for name in names}
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


def make_sb3(
    phase: str,
    n_envs: int = 64,
    *,
    monitor: bool = True,
    normalize_reward: float | None = None,
    **options: Any,
) -> VecEnv:
    """A native vector environment for SB3.

    Args:
        phase: ``prefill`` or ``decode``.
        n_envs: environments.
        monitor: tell return and length of each episode (SB3's ``VecMonitor``), so that they are
            logged.
        normalize_reward: divide rewards by the spread of their discounted sum (SB3's
            ``VecNormalize``) with this discount, the algorithm's ``gamma``; None leaves them as
            they are. A missed request costs 30 reference energies, a step mostly one: without it a
            value network explains next to nothing for long.
        **options: as for the single environment.
    """
    env: VecEnv = SB3VecEnv(PhaseVectorEnv(phase, n_envs, **options))
    if monitor:
        env = VecMonitor(env)
    if normalize_reward is not None:
        env = VecNormalize(env, norm_obs=False, gamma=normalize_reward)
    return env
