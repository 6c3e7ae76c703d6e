"""Scores across scenarios: 0 is max clock, 1 the oracle.

A policy that misses an SLO somewhere is not averaged in.
"""

import math
from typing import Any, Final

import numpy as np
import pandas as pd

from biscale_env.evaluation.runs.record import PAIR_COLUMNS, SCENARIO_COLUMNS, is_bound
from biscale_env.evaluation.stats.bootstrap import (
    Interval,
    normalised_score,
    paired_difference,
    probability_of_improvement,
    stratified_bootstrap,
)
from biscale_env.evaluation.stats.intervals import SEED

_NAN: Final = Interval(math.nan, math.nan, math.nan)


def with_scores(frame: pd.DataFrame) -> pd.DataFrame:
    """Results with a column ``score``.

    The fraction of the oracle's saving that the run reaches on the same workload.

    NaN where the oracle or max clock was not run. The oracle is the first policy of that family by
    name.
    """
    bounds = (
        frame[frame["policy"].map(is_bound)]
        .sort_values(["policy", "variant"])
        .drop_duplicates(list(PAIR_COLUMNS))
    )
    best = bounds[[*PAIR_COLUMNS, "energy_ratio"]].rename(columns={"energy_ratio": "_bound"})
    joined = frame.drop(columns="score", errors="ignore").merge(
        best, on=list(PAIR_COLUMNS), how="left"
    )
    joined["score"] = normalised_score(
        joined["energy_ratio"], np.ones(len(joined)), joined["_bound"]
    )
    return joined.drop(columns="_bound")


def score_table(frame: pd.DataFrame, against: str | None = None) -> pd.DataFrame:
    """One row per phase and policy.

    IQM of the scores over feasible scenarios, with a stratified bootstrap interval.

    A policy that misses the SLO in any feasible scenario gets no score: to average the saving of a
    run that misses the SLO would reward missing it. ``scenarios_met`` of ``scenarios`` says how
    often it kept it.

    Args:
        frame: completed results.
        against: a policy; adds the probability that each policy scores higher in a scenario chosen
            at random, and the mean paired difference in energy ratio (negative: uses less) over
            common workloads.
    """
    scored = with_scores(frame)
    scored = scored[scored["feasible"].fillna(False).astype(bool)]
    rows: list[dict[str, Any]] = []
    for (phase, policy, variant), runs in scored.groupby(
        ["phase", "policy", "variant"], sort=False
    ):
        points = runs.groupby(list(SCENARIO_COLUMNS), dropna=False, sort=False)
        kept = [
            _pooled_attainment(group) >= float(group["slo_attainment"].iloc[0]) * (1 - 1e-12)
            for _, group in points
        ]
        rng = np.random.default_rng(SEED)
        strata = [group["score"].dropna().to_numpy() for _, group in points]
        score = stratified_bootstrap(strata, rng) if all(kept) else _NAN
        row = {
            "phase": phase,
            "policy": policy,
            "variant": variant,
            "scenarios": len(kept),
            "scenarios_met": sum(kept),
        }
        row |= {"score_iqm": score.estimate, "score_ci_low": score.low, "score_ci_high": score.high}
        if against is not None:
            row |= _against(
                runs, scored[(scored["phase"] == phase) & (scored["policy"] == against)]
            )
        rows.append(row)
    return pd.DataFrame(rows)


def _pooled_attainment(group: pd.DataFrame) -> float:
    weight = group["n_counted"].to_numpy(dtype=np.float64)
    return float(np.average(group["attainment"], weights=weight)) if weight.sum() > 0 else 1.0


def _against(runs: pd.DataFrame, rival: pd.DataFrame) -> dict[str, float]:
    rival = rival[rival["variant"] == ""]
    columns = [*PAIR_COLUMNS, "score", "energy_ratio"]
    pairs = (
        runs[columns]
        .merge(rival[columns], on=list(PAIR_COLUMNS), suffixes=("", "_rival"))
        .dropna(subset=["score"])
    )
    groups = [group for _, group in pairs.groupby(list(SCENARIO_COLUMNS), dropna=False, sort=False)]
    better = probability_of_improvement(
        [group["score"] for group in groups],
        [group["score_rival"] for group in groups],
        np.random.default_rng(SEED),
        500,
    )
    less = paired_difference(pairs["energy_ratio"], pairs["energy_ratio_rival"])
    return {
        "p_better": better.estimate,
        "p_better_ci_low": better.low,
        "p_better_ci_high": better.high,
        "energy_ratio_difference": less.estimate,
        "energy_ratio_difference_ci_low": less.low,
        "energy_ratio_difference_ci_high": less.high,
    }
