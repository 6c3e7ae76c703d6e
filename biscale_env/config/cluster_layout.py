"""Placements: which instances share the GPUs of a cluster.

An instance has a phase, a tensor-parallel degree and a base clock.
"""

from collections import Counter
from typing import Literal

from pydantic import Field, model_validator

from biscale_env.config.loader import Config, load_named

InstancePhase = Literal["prefill", "decode", "colocated"]


class InstanceGroup(Config):
    """Instances that are alike.

    Attributes:
        phase: ``prefill``, ``decode``, or ``colocated`` (both in one instance, chunked prefill).
        tp: GPUs per instance.
        freq_mhz: base clock; tier 2 starts from it, without tier 2 it is the clock.
        count: how many of them.
        weight: relative speed of one of them, for routing (requests/s it can serve, where known).
    """

    phase: InstancePhase
    tp: int = Field(gt=0)
    freq_mhz: float = Field(gt=0)
    count: int = Field(default=1, gt=0)
    weight: float = Field(default=1.0, gt=0)

    @property
    def gpus(self) -> int:
        """GPUs of the group."""
        return self.tp * self.count

    def label(self) -> str:
        """Short form, e.g. ``2 x TP4 @ 1395``."""
        return f"{self.count} x TP{self.tp} @ {self.freq_mhz:g}"


class Placement(Config):
    """Instances of a cluster.

    A placement is either disaggregated (at least one prefill and one decode instance) or
    co-located.
    """

    name: str
    groups: tuple[InstanceGroup, ...] = Field(min_length=1)
    source: str = ""

    @model_validator(mode="after")
    def _serves_requests(self) -> "Placement":
        phases = {g.phase for g in self.groups}
        if phases not in ({"prefill", "decode"}, {"colocated"}):
            raise ValueError(
                "a placement needs prefill and decode instances, or only colocated ones; "
                f"this one has {', '.join(sorted(phases))}"
            )
        return self

    @property
    def colocated(self) -> bool:
        """Whether prefill and decode share instances."""
        return self.groups[0].phase == "colocated"

    @property
    def gpus(self) -> int:
        """GPUs in use."""
        return sum(g.gpus for g in self.groups)

    def gpus_of(self, phase: str) -> int:
        """GPUs of one phase."""
        return sum(g.gpus for g in self.groups if g.phase == phase)

    def instances(self, phase: str) -> list[InstanceGroup]:
        """One entry per instance of a phase, each with count 1."""
        return [
            g.model_copy(update={"count": 1})
            for g in self.groups
            if g.phase == phase
            for _ in range(g.count)
        ]

    def shape(self) -> Counter[tuple[str, int]]:
        """Number of instances per (phase, TP), clocks aside."""
        counts: Counter[tuple[str, int]] = Counter()
        for g in self.groups:
            counts[g.phase, g.tp] += g.count
        return counts

    def label(self) -> str:
        """Short form, e.g. ``P 1 x TP4 @ 1395; D 2 x TP4 @ 1005``."""
        marks = {"prefill": "P", "decode": "D", "colocated": "C"}
        parts = [
            f"{mark} " + " + ".join(g.label() for g in self.groups if g.phase == phase)
            for phase, mark in marks.items()
            if any(g.phase == phase for g in self.groups)
        ]
        return "; ".join(parts)


def load_placement(name: str) -> Placement:
    """Load a shipped placement (``configs/placements``) or a YAML file."""
    return load_named("placements", name, Placement)
