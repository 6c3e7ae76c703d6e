"""The native vector environment.

N instances stepped by one compiled call, for Gymnasium and (adapted once) for SB3. Episodes, infos
and autoreset modes are those of Gymnasium's ``SyncVectorEnv`` over the single environment.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.actions import ActionReader
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.instance_screen import InstanceScreen
from biscale_env.envs.kpis import MaxClock, kpi_names, kpis_of
from biscale_env.envs.options import check_render_mode, make_options, reset_options, whole
from biscale_env.envs.plain_spec import PlainSpec
from biscale_env.envs.row_tables import RowTables
from biscale_env.render.screen import RENDER_FPS, RENDER_MODES

Infos = dict[str, Any]
Bools = NDArray[np.bool_]


def autoreset_mode_of(mode: AutoresetMode | str) -> AutoresetMode:
    """The mode, given as Gymnasium's or by its name or value.

    Raises:
        BiscaleError: there is no such mode.
    """
    for known in AutoresetMode:
        if mode is known or str(mode).lower() in (known.name.lower(), known.value.lower()):
            return known
    names = ", ".join(known.name for known in AutoresetMode)
    raise BiscaleError(f"there is no autoreset_mode '{mode}': choose one of {names}")


def masked(values: Mapping[str, Any], mask: Bools) -> Infos:
    """Infos with their masks ``_name``, as Gymnasium lays them out."""
    infos: Infos = {}
    for name, value in values.items():
        infos[name], infos[f"_{name}"] = value, mask
    return infos


class PhaseVectorEnv(PlainSpec, VectorEnv[NDArray[np.float32], Any, NDArray[Any]]):
    """``num_envs`` environments of one phase, stepped together.

    Attributes:
        batch: their states and models.
        autoreset_mode: what happens to an environment whose episode has ended. ``SAME_STEP``: it
            restarts in the same step, the last observation and info are ``infos["final_obs"]`` and
            ``infos["final_info"]``; ``NEXT_STEP``: it restarts in the next step, whose action is
            ignored; ``DISABLED``: ``reset(options={"reset_mask": ...})`` restarts it.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium's convention
        "render_modes": list(RENDER_MODES),
        "render_fps": RENDER_FPS,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        phase: str,
        num_envs: int = 1,
        discrete: bool = False,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        kpis: bool = False,
        **options: Any,
    ) -> None:
        """Make all workloads once.

        Args:
            phase: ``prefill`` or ``decode``.
            num_envs: environments.
            discrete: actions are indices of clock levels.
            autoreset_mode: Gymnasium's mode or its name.
            max_episode_steps: an episode is truncated after so many steps.
            render_mode: as for the single environment; :meth:`render` answers for each.
            kpis: tell ``kpis`` at the end of an episode as the single environment does. Keeping the
                time of every request slows 1,024 environments down by up to half, so it has to be
                asked for.
            **options: as for the single environment.

        Raises:
            OptionError: an unknown option or render mode.
            BiscaleError: an impossible value.
        """
        if num_envs < 1:
            raise BiscaleError(f"num_envs must be at least 1, got {num_envs}")
        if max_episode_steps is not None and whole(max_episode_steps, "max_episode_steps") < 1:
            raise BiscaleError(f"max_episode_steps must be at least 1, got {max_episode_steps}")
        check_render_mode(render_mode, self.metadata["render_modes"])
        self.autoreset_mode = autoreset_mode_of(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.options = make_options(phase, **options)
        self.plant = self.options.plant
        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        self.render_mode, self.closed = render_mode, False
        self._make_spaces(discrete)
        source, count = self.options.source, self.options.n_workloads
        self._table = RequestTable.of(self.plant, [source.workload(k) for k in range(count)])
        self._rows = RowTables(self._table, num_envs) if kpis else None
        self._reference = MaxClock(self.plant) if kpis else None
        pool = self._table if self._rows is None else self._rows.pool
        self.batch = Batch(self.plant, num_envs, pool, record=kpis)
        shown = range(num_envs if render_mode is not None else 0)
        self._screens = [InstanceScreen(self.plant, str(render_mode), row) for row in shown]
        self._generators: list[np.random.Generator] = []
        self._steps = np.zeros(num_envs, dtype=np.int64)
        self._ended = np.zeros(num_envs, dtype=bool)
        self._episode = np.zeros((2, num_envs))  # workload, ensemble member
        self._cost_name = "cost_ttft" if phase == "prefill" else "cost_tpot"

    def _make_spaces(self, discrete: bool) -> None:
        spec = self.plant.spec
        self._reader = ActionReader(self.plant.clocks, discrete)
        self.single_observation_space = gym.spaces.Box(spec.low, spec.high, dtype=np.float32)
        self.single_action_space = self._reader.space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def _start(self, rows: NDArray[np.int64], fixed: Mapping[str, Any] | None = None) -> None:
        """Start episodes in some rows."""
        choose, generators = self.options.choose, self._generators
        chosen = np.array([choose(generators[i], fixed) for i in rows], dtype=np.int64)
        known = len(self._table.begins)
        if chosen[:, 0].max() >= known:
            raise BiscaleError(
                f"workload {chosen[:, 0].max()} does not exist here: choose 0 to {known - 1}, or "
                "make the environment with more n_workloads"
            )
        workloads = chosen[:, 0]
        if self._rows is not None:
            workloads = self._rows.take(rows, workloads, self.batch)
        self.batch.reset(rows, workloads, chosen[:, 1])
        self._episode[:, rows] = chosen.T
        self._steps[rows], self._ended[rows] = 0, False
        for i in rows if self._screens else ():
            self._screens[i].begin(self.batch)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], Infos]:
        """Start episodes.

        Args:
            seed: an int seeds environment i with ``seed + i``, a sequence each with its own; None
                continues. Environment i then runs the episodes of a single one with its seed.
            options: ``reset_mask``, bool (n,), restarts only some environments; ``workload`` and
                ``member`` choose the episode instead of the random sequence.

        Raises:
            BiscaleError: a wrong number of seeds, a mask of another shape, an unknown option.
        """
        given = reset_options(options)
        rows = np.flatnonzero(self._mask(given.pop("reset_mask", None)))
        self.options.choose(np.random.default_rng(0), given)  # refused before anything is touched
        self._seed(seed)
        self._start(rows, given)
        return self.batch.obs.copy(), self._infos(rows)

    def _mask(self, given: Any) -> Bools:
        if given is None:
            return np.ones(self.num_envs, dtype=bool)
        mask = np.asarray(given)
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise BiscaleError(
                f"reset_mask must be boolean of shape ({self.num_envs},) and true somewhere, got "
                f"{mask.dtype} of shape {mask.shape}"
            )
        if not self._generators and not mask.all():
            raise BiscaleError("the first reset starts every environment: leave reset_mask out")
        return mask

    def _seed(self, seed: int | Sequence[int | None] | None) -> None:
        if seed is None or isinstance(seed, int | np.integer):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise BiscaleError(
                f"{len(seeds)} seeds for {self.num_envs} environments: give one each"
            )
        if any(s is not None and s < 0 for s in seeds):
            raise BiscaleError(f"a seed must be a whole number of at least 0, got {seed}")
        if not self._generators:
            self._generators = [gym.utils.seeding.np_random(s)[0] for s in seeds]
            return
        for i, s in enumerate(seeds):
            if s is not None:
                self._generators[i] = gym.utils.seeding.np_random(s)[0]

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], Bools, Bools, Infos]:
        """One decision in every environment.

        Raises:
            BiscaleError: before the first reset, actions that are none, or (``DISABLED``) an
                environment whose episode has ended.
        """
        if not self._generators:
            raise BiscaleError("call reset() before step()")
        flat = self._reader.many(actions, self.num_envs)
        restarting = self._ended  # replaced, never written, where it matters
        if self.autoreset_mode is AutoresetMode.DISABLED and restarting.any():
            raise BiscaleError(
                f"the episode of environment {int(np.argmax(restarting))} has ended: reset it with "
                "options={'reset_mask': ...} first"
            )
        batch = self.batch
        batch.step(flat)
        truncated = batch.told.done == 1
        if self.max_episode_steps is not None:
            self._steps += 1
            truncated |= self._steps >= self.max_episode_steps
        reward, ends = batch.reward.copy(), {}
        for i in np.flatnonzero(~restarting) if self._screens else ():
            self._screens[i].step(batch)
        told = {} if self._reference is None else self._kpis(truncated & ~restarting)
        if self.autoreset_mode is not AutoresetMode.SAME_STEP:
            if restarting.any():
                reward[restarting], truncated[restarting] = 0.0, False
                self._start(np.flatnonzero(restarting))
            self._ended, ends = truncated.copy(), told
        elif truncated.any():
            ends = self._restart(truncated.nonzero()[0], told)
        none = np.zeros(self.num_envs, dtype=bool)
        return batch.obs.copy(), reward, none, truncated, {**ends, **self._infos()}

    def _infos(self, rows: NDArray[np.int64] | None = None) -> Infos:
        """What ``info`` of the single environment says, of all rows or some, with masks."""
        table = self.batch.told_table
        if rows is None:
            told, episode = table.copy(), self._episode.copy()
            mask = np.ones(self.num_envs, dtype=bool)
        else:
            told, episode = np.zeros(table.shape), np.zeros(self._episode.shape)
            told[:, rows], episode[:, rows] = table[:, rows], self._episode[:, rows]
            mask = np.zeros(self.num_envs, dtype=bool)
            mask[rows] = True
        time_s, dt, energy_j, freq_mhz, cost, _ = told
        values = {
            "time_s": time_s,
            "dt": dt,
            "energy_j": energy_j,
            "freq_mhz": freq_mhz,
            "cost": cost,
            self._cost_name: cost.copy(),
            "workload": episode[0],
            "ensemble_member": episode[1],
        }
        return masked(values, mask)

    def _kpis(self, ended: Bools) -> Infos:
        """Key figures of the rows whose episode has ended, with masks; empty without any."""
        if self._reference is None or not ended.any():
            return {}
        values = {name: np.zeros(self.num_envs) for name in kpi_names(self.plant.phase)}
        for i in np.flatnonzero(ended):
            workload, member = (int(x) for x in self._episode[:, i])
            mine = kpis_of(self.batch, int(i), int(i), (workload, member), self._reference)
            for name, value in mine.items():
                values[name][i] = value
        return masked({"kpis": masked(values, ended)}, ended)

    def render(self) -> tuple[Any, ...] | None:
        """What each environment shows, as the single one; None without a mode."""
        if not self._screens or self.render_mode == "human":
            return None
        return tuple(screen.frame() for screen in self._screens)

    def _restart(self, rows: NDArray[np.int64], told: Infos) -> Infos:
        """Restart the rows whose episode has ended; what the last step of each said."""
        final = {**self._infos(rows), **told}
        last = np.empty(self.num_envs, dtype=object)  # filled with None
        for i in rows:
            last[i] = self.batch.obs[i].copy()
        self._start(rows)
        return masked({"final_obs": last, "final_info": final}, final["_dt"].copy())


def make_prefill(num_envs: int = 1, **options: Any) -> PhaseVectorEnv:
    """Vector entry point of the prefill ids."""
    return PhaseVectorEnv("prefill", num_envs, **options)


def make_decode(num_envs: int = 1, **options: Any) -> PhaseVectorEnv:
    """Vector entry point of the decode ids."""
    return PhaseVectorEnv("decode", num_envs, **options)
