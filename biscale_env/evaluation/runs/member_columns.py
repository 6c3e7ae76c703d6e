"""The range of the energy ratio over members of the ensemble, as columns of a summary."""

import math
from typing import Any, Final

import pandas as pd

from biscale_env.evaluation.runs.record import REFERENCE_POLICY, SCENARIO_COLUMNS

MEMBER_RANGE: Final = (0.05, 0.95)

Key = tuple[Any, ...]


def row_keys(frame: pd.DataFrame) -> list[Key]:
    """Operating point, policy and variant of every row."""
    columns = frame[[*SCENARIO_COLUMNS, "policy", "variant"]]
    return [
        tuple(None if isinstance(v, float) and math.isnan(v) else v for v in row)
        for row in columns.itertuples(index=False)
    ]


def add_member_range(
    summary: pd.DataFrame, results: pd.DataFrame, member_runs: pd.DataFrame
) -> pd.DataFrame:
    """Add ``member_ratio_low`` and ``_high``: 5 and 95 % of the energy ratio over members.

    Every member's energy is divided by that of max clock in the same member, on the same workload;
    parameters are those chosen in the nominal plant, and of several training seeds it is the mean.
    ``n_members`` says over how many.

    Args:
        summary: the summary so far.
        results: the completed results frame.
        member_runs: ``Run.member_runs``; when it is empty the summary is returned as it is.
    """
    if member_runs.empty:
        return summary
    names = dict(zip(results["run_id"], row_keys(results), strict=True))
    each: dict[Key, list[pd.Series]] = {}
    for run, rows in member_runs.groupby("run_id", sort=False):
        each.setdefault(names[str(run)], []).append(rows.set_index("member")["energy_j"])
    energy = {key: pd.concat(seeds, axis=1).mean(axis=1) for key, seeds in each.items()}
    added = [_member_range(key, energy) for key in row_keys(summary)]
    return pd.concat([summary, pd.DataFrame(added, index=summary.index)], axis=1)


def _member_range(key: Key, energy: dict[Key, pd.Series]) -> dict[str, float]:
    own, base = energy.get(key), energy.get((*key[:-2], REFERENCE_POLICY, ""))
    names = ("member_ratio_low", "member_ratio_high")
    if own is None or base is None:
        return dict.fromkeys(names, math.nan) | {"n_members": 0}
    ratio = (own / base).dropna()
    return dict(zip(names, ratio.quantile(list(MEMBER_RANGE)), strict=True)) | {
        "n_members": len(ratio)
    }
