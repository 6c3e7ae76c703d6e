"""The Gymnasium environments of one instance.

``BiScale/Prefill-v1``, ``BiScale/Decode-v1`` and their discrete twins.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.actions import ActionReader
from biscale_env.envs.batch import Batch
from biscale_env.envs.options import EnvOptions, check_render_mode, make_options
from biscale_env.envs.plain_spec import PlainSpec
from biscale_env.envs.plant import Plant
from biscale_env.envs.workload_tables import WorkloadTables

ROW = np.zeros(1, dtype=np.int64)


class PhaseEnv(PlainSpec, gym.Env[NDArray[np.float32], Any]):
    """One instance of one phase.

    A step is one engine iteration (or as many as fit into ``min_decision_interval_s``).

    Observation: :mod:`biscale_env.contract.observation`. Action: ``[-1, 1]``, shape (1,), over the
    clock range; in the discrete twin an index into the GPU's clock levels. Reward: ``- energy /
    reference energy - weight * SLO-violating requests``; the parts are in ``info`` as energy_j and
    cost. Episodes are only truncated, never terminated.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - Gymnasium's convention

    def __init__(
        self, phase: str, discrete: bool = False, render_mode: str | None = None, **options: Any
    ) -> None:
        """Make the plant and its workloads.

        Args:
            phase: ``prefill`` or ``decode``.
            discrete: actions are indices of clock levels.
            render_mode: None; there is nothing to show yet.
            **options: see :func:`biscale_env.envs.options.make_options`.

        Raises:
            OptionError: an unknown option or render mode.
            BiscaleError: an impossible value.
        """
        check_render_mode(render_mode, self.metadata["render_modes"])
        self.render_mode = render_mode
        self.options: EnvOptions = make_options(phase, **options)
        self.plant = self.options.plant
        spec = self.plant.spec
        self.observation_space = gym.spaces.Box(spec.low, spec.high, dtype=np.float32)
        self._reader = ActionReader(self.plant.clocks, discrete)
        self.action_space = self._reader.space
        self._tables = WorkloadTables(self.plant, self.options.source)
        self._batch: Batch | None = None
        self._action = np.zeros(1, dtype=np.float32)
        self._episode = (0, -1)  # workload, ensemble member
        self._cost_name = "cost_ttft" if phase == "prefill" else "cost_tpot"

    @property
    def world(self) -> Plant:
        """The plant, under the name that scripts of version 0.1 know."""
        return self.plant

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
        table = self._tables.of(workload)
        if self._batch is None:
            self._batch = Batch(self.plant, 1, table)
        else:
            self._batch.use(table)
        self._batch.reset(ROW, ROW, np.array([member]))
        self._episode = workload, member
        return self._batch.obs[0].copy(), self._info(self._batch)

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """One decision.

        Raises:
            BiscaleError: before the first reset, or an action that is none.
        """
        batch = self._batch
        if batch is None:
            raise BiscaleError("call reset() before step()")
        self._action[0] = self._reader.one(action)
        batch.step(self._action)
        truncated = bool(batch.states["done"][0])
        return (
            batch.obs[0].copy(),
            float(batch.reward[0]),
            False,
            truncated,
            self._info(batch),
        )

    def _info(self, batch: Batch) -> dict[str, float]:
        """Plain floats, none of which depends on wall time; the same keys at reset and step."""
        st = batch.states[0]
        violations = float(st["step_violations"])
        return {
            "time_s": float(st["time_s"]),
            "energy_j": float(st["step_energy_j"]),
            "freq_mhz": float(st["step_freq_mean_ghz"]) * 1e3,
            "cost": violations,
            self._cost_name: violations,
            "workload": float(self._episode[0]),
            "ensemble_member": float(self._episode[1]),
        }


class PrefillEnv(PhaseEnv):
    """``BiScale/Prefill-v1``: the clock of a prefill instance, a decision per batch."""

    def __init__(self, **options: Any) -> None:
        """Options as for :class:`PhaseEnv`."""
        super().__init__("prefill", **options)


class DecodeEnv(PhaseEnv):
    """``BiScale/Decode-v1``: the clock of a decode instance, a decision per iteration."""

    def __init__(self, **options: Any) -> None:
        """Options as for :class:`PhaseEnv`."""
        super().__init__("decode", **options)
