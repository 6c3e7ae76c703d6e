"""What a policy's name means before it is bound to a plant, and how a name is cut in parts."""

import re
from collections.abc import Collection
from typing import Any, Final, Protocol

from biscale_env.contract import Policy
from controllers.base import PolicyContext
from controllers.registry import LOOKAHEAD, is_lookahead

PHASES: Final = ("prefill", "decode")
AGENT: Final = "agent"
STATIC_BEST: Final = "static-best"
STATIC_HINDSIGHT: Final = "static-hindsight"
"""The best constant clock of the judged workloads themselves: no controller, but what one must beat
to have earned its keep."""
ORACLE: Final = "oracle"
PLANNED: Final = (STATIC_BEST, STATIC_HINDSIGHT, ORACLE, LOOKAHEAD)
"""Names of policies that are made from the workload itself: a comparison can make them only."""
BISCALE_OWN: Final = {"prefill": "mpc", "decode": "slack"}
"""BiScale's own controllers, which learned agents are compared with."""
SUFFIXES: Final = (".npz", ".zip")
FILES: Final = (*SUFFIXES, ".onnx")
"""Suffixes of policies in files; only those of :data:`SUFFIXES` are found in run directories."""

_FILE = re.compile(r"(?P<base>.+\.(?:npz|zip|onnx))(?::(?P<rest>.*))?")
_CLASS = re.compile(r"(?P<base>(?:[A-Za-z_][\w.]*|.+\.py):[A-Za-z_]\w*)(?::(?P<rest>.*))?")
_OTHER = re.compile(r"(?P<base>.+?)(?::(?P<rest>[A-Za-z_]\w*=.*))?")


def is_planned(name: str) -> bool:
    """Whether a policy is made from the workload itself, by a comparison only."""
    return name in PLANNED or is_lookahead(name)


def is_planned_each(name: str) -> bool:
    """Whether every workload has a plan of its own, instead of one setting for all."""
    return name == ORACLE or is_lookahead(name)


class PolicySource(Protocol):
    """One policy by name, not yet made."""

    @property
    def name(self) -> str:
        """The whole name, as it was given."""
        ...

    @property
    def phases(self) -> tuple[str, ...]:
        """Phases that it can control."""
        ...

    def settings(self, phase: str) -> list[dict[str, Any]]:
        """Settings of its free parameters that tuning tries; none when there is nothing to tune."""
        ...

    def make(self, context: PolicyContext, **params: Any) -> Policy:
        """The policy in a context; ``params`` win over those in the name."""
        ...


def split_name(name: str, known: Collection[str]) -> tuple[str, str]:
    """Base of a policy's name and its parameters as text.

    Args:
        name: e.g. ``mpc:margin=0.1,forecast=4``, ``runs/p:margin=0.2``, ``mine:Rule:gain=2``.
        known: names that need no further look, such as those of the controllers.
    """
    base, _, rest = name.partition(":")
    if base in known:
        return base, rest
    for pattern in (_FILE, _CLASS, _OTHER):
        if found := pattern.fullmatch(name):
            return found["base"], found["rest"] or ""
    return name, ""


def is_class_name(base: str) -> bool:
    """Whether a base reads ``module:Class`` or ``file.py:Class``."""
    found = _CLASS.fullmatch(base)
    return found is not None and found["base"] == base
