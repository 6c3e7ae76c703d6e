"""``biscale evaluate --robustness``.

One agent in distribution, under shifted conditions, and on unseen workloads, kept apart.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field

from biscale_env.config.loader import Config, load_named
from biscale_env.evaluation.experiment.agent_jobs import AGENT, BISCALE_OWN, scenario_jobs
from biscale_env.evaluation.experiment.compare import ComparisonJob
from biscale_env.evaluation.experiment.scenarios import Infeasible
from biscale_env.evaluation.report.agent_table import STATIC, percent, saving, shown, target

BETWEEN = ": "


class Condition(Config):
    """A named scenario with changes.

    Attributes:
        name: shown in the table.
        scenario: name of a scenario in ``configs/scenarios``.
        changes: keys of the scenario that are other here.
    """

    name: str
    scenario: str
    changes: dict[str, Any] = Field(default_factory=dict)


class Robustness(Config):
    """Conditions by split.

    Attributes:
        about: what it is for.
        splits: conditions per split, in the order of the table.
    """

    about: str
    splits: dict[str, tuple[Condition, ...]] = Field(min_length=1)


def robustness_jobs(
    name: str,
    phase: str,
    found: list[tuple[int, Path]],
    changes: dict[str, Any],
    tuned: bool,
    infeasible: list[Infeasible],
) -> Iterator[ComparisonJob]:
    """Jobs of all conditions; the scenario of each is called ``split: name``, so that the results
    frame keeps them apart.
    """
    for split, conditions in load_named("robustness", name, Robustness).splits.items():
        for condition in conditions:
            point = changes | condition.changes | {"name": f"{split}{BETWEEN}{condition.name}"}
            try:
                yield from scenario_jobs(condition.scenario, phase, found, None, point, tuned)
            except Infeasible as error:
                infeasible.append(error)


def markdown(results: pd.DataFrame) -> str:
    """One row per phase, split and condition.

    Max clock, best static, BiScale's own, the agent and the paired difference.
    """
    head = [
        "phase",
        "split",
        "condition",
        "max clock",
        "best static",
        "BiScale's own",
        "agent",
        "agent - own, points",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|" + "---:|" * (len(head) - 3)]
    for (phase, scenario), rows in results.groupby(["phase", "scenario"], sort=False):
        split, _, name = str(scenario).partition(BETWEEN)
        own = BISCALE_OWN[str(phase)]
        policies = ("max", STATIC, own, AGENT)
        parts = {policy: rows[rows["policy"] == policy] for policy in policies}
        if parts[AGENT].empty:  # a run that was broken off
            continue
        cells = [str(shown(parts[policy], target(rows)) or "-") for policy in policies]
        cells.append(percent(saving(parts[AGENT], parts[own])))
        lines.append("| " + " | ".join([str(phase), split, name, *cells]) + " |")
    return "\n".join(lines) + "\n"
