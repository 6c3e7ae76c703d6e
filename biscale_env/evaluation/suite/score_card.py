"""The score card: what a policy did on every task of a suite, and where that comes from."""

import json
import re
from pathlib import Path
from typing import Any, Final

from pydantic import Field

from biscale_env.config.loader import Config, read_bytes, validate
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole

CARD_FORMAT: Final = 1
ALL: Final = "all"


class Estimate(Config):
    """An estimate with its 95 % interval; ends are None where the data cannot tell."""

    estimate: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.estimate:.3f}"
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


class TaskResult(Config):
    """What a policy did on one task, all workloads together.

    Attributes:
        task: key of the task in its suite, ``tier/name``.
        split: of the suite.
        score: 0 at max clock, 1 at the bound; below 0 where it spends more than max clock, 0 where
            the SLO is missed. The mean over training seeds.
        seed_scores: the same per training seed.
        met: whether every training seed reaches the target.
        energy_ratio: energy per output token relative to max clock on the same workloads.
        own_ratio: the same of BiScale's own controller.
        bound_ratio: the same of the bound (of the best plan found where ``bound_of`` says so).
        bound_of: ``bound`` or ``plan``.
        attainment: fraction of requests within the SLO; the lowest of the training seeds.
        target: attainment that every policy is judged by here.
        better: fraction of windows of time in which it spends less than BiScale's own.
        tuned: whether free parameters were chosen on tuning workloads.
        settings: what was chosen, per training seed.
        decision_median_s: median time of a single decision, s.
        decision_p99_s: its P99, s.
    """

    task: str
    split: str
    score: float
    seed_scores: tuple[float, ...] = Field(min_length=1)
    met: bool
    energy_ratio: float
    own_ratio: float
    bound_ratio: float
    bound_of: str
    attainment: float
    target: float
    better: float
    tuned: bool
    settings: tuple[str, ...]
    decision_median_s: float | None
    decision_p99_s: float | None


class Unscored(Config):
    """A task without a score for anybody, and why."""

    task: str
    reason: str


class Aggregate(Config):
    """The scores of several tasks.

    Attributes:
        tier: ``prefill``, ``decode`` or ``all``.
        split: of the suite, or ``all``.
        score: inter-quartile mean over tasks and training seeds.
        mean: the plain mean, which no missed task can leave.
        better: probability that the policy spends less than BiScale's own controller in a random
            window of time; a missed task is no improvement.
        n_tasks: scored tasks.
        missed: tasks whose SLO is missed.
    """

    tier: str
    split: str
    score: Estimate
    mean: float
    better: Estimate
    n_tasks: int
    missed: tuple[str, ...] = ()


class TrainingCost(Config):
    """What the checkpoints say of their training.

    Attributes:
        tier: phase of the checkpoint.
        algorithm: e.g. ``ppo``.
        env_steps: steps until the checkpoint was written.
        seeds: training seeds.
        cpu_minutes: processor time of learning until then, recording of data left out, the most of
            the seeds; None where a checkpoint does not say.
    """

    tier: str
    algorithm: str
    env_steps: int
    seeds: tuple[int, ...]
    cpu_minutes: float | None = None


_FOLDERS: Final = re.compile(r"(?<![\w.:/])/(?:[^\s/,:=()]+/)+|\b[A-Za-z]:\\(?:[^\s\\,:=()]+\\)*")


def without_folders(value: Any) -> Any:
    """Provenance as it may be published: files by their names, not by where someone keeps them.

    Args:
        value: strings, lists and mappings of them, whose keys are rewritten too.
    """
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, dict):
        return {without_folders(key): without_folders(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(each) for each in value]
    return value


class ScoreCard(Config):
    """A policy's result on a suite.

    Attributes:
        card_format: version of this format.
        suite: name of the suite.
        suite_version: its version.
        suite_digest: SHA-256 of its tasks.
        policy: name in tables.
        build: name for the resolver.
        scores: per tier and split, the whole first.
        results: per task.
        unscored: tasks without a score.
        training: per checkpoint; empty for policies that are not trained.
        provenance: command, revision, packages, digests of inputs, time.
    """

    card_format: int = CARD_FORMAT
    suite: str
    suite_version: int
    suite_digest: str
    policy: str
    build: str
    scores: tuple[Aggregate, ...] = Field(min_length=1)
    results: tuple[TaskResult, ...] = Field(min_length=1)
    unscored: tuple[Unscored, ...] = ()
    training: tuple[TrainingCost, ...] = ()
    provenance: dict[str, Any]

    @property
    def tiers(self) -> list[str]:
        """Tiers that were run."""
        return list(dict.fromkeys(result.task.partition("/")[0] for result in self.results))

    def of(self, tier: str, split: str = ALL) -> Aggregate | None:
        """The scores of a tier and split; None where it has none."""
        return next((s for s in self.scores if (s.tier, s.split) == (tier, split)), None)


def write_card(card: ScoreCard, path: Path) -> None:
    """Write a card as JSON."""
    write_whole(path, json.dumps(card.model_dump(mode="json"), indent=1) + "\n")


def read_card(path: Path) -> ScoreCard:
    """Read a card.

    Raises:
        BiscaleError: no such file, no JSON, another format, an unknown key or a missing one.
    """
    content = read_bytes(path)
    try:
        data = json.loads(content)
    except ValueError:  # not UTF-8, or not JSON
        raise BiscaleError(f"{path} is not valid JSON: give a score card") from None
    if isinstance(data, dict) and data.get("card_format") != CARD_FORMAT:
        given = data.get("card_format")
        raise BiscaleError(
            f"{path}: card_format is {given!r}, this version reads {CARD_FORMAT}: "
            "give a score card of biscale benchmark"
        )
    return validate(data, ScoreCard, str(path))
