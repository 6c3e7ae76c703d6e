"""The native vector environment.

N instances stepped by one compiled call, for Gymnasium and (adapted once) for SB3.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.options import make_options

DEFAULT_POOL = 64  # workloads made at construction; episodes are drawn from them


class PhaseVectorEnv(VectorEnv[NDArray[np.float32], Any, NDArray[Any]]):
    """n copies of one phase. Finished episodes restart in the same step.

    The last observation is ``infos["final_obs"]``.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        phase: str,
        num_envs: int = 1,
        discrete: bool = False,
        n_workloads: int = DEFAULT_POOL,
        **options: Any,
    ) -> None:
        """Make all workloads once.

        Args:
            phase: ``prefill`` or ``decode``.
            num_envs: copies.
            discrete: actions are indices of clock levels.
            n_workloads: workloads that episodes are drawn from.
            **options: as for the single environment.
        """
        if num_envs < 1:
            raise BiscaleError(f"num_envs must be at least 1, got {num_envs}")
        self.options = make_options(phase, n_workloads=n_workloads, **options)
        self.plant = self.options.plant
        self.num_envs = num_envs
        spec = self.plant.spec
        self.single_observation_space = gym.spaces.Box(spec.low, spec.high, dtype=np.float32)
        self._levels = (
            self.plant.clocks.to_action(np.array(self.plant.clocks.levels_mhz))
            if discrete
            else None
        )
        self.single_action_space: gym.Space[Any] = (
            gym.spaces.Discrete(len(self._levels))
            if self._levels is not None
            else gym.spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        pool = RequestTable.of(
            self.plant, [self.options.source.workload(k) for k in range(n_workloads)]
        )
        self.batch = Batch(self.plant, num_envs, pool)
        self._generators: list[np.random.Generator] = []
        self._cost_name = "cost_ttft" if phase == "prefill" else "cost_tpot"
        self.render_mode = None
        self.closed = False

    def _start(self, rows: NDArray[np.int64]) -> None:
        chosen = np.array([self.options.choose(self._generators[i]) for i in rows], dtype=np.int64)
        self.batch.reset(rows, chosen[:, 0], chosen[:, 1])

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start all episodes; an int seeds copy i with ``seed + i``, as Gymnasium does.

        ``options={"reset_mask": bool (n,)}`` restarts only some copies.
        """
        seeds = (
            [None if seed is None else seed + i for i in range(self.num_envs)]
            if seed is None or isinstance(seed, int | np.integer)
            else seed
        )
        if not self._generators or seed is not None:
            fresh = [np.random.default_rng(np.random.SeedSequence(s)) for s in seeds]
            old = self._generators or fresh
            self._generators = [
                g if s is not None else o for g, o, s in zip(fresh, old, seeds, strict=True)
            ]
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool)))
        self._start(np.flatnonzero(mask))
        return self.batch.obs.copy(), {}

    def _of_levels(self, indices: NDArray[Any]) -> NDArray[np.float32]:
        levels = self._levels
        if levels is None or indices.min() < 0 or indices.max() >= len(levels):
            raise BiscaleError(
                f"clock levels must be 0 to {0 if levels is None else len(levels) - 1}, got {indices}"
            )
        return levels[indices]

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[
        NDArray[np.float32],
        NDArray[np.float64],
        NDArray[np.bool_],
        NDArray[np.bool_],
        dict[str, Any],
    ]:
        """One decision in every copy.

        Raises:
            BiscaleError: before the first reset, or a clock level that does not exist.
        """
        if not self._generators:
            raise BiscaleError("call reset() before step()")
        flat = np.asarray(actions).reshape(self.num_envs)
        if self._levels is not None:
            flat = self._of_levels(flat)
        batch = self.batch
        batch.step(np.ascontiguousarray(flat, dtype=np.float32))
        states = batch.states
        truncated = states["done"] == 1
        reward = batch.reward.copy()
        cost = states["step_violations"].astype(np.float64)
        infos: dict[str, Any] = {
            "time_s": states["time_s"].copy(),
            "energy_j": states["step_energy_j"].copy(),
            "freq_mhz": states["step_freq_mean_ghz"] * 1e3,
            "cost": cost,
            self._cost_name: cost,
        }
        if truncated.any():
            ended = np.flatnonzero(truncated)
            infos["final_obs"] = np.empty(self.num_envs, dtype=object)  # filled with None
            for i in ended:
                infos["final_obs"][i] = batch.obs[i].copy()
            infos["_final_obs"] = truncated.copy()
            self._start(ended)
        return batch.obs.copy(), reward, np.zeros(self.num_envs, dtype=bool), truncated, infos


def make_prefill(num_envs: int = 1, **options: Any) -> PhaseVectorEnv:
    """Vector entry point of the prefill ids."""
    return PhaseVectorEnv("prefill", num_envs, **options)


def make_decode(num_envs: int = 1, **options: Any) -> PhaseVectorEnv:
    """Vector entry point of the decode ids."""
    return PhaseVectorEnv("decode", num_envs, **options)
