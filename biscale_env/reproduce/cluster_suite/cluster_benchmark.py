"""``biscale benchmark --tier cluster|multi`` as a library: run, keep, resume, write cards."""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from biscale_env.core.errors import BiscaleError
from biscale_env.core.extras import need_packages
from biscale_env.core.files import lock, write_whole
from biscale_env.evaluation.runs import run_files
from biscale_env.evaluation.runs.provenance import provenance
from biscale_env.evaluation.suite.benchmark import folder_of, write_cards
from biscale_env.evaluation.suite.entrants import labelled
from biscale_env.evaluation.suite.score_card import without_folders
from biscale_env.jobs.progress import JobProgress
from biscale_env.jobs.workers import Workers, run_each
from biscale_env.reproduce.cluster_suite.cluster_scoring import cluster_cards
from biscale_env.reproduce.cluster_suite.cluster_tasks import ClusterSuite, ClusterTier
from biscale_env.reproduce.cluster_suite.suite_rows import BOUND, MAX, OWN, SAVED, TierRules

CONFIG: Final = "suite.json"
POLICIES: Final = "policies.json"


@dataclass(frozen=True)
class ClusterRequest:
    """What is run.

    Attributes:
        suite: the suite, or a sample of it.
        policies: entries ``[label=]name``.
        tier: ``cluster`` or ``multi``.
    """

    suite: ClusterSuite
    policies: Sequence[str]
    tier: ClusterTier

    def entrants(self) -> dict[str, str]:
        """Label and name of everybody who is scored.

        Raises:
            BiscaleError: nobody, no such policy, two of one label, or a reference's label.
        """
        found = labelled(self.policies, {MAX, BOUND, OWN[self.tier]})
        check = _rules_of(self.tier).check_of(getattr(self.suite, self.tier))
        for label, build in found.items():
            if label != MAX:
                check(build)
        return found


def run_cluster_benchmark(
    request: ClusterRequest,
    out: Path | None = None,
    resume: bool = False,
    n_jobs: int | Workers | None = None,
) -> list[Path]:
    """Run a suite of clusters and write a score card per policy, and one page of all.

    Args:
        request: what to run.
        out: run directory; None makes a new one under ``runs``.
        resume: go on with an interrupted run in ``out``, or let further policies join: what is
            there already is not run again.
        n_jobs: processes, or which workers; None for all cores.

    Returns:
        Paths of the cards.

    Raises:
        BiscaleError: an unknown policy or tier, nothing to score, a directory of other settings.
    """
    folder = folder_of(out, resume, f"{request.suite.name}-{request.tier}")
    tasks, entrants = request.suite.tasks(request.tier), request.entrants()
    own = OWN[request.tier]
    everybody = {BOUND: BOUND, MAX: MAX, own: own, **entrants}
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / run_files.LOCK):
        _claim(folder, request, resume)
        known = _keep_inputs(folder, request.tier, everybody)
        rows = _run(folder, request, everybody, Workers.of(n_jobs))
    inputs = {k: v for label in entrants for k, v in known[label]["sha256"].items()}
    made_by = without_folders(provenance(inputs={"suite": request.suite.digest, **inputs}))
    return write_cards(cluster_cards(rows, request.suite, tasks, entrants, made_by), folder)


def rerun_clusters(
    part: ClusterSuite, entry: str, out: Path | None, n_jobs: int | Workers | None
) -> Path:
    """A sample of a suite of clusters, all of one tier, for verification."""
    tier = part.tasks()[0].tier
    (card,) = run_cluster_benchmark(ClusterRequest(part, [entry], tier), out, False, n_jobs)
    return card


def _rules_of(tier: ClusterTier) -> TierRules:
    """What is done in a tier.

    Raises:
        BiscaleError: the tier needs packages that are not installed.
    """
    if tier == "cluster":
        from biscale_env.reproduce.cluster_suite.placement_tier import PLACEMENTS

        return PLACEMENTS
    need_packages("the tier multi needs", "marl", {"pettingzoo": "pettingzoo"})
    from biscale_env.reproduce.cluster_suite.clock_tier import CLOCKS

    return CLOCKS


def _claim(folder: Path, request: ClusterRequest, resume: bool) -> None:
    """Keep what the directory is a run of.

    Raises:
        BiscaleError: it holds a run already, or one of other tasks.
    """
    path = folder / CONFIG
    mine = {"tier": request.tier, "suite": request.suite.model_dump(mode="json")}
    if path.is_file():
        if not resume:
            raise BiscaleError(f"{folder} holds a run already: give another folder or --resume")
        if _read_json(path) != mine:
            raise BiscaleError(f"{folder} is a run of other tasks: give another folder")
    elif any(one.name != run_files.LOCK for one in folder.iterdir()):
        raise BiscaleError(f"{folder} is not empty and no run of this suite: give another folder")
    write_whole(path, json.dumps(mine, indent=1) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    with run_files.reading(path):
        return dict(json.loads(run_files.read_text(path)))


def _keep_inputs(
    folder: Path, tier: ClusterTier, everybody: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Keep and return what every label means, its files included.

    Raises:
        BiscaleError: a label meant something else before.
    """
    path, inputs_of = folder / POLICIES, _rules_of(tier).inputs_of
    known: dict[str, dict[str, Any]] = _read_json(path) if path.is_file() else {}
    mine: dict[str, dict[str, Any]] = {
        label: {"build": build, "sha256": {} if label in (BOUND, MAX) else inputs_of(build)}
        for label, build in everybody.items()
    }
    for label, one in mine.items():
        before = known.get(label, one)
        if before["build"] != one["build"]:
            raise BiscaleError(
                f"in {folder} '{label}' is {before['build']}: give {one['build']} another name, "
                "name=build"
            )
        if before != one:
            changed = next(k for k, v in one["sha256"].items() if before["sha256"].get(k) != v)
            raise BiscaleError(
                f"{changed} has changed since '{label}' was run in {folder}: give another folder"
            )
    write_whole(path, json.dumps({**known, **mine}, indent=1) + "\n")
    return mine


def _run(
    folder: Path, request: ClusterRequest, everybody: Mapping[str, str], workers: Workers
) -> pd.DataFrame:
    """Rows of references and entrants on all tasks; what is kept is not run again."""
    shared, path = getattr(request.suite, request.tier), folder / SAVED
    rows = run_files.read_csv(path, ("task", "policy", "setting")).fillna({"setting": ""})
    known = set(zip(rows["task"], rows["policy"], strict=True))
    asked = [
        (shared, task.what, task.key, label, build)
        for task in request.suite.tasks(request.tier)
        for label, build in everybody.items()
    ]
    calls = [call for call in asked if call[2:4] not in known]
    done = len(asked) - len(calls)
    if not calls:
        return rows
    with (
        JobProgress("runs", len(asked), done) as progress,
        closing(run_each(_rules_of(request.tier).rows_of, calls, workers)) as results,
    ):
        for count, (number, found) in enumerate(results, start=done + 1):
            rows = pd.concat([rows, pd.DataFrame(found)], ignore_index=True)
            write_whole(path, rows.to_csv(index=False))
            progress.tell(count, name=f"{calls[number][2]} {calls[number][3]}")
    return rows
