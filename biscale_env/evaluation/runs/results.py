"""The results frame, one row per run, and its summary per policy.

Rows are completed with what only all of them can tell.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
import pandas as pd

from biscale_env.evaluation.runs.class_columns import pooled_attainment
from biscale_env.evaluation.runs.record import (
    PAIR_COLUMNS,
    PHASES,
    REFERENCE_POLICY,
    SCENARIO_COLUMNS,
)
from biscale_env.evaluation.stats import targets
from biscale_env.evaluation.stats.class_metrics import CLASSES

LATENCIES: Final = tuple(f"{metric}_p{q}_s" for metric in ("ttft", "tpot") for q in (50, 90, 99))
_AVERAGED: Final = (
    "energy_per_output_token_j",
    "energy_per_request_j",
    "energy_ratio",
    "attainment",
    "attainment_ttft",
    "attainment_tpot",
    "goodput_rps",
    *LATENCIES,
    "mean_power_w",
    "utilisation",
    "freq_effective_mean_mhz",
    "decision_time_median_s",
    "decision_time_p99_s",
)


def results_frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A completed frame from result rows, in a stable order.

    By scenario, the reference first, then by name.
    """
    frame = pd.DataFrame(list(rows))
    return complete(frame) if len(frame) else frame


def _is_reference(frame: pd.DataFrame) -> "pd.Series[bool]":
    return (frame["policy"] == REFERENCE_POLICY) & (frame["variant"] == "")


