"""Frozen, versioned tasks: which operating points a suite holds, and a digest that pins them."""

import json
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

from pydantic import Field, model_validator

from biscale_env.config.loader import Config, list_names, load_named, validate
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.rollouts.scenarios import Scenario
from biscale_env.evaluation.runs.provenance import text_hash

Tier = Literal["prefill", "decode"]
TIERS: Final[tuple[Tier, ...]] = ("prefill", "decode")
CLUSTER_TIERS: Final = ("cluster", "multi")
"""Tiers of whole clusters, which have suites of their own (``configs/benchmark/clusters``)."""


class BenchmarkTask(Config):
    """One operating point of a suite.

    Attributes:
        name: short name, alone of its kind in the suite.
        tiers: phases that it is a task of.
        changes: keys of the scenario that differ from the suite's ``base``.
    """

    name: str
    tiers: tuple[Tier, ...] = Field(default=TIERS, min_length=1)
    changes: dict[str, Any] = Field(default_factory=dict)


class FrozenTask(NamedTuple):
    """A task of one tier with everything that it is made of.

    Attributes:
        split: e.g. ``in distribution``.
        tier: ``prefill`` or ``decode``.
        scenario: the operating point.
    """

    split: str
    tier: str
    scenario: Scenario

    @property
    def key(self) -> str:
        """Name that no other task of the suite has."""
        return f"{self.tier}/{self.scenario.name}"


class BenchmarkSuite(Config):
    """Tasks whose results may be compared for as long as the version is the same.

    Attributes:
        name: name of the suite.
        version: raised by any change of a task.
        about: one sentence on what it is for.
        base: keys of the scenario that all tasks share.
        by_tier: further ones that all tasks of a tier share (a decode instance serves ten times
            the requests, so its workloads are shorter).
        oracle_seeds: workloads of each tier for which the bound is computed, the first few.
        splits: tasks by what they are to the shipped agents: in distribution, or held out.
    """

    name: str
    version: int = Field(ge=1)
    about: str = ""
    base: dict[str, Any]
    by_tier: dict[Tier, dict[str, Any]] = Field(default_factory=dict)
    oracle_seeds: dict[Tier, int]
    splits: dict[str, tuple[BenchmarkTask, ...]] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_once(self) -> "BenchmarkSuite":
        names = [task.name for tasks in self.splits.values() for task in tasks]
        refuse_twice(self.name, names)
        if missing := set(self.tiers) - set(self.oracle_seeds):
            raise BiscaleError(f"suite '{self.name}': oracle_seeds lacks {min(missing)}")
        return self

    @property
    def title(self) -> str:
        """Name and version, as in tables."""
        return f"{self.name} v{self.version}"

    @property
    def tiers(self) -> list[Tier]:
        """Tiers that have tasks."""
        found = {tier for tasks in self.splits.values() for task in tasks for tier in task.tiers}
        return [tier for tier in TIERS if tier in found]

    def tasks(self, tier: str | None = None) -> list[FrozenTask]:
        """All tasks, or those of one tier.

        Args:
            tier: ``prefill``, ``decode``; None for all there are.

        Raises:
            BiscaleError: the suite has no task of that tier, or a task is no scenario.
        """
        if tier is not None and tier not in self.tiers:
            known = ", ".join(self.tiers)
            if tier in CLUSTER_TIERS:
                raise BiscaleError(f"{tier} is a tier of clusters: suite {self.title} has {known}")
            clusters = " and ".join(CLUSTER_TIERS)
            raise BiscaleError(
                f"unknown tier '{tier}': suite {self.title} has {known}; {clusters} are those of "
                "clusters"
            )
        return [
            FrozenTask(split, of, self._scenario(task, of))
            for of in self.tiers
            if tier in (None, of)
            for split, tasks in self.splits.items()
            for task in tasks
            if of in task.tiers
        ]

    def _scenario(self, task: BenchmarkTask, tier: Tier) -> Scenario:
        keys = self.base | self.by_tier.get(tier, {}) | task.changes | {"name": task.name}
        return validate(keys, Scenario, f"suite '{self.name}', task '{task.name}'")

    @property
    def digest(self) -> str:
        """SHA-256 of all tasks as they are resolved; a comment in the file changes nothing."""
        resolved = [
            [task.split, task.tier, task.scenario.model_dump(mode="json", exclude_defaults=True)]
            for task in self.tasks()
        ]
        plain = [self.name, self.version, sorted(self.oracle_seeds.items()), resolved]
        return text_hash(json.dumps(plain, sort_keys=True))

    def only(self, keys: set[str]) -> "BenchmarkSuite":
        """The suite with some of its tasks, e.g. a sample to verify.

        Args:
            keys: keys of the tasks (:attr:`FrozenTask.key`) that stay.
        """
        splits = {}
        for split, tasks in self.splits.items():
            kept = [
                task.model_copy(update={"tiers": tiers})
                for task in tasks
                if (tiers := tuple(t for t in task.tiers if f"{t}/{task.name}" in keys))
            ]
            if kept:
                splits[split] = tuple(kept)
        return self.model_copy(update={"splits": splits})


def refuse_twice(suite: str, names: Sequence[str]) -> None:
    """Names of tasks stand once.

    Raises:
        BiscaleError: one stands twice.
    """
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise BiscaleError(f"suite '{suite}': two tasks are called '{twice}'")


def load_suite(name: str) -> BenchmarkSuite:
    """A suite ``configs/benchmark/<name>.yaml`` or a YAML file.

    Raises:
        BiscaleError: no such suite; lists the known ones.
    """
    if name not in list_names("benchmark") and not name.endswith((".yaml", ".yml")):
        known = ", ".join(list_names("benchmark"))
        raise BiscaleError(f"unknown suite '{name}'; known: {known}, or the path of a YAML file")
    return load_named("benchmark", name, BenchmarkSuite)
