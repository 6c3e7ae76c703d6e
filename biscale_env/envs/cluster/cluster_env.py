"""``BiScale/Cluster-v0``: the coarse loop as an environment.

A step is one window, the action is the placement with its base clocks.
"""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from biscale_env.config.cluster_layout import Placement
from biscale_env.config.slo import within
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_options import (
    ClusterOptions,
    enumerate_placements,
    make_cluster_options,
)
from biscale_env.envs.cluster.whole_run import Window, WindowedRun, cut
from biscale_env.traces import Trace

VIOLATION_WEIGHT = 30.0  # as in the single-instance environments
# name, unit, scale: encoded = value / scale, clipped to [0, 100]; all of the window before, all 0
# at the start
FEATURES = (
    ("arrival_rate", "req/s", 30.0),
    ("arrival_rate_change", "ratio to the window before it", 1.0),
    ("prompt_mean", "tokens", 1000.0),
    ("prompt_p99", "tokens", 4000.0),
    ("output_mean", "tokens", 300.0),
    ("gap_cv", "coefficient of variation", 1.0),
    ("attainment_ttft", "share", 1.0),
    ("attainment_tpot", "share", 1.0),
    ("prefill_power", "W", 5000.0),
    ("decode_power", "W", 5000.0),
    ("in_flight", "requests", 500.0),
    ("prefill_gpus", "GPUs", 16.0),
    ("decode_gpus", "GPUs", 16.0),
    ("prefill_freq", "MHz", 1980.0),
    ("decode_freq", "MHz", 1980.0),
    ("slo_ttft", "s", 1.0),
    ("slo_tpot", "s", 0.1),
)
SCALE = np.array([f[2] for f in FEATURES])
HIGH = 100.0


