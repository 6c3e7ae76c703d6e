"""Jobs of the headline experiment.

Built where they run, so that only names travel between processes.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

import controllers
from biscale_env import traces
from biscale_env.config import configs_dir
from biscale_env.core import user_cache
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_options import fitting_tps
from biscale_env.envs.cluster.cluster_settings import ClusterSettings
from biscale_env.jobs.workers import Workers, run_each
from biscale_env.models import instance_model
from biscale_env.reproduce import paper
from biscale_env.reproduce.experiment import ReproductionJob, distserve_capacity_rps, run_job
from biscale_env.reproduce.paper import (
    OWN_LENGTHS,
    TUNE_SEED,
    OperatingPoint,
    PaperExperiment,
    Variation,
    generated_arrivals,
    member_indices,
    workload_a,
    workload_b,
)
from biscale_env.traces import Trace, with_lengths
from controllers.placement.capacity_table import TableRequest, table_key
from controllers.placement.ilp import NoPlacementError

NOMINAL = -1


@dataclass(frozen=True)
class Task:
    """One operating point, in one plant, with at most one assumption changed."""

    point: OperatingPoint
    member: int
    variation: Variation | None = None


def tasks_of(experiment: PaperExperiment) -> list[Task]:
    """Every task, those of the nominal plant first, then member by member."""
    nominal = [Task(point, NOMINAL) for point in experiment.points]
    varied = [Task(experiment.point(v.point), NOMINAL, v) for v in experiment.variations]
    sampled: list[tuple[int, Task]] = []
    for point in experiment.points:
        members = member_indices(experiment.members, _members_of(experiment, point))
        sampled += enumerate(Task(point, member) for member in members)
    sampled.sort(key=lambda numbered: numbered[0])  # plant by plant: early results cover all points
    return nominal + varied + [task for _, task in sampled]


def _members_of(experiment: PaperExperiment, point: OperatingPoint) -> int:
    """Members in the ensemble of a point's models; all TP degrees have the same."""
    settings = settings_of(experiment, Task(point, NOMINAL))
    tps = fitting_tps(settings, "prefill")
    return instance_model("prefill", settings.instance("prefill", tps[0])).n_members if tps else 0


def settings_of(experiment: PaperExperiment, task: Task) -> ClusterSettings:
    """Cluster of a task."""
    base: dict[str, Any] = {
        **experiment.cluster(),
        "dtype": task.point.dtype,
        "ensemble_member": task.member,
    }
    return ClusterSettings.of(**{**base, **(task.variation.settings if task.variation else {})})


def scope_of(experiment: PaperExperiment, task: Task) -> tuple[tuple[str, ...], int, bool]:
    """Systems and workload seeds of a task, and whether prefill is also solved in hindsight."""
    if task.member != NOMINAL:
        return experiment.member_systems, experiment.member_seeds, False
    if task.variation is not None:
        return experiment.variation_systems, experiment.seeds, False
    return experiment.systems, experiment.seeds, task.point.name in experiment.oracle


def job_of(experiment: PaperExperiment, task: Task, arrivals: Trace) -> ReproductionJob:
    """Workloads, settings and systems of a task.

    Workload B is tuned on the first half of the trace and shown on the second; its rate is a
    fraction of what DistServe's placement serves on the second half in this very plant.
    """
    point, settings, varied = task.point, settings_of(experiment, task), task.variation
    if varied is not None:
        given = {"load": varied.load, "lengths": varied.lengths}
        point = point.model_copy(update={k: v for k, v in given.items() if v is not None})
    systems, seeds, oracle = scope_of(experiment, task)
    tune_seeds = range(TUNE_SEED, TUNE_SEED + experiment.tune_seeds)
    if point.workload == "A":
        cv = varied.gap_cv if varied else None
        rate = float(point.rate_rps or 0.0)
        tuning = tuple(workload_a(experiment, point, seed, cv) for seed in tune_seeds)
        shown = tuple(workload_a(experiment, point, seed, cv) for seed in range(seeds))
    else:
        first, second = arrivals_at(task, arrivals).split(0.5)
        rate = float(point.load or 0.0) * _capacity(settings, point, first, second)
        tuning = tuple(workload_b(first, point, rate, seed) for seed in tune_seeds)
        shown = tuple(workload_b(second, point, rate, seed) for seed in range(seeds))
    labels = {
        "point": point.name,
        "variation": varied.name if varied else "",
        "member": task.member,
        "workload": point.workload,
        "dtype": point.dtype,
        "load": point.load,
        "lengths": point.lengths,
        "arrivals": point.arrivals or "",
    }
    return ReproductionJob(
        labels,
        settings,
        systems,
        tune_workloads=tuning,
        workloads=shown,
        rate_rps=rate,
        window_s=experiment.window_s,
        spare_w=varied.spare_w if varied else 0.0,
        alpha=varied.alpha if varied else None,
        tables=(varied.tables if varied else None) or experiment.tables,
        oracle=oracle,
    )


