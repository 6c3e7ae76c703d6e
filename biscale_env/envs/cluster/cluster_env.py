"""``BiScale/Cluster-v1``: the coarse loop as an environment.

A step is one window, the action is the placement with its base clocks.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from biscale_env.config.cluster_layout import Placement
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.actions import numbers
from biscale_env.envs.cluster.cluster_kpis import cluster_kpis
from biscale_env.envs.cluster.cluster_options import (
    ClusterOptions,
    enumerate_placements,
    make_cluster_options,
)
from biscale_env.envs.cluster.cluster_screen import show_window, windows_screen
from biscale_env.envs.cluster.instance_capacities import Capacities
from biscale_env.envs.cluster.whole_run import Window, WindowedRun, cut
from biscale_env.envs.options import check_render_mode, real, whole
from biscale_env.envs.plain_spec import PlainSpec
from biscale_env.render.screen import RENDER_MODES
from biscale_env.traces import Trace

WINDOWS: Final = 12
WINDOW_S: Final = 300.0
# name, unit, scale: encoded = value / scale, clipped to [0, 100]; all of the window before, all 0
# at the start
FEATURES = (
    ("arrival_rate", "req/s", 30.0),
    ("arrival_rate_change", "ratio to the window before it", 1.0),
    ("prompt_mean", "tokens", 1000.0),
    ("prompt_p99", "tokens", 4000.0),
    ("output_mean", "tokens", 300.0),
    ("gap_cv", "coefficient of variation", 1.0),
    ("attainment_ttft", "fraction", 1.0),
    ("attainment_tpot", "fraction", 1.0),
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
PLACEMENT_FEATURES: Final = [f[0] for f in FEATURES].index("prefill_gpus")  # the first of them
HIGH = 100.0


class ClusterEnv(PlainSpec, gym.Env[NDArray[np.float32], Any]):
    """The coarse loop: a placement for every window, from what happened in the one before.

    Action: index into ``placements`` (every number of instances, TP and base clock per phase that
    fits the GPUs). :meth:`action_masks` leaves out what cannot serve the load of the last window.
    Tier 2 runs inside (``prefill_policy``, ``decode_policy``). Reward: minus energy of all GPUs
    relative to a reference, minus a weight per request that misses the SLO, both per request at the
    nominal rate. Episodes are only truncated, never terminated; requests still in flight then are
    not judged.

    Info: ``time_s``, ``dt``, ``energy_j`` (of the window), ``cost``, ``cost_ttft``, ``cost_tpot``
    (requests that ended in it and missed a bound), ``workload``; at the end of an episode ``kpis``.

    Its vector form is :class:`biscale_env.envs.cluster.cluster_vector.ClusterVectorEnv`.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium's convention
        "render_modes": list(RENDER_MODES),
        "render_fps": 1,
    }

    def __init__(
        self,
        windows: int | None = None,
        window_s: float | None = None,
        *,
        episode_s: float | None = None,
        freqs_mhz: tuple[float, ...] | None = None,
        capacities_rps: Capacities | Sequence[Sequence[Any]] | None = None,
        prefill_policy: str = "mpc",
        decode_policy: str = "slack",
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        """Make the environment.

        Args:
            windows: steps per episode; default 12.
            window_s: length of a window, s; default 300, or the episode if that is shorter.
            episode_s: length of an episode, s, in place of ``windows``.
            freqs_mhz: base clocks to choose from, MHz; default: every second level of the GPU.
            capacities_rps: load that one instance of (phase, TP, clock) serves, for the mask, as a
                mapping or as rows (phase, TP, clock, load); default: measured at the first call of
                :meth:`action_masks`.
            prefill_policy: tier-2 rule of prefill.
            decode_policy: tier-2 rule of decode.
            render_mode: ``ansi``, ``rgb_array``, ``human`` or None.
            **options: see :func:`biscale_env.envs.cluster.cluster_options.make_cluster_options`.

        Raises:
            BiscaleError: an unknown option or an impossible value.
        """
        check_render_mode(render_mode, self.metadata["render_modes"])
        self.render_mode = render_mode
        self.windows, self.window_s = episode_of(windows, window_s, episode_s)
        self.options: ClusterOptions = make_cluster_options(
            self.windows * self.window_s,
            lambda of: max(
                of.goodput_rps(p) for p in enumerate_placements(of.plant.settings, freqs_mhz)
            ),
            prefill_policy=prefill_policy,
            decode_policy=decode_policy,
            **options,
        )
        self.plant = self.options.plant
        self.placements = enumerate_placements(self.plant.settings, freqs_mhz)
        self._capacities = capacities_of(capacities_rps)
        self._goodput: NDArray[np.float64] | None = None
        largest = {g.phase: g.tp for g in self.placements[-1].groups}
        plants = [self.plant.plant(phase, tp) for phase, tp in largest.items()]
        self.energy_ref_j = sum(p.energy_ref_j for p in plants)
        self.observation_space = gym.spaces.Box(0.0, HIGH, (len(FEATURES),), dtype=np.float32)
        self.action_space = gym.spaces.Discrete(len(self.placements))
        self._run: WindowedRun | None = None
        self._pieces: list[Trace] | None = None
        self._seen: list[Window] = []
        span_s = self.windows * self.window_s
        gpus = self.plant.settings.gpus
        self._screen = None if render_mode is None else windows_screen(render_mode, gpus, span_s)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start the next episode: idle, in the largest placement at the highest clocks.

        Args:
            seed: restarts the sequence of episodes; None continues it.
            options: ``workload`` chooses the episode instead of the random sequence.

        Raises:
            BiscaleError: an unknown option or not a workload.
        """
        super().reset(seed=seed)
        workload = self.options.choose(self.np_random, options)
        self._pieces = list(cut(self.options.source.workload(workload), self.window_s))
        self._step = 0
        self._before: Trace | None = None
        self._rates = [0.0, 0.0]
        self._placement = self.placements[-1]
        self._run, self._seen = None, []
        self._workload = float(workload)
        if self._screen is not None:
            self._screen.clear()
        return self._observe(None), self._info(0.0, 0.0, (0, 0))

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """One window under a placement of the set.

        Args:
            action: index into ``placements``: an int, or an integer array with one value.

        Raises:
            BiscaleError: before the first reset, or a placement that does not exist.
        """
        return self.step_placement(self.placements[placement_index(action, len(self.placements))])

    def step_placement(
        self, placement: Placement
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """One window under any placement, also one outside the set.

        How the ILP stands beside a learned policy.

        Raises:
            BiscaleError: before the first reset, after the end, or a placement that does not fit.
        """
        if self._pieces is None:
            raise BiscaleError("call reset() before step()")
        if self._step >= len(self._pieces):
            raise BiscaleError("the episode is over: call reset()")
        if self._run is None:
            self._run = WindowedRun(self.plant, placement)
        else:
            self._run.cluster.place(placement)
        self._placement = placement
        piece = self._pieces[self._step]
        window = self._run.window(self._step, piece)
        self._step += 1
        self._before = piece
        self._rates = [self._rates[1], piece.rate_rps]
        costs = self._costs(window)
        self._seen.append(window)
        now_s = self._run.cluster.time_s
        info: dict[str, Any] = self._info(now_s, window.energy.total_j, costs)
        over = self._step >= len(self._pieces)
        if over:
            info["kpis"] = self.kpis()
        if self._screen is not None:
            show_window(self._screen, window, now_s, sum(costs))
        return self._observe(window), self._reward(window, sum(costs)), False, over, info

    def _info(self, now_s: float, energy_j: float, costs: tuple[int, int]) -> dict[str, float]:
        """The same keys at reset and step."""
        return {
            "time_s": now_s,
            "dt": self.window_s if now_s > 0 else 0.0,
            "energy_j": energy_j,
            "cost": float(sum(costs)),
            "cost_ttft": float(costs[0]),
            "cost_tpot": float(costs[1]),
            "workload": self._workload,
        }

    def kpis(self) -> dict[str, float]:
        """Key figures up to now; see :func:`biscale_env.envs.cluster.cluster_kpis.cluster_kpis`.

        Raises:
            BiscaleError: before the first step of an episode.
        """
        if not self._seen or self._run is None:
            raise BiscaleError("there are no kpis before the first window: call step() first")
        return cluster_kpis(self._seen, self.plant.slo, self._run.cluster.in_flight)

    def render(self) -> Any:
        """The windows so far: text (``ansi``) or a picture (``rgb_array``), else None."""
        if self._screen is None or self.render_mode == "human":
            return None
        return self._screen.frame()

    def _reward(self, window: Window, violations: int) -> float:
        expected = self.options.source.rate_rps * self.window_s
        energy_term = window.energy.total_j / (self.energy_ref_j * expected)
        return float(-energy_term - self.options.violation_weight * violations / expected)

    def _costs(self, window: Window) -> tuple[int, int]:
        """Requests that ended in the window and missed TTFT, and TPOT."""
        return window.missed(self.plant.slo.ttft_s, self.plant.slo.tpot_s)

    def _observe(self, window: Window | None) -> NDArray[np.float32]:
        values = np.zeros(len(FEATURES))
        piece = self._before
        if window is not None and piece is not None and len(piece):
            values[:PLACEMENT_FEATURES] = self._of_window(window, piece)
        p = self._placement
        freq = {g.phase: g.freq_mhz for g in p.groups}
        values[PLACEMENT_FEATURES:] = [
            p.gpus_of("prefill"),
            p.gpus_of("decode"),
            freq["prefill"],
            freq["decode"],
            self.plant.slo.ttft_s,
            self.plant.slo.tpot_s,
        ]
        return np.clip(values / SCALE, 0.0, HIGH).astype(np.float32)

    def _of_window(self, window: Window, piece: Trace) -> list[float]:
        """Features of what happened in a window."""
        gaps = np.diff(piece.arrival_s)
        late, slow = self._costs(window)
        ended = max(len(window.finished), 1)
        return [
            piece.rate_rps,
            self._rates[1] / self._rates[0] if self._rates[0] > 0 else 1.0,
            float(piece.prompt_tokens.mean()),
            float(np.quantile(piece.prompt_tokens, 0.99)),
            float(piece.output_tokens.mean()),
            float(gaps.std() / gaps.mean()) if len(gaps) > 1 and gaps.mean() > 0 else 0.0,
            1.0 - late / ended,
            1.0 - slow / ended,
            window.energy.prefill_j / window.duration_s,
            window.energy.decode_j / window.duration_s,
            float(self._run.cluster.in_flight) if self._run is not None else 0.0,
        ]

    def action_masks(self) -> NDArray[np.bool_]:
        """Placements worth choosing (the method that sb3-contrib's MaskablePPO asks for).

        Those that are predicted to serve the load of the last window within the SLO, or the largest
        if none is; all of them before the first window. The prediction is the capacity of the
        instances alone: ``capacities_rps`` where it was given, else measured at the first call,
        which then takes some tenths of a second.
        """
        if self._goodput is None:
            of, given = self.options.capacities, self._capacities
            self._goodput = np.array([of.goodput_rps(p, given) for p in self.placements])
        allowed = self._goodput >= self._rates[1]
        return allowed if allowed.any() else self._goodput >= self._goodput.max()


def episode_of(
    windows: int | None, window_s: float | None, episode_s: float | None
) -> tuple[int, float]:
    """Number and length of the windows of an episode.

    Raises:
        BiscaleError: impossible, or contradicting each other.
    """
    for name, value in (("window_s", window_s), ("episode_s", episode_s)):
        if value is not None and not 0 < real(value, name) < np.inf:
            raise BiscaleError(f"{name} must be a positive number of seconds, got {value}")
    if episode_s is None:
        count = WINDOWS if windows is None else whole(windows, "windows")
        length_s = WINDOW_S if window_s is None else window_s
        if count < 1:
            raise BiscaleError(f"an episode needs at least one window, got windows={windows}")
        return count, length_s
    if windows is not None:
        raise BiscaleError("give either windows or episode_s, not both")
    length_s = min(WINDOW_S, episode_s) if window_s is None else window_s
    count = round(episode_s / length_s)
    if count < 1 or abs(count * length_s - episode_s) > 1e-6 * episode_s:
        raise BiscaleError(
            f"an episode of {episode_s:g} s is not a whole number of windows of {length_s:g} s: "
            "change episode_s or window_s"
        )
    return count, length_s


def capacities_of(given: Any) -> Capacities | None:
    """Capacities given as a mapping or, as a spec's JSON has them, as rows.

    Raises:
        BiscaleError: neither.
    """
    if given is None or isinstance(given, Mapping):
        return given
    try:
        return {
            (str(phase), int(tp), float(mhz)): float(load_rps) for phase, tp, mhz, load_rps in given
        }
    except (TypeError, ValueError):
        raise BiscaleError(
            "capacities_rps is a mapping of (phase, TP, MHz) to requests/s, or rows of these four, "
            f"got {given!r}"
        ) from None


def placement_index(action: Any, n: int) -> int:
    """The index that an action means.

    Raises:
        BiscaleError: not a single whole number, or outside the set.
    """
    what = f"the index of a placement, 0 to {n - 1}"
    index = numbers(action, "iu", what)
    if index.size != 1:
        raise BiscaleError(f"an action is {what}, got shape {index.shape}")
    if not 0 <= index.item() < n:
        raise BiscaleError(f"placement {index.item()} does not exist: choose 0 to {n - 1}")
    return int(index.item())
