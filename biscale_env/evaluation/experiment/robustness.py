"""``biscale evaluate --robustness``.

One agent in distribution, under shifted conditions, and on unseen workloads, kept apart.
"""

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from biscale_env.config.loader import Config, load_named
from biscale_env.evaluation.report.robustness_table import BETWEEN


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

    def scenarios(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Scenario and changes of every condition.

        Its name becomes ``split: name``, so that the results frame keeps the splits apart.
        """
        for split, conditions in self.splits.items():
            for condition in conditions:
                name = f"{split}{BETWEEN}{condition.name}"
                yield condition.scenario, {**condition.changes, "name": name}


def load_robustness(name: str) -> Robustness:
    """The conditions ``configs/robustness/<name>.yaml``, or of a YAML file.

    Raises:
        BiscaleError: no such file, an unknown key or an impossible value.
    """
    return load_named("robustness", name, Robustness)
