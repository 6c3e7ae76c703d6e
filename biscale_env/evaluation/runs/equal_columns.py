"""Energy at the SLO's attainment, as columns of a summary.

Relative to max clock and to the best static clock in hindsight.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from biscale_env.evaluation.runs.member_columns import Key, row_keys
from biscale_env.evaluation.runs.record import REFERENCE_POLICY
from biscale_env.evaluation.stats.equal_attainment import (
    AttainmentCurve,
    mean_ratio_interval_at,
    standing,
)
from biscale_env.evaluation.stats.paired_windows import point_weights
from biscale_env.policies.policy_source import STATIC_BEST, STATIC_HINDSIGHT

Curves = dict[Key, dict[tuple[int, int], tuple[AttainmentCurve, float]]]
"""Curve and attainment asked for, by operating point and policy, ensemble member, training seed."""

TOTALS: Final = ("energy_j", "n_met", "n_counted", "output_tokens")
AGAINST: Final = {"equal_ratio": REFERENCE_POLICY, "static_ratio": STATIC_HINDSIGHT}
"""Column, and the policy whose energy at the SLO's attainment it is a ratio to."""


def add_equal_attainment(
    summary: pd.DataFrame, results: pd.DataFrame, curves: pd.DataFrame
) -> pd.DataFrame:
    """Add the ratios of :data:`AGAINST` with their 95 % intervals, and how they came about.

    ``equal_state`` is ``reached``, ``above`` (even the setting of least energy attains more than
    was asked) or ``not reached`` (no number). ``<column>_not_reached`` is the share of resamples in
    which one of the two curves does not reach. Over several members of the ensemble or training
    seeds it is the mean of the ratios, each formed within one plant at the attainment that is
    asked for in it; where one of them does not reach it there is no number.

    Args:
        summary: from :func:`biscale_env.evaluation.runs.results.summarise`.
        results: the completed results frame.
        curves: ``Run.curves``; when it is empty the summary is returned as it is.
    """
    if curves.empty:
        return summary
    plants = dict(
        zip(
            results["run_id"],
            zip(
                results["ensemble_member"].astype(int),
                results["training_seed"].astype(int),
                results["target"].astype(float),
                strict=True,
            ),
            strict=True,
        )
    )
    names = dict(zip(results["run_id"], row_keys(results), strict=True))
    found: Curves = {}
    windows: dict[Key, pd.DataFrame] = {}
    for run, rows in curves.groupby("run_id", sort=False):
        key, (member, seed, target) = names[str(run)], plants[str(run)]
        found.setdefault(key, {}).setdefault((member, seed), (curve_of(rows), target))
        windows.setdefault(key[:-2], rows.head(int(rows["window"].max()) + 1))
    weights = {point: _weights(point, found, rows) for point, rows in windows.items()}
    added = [_ratios(key, found, weights.get(key[:-2])) for key in row_keys(summary)]
    return pd.concat([summary, pd.DataFrame(added, index=summary.index)], axis=1)


def curve_of(rows: pd.DataFrame) -> AttainmentCurve:
    """The curve of one run's rows of ``curves.parquet``, the chosen setting first."""
    n_windows = int(rows["window"].max()) + 1
    return AttainmentCurve(
        *(rows[name].to_numpy(dtype=np.float64).reshape(-1, n_windows) for name in TOTALS)
    )


def _weights(point: Key, curves: Curves, windows: pd.DataFrame) -> NDArray[np.float64]:
    """Weights of the windows of a point, the same for all of its policies.

    The load, and the policies' mean energy beside max clock's in their first plant, say how alike
    neighbours are. Workloads generated independently of each other are days apart.

    Args:
        point: the operating point.
        curves: all curves.
        windows: ``day`` and ``copies`` of each window.
    """
    first = {
        key: of_plants[min(of_plants)][0] for key, of_plants in curves.items() if key[:-2] == point
    }
    top = first.get((*point, REFERENCE_POLICY, ""))
    mine = list(first.values())
    series: list[NDArray[np.float64]] = []
    if top is not None:
        base = np.where(top.energy_j[0] > 0, top.energy_j[0], np.nan)
        others = [curve.energy_j[0] / base for curve in mine if curve is not top]
        series = [np.mean(others, axis=0)] if others else []
    copies = float(windows["copies"].mean()) if "copies" in windows else 1.0
    return point_weights(windows["day"].to_numpy(), mine[0].n_counted[0], series, copies)


def _ratios(key: Key, curves: Curves, weights: NDArray[np.float64] | None) -> dict[str, Any]:
    point, (policy, variant) = key[:-2], key[-2:]
    # constant clocks are one family, so they have one curve
    own = (*point, STATIC_HINDSIGHT, "") if policy == STATIC_BEST else (*point, policy, variant)
    mine = curves.get(own, {})
    row: dict[str, Any] = {"equal_state": _standing(list(mine.values()))}
    for column, other in AGAINST.items():
        others = curves.get((*point, other, ""), {})
        base = {member: curve for (member, _), (curve, _) in others.items()}
        pairs = [
            (curve, base[member], target)
            for (member, _), (curve, target) in mine.items()
            if member in base
        ]
        if not pairs or weights is None:
            row[column] = math.nan
            continue
        ratio = mean_ratio_interval_at(pairs, weights)
        row |= {
            column: ratio.estimate,
            f"{column}_ci_low": ratio.low,
            f"{column}_ci_high": ratio.high,
            f"{column}_not_reached": ratio.not_reached,
        }
    return row


def _standing(plants: Sequence[tuple[AttainmentCurve, float]]) -> str:
    """The curve's standing that says least in any plant; empty without a curve."""
    found = {standing(curve, target) for curve, target in plants}
    return next((s for s in ("not reached", "above", "reached") if s in found), "")
