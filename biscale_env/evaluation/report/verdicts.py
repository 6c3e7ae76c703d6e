"""One sentence on an operating point: who needs least energy there, against what."""

import math
from collections.abc import Mapping
from typing import Any, Final

import pandas as pd

from biscale_env.evaluation.report.words import number, requirement, share
from biscale_env.evaluation.runs.record import REFERENCE_POLICY, is_bound
from biscale_env.policies.policy_source import STATIC_BEST, STATIC_HINDSIGHT

NOT_REACHED: Final = "not reached"  # no setting of a policy comes up to the attainment


def infeasible(rows: pd.DataFrame) -> bool:
    """Whether max clock itself was run and misses the SLO here."""
    return bool(rows["feasible"].fillna(True).eq(False).any())


def verdict(rows: pd.DataFrame) -> str:
    """One sentence on one operating point.

    Who needs least energy, against max clock and against the best static clock in hindsight: at
    equal attainment where there are curves, else among those that meet the SLO as they are.
    """
    if compared_at_equal_attainment(rows):
        return _verdict_of_curves(rows)
    able = rows[rows["target_met"].astype(bool) & _is_controller(rows)]
    if infeasible(rows):
        return _verdict_beside_max(rows, able)
    if able.empty:
        return "No controller meets the SLO here."
    if able["policy"].eq(REFERENCE_POLICY).all() and len(rows) > 1:
        return (
            "Only max clock meets the SLO here: no controller saves energy and keeps the promise."
        )
    first = able.sort_values(["energy_ratio", "energy_per_output_token_j"]).iloc[0].to_dict()
    energy = number(first["energy_per_output_token_j"])
    text = f"Least energy while meeting the SLO: {first['label']}, {energy} J per token"
    if math.isfinite(first["energy_ratio"]):
        text += f", {_change(first['energy_ratio'])} max clock"
    return f"{text}{_against_static(rows, first)}{_with_future_known(rows)}."


def compared_at_equal_attainment(rows: pd.DataFrame) -> bool:
    """Whether settings were run on the judged workloads here, so that there are curves."""
    return "equal_ratio" in rows and bool(rows["equal_ratio"].notna().any())


def _is_controller(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Neither a bound nor the clock that was chosen on the judged workloads."""
    return ~rows["policy"].map(is_bound) & ~rows["policy"].eq(STATIC_HINDSIGHT)


def _against_static(rows: pd.DataFrame, first: Mapping[Any, Any]) -> str:
    static = rows[rows["policy"].eq(STATIC_HINDSIGHT) & rows["target_met"].astype(bool)]
    if static.empty:
        return ""
    ratio = first["energy_per_output_token_j"] / static["energy_per_output_token_j"].iloc[0]
    return f", {_change(float(ratio))} the best static clock in hindsight"


def _with_future_known(rows: pd.DataFrame) -> str:
    bound = rows[rows["policy"].map(is_bound) & rows["slo_met"].astype(bool)]
    if bound.empty or not math.isfinite(bound["energy_ratio"].min()):
        return ""
    return f"; with the future known {_change(bound['energy_ratio'].min())} max clock"


def _verdict_of_curves(rows: pd.DataFrame) -> str:
    """Where policies are compared at equal attainment."""
    own = rows[_is_controller(rows) & ~rows["policy"].isin([REFERENCE_POLICY, STATIC_BEST])]
    able = own[own["equal_ratio"].notna()].sort_values("equal_ratio")
    late = own.loc[own["equal_state"].eq(NOT_REACHED), "policy"].tolist()
    if able.empty:
        return "No controller reaches the attainment that is asked for here."
    first = able.iloc[0]
    text = (
        f"At {share(float(first['target']))} % attainment {first['policy']} needs least energy, "
        f"{_change(first['equal_ratio'])} max clock"
    )
    if math.isfinite(first["static_ratio"]):
        text += f", {_beside_static(first)}"
    if not first["target_met"]:
        text += f"; as tuned it reaches {share(float(first['attainment']))} % only"
    if late:
        text += f"; not reached by any setting of {', '.join(late)}"
    return f"{text}{_with_future_known(rows)}."


def _beside_static(row: "pd.Series[Any]") -> str:
    low, high = row["static_ratio_ci_low"], row["static_ratio_ci_high"]
    change = f"{_change(row['static_ratio'])} the best static clock in hindsight"
    if not (math.isfinite(low) and math.isfinite(high)) or high - low < 5e-4:
        return change
    interval = f"{low:.3f} to {high:.3f} of its energy"
    return f"{change} ({interval}{', so not told apart' if low <= 1.0 <= high else ''})"


def _verdict_beside_max(rows: pd.DataFrame, able: pd.DataFrame) -> str:
    """Where max clock itself misses the SLO.

    Who saves most without losing more than the allowance to it.
    """
    reached = rows.loc[rows["policy"].eq(REFERENCE_POLICY), "attainment"].iloc[0]
    text = (
        f"Infeasible: max clock itself reaches only {share(float(reached))} % where the SLO asks "
        f"for {requirement({str(k): v for k, v in rows.iloc[0].items()})}; "
        f"controllers are judged by {share(float(rows['target'].iloc[0]))} % here"
    )
    others = able[~able["policy"].eq(REFERENCE_POLICY)].sort_values(
        ["energy_ratio", "energy_per_output_token_j"]
    )
    if others.empty:
        return f"{text}, and none holds it."
    first = others.iloc[0]
    change = _change(first["energy_ratio"])
    return f"{text}; least energy among those that hold it: {first['label']}, {change} max clock."


def _change(ratio: float) -> str:
    percent = 100 * (1 - ratio)
    return (
        f"{percent:.1f} % below"
        if percent >= 0.05
        else f"{-percent:.1f} % above"
        if percent <= -0.05
        else "equal to"
    )
