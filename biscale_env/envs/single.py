"""The Gymnasium environments of one instance.

``BiScale/Prefill-v1``, ``BiScale/Decode-v1`` and their discrete twins.
"""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.actions import ActionReader
from biscale_env.envs.batch import Batch
from biscale_env.envs.instance_screen import InstanceScreen
from biscale_env.envs.kpis import MaxClock, kpis_of
from biscale_env.envs.loads.workload_tables import WorkloadTables
from biscale_env.envs.options import EnvOptions, check_render_mode, make_options
from biscale_env.envs.plain_spec import PlainSpec
from biscale_env.envs.plant import Plant
from biscale_env.render.screen import RENDER_FPS, RENDER_MODES

ROW = np.zeros(1, dtype=np.int64)


class PhaseEnv(PlainSpec, gym.Env[NDArray[np.float32], Any]):
    """One instance of one phase.

    A step is one engine iteration (or as many as fit into ``min_decision_interval_s``), and what it
    waits for work after it: steps differ in length, and a low clock makes long ones. A discount per
    step therefore prefers high clocks; ``info["dt"]`` is the length, and
    :class:`biscale_env.wrappers.TimeDiscount` discounts by time.

    Observation: :mod:`biscale_env.contract.observation`. Action: ``[-1, 1]``, shape (1,), over the
    clock range; in the discrete twin an index into the GPU's clock levels. Reward: ``- energy /
    reference energy - weight * SLO-violating requests``; the parts are in ``info`` as energy_j and
    cost. Episodes are only truncated, never terminated.

    Info: ``time_s`` (since the start of the episode), ``dt`` (length of the step, s), ``energy_j``
    (of the step), ``freq_mhz`` (mean clock while busy), ``cost`` and ``cost_ttft`` or ``cost_tpot``
    (requests of the step that missed their SLO), ``workload``, ``ensemble_member``; at the end of
    an episode ``kpis`` (see :func:`biscale_env.envs.kpis.kpis_of`).
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium's convention
        "render_modes": list(RENDER_MODES),
        "render_fps": RENDER_FPS,
    }

    def __init__(
        self,
        phase: str,
        discrete: bool = False,
        render_mode: str | None = None,
        kpis: bool = True,
        **options: Any,
    ) -> None:
        """Make the plant and its workloads.

        Args:
            phase: ``prefill`` or ``decode``.
            discrete: actions are indices of clock levels.
            render_mode: ``ansi``: text; ``rgb_array``: a picture; ``human``: text in the terminal
                at every step; None: nothing is kept for it.
            kpis: tell ``info["kpis"]`` at the end of an episode of its own; where a wrapper cuts it
                off before, ask :meth:`kpis`.
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
        self._told = 0.0, -1.0
        self._cost_name = "cost_ttft" if phase == "prefill" else "cost_tpot"
        self._reference = MaxClock(self.plant) if kpis else None
        self._screen = None if render_mode is None else InstanceScreen(self.plant, render_mode)

    @property
    def world(self) -> Plant:
        """The plant, under the name that scripts of version 0.1 know."""
        return self.plant

    @property
    def batch(self) -> Batch:
        """The simulator's records, a batch of one.

        Raises:
            BiscaleError: before the first reset.
        """
        if self._batch is None:
            raise BiscaleError("call reset() first: no episode has begun")
        return self._batch

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
            self._batch = Batch(self.plant, 1, table, record=self._reference is not None)
        else:
            self._batch.use(table)
        self._episode, self._told = (workload, member), (float(workload), float(member))
        return self.restart()

    def restart(
        self, changes: Mapping[str, NDArray[np.float64]] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start the present episode again, with other engine parameters if any are given.

        Args:
            changes: see :meth:`biscale_env.envs.batch.Batch.reset`, arrays of one value.

        Raises:
            BiscaleError: before the first reset, or an unknown parameter.
        """
        batch = self.batch
        batch.finish_s.fill(np.nan)
        batch.reset(ROW, ROW, np.array([self._episode[1]]), changes)
        if self._screen is not None:
            self._screen.begin(batch)
        return batch.obs[0].copy(), self._info(batch)

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
        truncated = batch.told.done.item() == 1
        info = self._info(batch)
        if truncated and self._reference is not None:
            info["kpis"] = self.kpis()
        if self._screen is not None:
            self._screen.step(batch)
        return batch.obs[0].copy(), batch.reward.item(), False, truncated, info

    def _info(self, batch: Batch) -> dict[str, Any]:
        """Plain floats, none of which depends on wall time; the same keys at reset and step."""
        told, (workload, member) = batch.told, self._told
        violations = told.cost.item()
        return {
            "time_s": told.time_s.item(),
            "dt": told.dt.item(),
            "energy_j": told.energy_j.item(),
            "freq_mhz": told.freq_mhz.item(),
            "cost": violations,
            self._cost_name: violations,
            "workload": workload,
            "ensemble_member": member,
        }

    def kpis(self) -> dict[str, float]:
        """Key figures of the episode up to now; see :func:`biscale_env.envs.kpis.kpis_of`.

        Raises:
            BiscaleError: before the first reset, or the environment was made with ``kpis=False``.
        """
        if self._reference is None:
            raise BiscaleError("there are no kpis: make the environment without kpis=False")
        return kpis_of(self.batch, 0, 0, self._episode, self._reference)

    def render(self) -> Any:
        """The last ten seconds: text (``ansi``) or a picture (``rgb_array``), else None.

        Raises:
            BiscaleError: pictures are asked for and Pillow is not installed.
        """
        if self._screen is None or self.render_mode == "human":
            return None
        return self._screen.frame()


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