def arrivals_at(task: Task, arrivals: Trace) -> Trace:
    """Arrivals of a task: those that its point names, else those of the experiment's trace."""
    named = task.point.arrivals
    return arrivals if named is None else generated_arrivals(named)


def _capacity(
    settings: ClusterSettings, point: OperatingPoint, first: Trace, second: Trace
) -> float:
    parts = [first, second]
    if point.lengths != OWN_LENGTHS:
        parts = [with_lengths(part, point.lengths, TUNE_SEED) for part in parts]
    return distserve_capacity_rps(settings, *parts)


def task_key(experiment: PaperExperiment, task: Task, arrivals: Trace) -> str:
    """Hash of everything the rows of a task depend on: settings, workloads, coefficients, code."""
    depends = experiment.model_dump(
        include={"gpus", "slo", "profile", "duration_s", "window_s", "tables", "tune_seeds"}
    )
    parts = [
        depends,
        scope_of(experiment, task),
        task.point.model_dump(),
        task.member,
        task.variation.model_dump() if task.variation else None,
    ]
    table = table_key(TableRequest(settings_of(experiment, task)), arrivals_at(task, arrivals))
    return hashlib.sha256(
        (json.dumps(parts, sort_keys=True) + table + _code()).encode()
    ).hexdigest()[:24]


@lru_cache
def _code() -> str:
    """Hash of the code that makes workloads and rows and is not part of a capacity table's key."""
    files = [Path(__file__), Path(paper.__file__)]
    files += sorted(Path(controllers.__file__).parent.rglob("*.py")) + sorted(
        Path(traces.__file__).parent.rglob("*.py")
    )
    files += sorted((configs_dir() / "traces").glob("*.yaml"))
    return hashlib.sha256(b"\0".join(f.name.encode() + f.read_bytes() for f in files)).hexdigest()


def run_kept(
    experiment: PaperExperiment, task: Task, arrivals: Trace, folder: Path
) -> list[dict[str, Any]]:
    """Rows of a task, from ``folder`` if it was finished before.

    An interrupted experiment goes on where it was. A task that fails leaves nothing there.

    Raises:
        BiscaleError: the task fails for another reason than that nothing can be served.
    """
    path = folder / f"{task_key(experiment, task, arrivals)}.json"
    kept = _kept_rows(path)
    if kept is not None:
        return kept
    rows = run_task(experiment, task, arrivals)
    user_cache.remember(path, json.dumps(rows))
    return rows


def run_task(experiment: PaperExperiment, task: Task, arrivals: Trace) -> list[dict[str, Any]]:
    """Rows of a task; one of system ``none`` with the reason where nothing can be served there.

    Raises:
        BiscaleError: any other mistake, with the task that it is about.
    """
    where = {
        "point": task.point.name,
        "variation": task.variation.name if task.variation else "",
        "member": task.member,
    }
    try:
        return run_job(job_of(experiment, task, arrivals))
    except NoPlacementError as error:
        return [{**where, "system": "none", "reason": str(error)}]
    except BiscaleError as error:
        about = " ".join(str(value) for value in where.values() if value not in ("", NOMINAL))
        raise BiscaleError(f"{experiment.name}, {about}: {error}") from None


def run_experiment(
    experiment: PaperExperiment,
    arrivals: Trace,
    jobs: int | Workers,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """All rows of the experiment; the first task runs alone, so that kernels are compiled once.

    Rows come in the order of the tasks, however many workers there are.

    Args:
        experiment: what to run.
        arrivals: trace behind workload B.
        jobs: processes, or which workers.
        progress: called with (done, all) after each task.

    Raises:
        BiscaleError: a task fails; those finished before are kept in the cache.
    """
    tasks = tasks_of(experiment)
    folder = (user_cache.writable_root() or user_cache.cache_root()) / "reproduce"
    paths = [folder / f"{task_key(experiment, task, arrivals)}.json" for task in tasks]
    found = {k: kept for k, path in enumerate(paths) if (kept := _kept_rows(path)) is not None}
    if 0 not in found:
        found[0] = run_kept(experiment, tasks[0], arrivals, folder)
    todo = [k for k in range(len(tasks)) if k not in found]
    _tell(progress, len(found), len(tasks))
    calls = [(experiment, tasks[k], arrivals, folder) for k in todo]
    with closing(run_each(run_kept, calls, Workers.of(jobs))) as results:
        for number, rows in results:
            found[todo[number]] = rows
            if _kept_rows(paths[todo[number]]) is None:  # a worker elsewhere kept them there
                user_cache.remember(paths[todo[number]], json.dumps(rows))
            _tell(progress, len(found), len(tasks))
    return pd.DataFrame([row for k in range(len(tasks)) for row in found[k]])


def _kept_rows(path: Path) -> list[dict[str, Any]] | None:
    """Rows of a finished task; None: there are none."""
    kept = user_cache.recall(path)
    return kept if isinstance(kept, list) else None


def _tell(progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
