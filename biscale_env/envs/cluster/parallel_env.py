"""The cluster as a PettingZoo ``ParallelEnv``.

Every instance is an agent that chooses its clock.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from pettingzoo import ParallelEnv

from biscale_env.config.cluster_layout import Placement, load_placement
from biscale_env.contract import DECODE_SPEC, PREFILL_SPEC, ObservationSpec
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_options import make_cluster_options
from biscale_env.envs.cluster.engine import Cluster
from biscale_env.envs.cluster.instance_observer import ClusterObserver

VIOLATION_WEIGHT = 30.0  # as in the single-instance environments


class ClusterParallelEnv(ParallelEnv[str, NDArray[np.float32], NDArray[np.float32]]):
    """Every instance of a fixed placement is an agent.

    All choose a clock at once, every ``interval_s``.

    Agents are called ``prefill_0, ..., decode_0, ...``. Observations are those of the
    single-instance environments, actions are [-1, 1] over the clock range. Reward of an agent:
    minus its own energy in reference energies, minus the weight for each request that missed its
    own bound there. All agents are truncated together at the end of the episode.
    """

    metadata = {"name": "biscale_cluster_v0", "render_modes": [], "is_parallelizable": True}  # noqa: RUF012

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
            render_mode: none is supported.
            **options: see :func:`biscale_env.envs.cluster.cluster_options.make_cluster_options`.
        """
        self.placement = load_placement(placement) if isinstance(placement, str) else placement
        if self.placement.colocated:
            raise BiscaleError(
                f"placement '{self.placement.name}' is co-located: agents need prefill and decode instances"
            )
        if not interval_s > 0:
            raise BiscaleError(f"interval_s must be positive, got {interval_s:g}")
        self.interval_s, self.episode_s, self.render_mode = interval_s, episode_s, render_mode
        self.options = make_cluster_options(episode_s, **options)
        phases = ("prefill", "decode")
        self.possible_agents = [
            f"{ph}_{k}" for ph in phases for k in range(len(self.placement.instances(ph)))
        ]
        self.agents: list[str] = []
        self._number = {agent: k for k, agent in enumerate(self.possible_agents)}
        self._spaces = {
            spec.name: gym.spaces.Box(spec.low, spec.high, dtype=np.float32)
            for spec in (PREFILL_SPEC, DECODE_SPEC)
        }
        self._action_spaces = {
            a: gym.spaces.Box(-1.0, 1.0, (1,), dtype=np.float32) for a in self.possible_agents
        }
        self._rng = np.random.default_rng()
        self.cluster: Cluster | None = None

    def spec_of(self, agent: str) -> ObservationSpec:
        """Meaning of an agent's observation."""
        return PREFILL_SPEC if agent.startswith("prefill") else DECODE_SPEC

    def observation_space(self, agent: str) -> gym.spaces.Space[Any]:
        """Space of an agent's observation."""
        return self._spaces[self.spec_of(agent).name]

    def action_space(self, agent: str) -> gym.spaces.Space[Any]:
        """Space of an agent's action."""
        return self._action_spaces[agent]

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, dict[str, Any]]]:
        """Start the next episode; ``options`` may fix the ``workload`` (others are ignored, as
        PettingZoo's own tests expect).
        """
        if seed is not None:
            self._rng = np.random.default_rng(np.random.SeedSequence(seed))
        fixed = {key: value for key, value in (options or {}).items() if key == "workload"}
        workload = self.options.choose(self._rng, fixed)
        self.cluster = Cluster(self.options.plant, self.placement)
        self._observer = ClusterObserver(self.cluster)
        self.cluster.offer(self.options.source.workload(workload))
        self.agents = list(self.possible_agents)
        self._read = self._totals()
        return self._observations(), {agent: {"workload": float(workload)} for agent in self.agents}

    def _totals(self) -> NDArray[np.float64]:
        """Per agent: energy and violations so far, (agents, 2)."""
        assert self.cluster is not None
        pools = (self.cluster.prefills.states, self.cluster.decodes.states)
        return np.concatenate(
            [np.stack([s["energy_j"], s["violations"]], axis=1) for s in pools]
        ).astype(np.float64)

    def _observations(self) -> dict[str, NDArray[np.float32]]:
        return {agent: self._observer.observe(self._number[agent])[1] for agent in self.agents}

    def step(
        self, actions: dict[str, NDArray[np.float32]]
    ) -> tuple[
        dict[str, NDArray[np.float32]],
        dict[str, float],
        dict[str, bool],
        dict[str, bool],
        dict[str, dict[str, Any]],
    ]:
        """All agents choose, then ``interval_s`` pass.

        Raises:
            BiscaleError: before the first reset or after the end.
        """
        cluster = self.cluster
        if cluster is None or not self.agents:
            raise BiscaleError("call reset() before step()")
        for agent, action in actions.items():
            freq = self._observer.freq_mhz(self.spec_of(agent).name, float(np.ravel(action)[0]))
            self._set_clock(self._number[agent], freq)
        cluster.advance(cluster.time_s + self.interval_s)
        now = self._totals()
        energy, missed = (now - self._read).T
        self._read = now
        over = cluster.time_s >= self.episode_s - 1e-9
        agents = self.agents
        observations = self._observations()
        rewards, infos = {}, {}
        for agent in agents:
            k = self._number[agent]
            reference = self.options.plant.plant(
                self.spec_of(agent).name, self._tp(agent)
            ).energy_ref_j
            rewards[agent] = float(-energy[k] / reference - VIOLATION_WEIGHT * missed[k])
            infos[agent] = {
                "time_s": cluster.time_s,
                "energy_j": float(energy[k]),
                "cost": float(missed[k]),
            }
        if over:
            self.agents = []
        return (
            observations,
            rewards,
            dict.fromkeys(agents, False),
            dict.fromkeys(agents, over),
            infos,
        )

    def _tp(self, agent: str) -> int:
        phase, number = agent.split("_")
        return self.placement.instances(phase)[int(number)].tp

    def _set_clock(self, number: int, freq_mhz: float) -> None:
        assert self.cluster is not None
        phase, i = self._observer.phase_of(number)
        pool = self.cluster.prefills if phase == "prefill" else self.cluster.decodes
        pool.meta[i]["base_ghz"] = freq_mhz / 1e3

    def render(self) -> None:
        """Nothing to draw; the figures of the report show runs."""

    def close(self) -> None:
        """Nothing to release."""
