"""Frozen tasks of whole clusters: ``configs/benchmark/clusters/*.yaml``."""

import json
from typing import Any, Final, Literal, NamedTuple

from pydantic import Field, model_validator

from biscale_env.config.loader import Config, list_names, load_named
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.runs.provenance import text_hash
from biscale_env.evaluation.suite.tasks import CLUSTER_TIERS, refuse_twice

FOLDER: Final = "benchmark/clusters"
ClusterTier = Literal["cluster", "multi"]
"""Who decides which instances are in service, and who decides the clock of each."""


class PlacementTask(Config):
    """Days of a service, for policies of the coarse loop.

    Attributes:
        name: short name, alone of its kind in the suite.
        service: rate profile.
        tune_days: days on which free parameters are chosen.
        judged_days: days that are scored.
    """

    name: str
    service: str
    tune_days: tuple[int, ...] = Field(min_length=1)
    judged_days: tuple[int, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _apart(self) -> "PlacementTask":
        if both := set(self.tune_days) & set(self.judged_days):
            raise BiscaleError(f"task '{self.name}': day {min(both)} is tuned on and judged")
        return self


class ClockTask(Config):
    """A cluster at a load, for policies of its instances.

    Attributes:
        name: short name, alone of its kind in the suite.
        placement: name of a placement with one tensor parallel degree per phase, or a YAML file.
        profile: workload profile.
        load: fraction of what the placement is predicted to serve.
        env: further options of the cluster.
    """

    name: str
    placement: str
    profile: str
    load: float = Field(gt=0)
    env: dict[str, Any] = Field(default_factory=dict)


class PlacementTier(Config):
    """What all tasks of placements share.

    Attributes:
        env: options of ``BiScale/Cluster-v1``, tier 2 among them.
        profile: workload profile of gaps and lengths.
        window_s: time between decisions, s.
        windows: decisions a day.
        mean_rps: mean load of a service over its whole profile, requests/s.
        seed: of gaps and lengths of the judged days; those of the tuning days have the next one.
        splits: tasks by what they are to the shipped agents.
    """

    env: dict[str, Any]
    profile: str
    window_s: float = Field(gt=0)
    windows: int = Field(gt=0)
    mean_rps: float = Field(gt=0)
    seed: int = Field(ge=0)
    splits: dict[str, tuple[PlacementTask, ...]] = Field(min_length=1)


class ClockTier(Config):
    """What all tasks of clocks share.

    Attributes:
        window_s: time in which the requests of a workload arrive, s.
        grace_s: time after that until energy counts no longer, s.
        n_tune: workloads on which free parameters are chosen.
        n_judged: workloads that are scored.
        splits: tasks by what they are to the shipped agents.
    """

    window_s: float = Field(gt=0)
    grace_s: float = Field(ge=0)
    n_tune: int = Field(ge=1)
    n_judged: int = Field(ge=2)
    splits: dict[str, tuple[ClockTask, ...]] = Field(min_length=1)


class ClusterTask(NamedTuple):
    """A task with its split and tier.

    Attributes:
        split: e.g. ``in distribution``.
        tier: ``cluster`` or ``multi``.
        what: the task.
    """

    split: str
    tier: ClusterTier
    what: PlacementTask | ClockTask

    @property
    def key(self) -> str:
        """Name that no other task of the suite has."""
        return f"{self.tier}/{self.what.name}"


class ClusterSuite(Config):
    """Tasks of clusters whose results may be compared while the version is the same.

    Attributes:
        name: name of the suite.
        version: raised by any change of a task.
        about: one sentence on what it is for.
        cluster: tasks of placements.
        multi: tasks of clocks.
    """

    name: str
    version: int = Field(ge=1)
    about: str = ""
    cluster: PlacementTier | None = None
    multi: ClockTier | None = None

    @model_validator(mode="after")
    def _names_once(self) -> "ClusterSuite":
        refuse_twice(self.name, [task.key for task in self.tasks()])
        return self

    @property
    def title(self) -> str:
        """Name and version, as in tables."""
        return f"{self.name} v{self.version}"

    def tasks(self, tier: str | None = None) -> list[ClusterTask]:
        """All tasks, or those of one tier.

        Raises:
            BiscaleError: the suite has no task of that tier.
        """
        found = [
            ClusterTask(split, of, task)
            for of in CLUSTER_TIERS
            if tier in (None, of) and (shared := getattr(self, of)) is not None
            for split, tasks in shared.splits.items()
            for task in tasks
        ]
        if not found:
            raise BiscaleError(f"suite {self.title} has no {tier or 'cluster'} tasks")
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of all tasks; a comment in the file changes nothing."""
        plain = self.model_dump(mode="json", exclude={"about"})
        return text_hash(json.dumps(plain, sort_keys=True))

    def only(self, keys: set[str]) -> "ClusterSuite":
        """The suite with some of its tasks, e.g. a sample to verify.

        Args:
            keys: keys of the tasks (:attr:`ClusterTask.key`) that stay.
        """
        changed: dict[str, Any] = {}
        for tier in CLUSTER_TIERS:
            shared = getattr(self, tier)
            kept = {
                split: chosen
                for split, tasks in (shared.splits.items() if shared else ())
                if (chosen := tuple(task for task in tasks if f"{tier}/{task.name}" in keys))
            }
            changed[tier] = shared.model_copy(update={"splits": kept}) if kept else None
        return self.model_copy(update=changed)


def tier_of(name: str) -> ClusterTier:
    """A tier of clusters by name.

    Raises:
        BiscaleError: no such tier.
    """
    if name == "cluster":
        return "cluster"
    if name == "multi":
        return "multi"
    raise BiscaleError(f"unknown tier '{name}': it must be {' or '.join(CLUSTER_TIERS)}")


def load_cluster_suite(name: str) -> ClusterSuite:
    """A suite ``configs/benchmark/clusters/<name>.yaml`` or a YAML file.

    Raises:
        BiscaleError: no such suite; lists the known ones.
    """
    if name not in list_names(FOLDER) and not name.endswith((".yaml", ".yml")):
        known = ", ".join(list_names(FOLDER))
        raise BiscaleError(
            f"unknown suite of clusters '{name}'; known: {known}, or the path of a YAML file"
        )
    return load_named(FOLDER, name, ClusterSuite)
