"""Energy at the SLO's attainment, as columns of a summary.

Relative to max clock and to the best static clock in hindsight.
"""

import math
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from biscale_env.evaluation.runs.member_columns import Key, row_keys
from biscale_env.evaluation.runs.record import REFERENCE_POLICY
from biscale_env.evaluation.stats.equal_attainment import (
    AttainmentCurve,
    ratio_interval_at,
    standing,
)
from biscale_env.evaluation.stats.paired_windows import point_weights
from biscale_env.policies.policy_source import STATIC_BEST, STATIC_HINDSIGHT

TOTALS: Final = ("energy_j", "n_met", "n_counted", "output_tokens")
AGAINST: Final = {"equal_ratio": REFERENCE_POLICY, "static_ratio": STATIC_HINDSIGHT}
"""Column, and the policy whose energy at the SLO's attainment it is a ratio to."""


def add_equal_attainment(
    summary: pd.DataFrame, results: pd.DataFrame, curves: pd.DataFrame
) -> pd.DataFrame:
    """Add the ratios of :data:`AGAINST` with their 95 % intervals, and how they came about.

    ``equal_state`` is ``reached``, ``above`` (even the setting of least energy attains more than
    was asked) or ``not reached`` (no number). ``<column>_not_reached`` is the share of resamples in
    which one of the two curves does not reach. Policies of several members or training seeds are
    compared in the first of them.

    Args:
        summary: from :func:`biscale_env.evaluation.runs.results.summarise`.
        results: the completed results frame.
        curves: ``Run.curves``; when it is empty the summary is returned as it is.
    """
    if curves.empty:
        return summary
    names = dict(zip(results["run_id"], row_keys(results), strict=True))
    found: dict[Key, AttainmentCurve] = {}
    windows: dict[Key, pd.DataFrame] = {}
    for run, rows in curves.groupby("run_id", sort=False):
        key = names[str(run)]
        if key not in found:
            found[key], windows[key[:-2]] = curve_of(rows), rows.head(int(rows["window"].max()) + 1)
    targets = dict(zip(row_keys(results), results["target"], strict=True))
    weights = {point: _weights(point, found, rows) for point, rows in windows.items()}
    added = [
        _ratios(key, found, float(targets[key]), weights.get(key[:-2])) for key in row_keys(summary)
    ]
    return pd.concat([summary, pd.DataFrame(added, index=summary.index)], axis=1)


def curve_of(rows: pd.DataFrame) -> AttainmentCurve:
    """The curve of one run's rows of ``curves.parquet``, the chosen setting first."""
    n_windows = int(rows["window"].max()) + 1
    return AttainmentCurve(
        *(rows[name].to_numpy(dtype=np.float64).reshape(-1, n_windows) for name in TOTALS)
    )


def _weights(
    point: Key, curves: dict[Key, AttainmentCurve], windows: pd.DataFrame
) -> NDArray[np.float64]:
    """Weights of the windows of a point, the same for all of its policies.

    The load, and the policies' mean energy beside max clock's, say how alike neighbours are.
    Workloads generated independently of each other are days apart.

    Args:
        point: the operating point.
        curves: all curves.
        windows: ``day`` and ``copies`` of each window.
    """
    top = curves.get((*point, REFERENCE_POLICY, ""))
    mine = [curve for key, curve in curves.items() if key[:-2] == point]
    series: list[NDArray[np.float64]] = []
    if top is not None:
        base = np.where(top.energy_j[0] > 0, top.energy_j[0], np.nan)
        others = [curve.energy_j[0] / base for curve in mine if curve is not top]
        series = [np.mean(others, axis=0)] if others else []
    copies = float(windows["copies"].mean()) if "copies" in windows else 1.0
    return point_weights(windows["day"].to_numpy(), mine[0].n_counted[0], series, copies)


def _ratios(
    key: Key, curves: dict[Key, AttainmentCurve], target: float, weights: NDArray[np.float64] | None
) -> dict[str, Any]:
    point, (policy, variant) = key[:-2], key[-2:]
    # constant clocks are one family, so they have one curve
    own = (*point, STATIC_HINDSIGHT, "") if policy == STATIC_BEST else (*point, policy, variant)
    curve = curves.get(own)
    row: dict[str, Any] = {"equal_state": "" if curve is None else standing(curve, target)}
    for column, other in AGAINST.items():
        base = curves.get((*point, other, ""))
        if curve is None or base is None or weights is None:
            row[column] = math.nan
            continue
        ratio = ratio_interval_at(curve, base, target, weights)
        row |= {
            column: ratio.estimate,
            f"{column}_ci_low": ratio.low,
            f"{column}_ci_high": ratio.high,
            f"{column}_not_reached": ratio.not_reached,
        }
    return row