class ClusterEnv(gym.Env[NDArray[np.float32], Any]):
    """The coarse loop: at every window the agent sees what happened in the last one and chooses the
    placement for the next.

    Action: index into ``placements`` (every number of instances, TP and base clock per phase that
        fits the GPUs). With capacities given,
    :meth:`action_masks` leaves out what cannot serve the load of the last window. Tier 2 runs
    inside (``prefill_policy``, ``decode_policy``). Reward: minus energy of all GPUs relative to a
    reference, minus a weight per request that misses the SLO, both per request at the nominal rate.
    Episodes are only truncated, never terminated; requests still in flight then are not judged.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - Gymnasium's convention

    def __init__(
        self,
        windows: int = 12,
        window_s: float = 300.0,
        freqs_mhz: tuple[float, ...] | None = None,
        capacities_rps: Mapping[tuple[str, int, float], float] | None = None,
        prefill_policy: str = "mpc",
        decode_policy: str = "slack",
        **options: Any,
    ) -> None:
        """Make the environment.

        Args:
            windows: steps per episode.
            window_s: length of a window, s.
            freqs_mhz: base clocks to choose from, MHz.
            capacities_rps: load that one instance of (phase, TP, clock) serves, for the mask.
            prefill_policy: tier-2 rule of prefill.
            decode_policy: tier-2 rule of decode.
            **options: see :func:`biscale_env.envs.cluster.cluster_options.make_cluster_options`.
        """
        if windows < 1 or not window_s > 0:
            raise BiscaleError(
                f"an episode needs at least one window of positive length, got {windows} of {window_s:g} s"
            )
        self.windows, self.window_s = windows, window_s
        self.options: ClusterOptions = make_cluster_options(
            windows * window_s,
            prefill_policy=prefill_policy,
            decode_policy=decode_policy,
            **options,
        )
        self.plant = self.options.plant
        self.placements = enumerate_placements(self.plant.settings, freqs_mhz)
        self._goodput = self._predicted_goodput(capacities_rps)
        plants = [
            self.plant.plant(phase, self.placements[-1].groups[k].tp)
            for k, phase in enumerate(("prefill", "decode"))
        ]
        self.energy_ref_j = sum(w.energy_ref_j for w in plants)
        self.render_mode = None
        self.observation_space = gym.spaces.Box(0.0, HIGH, (len(FEATURES),), dtype=np.float32)
        self.action_space = gym.spaces.Discrete(len(self.placements))
        self._loop: WindowedRun | None = None

    def _predicted_goodput(
        self, capacities: Mapping[tuple[str, int, float], float] | None
    ) -> NDArray[np.float64] | None:
        if capacities is None:
            return None
        return np.array(
            [
                min(g.count * capacities.get((g.phase, g.tp, g.freq_mhz), 0.0) for g in p.groups)
                for p in self.placements
            ]
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start the next episode with an idle cluster in the largest placement at the highest
        clocks.

        Args:
            seed: restarts the sequence of episodes; None continues it.
            options: ``workload`` chooses the episode instead of the random sequence.
        """
        super().reset(seed=seed)
        workload = self.options.choose(self.np_random, options)
        self._pieces = list(cut(self.options.source.workload(workload), self.window_s))
        self._step = 0
        self._before: Trace | None = None
        self._rates = [0.0, 0.0]
        self._placement = self.placements[-1]
        self._loop = None
        return self._observe(None), {"workload": float(workload)}

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """One window under a placement of the set.

        Raises:
            BiscaleError: before the first reset, or a placement that does not exist.
        """
        if not 0 <= int(action) < len(self.placements):
            raise BiscaleError(
                f"placement {action} does not exist: choose 0 to {len(self.placements) - 1}"
            )
        return self.step_placement(self.placements[int(action)])

    def step_placement(
        self, placement: Placement
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """One window under any placement, also one outside the set.

        How the ILP stands beside a learned policy.
        """
        if not hasattr(self, "_pieces"):
            raise BiscaleError("call reset() before step()")
        if self._step >= len(self._pieces):
            raise BiscaleError("the episode is over: call reset()")
        self._placement = placement
        if self._loop is None:
            self._loop = WindowedRun(self.plant, lambda k, before: self._placement)
            self._events = self._loop.over(iter(self._pieces))
        window = next(self._events)
        piece = self._pieces[self._step]
        self._step += 1
        self._before = piece
        self._rates = [self._rates[1], piece.rate_rps]
        costs = self._costs(window)
        expected = self.options.source.rate_rps * self.window_s
        energy = window.energy.total_j
        reward = -energy / (self.energy_ref_j * expected) - VIOLATION_WEIGHT * sum(costs) / expected
        info = {
            "time_s": self._loop.cluster.time_s,
            "energy_j": energy,
            "cost": float(sum(costs)),
            "cost_ttft": float(costs[0]),
            "cost_tpot": float(costs[1]),
        }
        return self._observe(window), float(reward), False, self._step >= len(self._pieces), info

    def _costs(self, window: Window) -> tuple[int, int]:
        """Requests that ended in the window and missed TTFT, and TPOT."""
        r, slo = window.finished, self.plant.slo
        late = ~within(r["first_token_s"] - r["arrival_s"], slo.ttft_s)
        intervals = r["output_tokens"] - 1
        slow = ~within(r["finish_s"] - r["first_token_s"], slo.tpot_s * intervals)
        return int(late.sum()), int((slow & (intervals > 0)).sum())

    def _observe(self, window: Window | None) -> NDArray[np.float32]:
        values = np.zeros(len(FEATURES))
        piece = self._before
        if window is not None and piece is not None and len(piece):
            gaps = np.diff(piece.arrival_s)
            late, slow = self._costs(window)
            ended = max(len(window.finished), 1)
            values[:11] = [
                piece.rate_rps,
                self._rates[1] / self._rates[0] if self._rates[0] > 0 else 1.0,
                piece.prompt_tokens.mean(),
                np.quantile(piece.prompt_tokens, 0.99),
                piece.output_tokens.mean(),
                gaps.std() / gaps.mean() if len(gaps) > 1 and gaps.mean() > 0 else 0.0,
                1.0 - late / ended,
                1.0 - slow / ended,
                window.energy.prefill_j / window.duration_s,
                window.energy.decode_j / window.duration_s,
                self._loop.cluster.in_flight if self._loop is not None else 0,
            ]
        p = self._placement
        freq = {g.phase: g.freq_mhz for g in p.groups}
        values[11:] = [
            p.gpus_of("prefill"), p.gpus_of("decode"), freq["prefill"], freq["decode"], self.plant.slo.ttft_s,
            self.plant.slo.tpot_s,
        ]  # fmt: skip
        return np.clip(values / SCALE, 0.0, HIGH).astype(np.float32)

    def action_masks(self) -> NDArray[np.bool_]:
        """Placements worth choosing (the method that sb3-contrib's MaskablePPO asks for).

        Without capacities all of them; with capacities those that serve the load of the last
        window, or the largest if none does.
        """
        if self._goodput is None:
            return np.ones(len(self.placements), dtype=bool)
        allowed = self._goodput >= self._rates[1]
        return allowed if allowed.any() else self._goodput >= self._goodput.max()
