"""Rows of a suite of clusters: what an entrant did on one judged day or workload."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from biscale_env.evaluation.experiment.policy_list import REFERENCE

BOUND: Final = "bound"
"""Label of the rows that hold what nobody can go below."""
MAX: Final = REFERENCE.label
OWN: Final = {"cluster": "ilp", "multi": "tier2"}
"""BiScale's own per tier: tier 1 with its headroom tuned; tier 2, MPC and slack."""
NOT_HELD: Final = " (missed in tuning, too)"
"""Said of a setting where not even the most careful one held the bounds while tuning."""
SAVED: Final = "rows.csv"


@dataclass(frozen=True)
class TierRules:
    """What is done in a tier of clusters.

    Attributes:
        check_of: given what all tasks share, what refuses a name that is no entrant.
        inputs_of: SHA-256 of the files of an entrant that are not part of this package, by name.
        rows_of: runs an entrant on a task; a task for workers.
    """

    check_of: Callable[[Any], Callable[[str], None]]
    inputs_of: Callable[[str], dict[str, str]]
    rows_of: Callable[..., list[dict[str, Any]]]


def judged_row(task: str, policy: str, build: str, unit: str, **figures: Any) -> dict[str, Any]:
    """A row, all columns in order.

    Args:
        task: key of the task.
        policy: label.
        build: its name for the resolver.
        unit: the day or workload.
        **figures: ``energy_j`` of all GPUs; ``requests``, of which ``late_ttft`` and ``late_tpot``
            missed a bound; ``setting`` as words and whether it was ``tuned``; ``required``
            attainment; ``decision_s``, median time of a decision.
    """
    empty = {
        "energy_j": 0.0,
        "requests": 0.0,
        "late_ttft": 0.0,
        "late_tpot": 0.0,
        "setting": "",
        "tuned": False,
        "required": 0.0,
        "decision_s": float("nan"),
    }
    assert set(figures) <= set(empty), figures
    return {"task": task, "policy": policy, "build": build, "unit": unit, **empty, **figures}
