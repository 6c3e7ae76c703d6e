"""Verifying a score card: its arithmetic, and a sample of its tasks run again."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, Self

import numpy as np

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.stats.bootstrap import iqm
from biscale_env.evaluation.suite.benchmark import BenchmarkRequest, run_benchmark
from biscale_env.evaluation.suite.score_card import ALL, ScoreCard, TaskResult, read_card
from biscale_env.evaluation.suite.tasks import BenchmarkSuite
from biscale_env.jobs.workers import Workers

TOLERANCES: Final = {
    "energy_ratio": 2e-3,
    "own_ratio": 2e-3,
    "bound_ratio": 5e-3,
    "attainment": 1e-3,
}
"""By how much a figure may differ on another machine (assumed).

On one machine runs repeat to the bit; elsewhere the last bit of a latency can move a tuned setting.
The bound of decode comes from a solver.
"""
ROUNDING: Final = 1e-9


class Suite(Protocol):
    """What verification asks of a suite, of single instances or of clusters."""

    version: int

    @property
    def title(self) -> str:
        """Name and version."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of all tasks."""
        ...

    def tasks(self) -> Sequence[Any]:
        """All tasks; each has ``key`` and ``tier``."""
        ...

    def only(self, keys: set[str]) -> Self:
        """The suite with some of its tasks."""
        ...


Rerun = Callable[[Any, str, Path | None, int | Workers | None], Path]
"""Runs a suite for an entry ``[label=]name`` into a folder, and gives the card."""


def rerun(part: BenchmarkSuite, entry: str, out: Path | None, n_jobs: int | Workers | None) -> Path:
    """A suite of single instances."""
    (card,) = run_benchmark(BenchmarkRequest(part, [entry]), out, False, n_jobs)
    return card


def arithmetic_faults(card: ScoreCard, suite: Suite) -> list[str]:
    """What a card states that does not follow from its own figures, or from the suite.

    Args:
        card: the card.
        suite: the suite of that name as it is here.
    """
    if (suite.version, suite.digest) != (card.suite_version, card.suite_digest):
        return [
            f"its suite is {card.suite} v{card.suite_version} with other tasks than "
            f"{suite.title} of this version"
        ]
    faults = []
    asked = {task.key for task in suite.tasks() if task.tier in card.tiers}
    told = [result.task for result in card.results] + [each.task for each in card.unscored]
    if sorted(told) != sorted(asked):
        odd = min(asked.symmetric_difference(told) or set(told))
        faults.append(f"its tasks are not those of the suite: see '{odd}'")
    faults += [fault for result in card.results if (fault := _result_fault(result))]
    faults += _score_faults(card)
    return faults


def _result_fault(result: TaskResult) -> str:
    """One training seed states its score whole; several state only their mean."""
    if result.met != (result.attainment >= result.target - 1e-12):
        return f"{result.task}: attainment {result.attainment:.4f} does not say met={result.met}"
    if not math.isclose(np.mean(result.seed_scores), result.score, abs_tol=ROUNDING):
        return f"{result.task}: the score is not the mean of its training seeds"
    if len(result.seed_scores) > 1 and not result.met:
        return ""
    whole = (1.0 - result.energy_ratio) / (1.0 - result.bound_ratio)
    expected = whole if result.met else 0.0
    if not math.isclose(result.score, expected, abs_tol=ROUNDING):
        return f"{result.task}: score {result.score:.4f}, but its figures give {expected:.4f}"
    return ""


def _score_faults(card: ScoreCard) -> list[str]:
    faults = []
    for each in card.scores:
        chosen = [
            r
            for r in card.results
            if each.tier in (ALL, r.task.partition("/")[0]) and each.split in (ALL, r.split)
        ]
        values = [score for r in chosen for score in r.seed_scores]
        missed = tuple(r.task for r in chosen if not r.met)
        same = math.isclose(float(iqm(values)), each.score.estimate, abs_tol=ROUNDING)
        if not same or missed != each.missed:
            faults.append(f"the score of {each.tier}, {each.split} does not follow from its tasks")
    return faults


def sample_of(card: ScoreCard, n_tasks: int, seed: int) -> list[TaskResult]:
    """Tasks of a card that are run again, each tier in turn."""
    rng = np.random.default_rng(seed)
    shuffled = [card.results[i] for i in rng.permutation(len(card.results))]
    by_tier = [[r for r in shuffled if r.task.startswith(f"{tier}/")] for tier in card.tiers]
    turns = [each[i] for i in range(len(shuffled)) for each in by_tier if i < len(each)]
    return turns[:n_tasks]


def differences(told: Sequence[TaskResult], found: Sequence[TaskResult]) -> list[str]:
    """Figures that do not come out again, one sentence each."""
    again = {result.task: result for result in found}
    faults = []
    for result in told:
        if result.task not in again:
            faults.append(f"{result.task}: it cannot be scored here")
            continue
        for name, tolerance in TOLERANCES.items():
            ours, theirs = getattr(again[result.task], name), getattr(result, name)
            if not abs(ours - theirs) <= tolerance:
                faults.append(f"{result.task}: {name} is {theirs:.4f} on the card, {ours:.4f} here")
    return faults


def verify(
    path: Path,
    suite: Suite,
    n_tasks: int = 2,
    seed: int = 0,
    policy: str | None = None,
    out: Path | None = None,
    n_jobs: int | Workers | None = None,
    run: Rerun = rerun,
) -> list[str]:
    """Check a card and run a sample of its tasks again, tuning and references included.

    Args:
        path: the card.
        suite: the suite it states.
        n_tasks: tasks of the sample; 0 checks the arithmetic only.
        seed: of the sample.
        policy: the policy's name here, if it is another than on the card.
        out: run directory of the sample; None makes a new one.
        n_jobs: processes, or which workers; None for all cores.
        run: runs a suite of that kind.

    Returns:
        What does not hold, one sentence each; empty for a card that holds.

    Raises:
        BiscaleError: no card, or its policy cannot be found here.
    """
    card = read_card(path)
    faults = arithmetic_faults(card, suite)
    sample = sample_of(card, n_tasks, seed)
    if faults or not sample:
        return faults
    part = suite.only({result.task for result in sample})
    build = policy or card.build
    entry = build if build == card.policy else f"{card.policy}={build}"
    return differences(sample, read_card(run(part, entry, out, n_jobs)).results)


def require_valid(path: Path, faults: Sequence[str]) -> None:
    """Say what does not hold.

    Raises:
        BiscaleError: anything does not.
    """
    if faults:
        raise BiscaleError(f"{path} does not hold: {'; '.join(faults)}")
