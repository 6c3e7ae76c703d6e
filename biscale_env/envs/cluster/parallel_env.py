"""The cluster as a PettingZoo ``ParallelEnv``.

Every instance is an agent that chooses its clock.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from pettingzoo import ParallelEnv

from biscale_env.config.cluster_layout import Placement, load_placement
from biscale_env.contract import DECODE_SPEC, PREFILL_SPEC, ClockRange, ObservationSpec
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_options import make_cluster_options
from biscale_env.envs.cluster.cluster_screen import agents_screen, show_interval
from biscale_env.envs.cluster.engine import Cluster
from biscale_env.envs.cluster.instance_observer import ClusterObserver
from biscale_env.envs.options import DEFAULT_LOAD, check_render_mode
from biscale_env.render.screen import RENDER_MODES, Screen

Observations = dict[str, NDArray[np.float32]]
Infos = dict[str, dict[str, float]]
TOTALS = ("energy_j", "cost", "finished", "tokens")
"""What an agent's info says of an interval, in the order of the books."""


class ClusterParallelEnv(ParallelEnv[str, NDArray[np.float32], NDArray[np.float32]]):
    """Every instance of a fixed placement is an agent.

    All choose a clock at once, every ``interval_s``.

    Agents are called ``prefill_0, ..., decode_0, ...``. Observations are those of the
    single-instance environments, actions are [-1, 1] over the clock range. Reward of an agent:
    minus its own energy in reference energies, minus the weight for each request that missed its
    own bound there. All agents are truncated together at the end of the episode.

    Info of an agent: as of a single instance, ``freq_mhz`` the clock in effect, ``cost`` the
    requests that missed its own phase's bound, ``finished`` all that ended there, ``tokens`` the
    rows of the iterations that it began; the same keys for every agent, at reset and step.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "name": "biscale_cluster_v1",
        "render_modes": list(RENDER_MODES),
        "render_fps": 10,
        "is_parallelizable": True,
    }

    def __init__(
        self,
        placement: Placement | str = "default-16",
        interval_s: float = 0.1,
        episode_s: float = 60.0,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        """Make the environment.

        Args:
            placement: a disaggregated placement, its name, or a YAML file.
            interval_s: time between decisions, s.
            episode_s: length of an episode, s.
            render_mode: ``ansi``, ``rgb_array``, ``human`` or None.
            **options: see :func:`biscale_env.envs.cluster.cluster_options.make_cluster_options`;
                without ``load`` and ``rate_rps`` the load is 0.75 of what the placement is
                predicted to serve within the SLO at its clocks.

        Raises:
            BiscaleError: an unknown option or an impossible value.
        """
        check_render_mode(render_mode, self.metadata["render_modes"])
        if options.get("load") is None and options.get("rate_rps") is None:
            options = {**options, "load": DEFAULT_LOAD}
        chosen = load_placement(placement) if isinstance(placement, str) else placement
        if chosen.colocated:
            raise BiscaleError(
                f"placement '{chosen.name}' is co-located: agents need prefill and decode instances"
            )
        if not 0 < interval_s < np.inf:
            raise BiscaleError(f"interval_s must be a positive number of seconds, got {interval_s}")
        self.placement, self.render_mode = chosen, render_mode
        self.interval_s, self.episode_s = interval_s, episode_s
        self.options = make_cluster_options(episode_s, lambda of: of.goodput_rps(chosen), **options)
        tps = {
            f"{phase}_{k}": group.tp
            for phase in ("prefill", "decode")
            for k, group in enumerate(chosen.instances(phase))
        }
        self.possible_agents = list(tps)
        self.agents: list[str] = []
        self._number = {agent: k for k, agent in enumerate(tps)}
        self._tps = tps
        self._energy_ref_j = {
            agent: self.options.plant.plant(self.spec_of(agent).name, tp).energy_ref_j
            for agent, tp in tps.items()
        }
        self._spaces = {
            spec.name: gym.spaces.Box(spec.low, spec.high, dtype=np.float32)
            for spec in (PREFILL_SPEC, DECODE_SPEC)
        }
        self._action_spaces = {
            agent: gym.spaces.Box(-1.0, 1.0, (1,), dtype=np.float32) for agent in tps
        }
        self._rng = np.random.default_rng()
        self.cluster: Cluster | None = None
        self._screen: Screen | None = None

    def spec_of(self, agent: str) -> ObservationSpec:
        """Meaning of an agent's observation."""
        return PREFILL_SPEC if agent.startswith("prefill") else DECODE_SPEC

    def tp_of(self, agent: str) -> int:
        """GPUs of an agent's instance."""
        return self._tps[agent]

    @property
    def clocks(self) -> ClockRange:
        """Clocks that actions are over; those of all agents."""
        group = self.placement.groups[0]
        return self.options.plant.plant(group.phase, group.tp).clocks

    def observation_space(self, agent: str) -> gym.spaces.Space[Any]:
        """Space of an agent's observation."""
        return self._spaces[self.spec_of(agent).name]

    def action_space(self, agent: str) -> gym.spaces.Space[Any]:
        """Space of an agent's action."""
        return self._action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, Infos]:
        """Start the next episode.

        Args:
            seed: restarts the sequence of episodes; None continues it.
            options: ``workload`` chooses the episode; others are ignored, as PettingZoo's own
                tests expect.

        Returns:
            Observations and infos per agent; the infos have the keys of those of a step.
        """
        if seed is not None:
            self._rng = np.random.default_rng(np.random.SeedSequence(seed))
        fixed = {key: value for key, value in (options or {}).items() if key == "workload"}
        self._workload = self.options.choose(self._rng, fixed)
        self.cluster = Cluster(self.options.plant, self.placement)
        self._observer = ClusterObserver(self.cluster)
        self.cluster.offer(self.options.source.workload(self._workload))
        self.agents = list(self.possible_agents)
        self._read = self._totals()
        if self.render_mode is not None:
            self._screen = agents_screen(self.render_mode, self.cluster)
        clocks_mhz = self._clocks_mhz()
        return self._observations(), {
            agent: self._info([0.0] * len(TOTALS), clocks_mhz[self._number[agent]])
            for agent in self.agents
        }

    def _info(self, changes: Sequence[float], freq_mhz: float) -> dict[str, float]:
        assert self.cluster is not None
        now_s = self.cluster.time_s
        return {
            "time_s": now_s,
            "dt": self.interval_s if now_s > 0 else 0.0,
            **dict(zip(TOTALS, changes, strict=True)),
            "freq_mhz": freq_mhz,
            "workload": float(self._workload),
            "ensemble_member": float(self.options.plant.settings.ensemble_member),
        }

    def _clocks_mhz(self) -> list[float]:
        """Clock in effect per agent, MHz."""
        assert self.cluster is not None
        pools = (self.cluster.prefills.states, self.cluster.decodes.states)
        ghz: list[float] = np.concatenate([states["freq_ghz"] for states in pools]).tolist()
        return [1e3 * freq for freq in ghz]

    def _totals(self) -> NDArray[np.float64]:
        """Per agent: what of :data:`TOTALS` there was so far, (agents, totals)."""
        assert self.cluster is not None
        pools = (self.cluster.prefills, self.cluster.decodes)
        parts = [
            [
                *(p.states[name] for name in ("energy_j", "violations", "finished")),
                p.meta["work_tokens"],
            ]
            for p in pools
        ]
        return np.concatenate([np.stack(part, axis=1) for part in parts]).astype(np.float64)

    def _observations(self) -> Observations:
        return {agent: self._observer.observe(self._number[agent])[1] for agent in self.agents}

    def step(
        self, actions: Mapping[str, NDArray[np.float32]]
    ) -> tuple[Observations, dict[str, float], dict[str, bool], dict[str, bool], Infos]:
        """All agents choose, then ``interval_s`` pass.

        Args:
            actions: a number in [-1, 1] per agent, or an array with one; an agent without an action
                keeps its clock.

        Raises:
            BiscaleError: before the first reset, after the end, or not an action.
        """
        cluster = self.cluster
        if cluster is None or not self.agents:
            raise BiscaleError("call reset() before step()")
        chosen = {agent: self._freq_mhz(agent, action) for agent, action in actions.items()}
        for agent, freq_mhz in chosen.items():
            self._observer.set_clock(self._number[agent], freq_mhz)
        cluster.advance(cluster.time_s + self.interval_s)
        now = self._totals()
        changes = (now - self._read).tolist()
        energy_j, missed, *_ = (now - self._read).T
        self._read = now
        over = cluster.time_s >= self.episode_s - 1e-9
        if self._screen is not None:
            total = (self.interval_s, float(energy_j.sum()), float(missed.sum()))
            show_interval(self._screen, cluster, *total)
        agents, observations = self.agents, self._observations()
        clocks_mhz = self._clocks_mhz()
        rewards: dict[str, float] = {}
        infos: Infos = {}
        for agent in agents:
            k, weight = self._number[agent], self.options.violation_weight
            rewards[agent] = float(-energy_j[k] / self._energy_ref_j[agent] - weight * missed[k])
            infos[agent] = self._info(changes[k], clocks_mhz[k])
        if over:
            self.agents = []
        ends, never = dict.fromkeys(agents, over), dict.fromkeys(agents, False)
        return observations, rewards, never, ends, infos

    def _freq_mhz(self, agent: str, action: Any) -> float:
        """Clock that an agent's action means, MHz."""
        if agent not in self._number:
            known = ", ".join(self.possible_agents)
            raise BiscaleError(f"there is no agent '{agent}'; agents are {known}")
        try:
            value = np.asarray(action, dtype=np.float64)
        except (TypeError, ValueError):
            value = np.empty(0)
        if value.size != 1 or np.isnan(value).any():
            raise BiscaleError(f"the action of {agent} must be one number in [-1, 1], got {action}")
        return self._observer.freq_mhz(self.spec_of(agent).name, float(value.item()))

    def render(self) -> Any:
        """The last ten seconds: text (``ansi``) or a picture (``rgb_array``), else None."""
        if self._screen is None or self.render_mode == "human":
            return None
        return self._screen.frame()

    def close(self) -> None:
        """Nothing to release."""
