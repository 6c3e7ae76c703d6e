"""What each SLO class of requests was given: from the columns of results to a table."""

from typing import Any, Final

import numpy as np
import pandas as pd

from biscale_env.config.slo import Slo
from biscale_env.evaluation.runs.record import SCENARIO_COLUMNS
from biscale_env.evaluation.stats.class_metrics import CLASSES, slo_of

CLASS_COLUMNS: Final = (
    *SCENARIO_COLUMNS,
    "policy",
    "variant",
    "slo_class",
    "n_counted",
    "attainment",
    "asked",
    "ttft_p99_s",
    "ttft_bound_s",
    "tpot_p99_s",
    "tpot_bound_s",
)
"""Columns of ``classes.csv``: latencies are means of each run's P99, NaN where a phase has none."""


def has_classes(results: pd.DataFrame) -> bool:
    """Whether any run was judged by an SLO with classes."""
    return CLASSES in results and bool(results[CLASSES].notna().any())


def counts(group: pd.DataFrame, slo: Slo) -> tuple[np.ndarray, np.ndarray]:
    """Requests judged and missed of each class over some runs, by the class's number."""
    found = []
    for what in ("counted", "missed"):
        names = [f"n_{what}_{name}" for name in slo.class_names]
        found.append([float(group[n].sum()) if n in group else 0.0 for n in names])
    return np.array(found[0]), np.array(found[1])


def pooled_attainment(group: pd.DataFrame) -> float | None:
    """Attainment of the class that is worst off over some runs; None without classes."""
    if not has_classes(group):
        return None
    slo = slo_of(group.iloc[0].to_dict())
    return slo.worst_off(*counts(group, slo))[0]


def class_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row per operating point, policy and class that has requests; empty without classes.

    Args:
        results: the completed results frame.
    """
    rows: list[dict[str, Any]] = []
    if has_classes(results):
        keys = [*SCENARIO_COLUMNS, "policy", "variant"]
        told = results[results[CLASSES].notna()]
        for values, group in told.groupby(keys, dropna=False, sort=False):
            point = dict(zip(keys, values, strict=True))
            rows += [point | row for row in _rows(group)]
    return pd.DataFrame(rows, columns=list(CLASS_COLUMNS))


def _rows(group: pd.DataFrame) -> list[dict[str, Any]]:
    slo = slo_of(group.iloc[0].to_dict())
    counted, missed = counts(group, slo)
    found = []
    for k in np.flatnonzero(counted).tolist():
        own, name = slo.of_class(k), slo.class_names[k]
        row = {
            "slo_class": name,
            "n_counted": int(counted[k]),
            "attainment": 1.0 - missed[k] / counted[k],
            "asked": own.attainment,
        }
        for metric, bound_s in (("ttft", own.ttft_s), ("tpot", own.tpot_s)):
            column = f"{metric}_p99_{name}_s"
            row[f"{metric}_p99_s"] = float(group[column].mean()) if column in group else np.nan
            row[f"{metric}_bound_s"] = bound_s
        found.append(row)
    return found
