"""Comparing policies from Python: what the notebooks use.

The same loop, frame and report as ``biscale compare``.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biscale_env.contract import Policy
from biscale_env.envs.plant import Plant
from biscale_env.evaluation.experiment.compare import ComparisonJob, record_of
from biscale_env.evaluation.experiment.input_digests import case_inputs
from biscale_env.evaluation.rollouts.rollout import Rollout, rollout
from biscale_env.evaluation.rollouts.scenarios import Scenario, resolve
from biscale_env.evaluation.runs.record import Column
from biscale_env.evaluation.runs.run_view import Run, load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.evaluation.tuning.judged_curves import hindsight_static
from biscale_env.policies import resolve_policy
from biscale_env.policies.policy_source import STATIC_HINDSIGHT

MakePolicy = Callable[[Plant], Policy]


def compare_policies(
    policies: Sequence[str] | Mapping[str, str | MakePolicy],
    phase: str,
    scenario: Scenario,
    out: Path | str,
) -> Run:
    """Run policies on the same workloads and keep everything in a run directory.

    The best constant clock of these workloads is run beside them, as in every table.

    Args:
        policies: names in the syntax of :mod:`biscale_env.policies`; or labels, each with a name or
            a function that makes the policy for a plant. One should be called ``max``.
        phase: ``prefill`` or ``decode``.
        scenario: operating point.
        out: run directory; must not hold a run yet.

    Returns:
        The opened run: ``.summary()``, ``.results``; its figures are those of
        :func:`biscale_env.evaluation.report.drawing.figures.figure`.

    Raises:
        BiscaleError: an unknown name, a run directory in use, or a scenario that cannot be served.
    """
    named = policies if isinstance(policies, Mapping) else {name: name for name in policies}
    case = resolve(scenario, phase)
    seeds = case.workload_seeds()
    traces = [case.workload(seed) for seed in seeds]
    made = {label: _made(policy, case.plant) for label, policy in named.items()}
    static = hindsight_static(case, traces, -1).chosen.params["freq_mhz"]
    made.setdefault(STATIC_HINDSIGHT, resolve_policy(f"static:{static:g}", case.plant))
    config = {"scenario": scenario.model_dump(), "phase": phase, "policies": sorted(named)}
    with RunDirectory(out, config, inputs=case_inputs(case)) as run:
        for label, policy in made.items():
            job = ComparisonJob(scenario, phase, label, label, -1, seeds)
            done = rollout(policy, getattr(policy, "plant", None) or case.plant, traces)
            for seed, one, trace in zip(seeds, done, traces, strict=True):
                run.add(record_of(job, case, seed, one, trace, {}))
    return load_run(out)


def _made(policy: str | MakePolicy, plant: Plant) -> Policy:
    return resolve_policy(policy, plant) if isinstance(policy, str) else policy(plant)


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
