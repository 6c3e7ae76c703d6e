"""``biscale evaluate`` as a library: a policy beside the references on named scenarios."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole
from biscale_env.evaluation.experiment.agent_jobs import (
    Candidate,
    candidates_of,
    case_of,
    label_of,
    scenario_jobs,
)
from biscale_env.evaluation.experiment.compare import ComparisonJob
from biscale_env.evaluation.experiment.comparison import RUNS, checked_phases
from biscale_env.evaluation.experiment.input_digests import inputs_of
from biscale_env.evaluation.experiment.robustness import load_robustness
from biscale_env.evaluation.experiment.run_comparison import conclude, run_all
from biscale_env.evaluation.report import agent_table
from biscale_env.evaluation.report.robustness_table import robustness_markdown
from biscale_env.evaluation.rollouts.scenarios import Infeasible
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.jobs.workers import Workers
from biscale_env.policies.checkpoint_source import shipped_seeds
from biscale_env.policies.policy_source import AGENT


@dataclass(frozen=True)
class EvaluationRequest:
    """What is evaluated, and on what.

    Attributes:
        target: see :func:`biscale_env.evaluation.experiment.agent_jobs.candidates_of`.
        scenarios: names of scenarios.
        policies: references; none takes max clock, the best static one and BiScale's own.
        loads: fractions of capacity instead of the scenario's; none takes its own.
        phase: ``prefill`` or ``decode``; None for those of the target.
        changes: keys of the scenarios that are other here.
        robustness: name of conditions instead of scenarios.
        tuned: choose free parameters on tuning workloads.
        oracle_seeds: workloads for which the optimum is computed; None for all.
    """

    target: str
    scenarios: Sequence[str] = ("synthetic",)
    policies: Sequence[str] = ()
    loads: Sequence[float] = ()
    phase: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    robustness: str | None = None
    tuned: bool = False
    oracle_seeds: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that the run directory keeps: everything that was asked."""
        return {
            "command": "evaluate",
            "target": self.target,
            "scenarios": [] if self.robustness else list(self.scenarios),
            "robustness": self.robustness,
            "policies": list(self.policies),
            "loads": list(self.loads),
            "phase": self.phase,
            "tuned": self.tuned,
            "oracle_seeds": self.oracle_seeds,
            **self.changes,
        }

    def points(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Scenario and changes of every operating point."""
        if self.robustness is not None:
            for name, own in load_robustness(self.robustness).scenarios():
                yield name, {**self.changes, **own}
            return
        for name, load in itertools.product(self.scenarios, self.loads or (None,)):
            yield name, {**self.changes, **({} if load is None else {"load": load})}


def phases_to_run(request: EvaluationRequest, found: Sequence[Candidate]) -> list[str]:
    """Phases of the target, or the one of them that was asked for.

    Raises:
        BiscaleError: the target cannot run it.
    """
    able = {phase for one in found for phase in one.phases}
    phases = sorted(able & set(checked_phases(request.phase)))
    if not phases:
        raise BiscaleError(
            f"{request.target} is for {' and '.join(sorted(able))}, not for {request.phase}"
        )
    return phases


def plan_evaluation(
    request: EvaluationRequest,
) -> tuple[list[ComparisonJob], list[Infeasible]]:
    """Jobs of all points, and the points that max clock itself cannot serve.

    Raises:
        BiscaleError: an unknown name, or nothing is left to run.
    """
    found = candidates_of(request.target)
    phases = phases_to_run(request, found)
    oracle_seeds = None if request.robustness else request.oracle_seeds
    label = label_of(request.target)
    planned: list[ComparisonJob] = []
    infeasible: list[Infeasible] = []
    for (name, changes), phase in itertools.product(request.points(), phases):
        try:
            case = case_of(name, changes, phase)
        except Infeasible as error:
            infeasible.append(error)
            continue
        planned += scenario_jobs(case, found, request.policies, request.tuned, oracle_seeds, label)
    if not planned:
        nothing = BiscaleError("there is nothing to evaluate: give a scenario with --scenario")
        raise infeasible[0] if infeasible else nothing
    return planned, infeasible


def run_evaluation(
    request: EvaluationRequest,
    out: Path | None = None,
    resume: bool = False,
    n_jobs: int | Workers | None = None,
    table: Path | None = None,
) -> Path:
    """Run an evaluation and keep everything in its run directory; print table and report.

    Args:
        request: what to evaluate.
        out: run directory; None is ``runs/evaluate-<target>``.
        resume: go on with an interrupted evaluation.
        n_jobs: processes, or which workers; None for all cores.
        table: also write the table with intervals to this Markdown file.

    Returns:
        The run directory.

    Raises:
        BiscaleError: an unknown name, or a directory of other settings.
    """
    planned, infeasible = plan_evaluation(request)
    folder = out or RUNS / f"evaluate-{_file_name(request.target)}"
    inputs = inputs_of(planned)
    with RunDirectory(folder, request.config, resume=resume, inputs=inputs) as run:
        run_all(run, planned, n_jobs, infeasible)
    conclude(folder)
    if table is not None:
        run_kept = load_run(folder)
        results, windows = run_kept.results, run_kept.windows
        by_split = request.robustness is not None
        judged = label_of(request.target)
        shipped = shipped_seeds() if judged == AGENT else None
        text = (
            robustness_markdown(results, windows, judged)
            if by_split
            else agent_table.markdown(results, windows, shipped, judged)
        )
        write_whole(table, text)
        print(f"table:         {table}")
    return folder


def _file_name(target: str) -> str:
    """Last part of a target, fit for a file name."""
    last = (
        Path(target).name.removesuffix(".npz").removesuffix(".zip").removesuffix(".onnx") or "agent"
    )
    return "".join(c if c.isalnum() or c in "-_.=" else "-" for c in last)
