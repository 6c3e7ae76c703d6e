"""Running planned jobs with a progress bar, and what is shown at the end."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.experiment.compare import ComparisonJob, run_jobs
from biscale_env.evaluation.experiment.outcome_tables import keep_outcome
from biscale_env.evaluation.experiment.policy_jobs import plan
from biscale_env.evaluation.experiment.policy_list import NamedPolicy
from biscale_env.evaluation.report.class_rows import print_classes, write_classes
from biscale_env.evaluation.report.decomposition_table import write_decomposition
from biscale_env.evaluation.report.page import write_report
from biscale_env.evaluation.report.tables import print_table
from biscale_env.evaluation.rollouts.scenarios import Infeasible, Scenario, resolve
from biscale_env.evaluation.runs.results import scenario_label
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.jobs.progress import JobProgress
from biscale_env.jobs.workers import Workers


@dataclass(frozen=True)
class Prepared:
    """Jobs of a comparison, and the points that cannot be served at all."""

    jobs: list[ComparisonJob]
    infeasible: list[Infeasible]


def prepare(
    points: Sequence[Scenario],
    phases: Sequence[str],
    policies: Mapping[str, Sequence[NamedPolicy]],
    tuned: bool,
    oracle_seeds: Mapping[str, int] | None,
    spread: int = 0,
) -> Prepared:
    """Resolve every point and phase.

    One that max clock cannot serve at any load is named, not hidden.

    Args:
        points: operating points.
        phases: phases of each.
        policies: policies of each phase.
        tuned: choose free parameters on tuning workloads.
        oracle_seeds: workloads per phase for which the optimum is computed; None for all.
        spread: ensemble members that every chosen setting is run in.

    Raises:
        BiscaleError: no point can be served, or a mistake in a policy's parameters.
    """
    jobs: list[ComparisonJob] = []
    infeasible: list[Infeasible] = []
    for point, phase in itertools.product(points, phases):
        try:
            case = resolve(point, phase)
        except Infeasible as error:
            infeasible.append(error)
            continue
        limit = None if oracle_seeds is None else oracle_seeds[phase]
        jobs += plan(point, case, policies[phase], tuned, limit, spread)
    if not jobs:
        raise infeasible[0]
    return Prepared(jobs, infeasible)


def run_all(
    run: RunDirectory,
    jobs: Sequence[ComparisonJob],
    n_jobs: int | Workers | None,
    infeasible: Sequence[Infeasible] = (),
) -> None:
    """Run what is not finished yet; every finished run is on disk before the next is awaited.

    Args:
        run: where to.
        jobs: all jobs, finished ones too.
        n_jobs: processes, or which workers; None for all cores.
        infeasible: points to name beside the results.
    """
    run.name_infeasible([error.point for error in infeasible])
    todo = [job for job in jobs if not all(run.has(job.key(seed)) for seed in job.seeds)]
    done = len(jobs) - len(todo)
    try:
        with (
            JobProgress("runs", len(jobs), done) as progress,
            closing(run_jobs(todo, Workers.of(n_jobs))) as outcomes,
        ):
            for outcome in outcomes:
                keep_outcome(run, outcome)
                done += 1
                name = f"{outcome.job.phase} {outcome.job.policy}"
                progress.tell(done, name=name, cpu_s=outcome.cpu_s)
    except KeyboardInterrupt:
        kept = f"{done} of {len(jobs)} are finished and kept in {run.path}"
        print(
            f"biscale: interrupted; {kept}: "
            f"the same command with --out {run.path} --resume goes on",
            file=sys.stderr,
        )
        raise


def conclude(folder: Path) -> None:
    """Print the table, name what is infeasible, write the report."""
    run = load_run(folder)
    if run.results.empty:
        raise BiscaleError(f"{folder} holds no finished run: add --resume to continue it")
    print_table(run.summary())
    print_classes(run)
    for point in run.infeasible:
        print(f"infeasible, so without a table: {scenario_label(point)}: {point['reason']}")
    write_decomposition(run)
    write_classes(run)
    print(f"\nrun directory: {folder}\nreport:        {write_report(run)}")
