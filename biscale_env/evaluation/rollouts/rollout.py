"""The one loop of evaluation.

Any policy, any plant, several workloads in lock-step, everything it did on record.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.contract import Policy
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant
from biscale_env.evaluation.rollouts.same_work import busy_at_max_clock_j
from biscale_env.evaluation.rollouts.window_meter import (
    WindowMeter,
    WindowTotals,
    judged_windows,
    window_edges,
)
from biscale_env.evaluation.runs.record import SLO_CLASS, Column
from biscale_env.evaluation.stats.class_metrics import worst_class
from biscale_env.evaluation.stats.judging import CACHED
from biscale_env.traces import Trace

CHUNK_STEPS = 2048  # decisions kept raw before they are packed into columns
# single decisions timed after the run: between this many and twice as many, spread over all of it
PROBE_DECISIONS = 200
Watcher = Callable[[NDArray[Any], NDArray[np.float32], NDArray[np.bool_]], None]
"""Called after every step with the states, the actions and which rows were active."""
STEP_COLUMNS = {  # timeline column: (state field, factor)
    "time_s": ("step_start_s", 1.0),
    "duration_s": ("step_duration_s", 1.0),
    "idle_s": ("step_idle_s", 1.0),
    "freq_applied_mhz": ("step_freq_start_ghz", 1e3),
    "freq_effective_mhz": ("step_freq_mean_ghz", 1e3),
    "energy_j": ("step_energy_j", 1.0),
    "energy_idle_j": ("step_energy_idle_j", 1.0),
    "queue_requests": ("step_queue", 1.0),
    "batch_requests": ("step_requests", 1.0),
    "batch_tokens": ("step_tokens", 1.0),
    "kv_use": ("step_kv_use", 1.0),
}


@dataclass(frozen=True)
class Rollout:
    """What happened on one workload.

    Attributes:
        requests: columns of :data:`biscale_env.evaluation.runs.record.REQUEST_COLUMNS`.
        timeline: columns of :data:`biscale_env.evaluation.runs.record.TIMELINE_COLUMNS`.
        totals: energy, durations, counts, reward and decision times.
        windows: totals per window of time where they were asked for.
    """

    requests: dict[str, Column]
    timeline: dict[str, Column]
    totals: dict[str, float]
    windows: WindowTotals | None = None


@dataclass
class _Recorder:
    """Collects the steps of all rows and packs them per row."""

    n: int
    raw: list[tuple[NDArray[Any], NDArray[np.float32], NDArray[np.bool_]]] = field(
        default_factory=list
    )
    packed: list[dict[str, NDArray[Any]]] = field(default_factory=list)

    def add(
        self, states: NDArray[Any], actions: NDArray[np.float32], active: NDArray[np.bool_]
    ) -> None:
        """Keep one step."""
        self.raw.append((states.copy(), actions.copy(), active.copy()))
        if len(self.raw) >= CHUNK_STEPS:
            self.pack()

    def pack(self) -> None:
        """Turn the raw steps into columns of shape (steps, n)."""
        if not self.raw:
            return
        states = np.stack([r[0] for r in self.raw])
        columns = {
            name: np.asarray(states[f], dtype=np.float64) * k
            for name, (f, k) in STEP_COLUMNS.items()
        }
        columns["action"] = np.stack([r[1] for r in self.raw])
        columns["active"] = np.stack([r[2] for r in self.raw])
        self.packed.append(columns)
        self.raw.clear()

    def row(self, i: int) -> dict[str, NDArray[Any]]:
        """Columns of the steps in which row ``i`` was active."""
        self.pack()
        keep = [c["active"][:, i] for c in self.packed]
        names = [*STEP_COLUMNS, "action"]
        if not self.packed:
            return {n: np.zeros(0) for n in names}
        return {
            n: np.concatenate([c[n][k, i] for c, k in zip(self.packed, keep, strict=True)])
            for n in names
        }


@dataclass
class _Samples:
    """Observations evenly spread over a run of unknown length.

    Every ``stride``-th, thinned when there are too many.
    """

    kept: list[NDArray[np.float32]] = field(default_factory=list)
    stride: int = 1

    def offer(self, step: int, observation: NDArray[np.float32]) -> None:
        """Keep the observation of this step if its turn has come."""
        if step % self.stride == 0:
            self.kept.append(observation)
            if len(self.kept) >= 2 * PROBE_DECISIONS:
                self.kept, self.stride = self.kept[::2], 2 * self.stride


def time_decisions(policy: Policy, observations: NDArray[np.float32]) -> tuple[float, float]:
    """Median and P99 wall time of single decisions on recorded observations, s.

    ``(nan, nan)`` without any.

    Each is asked alone, as an engine would; the policy starts from no state. One decision before
    them is not timed: it loads compiled code for a single row, which an engine does before it
    serves.
    """
    if not len(observations):
        return float("nan"), float("nan")
    policy.predict(observations[:1], state=None, episode_start=np.array([True]))
    state: Any = None
    spent = np.empty(len(observations))
    for k, observation in enumerate(observations):
        start = time.perf_counter()
        _, state = policy.predict(observation[None], state=state, episode_start=np.array([k == 0]))
        spent[k] = time.perf_counter() - start
    return float(np.median(spent)), float(np.quantile(spent, 0.99))


def rollout(
    policy: Policy,
    plant: Plant,
    workloads: Sequence[Trace],
    member: int = -1,
    progress: Callable[[float], None] | None = None,
    time_probe: bool = True,
    keep_steps: bool = True,
    keep_windows: bool = False,
) -> list[Rollout]:
    """Run a policy over whole workloads, each to its last token.

    Args:
        policy: anything with ``predict``.
        plant: phase, hardware, engine settings; its ``drain`` is taken as on.
        workloads: one instance each, stepped together.
        member: ensemble member of the plant, -1 nominal.
        progress: called now and then with the fraction of time that is done.
        time_probe: time single decisions afterwards.
        keep_steps: record every decision; without, the timelines are empty and tuning is quicker.
        keep_windows: total up energy and requests per window of time.

    Raises:
        BiscaleError: the policy answers with another number of actions than it has observations.
    """
    n = len(workloads)
    batch = Batch(plant, n, RequestTable.of(plant, workloads), record=True)
    rows = np.arange(n)
    batch.reset(rows, rows, np.full(n, member))
    batch.params["drain"] = 1
    recorder, samples, failures = _Recorder(n), _Samples(), solver_failures(policy)
    meter = WindowMeter([window_edges(w.duration_s) for w in workloads]) if keep_windows else None
    watchers: list[Watcher] = [recorder.add] if keep_steps else []
    watchers += [meter.add] if meter is not None else []
    reward = _run_to_the_end(policy, batch, watchers, samples if time_probe else None, progress)
    # counted before the probe asks again
    shared = {"solver_failures": (solver_failures(policy) - failures) / n}
    median_s, p99_s = time_decisions(policy, np.array(samples.kept))
    shared |= {"decision_time_median_s": median_s, "decision_time_p99_s": p99_s}
    runs = [
        _collect(batch, recorder.row(i), i, {"reward": float(reward[i])} | shared, member)
        for i in range(n)
    ]
    if meter is None:
        return runs
    worst = None
    if plant.slo.classes:  # one class for all runs, whose windows are added
        judged = [(run.requests, run.totals["duration_s"]) for run in runs]
        worst = worst_class(judged, plant.slo, plant.phase)[1]
    return [
        replace(run, windows=_windows(run, plant, meter, i, worst)) for i, run in enumerate(runs)
    ]


def _windows(
    run: Rollout, plant: Plant, meter: WindowMeter, row: int, worst: int | None
) -> WindowTotals:
    energy_j = meter.energy_j(row, run.totals["energy_j"])
    return judged_windows(
        run.requests, plant, run.totals["duration_s"], meter.edges_s[row], energy_j, worst
    )


def _run_to_the_end(
    policy: Policy,
    batch: Batch,
    watchers: Sequence[Watcher],
    samples: _Samples | None,
    progress: Callable[[float], None] | None,
) -> NDArray[np.float64]:
    """Step every instance until all are done; the summed rewards, (n,)."""
    n = len(batch.states)
    reward = np.zeros(n)
    state: Any = None
    begins, later = np.ones(n, dtype=bool), np.zeros(n, dtype=bool)
    ends_s = max(float(batch.pool.durations_s.max()), 1e-9)
    step = 0
    active = ~batch.done
    while active.any():
        observation = batch.obs.copy()  # policies may keep it
        actions, state = policy.predict(
            observation, state=state, episode_start=begins, deterministic=True
        )
        flat = one_action_each(actions, n)
        batch.step(flat)
        for watch in watchers:
            watch(batch.states, flat, active)
        reward += batch.reward  # a finished row rests at zero
        if samples is not None:
            samples.offer(step, observation[int(np.argmax(active))])
        if step % 97 == 0 and progress is not None:
            progress(min(1.0, float(batch.states["time_s"].min()) / ends_s))
        begins = later
        active = batch.states["done"] == 0
        step += 1
    return reward


def one_action_each(actions: Any, n: int) -> NDArray[np.float32]:
    """Actions of n instances as (n,), whatever the shape they came in.

    Raises:
        BiscaleError: another number of them, or something else than numbers.
    """
    try:
        if actions is None:  # NumPy would make it NaN
            raise TypeError
        return np.ascontiguousarray(np.asarray(actions, dtype=np.float32).reshape(n))
    except (TypeError, ValueError):
        raise BiscaleError(
            f"the policy must answer {n} observations with {n} numbers in [-1, 1], "
            f"got {np.shape(actions)} of {type(actions).__name__}"
        ) from None


def solver_failures(policy: Policy) -> float:
    """How often the policy's solver has failed since it was made.

    0 for policies that count nothing.
    """
    return float(policy.stats().get("solver_failures", 0)) if hasattr(policy, "stats") else 0.0


def _collect(
    batch: Batch, steps: dict[str, NDArray[Any]], i: int, shared: dict[str, float], member: int
) -> Rollout:
    plant, pool, st = batch.plant, batch.pool, batch.states[i]
    mine = slice(int(pool.begins[i]), int(pool.ends[i]))
    arrival, finish = pool.arrival_s[mine], batch.finish_s[mine]
    decode = plant.phase == "decode"
    requests: dict[str, Column] = {
        "arrival_s": arrival,
        "start_s": batch.start_s[mine]
        if decode
        else _prefill_starts(pool.prompt[mine], steps, batch),
        "first_token_s": arrival if decode else finish,
        "finish_s": finish,
        "prompt_tokens": pool.prompt[mine] + pool.prefix[mine],
        "output_tokens": pool.output[mine],
    }
    if not decode:
        requests[CACHED] = pool.prefix[mine]
    if pool.slo_class.size:
        requests[SLO_CLASS] = pool.slo_class[mine]
    busy_j = steps["energy_j"] - steps.pop("energy_idle_j")
    n_gpus = float(plant.settings.tp)
    steps["power_w"] = np.divide(busy_j, steps["duration_s"] * n_gpus)
    steps["freq_requested_mhz"] = plant.clocks.to_freq_mhz(steps.pop("action"))
    totals = {
        "energy_j": float(st["energy_j"]),
        "energy_idle_j": float(st["energy_idle_j"]),
        "duration_s": float(st["time_s"]),
        "busy_s": float(st["busy_s"]),
        "iterations": float(st["iterations"]),
        "n_finished": float(st["finished"]),
        "n_violations": float(st["violations"]),
        "clock_switches": float(st["n_switches"]),
        "preemptions": float(st["preemptions"]) if decode else 0.0,
        "busy_at_max_clock_j": busy_at_max_clock_j(
            plant, steps, pool.prompt[mine], pool.prefix[mine], member
        ),
        **shared,
    }
    if decode:
        totals["output_tokens"] = float(pool.output[mine].sum(dtype=np.int64))
    return Rollout(requests, steps, totals)


def _prefill_starts(
    prompt: NDArray[np.int32], steps: dict[str, NDArray[Any]], batch: Batch
) -> NDArray[np.float64]:
    """When the first batch of each request began, s.

    Batches take tokens in order, so count tokens (NaN: not known).
    """
    if batch.plant.settings.min_decision_interval_s > 0 or not len(steps["time_s"]):
        return np.full(len(prompt), np.nan)
    before = np.concatenate([[0], np.cumsum(prompt[:-1], dtype=np.int64)])
    step = np.searchsorted(np.cumsum(steps["batch_tokens"]), before, side="right")
    return np.asarray(steps["time_s"][np.minimum(step, len(steps["time_s"]) - 1)])
