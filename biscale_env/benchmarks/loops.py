"""Speed figures: each measured the same way every time, with the target it is held against.

CPU time of this process is what counts (other programs on the machine then disturb little), and of
many short windows the best one is the
figure: the question is what the code costs, not what else was running. The median window is kept
    beside it.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from biscale_env.contract import Policy
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.capacity import StaticRun, run_static
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.evaluation.experiment.rollout import time_decisions
from biscale_env.traces import Trace, generate

HOUR_S = 3600.0
CONV_RPS = 5.38  # Azure conversation 2023: 19,366 requests in an hour
RATE_RPS = 3.0  # load of the environments that are timed: busy, never empty for long
WINDOWS = 20
TARGETS = {
    "hour_ms": (20.0, "lower"),
    "decode_iterations": (10e6, "higher"),
    "vector_steps": (3e6, "higher"),
    "single_steps": (100e3, "higher"),
    "import_s": (1.0, "lower"),
    "mpc_ms": (4.0, "lower"),
    "slack_us": (20.0, "lower"),
    "agent_us": (100.0, "lower"),
    "ppo_steps": (30e3, "higher"),
}


@dataclass(frozen=True)
class Measurement:
    """One measured figure.

    Attributes:
        name: what was measured.
        value: the figure, in ``unit``.
        beside: a second value in the same unit.
        unit: unit of both.
        target: what it should be.
        better: ``lower`` or ``higher``.
        beside_is: what the second value is.
    """

    name: str
    value: float
    beside: float
    unit: str
    target: float
    better: str
    beside_is: str = "median"

    @property
    def ratio(self) -> float:
        """How many times better than the target; below 1 misses it."""
        return self.target / self.value if self.better == "lower" else self.value / self.target

    def as_dict(self) -> dict[str, float | str]:
        """Plain values for JSON."""
        return {
            "name": self.name, "value": self.value, self.beside_is: self.beside, "unit": self.unit, "target": self.target,
            "better": self.better, "ratio": self.ratio,
        }  # fmt: skip


def cpu_seconds(work: Callable[[], object], windows: int = WINDOWS) -> tuple[float, float]:
    """Best and median CPU time of a piece of work, s, after one run to compile and warm up."""
    work()
    spent = []
    for _ in range(windows):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return min(spent), float(np.median(spent))


def figure(key: str, name: str, unit: str, best: float, median: float) -> Measurement:
    """A figure with the target of its key."""
    target, better = TARGETS[key]
    return Measurement(name, best, median, unit, target, better)


def conversation_hour() -> Trace:
    """An hour like the Azure conversation trace, generated from its statistics."""
    return generate("azure-conv-like", rate_rps=CONV_RPS, duration_s=HOUR_S, seed=0)


def handed_over(trace: Trace, run: StaticRun) -> Trace:
    """The requests as they leave prefill: the workload of decode."""
    ready_s = trace.arrival_s + run.latency_s
    order = np.argsort(ready_s, kind="stable")
    return Trace(
        trace.name,
        ready_s[order],
        trace.prompt_tokens[order],
        trace.output_tokens[order],
        trace.source,
    )


def measure_hour(trace: Trace) -> list[Measurement]:
    """A whole trace through one prefill and one decode instance at the highest clock, and decode
    iterations per second.
    """
    prefill, decode = (Plant(PlantSettings.of(phase)) for phase in ("prefill", "decode"))
    top = prefill.gpu.freq_max_mhz

    def both() -> StaticRun:
        first = run_static(prefill, trace, top)
        return run_static(decode, handed_over(trace, first), top)

    last = both()
    ready = handed_over(trace, run_static(prefill, trace, top))
    best, median = cpu_seconds(both)
    alone_best, alone_median = cpu_seconds(lambda: run_static(decode, ready, top))
    n = last.iterations
    return [
        figure(
            "hour_ms",
            f"{trace.name} ({len(trace)} requests), prefill + decode",
            "ms",
            best * 1e3,
            median * 1e3,
        ),
        figure(
            "decode_iterations", f"decode iterations ({n})", "1/s", n / alone_best, n / alone_median
        ),
    ]


def measure_vector(phase: str, num_envs: int = 1024, steps: int = 50) -> Measurement:
    """Steps per second of the native vector environment with random actions.

    Episodes end and restart meanwhile.
    """
    from biscale_env.envs.vector import PhaseVectorEnv

    env = PhaseVectorEnv(phase, num_envs, rate_rps=RATE_RPS)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    actions = [rng.uniform(-1, 1, (num_envs, 1)).astype(np.float32) for _ in range(steps)]

    def window() -> None:
        for action in actions:
            env.step(action)

    for _ in range(8):  # past the first, common start of all episodes
        window()
    best, median = cpu_seconds(window)
    n = num_envs * steps
    return figure(
        "vector_steps", f"vector env, {phase}, {num_envs} copies", "steps/s", n / best, n / median
    )


def measure_single(phase: str, steps: int = 2000) -> Measurement:
    """Steps per second through ``gymnasium.make``."""
    import gymnasium as gym

    env = gym.make(
        f"BiScale/{phase.capitalize()}-v0", rate_rps=RATE_RPS, episode_s=HOUR_S, n_workloads=1
    )
    env.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (64, 1)).astype(np.float32)

    def window() -> None:
        for k in range(steps):
            if env.step(actions[k % 64])[3]:
                env.reset()

    best, median = cpu_seconds(window)
    return figure(
        "single_steps", f"gymnasium.make, {phase}", "steps/s", steps / best, steps / median
    )


def measure_import(runs: int = 5) -> Measurement:
    """Wall time of ``import biscale_env`` in a fresh interpreter, without the interpreter's own
    start.
    """
    code = (
        "import time; t = time.perf_counter(); import biscale_env; print(time.perf_counter() - t)"
    )
    spent = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(runs)
    ]
    return figure("import_s", "import biscale_env", "s", min(spent), float(np.median(spent)))


def busy_observations(plant: Plant, n: int = 200, rate_rps: float = 4.0) -> np.ndarray:
    """Observations of a busy instance under random clocks, ``(n, dim)``."""
    trace = generate("azure-conv-like", rate_rps=rate_rps, duration_s=600.0, seed=0)
    batch = Batch(plant, 1, RequestTable.of(plant, [trace]))
    zero = np.zeros(1, dtype=np.int64)
    batch.reset(zero, zero, zero - 1)
    rng = np.random.default_rng(0)
    kept: list[np.ndarray] = []
    while len(kept) < n and not batch.done[0]:
        kept.append(batch.obs[0].copy())
        batch.step(rng.uniform(-1, 1, 1).astype(np.float32))
    return np.array(kept)


def measure_decision(policy: Policy, plant: Plant, key: str, name: str) -> Measurement:
    """Median wall time of single decisions, asked alone as an engine would, and their P99."""
    observations = busy_observations(plant)
    median, p99 = time_decisions(policy, observations)
    factor, unit = (1e3, "ms") if key.endswith("_ms") else (1e6, "us")
    target, better = TARGETS[key]
    return Measurement(
        f"{name} decision, median", median * factor, p99 * factor, unit, target, better, "p99"
    )
