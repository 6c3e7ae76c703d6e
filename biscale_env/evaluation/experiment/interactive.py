"""Comparing policies from Python: what the notebooks use.

The same loop, frame and report as ``biscale compare``.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biscale_env.contract import Policy
from biscale_env.envs.plant import Plant
from biscale_env.evaluation.experiment.compare import ComparisonJob, record_of
from biscale_env.evaluation.experiment.input_digests import case_inputs
from biscale_env.evaluation.experiment.rollout import Rollout, rollout
from biscale_env.evaluation.experiment.scenarios import Scenario, resolve
from biscale_env.evaluation.runs.record import Column
from biscale_env.evaluation.runs.run_view import Run, load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.traces import Trace

MakePolicy = Callable[[Plant], Policy]


def compare_policies(
    policies: Mapping[str, MakePolicy], phase: str, scenario: Scenario, out: Path | str
) -> Run:
    """Run policies on the same workloads and keep everything in a run directory.

    Args:
        policies: name to a function that makes the policy for a plant; one of them should be called
            ``max``.
        phase: ``prefill`` or ``decode``.
        scenario: operating point.
        out: run directory; must not hold a run yet.

    Returns:
        The opened run: ``.summary()``, ``.results``, ``.figure(name)``.
    """
    case = resolve(scenario, phase)
    traces = [case.workload(seed) for seed in range(scenario.seeds)]
    config = {"scenario": scenario.model_dump(), "phase": phase, "policies": sorted(policies)}
    with RunDirectory(out, config, inputs=case_inputs(case)) as run:
        for name, make in policies.items():
            job = ComparisonJob(scenario, phase, name, name, -1, tuple(range(scenario.seeds)))
            policy = make(case.plant)
            done = rollout(policy, getattr(policy, "plant", None) or case.plant, traces)
            for seed, one, trace in zip(job.seeds, done, traces, strict=True):
                run.add(record_of(job, case, seed, one, trace, {}))
    return load_run(out)


def busiest_window(trace: Trace, length_s: float) -> tuple[float, float]:
    """Start and end of the window of ``length_s`` seconds in which most prompt tokens arrive, s."""
    before = np.concatenate([[0], np.cumsum(trace.prompt_tokens, dtype=np.int64)])
    last = np.searchsorted(trace.arrival_s, trace.arrival_s + length_s, side="left")
    first = int(np.argmax(before[last] - before[np.arange(len(trace))]))
    start = float(min(trace.arrival_s[first], max(trace.duration_s - length_s, 0.0)))
    return start, start + length_s


def second_by_second(run: Rollout, step_s: float = 0.1) -> pd.DataFrame:
    """What an instance did on a regular grid of time.

    Effective clock, power per GPU, queue and batch; idle where nothing runs.

    Returns:
        Columns ``time_s, freq_mhz, power_w, queue_requests, batch_requests, busy``; clock and power
        are NaN while idle.
    """
    t: Mapping[str, Column] = run.timeline
    grid = np.arange(0.0, run.totals["duration_s"], step_s)
    at = np.clip(np.searchsorted(t["time_s"], grid, side="right") - 1, 0, len(t["time_s"]) - 1)
    busy = (grid >= t["time_s"][at]) & (grid < t["time_s"][at] + t["duration_s"][at])
    columns: dict[str, Any] = {"time_s": grid, "busy": busy}
    for name, source in (("freq_mhz", "freq_effective_mhz"), ("power_w", "power_w")):
        columns[name] = np.where(busy, t[source][at], np.nan)
    for name in ("queue_requests", "batch_requests"):
        columns[name] = np.where(busy, t[name][at], 0)
    return pd.DataFrame(columns)
