"""Jobs of the headline experiment.

Built where they run, so that only names travel between processes.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import controllers
from biscale_env import traces
from biscale_env.config import configs_dir
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole
from biscale_env.envs.cluster.cluster_options import fitting_tps
from biscale_env.envs.cluster.cluster_settings import ClusterSettings
from biscale_env.models import instance_model
from biscale_env.reproduce import paper
from biscale_env.reproduce.experiment import ReproductionJob, distserve_capacity_rps, run_job
from biscale_env.reproduce.paper import (
    TUNE_SEED,
    OperatingPoint,
    PaperExperiment,
    Variation,
    member_indices,
    workload_a,
    workload_b,
)
from biscale_env.traces import Trace, with_lengths
from controllers.placement.capacity_table import TableRequest, table_key

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
    drawn = []
    for point in experiment.points:
        available = _members_of(experiment, point)
        drawn += list(
            enumerate(
                Task(point, member) for member in member_indices(experiment.members, available)
            )
        )
    drawn.sort(
        key=lambda numbered: numbered[0]
    )  # plant by plant: what is finished early covers all points
    return nominal + varied + [task for _, task in drawn]


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
    """Systems and number of workload seeds of a task, and whether the prefill stage is solved in
    hindsight.
    """
    if task.member != NOMINAL:
        return experiment.member_systems, experiment.member_seeds, False
    if task.variation is not None:
        return experiment.variation_systems, experiment.seeds, False
    return experiment.systems, experiment.seeds, task.point.name in experiment.oracle


def job_of(experiment: PaperExperiment, task: Task, arrivals: Trace) -> ReproductionJob:
    """Workloads, settings and systems of a task.

    Workload B is tuned on the first half of the trace and shown on the second; its rate is a share
    of what DistServe's placement serves on the second half in this very plant.
    """
    point, settings, varied = task.point, settings_of(experiment, task), task.variation
    if varied is not None and varied.load is not None:
        point = point.model_copy(update={"load": varied.load})
    systems, seeds, oracle = scope_of(experiment, task)
    tune_seeds = range(TUNE_SEED, TUNE_SEED + experiment.tune_seeds)
    if point.workload == "A":
        cv = varied.gap_cv if varied else None
        rate = float(point.rate_rps or 0.0)
        tuning = tuple(workload_a(experiment, point, seed, cv) for seed in tune_seeds)
        shown = tuple(workload_a(experiment, point, seed, cv) for seed in range(seeds))
    else:
        first, second = arrivals.split(0.5)
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
    }
    return ReproductionJob(
        labels, settings, systems, tuning, shown, rate, experiment.window_s,
        varied.spare_w if varied else 0.0, varied.alpha if varied else None,
        oracle=oracle,
    )  # fmt: skip


def _capacity(
    settings: ClusterSettings, point: OperatingPoint, first: Trace, second: Trace
) -> float:
    parts = [first, second]
    if point.lengths != "own":
        parts = [with_lengths(part, point.lengths, TUNE_SEED) for part in parts]
    return distserve_capacity_rps(settings, *parts)


def task_key(experiment: PaperExperiment, task: Task, arrivals: Trace) -> str:
    """Hash of everything the rows of a task depend on: settings, workloads, coefficients, code."""
    depends = experiment.model_dump(
        include={"gpus", "slo", "profile", "duration_s", "window_s", "tune_seeds"}
    )
    parts = [
        depends,
        scope_of(experiment, task),
        task.point.model_dump(),
        task.member,
        task.variation.model_dump() if task.variation else None,
    ]
    table = table_key(TableRequest(settings_of(experiment, task)), arrivals)
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

    An interrupted experiment goes on where it was.
    """
    path = folder / f"{task_key(experiment, task, arrivals)}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    rows = run_task(experiment, task, arrivals)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(rows))
    return rows


def run_task(experiment: PaperExperiment, task: Task, arrivals: Trace) -> list[dict[str, Any]]:
    """Rows of a task; none where nothing at all can be served there."""
    try:
        return run_job(job_of(experiment, task, arrivals))
    except BiscaleError as error:
        label = {
            "point": task.point.name,
            "variation": task.variation.name if task.variation else "",
        }
        return [{**label, "member": task.member, "system": "none", "reason": str(error)}]
