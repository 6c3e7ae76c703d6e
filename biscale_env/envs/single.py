"""The Gymnasium environments of one instance.

``BiScale/Prefill-v0``, ``BiScale/Decode-v0`` and their discrete twins.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.options import EnvOptions, make_options

ROW = np.zeros(1, dtype=np.int64)


def describe_step(batch: Batch, i: int, phase: str) -> dict[str, float]:
    """The ``info`` of one step: five plain floats, none of which depends on wall time."""
    st = batch.states[i]
    violations = float(st["step_violations"])
    return {
        "time_s": float(st["time_s"]),
        "energy_j": float(st["step_energy_j"]),
        "freq_mhz": float(st["step_freq_mean_ghz"]) * 1e3,
        "cost": violations,
        "cost_ttft" if phase == "prefill" else "cost_tpot": violations,
    }


class PhaseEnv(gym.Env[NDArray[np.float32], Any]):
    """One instance of one phase.

    A step is one engine iteration (or as many as fit into ``min_decision_interval_s``).

    Observation: :mod:`biscale_env.contract.observation`. Action: ``[-1, 1]``, shape (1,), over the
        clock range; in the discrete twin an
    index into the GPU's clock levels. Reward: ``- energy / reference energy - weight * requests
    that missed the SLO``; the parts are in ``info`` as energy_j and cost. Episodes are only
    truncated, never terminated.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's convention

    def __init__(self, phase: str, discrete: bool = False, **options: Any) -> None:
        """See :func:`biscale_env.envs.options.make_options` for the options (trace, slo, load,
        ensemble_member, ...).
        """
        self.options: EnvOptions = make_options(phase, **options)
        self.plant = self.options.plant
        self.render_mode = None
        spec = self.plant.spec
        self.observation_space = gym.spaces.Box(spec.low, spec.high, dtype=np.float32)
        self._levels = (
            self.plant.clocks.to_action(np.array(self.plant.clocks.levels_mhz))
            if discrete
            else None
        )
        self.action_space = (
            gym.spaces.Discrete(len(self._levels))
            if self._levels is not None
            else gym.spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)
        )
        self._batch: Batch | None = None
        self._action = np.zeros(1, dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start the next episode.

        Args:
            seed: restarts the sequence of episodes; None continues it.
            options: ``workload`` and ``member`` choose the episode instead of the random sequence.
        """
        super().reset(seed=seed)
        workload, member = self.options.choose(self.np_random, options)
        pool = RequestTable.of(self.plant, [self.options.source.workload(workload)])
        if self._batch is None:
            self._batch = Batch(self.plant, 1, pool)
        else:
            self._batch.use(pool)
        self._batch.reset(ROW, ROW, np.array([member]))
        return self._batch.obs[0].copy(), {
            "workload": float(workload),
            "ensemble_member": float(member),
        }

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """One decision.

        Raises:
            BiscaleError: before the first reset, or a clock level that does not exist.
        """
        batch = self._batch
        if batch is None:
            raise BiscaleError("call reset() before step()")
        self._action[0] = action[0] if self._levels is None else self._level(action)
        batch.step(self._action)
        truncated = bool(batch.states["done"][0])
        return (
            batch.obs[0].copy(),
            float(batch.reward[0]),
            False,
            truncated,
            describe_step(batch, 0, self.plant.phase),
        )

    def _level(self, action: Any) -> np.float32:
        levels = self._levels
        if levels is None or not 0 <= action < len(levels):
            raise BiscaleError(
                f"clock level {action} does not exist: choose 0 to {0 if levels is None else len(levels) - 1}"
            )
        return levels[action]


class PrefillEnv(PhaseEnv):
    """``BiScale/Prefill-v0``: the clock of a prefill instance, a decision per batch."""

    def __init__(self, **options: Any) -> None:
        """Options as for :class:`PhaseEnv`."""
        super().__init__("prefill", **options)


class DecodeEnv(PhaseEnv):
    """``BiScale/Decode-v0``: the clock of a decode instance, a decision per iteration."""

    def __init__(self, **options: Any) -> None:
        """Options as for :class:`PhaseEnv`."""
        super().__init__("decode", **options)
