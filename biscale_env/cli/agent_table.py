"""The table of learned agents: per operating point, against BiScale's own controller and the best static clock, with intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from biscale_env.cli.agent_jobs import AGENT, BISCALE_OWN
from biscale_env.evaluation.statistics import (
    Interval,
    iqm,
    paired_difference,
    probability_of_improvement,
    stratified_bootstrap,
)

SEED = 20240229
POINT = ["phase", "scenario", "load"]


def per_workload(rows: pd.DataFrame, policy: str) -> pd.Series:
    """Energy ratio of a policy per workload seed and model draw, training seeds averaged."""
    mine = rows[rows["policy"] == policy]
    return mine.groupby(["workload_seed", "model_draw"])["energy_ratio"].mean()


def saving(rows: pd.DataFrame, other: str) -> Interval:
    """Mean paired difference of energy ratios, agent minus another policy, with Student's 95 % interval over workloads."""
    a, b = per_workload(rows, AGENT), per_workload(rows, other)
    common = a.index.intersection(b.index)
    return paired_difference(a[common].to_numpy(), b[common].to_numpy())


def _percent(interval: Interval) -> str:
    if not np.isfinite(interval.estimate):
        return "-"
    return f"{100 * interval.estimate:+.2f} [{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]"


def _cell(rows: pd.DataFrame, policy: str) -> str:
    mine = rows[rows["policy"] == policy]
    if mine.empty:
        return "-"
    counted = float(mine["n_counted"].sum())
    attained = 1.0 - float(mine["n_violations"].sum()) / max(counted, 1.0)
    mark = "" if attained >= float(mine["slo_attainment"].iloc[0]) else " (misses)"
    return f"{mine['energy_ratio'].mean():.4f} at {attained:.2%}{mark}"


def point_rows(results: pd.DataFrame) -> list[list[str]]:
    """One row of text per operating point."""
    made = []
    for (phase, scenario, load), rows in results.groupby(POINT, sort=False):
        own = BISCALE_OWN[str(phase)]
        made.append([
            str(phase), str(scenario), f"{load:.0%}", _cell(rows, "max"), _cell(rows, "static-best"), _cell(rows, own),
            _cell(rows, AGENT), _percent(saving(rows, own)), _percent(saving(rows, "static-best")),
        ])  # fmt: skip
    return made


def scores(results: pd.DataFrame, phase: str) -> dict[str, Any]:
    """IQM of the saving against max clock, and the probability that the agent saves more than BiScale's own controller."""
    rng, mine, own = np.random.default_rng(SEED), [], []
    for _, rows in results[results["phase"] == phase].groupby(POINT, sort=False):
        mine.append(1.0 - rows[rows["policy"] == AGENT]["energy_ratio"].to_numpy())
        own.append(1.0 - rows[rows["policy"] == BISCALE_OWN[phase]]["energy_ratio"].to_numpy())
    return {
        "agent": stratified_bootstrap(mine, rng, iqm),
        "own": stratified_bootstrap(own, rng, iqm),
        "better": probability_of_improvement(mine, own, rng),
    }


def markdown(results: pd.DataFrame) -> str:
    """The whole table and the scores below it."""
    head = [
        "phase", "scenario", "load", "max clock", "best static", "BiScale's own", "agent", "agent - own, % of max clock",
        "agent - static, % of max clock",
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in point_rows(results)]
    for phase in _phases(results):
        s = scores(results, phase)
        lines.append(
            f"\n{phase}: IQM of the saving against max clock {_share(s['agent'])} (agent), {_share(s['own'])} ({BISCALE_OWN[phase]}); "
            f"probability that the agent saves more in a random run: {_share(s['better'])}."
        )
    return "\n".join(lines) + "\n"


def _phases(results: pd.DataFrame) -> Sequence[str]:
    return list(dict.fromkeys(results["phase"]))


def _share(interval: Interval) -> str:
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
