"""``biscale benchmark`` as a library: run a suite, keep the runs, write score cards and a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agents.policy.numpy_policy import load_network
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.experiment.comparison import new_folder
from biscale_env.evaluation.experiment.input_digests import inputs_of
from biscale_env.evaluation.experiment.run_comparison import run_all
from biscale_env.evaluation.runs.run_view import Run, load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.evaluation.suite.card_page import write_cards_page
from biscale_env.evaluation.suite.entrants import Entrant, benchmark_jobs, entrants_of
from biscale_env.evaluation.suite.score_card import (
    ALL,
    ScoreCard,
    TrainingCost,
    Unscored,
    without_folders,
    write_card,
)
from biscale_env.evaluation.suite.scoring import (
    ScoredTask,
    aggregates,
    scored_task,
    task_rows,
    why_unscored,
)
from biscale_env.evaluation.suite.tasks import BenchmarkSuite, FrozenTask
from biscale_env.jobs.workers import Workers

CARDS_PAGE: Final = "score-cards.html"


@dataclass(frozen=True)
class BenchmarkRequest:
    """What is run.

    Attributes:
        suite: the suite, or a sample of it.
        policies: entries ``[label=]name``.
        tier: one tier only; None for all that the suite has.
    """

    suite: BenchmarkSuite
    policies: Sequence[str]
    tier: str | None = None

    def config(self, entrants: Sequence[Entrant]) -> dict[str, Any]:
        """The configuration that the run directory keeps.

        Policies stand as the run directory's own resuming reads them: more may join later.
        """
        pairs = [[one.label, one.build] for one in entrants]
        return {
            "command": "benchmark",
            "suite": self.suite.model_dump(mode="json"),
            "digest": self.suite.digest,
            "tier": self.tier,
            "policies": {ALL: pairs},
        }


def run_benchmark(
    request: BenchmarkRequest,
    out: Path | None = None,
    resume: bool = False,
    n_jobs: int | Workers | None = None,
) -> list[Path]:
    """Run a suite and write a score card per policy, and one page of all.

    Args:
        request: what to run.
        out: run directory; None makes a new one under ``runs``.
        resume: go on with an interrupted run in ``out``, or let further policies join a finished
            one: what is there already (references, bounds, other policies) is not run again.
        n_jobs: processes, or which workers; None for all cores.

    Returns:
        Paths of the cards.

    Raises:
        BiscaleError: an unknown policy or tier, nothing to score, a directory of other settings.
    """
    folder = folder_of(out, resume, request.suite.name)
    tasks = request.suite.tasks(request.tier)
    entrants = entrants_of(request.policies)
    jobs, infeasible = benchmark_jobs(request.suite, tasks, entrants)
    config, inputs = request.config(entrants), inputs_of(jobs)
    with RunDirectory(folder, config, resume=resume, inputs=inputs) as directory:
        run_all(directory, jobs, n_jobs, infeasible)
    reasons = {
        f"{e.point['phase']}/{e.point['scenario']}": str(e.point["reason"]) for e in infeasible
    }
    return write_cards(cards_of(load_run(folder), request.suite, tasks, entrants, reasons), folder)


def folder_of(out: Path | None, resume: bool, name: str) -> Path:
    """The run directory: the one that is named, or a new one.

    Args:
        out: as it was given.
        resume: whether to go on in it.
        name: of what is run, for a new one.

    Raises:
        BiscaleError: to be resumed, but not named.
    """
    if resume and out is None:
        raise BiscaleError("--resume needs the run directory to go on with: give it with --out")
    return out or new_folder(f"benchmark-{name}")


def write_cards(cards: Sequence[ScoreCard], folder: Path) -> list[Path]:
    """Write every card and the page of all into a run directory; the paths of the cards."""
    paths = [folder / f"{file_name(card.policy)}.json" for card in cards]
    for card, path in zip(cards, paths, strict=True):
        write_card(card, path)
    write_cards_page(cards, folder / CARDS_PAGE)
    return paths


def file_name(label: str) -> str:
    """A label as the name of a file."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in label)


def cards_of(
    run: Run,
    suite: BenchmarkSuite,
    tasks: Sequence[FrozenTask],
    entrants: Sequence[Entrant],
    infeasible: Mapping[str, str],
) -> list[ScoreCard]:
    """Score cards of a finished run, one per entrant.

    Args:
        run: the run directory, opened.
        suite: the suite.
        tasks: those that were run.
        entrants: who took part.
        infeasible: why a task could not be run at all, by its key.

    Raises:
        BiscaleError: an entrant has no task that can be scored.
    """
    reasons = dict(infeasible)
    for task in tasks:
        if task.key not in reasons and (why := why_unscored(task_rows(run.results, task))):
            reasons[task.key] = why
    return [_card(run, suite, tasks, one, reasons) for one in entrants]


def _card(
    run: Run,
    suite: BenchmarkSuite,
    tasks: Sequence[FrozenTask],
    one: Entrant,
    reasons: Mapping[str, str],
) -> ScoreCard:
    phases = {phase for candidate in one.candidates for phase in candidate.phases}
    mine = [task for task in tasks if task.tier in phases]
    scored: list[ScoredTask] = [
        scored_task(task, task_rows(run.results, task), run.windows, one.label)
        for task in mine
        if task.key not in reasons
    ]
    if not scored:
        first = next(f"{task.key}: {reasons[task.key]}" for task in mine)
        raise BiscaleError(f"policy '{one.label}' has no task that can be scored; {first}")
    return ScoreCard(
        suite=suite.name,
        suite_version=suite.version,
        suite_digest=suite.digest,
        policy=one.label,
        build=one.build,
        scores=aggregates(scored),
        results=tuple(each.result for each in scored),
        unscored=tuple(
            Unscored(task=task.key, reason=reasons[task.key])
            for task in mine
            if task.key in reasons
        ),
        training=training_costs(one),
        provenance=without_folders(run.provenance),
    )


def training_costs(one: Entrant) -> tuple[TrainingCost, ...]:
    """What the checkpoints of a policy say of their training; empty where nothing does."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for candidate in one.candidates:
        path = Path(candidate.build.partition(".npz")[0] + ".npz")
        if path.is_file():
            card = load_network(path).card
            if "steps" in card:
                found.setdefault(candidate.phases[0], []).append(card)
    return tuple(
        TrainingCost(
            tier=tier,
            algorithm=str(cards[0].get("algo", "")),
            env_steps=max(int(card["steps"]) for card in cards),
            seeds=tuple(int(card.get("seed", -1)) for card in cards),
            cpu_minutes=_most_minutes(cards),
        )
        for tier, cards in found.items()
    )


def _most_minutes(cards: Sequence[Mapping[str, Any]]) -> float | None:
    """Processor time of the dearest seed; None where one of them does not say."""
    spent = [card.get("cpu_minutes") for card in cards]
    return None if None in spent else max(float(one) for one in spent if one is not None)