def complete(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the columns that compare a run with the reference policy on the same workload and plant.

    ``energy_ratio``: energy per output token relative to policy ``max``; NaN when that run is
    absent. ``feasible``: whether ``max`` meets the SLO over all workloads of the scenario together
    (its counted requests are pooled); missing (NA) when ``max`` was not run. A scenario that max
    clock cannot serve is named infeasible. ``target``: attainment that controllers are judged by
    there (`targets.judged_target`).
    """
    frame = frame.drop(columns=["energy_ratio", "feasible", "target"], errors="ignore")
    reference = frame[_is_reference(frame)]
    base = reference.drop_duplicates(list(PAIR_COLUMNS))[
        [*PAIR_COLUMNS, "energy_per_output_token_j"]
    ]
    base = base.rename(columns={"energy_per_output_token_j": "_base_j"})
    frame = frame.merge(base, on=list(PAIR_COLUMNS), how="left")
    frame["energy_ratio"] = frame["energy_per_output_token_j"] / frame["_base_j"]
    met = _scenario_feasible(reference)
    frame = frame.drop(columns="_base_j").merge(met, on=list(SCENARIO_COLUMNS), how="left")
    frame["feasible"] = frame["feasible"].astype("boolean")
    frame["target"] = frame["target"].fillna(frame["slo_attainment"])
    order = frame.assign(_first=~_is_reference(frame), _phase=frame["phase"].map(PHASES.index))
    by = [
        "_phase",
        *SCENARIO_COLUMNS,
        "_first",
        "policy",
        "variant",
        "workload_seed",
        "ensemble_member",
        "training_seed",
    ]
    return (
        order.sort_values(by, kind="stable")
        .drop(columns=["_first", "_phase"])
        .reset_index(drop=True)
    )


def _scenario_feasible(reference: pd.DataFrame) -> pd.DataFrame:
    weighted = reference.assign(
        _met=reference["attainment"] * reference["n_counted"],
        _need=reference["slo_attainment"] * reference["n_counted"],
        _count=reference["n_counted"],
    )
    pooled = weighted.groupby(list(SCENARIO_COLUMNS), dropna=False, as_index=False)[
        ["_met", "_need", "_count"]
    ].sum()
    pooled["feasible"] = pooled["_met"] >= pooled["_need"] * (1 - 1e-12)
    fractions = pooled[["_met", "_need"]].div(pooled["_count"].clip(lower=1.0), axis=0)
    pooled["target"] = [targets.judged_target(need, met) for met, need in fractions.to_numpy()]
    return pooled[[*SCENARIO_COLUMNS, "feasible", "target"]]


def policy_label(row: Mapping[Any, Any]) -> str:
    """Name of a policy in tables and legends: with its variant where it has one."""
    return f"{row['policy']} ({row['variant']})" if row["variant"] else str(row["policy"])


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per scenario and policy.

    Means over workloads, members and training seeds, with their spread.

    Attainment is pooled over requests (not averaged over runs), so that it is the fraction the SLO
    speaks about; energies and decision times are means over runs, latency quantiles too
    (``intervals`` puts those of all requests in their place). ``energy_ratio`` is the mean energy
    per output token over that of the reference on the same workloads and members;
    ``energy_ratio_low`` and ``energy_ratio_high`` are the least and the greatest over runs.
    ``slo_met`` is judged on the pooled attainment, ``target_met`` too: as ``slo_met``, but where
    max clock itself misses the SLO, against what it attains less a small allowance. ``bound_below``
    is that of :func:`bound_below`.
    """
    keys = [*SCENARIO_COLUMNS, "policy", "variant"]
    rows = []
    for values, group in frame.groupby(keys, dropna=False, sort=False):
        row: dict[str, Any] = dict(zip(keys, values, strict=True))
        row |= {"runs": len(group), "n_requests": int(group["n_requests"].sum())}
        row |= {name: float(group[name].mean()) for name in _AVERAGED}
        row |= _pooled_columns(group) | {"bound_below": bound_below(group)}
        row |= {f"{n}_{side}": float(getattr(group[n], f)()) for n in _RANGED for side, f in _SIDES}
        for name, bound in (("slo_met", "slo_attainment"), ("target_met", "target")):
            row[name] = bool(row["attainment"] >= float(group[bound].iloc[0]) * (1 - 1e-12))
        row |= {name: group[name].iloc[0] for name in _COMMON}
        row |= {name: group[name].iloc[0] for name in _LABELS if name in group}
        row |= {CLASSES: group[CLASSES].iloc[0]} if CLASSES in group else {}
        row |= {name: round(float(group[name].sum())) for name in _SUMMED}
        if "day" in group:
            row["days"] = group["day"].nunique()
        rows.append(row)
    summary = pd.DataFrame(rows)
    if len(summary):
        summary["feasible"] = summary["feasible"].astype("boolean")
        summary.insert(len(keys), "label", [policy_label(r) for r in summary.to_dict("records")])
    return summary


def bound_below(group: pd.DataFrame) -> float:
    """How far the energy that nobody can undercut lies below that of the plans, a fraction.

    NaN for anything but plans made with the future known, and where a workload has no bound.
    """
    names = ["oracle_lower_bound_any_delay_j", "oracle_replay_j"]
    if not set(names) <= set(group):
        return math.nan
    bound_j, plan_j = (float(group[name].sum(skipna=False)) for name in names)
    return 1.0 - _ratio(bound_j, plan_j)


def _pooled_columns(group: pd.DataFrame) -> dict[str, float]:
    """Attainment over the requests of all runs; energy over that of the reference, where paired."""
    weight = group["n_counted"].to_numpy(dtype=np.float64)
    # a run without a judged request has no weight; if all are such, what they say (1, or not known)
    weight = weight if weight.sum() > 0 else np.ones_like(weight)
    pooled = {
        name: float(np.average(group[name][weight > 0], weights=weight[weight > 0]))
        for name in ("attainment", "attainment_ttft", "attainment_tpot")
    }
    own = group["energy_per_output_token_j"]
    base = own / group["energy_ratio"]
    paired = base.notna()
    worst = pooled_attainment(group)
    if worst is not None:
        pooled["attainment"] = worst
    return pooled | {"energy_ratio": _ratio(own[paired].sum(), base[paired].sum())}


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0 else math.nan


_COMMON: Final = (
    "feasible",
    "target",
    "slo_ttft_s",
    "slo_tpot_s",
    "slo_attainment",
    "slo_statistic",
    "rate_rps",
    "n_gpus",
)
_LABELS: Final = ("workload", "fold", "idle", "capacity_rps", "tune_capacity_rps", "one_trace")
"""Labels (``experiment.compare.record_of``) that the runs of a point share."""
_SUMMED: Final = ("n_violations", "solver_failures", "preemptions")
_RANGED: Final = ("energy_ratio", "energy_per_output_token_j", "attainment")
_SIDES: Final = (("low", "min"), ("high", "max"))


def scenario_label(row: Mapping[Any, Any]) -> str:
    """One line that names an operating point: scenario, phase, load, placement, SLO."""
    load = row["load"]
    fraction = "" if load is None or math.isnan(load) else f", {100 * load:.0f} % of capacity"
    instance = f"TP{row['tp']} {row['dtype']}"
    return f"{row['scenario']}, {row['phase']}{fraction}, {instance}, SLO {row['slo']}"
