"""The table of learned agents.

Per operating point, against BiScale's own controller, the best static clock in hindsight and the
oracle.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from biscale_env.core.markdown import markdown_table
from biscale_env.evaluation.stats.bootstrap import Interval, iqm, of_a_probability
from biscale_env.evaluation.stats.paired_windows import PairedWindows
from biscale_env.evaluation.stats.scores import crossed_interval
from biscale_env.evaluation.stats.targets import judged_target
from biscale_env.evaluation.stats.windows import resampled_ratios
from biscale_env.policies.policy_source import AGENT, BISCALE_OWN, ORACLE, STATIC_HINDSIGHT

SEED = 20240229
POINT = ["phase", "scenario", "load"]
HEAD = (
    "scenario",
    "load",
    "max clock",
    "best static (hindsight)",
    "BiScale's own",
    "agent",
    "agent - own",
    "agent - static",
    "oracle",
    "gap closed",
    "training seeds",
    "that hold",
)


class Shown(NamedTuple):
    """A policy at a point: energy ratio, pooled attainment, whether that reaches the target.

    ``unsure``: the interval of the attainment holds the target, or cannot be told.
    """

    ratio: float
    attained: float
    met: bool
    unsure: bool = False

    def __str__(self) -> str:
        """Energy with the attainment (never rounded up); struck through where it falls short."""
        attained = f"{np.floor(1e4 * self.attained + 1e-9) / 100:.2f}" + "?" * self.unsure
        text = f"{self.ratio:.3f} ({attained})"
        return text if self.met else f"~~{text}~~"


def attainment(rows: pd.DataFrame) -> float:
    """Fraction of all requests of these rows that met the SLO; NaN without rows."""
    counted = float(rows["n_counted"].sum())
    return 1.0 - float(rows["n_violations"].sum()) / counted if counted else float("nan")


def target(rows: pd.DataFrame) -> float:
    """Attainment that every policy is judged by at a point, given all its rows."""
    return judged_target(
        float(rows["slo_attainment"].iloc[0]), attainment(rows[rows["policy"] == "max"])
    )


def shown(rows: pd.DataFrame, asked: float, point: PairedWindows | None = None) -> Shown | None:
    """A policy's rows at one point, all workloads and seeds pooled; None without rows.

    Args:
        rows: its rows.
        asked: attainment that every policy is judged by.
        point: the operating point, for the interval of the attainment.
    """
    if rows.empty:
        return None
    attained = attainment(rows)
    unsure = False
    if point is not None:
        at = point.attainment(rows)
        unsure = not (asked <= at.low or at.high < asked)
    return Shown(float(rows["energy_ratio"].mean()), attained, attained >= asked - 1e-12, unsure)


def per_workload(rows: pd.DataFrame) -> pd.Series:
    """Energy ratio per workload seed and ensemble member, training seeds averaged."""
    return rows.groupby(["workload_seed", "ensemble_member"])["energy_ratio"].mean()


def by_seed(rows: pd.DataFrame) -> NDArray[np.float64]:
    """Energy ratios as a matrix: training seeds by workloads."""
    return rows.pivot_table(
        index="training_seed", columns=["workload_seed", "ensemble_member"], values="energy_ratio"
    ).to_numpy()


def split(rows: pd.DataFrame, shipped: int | None) -> dict[str, pd.DataFrame]:
    """Rows of one point by policy.

    ``agent`` is the shipped training seed (or all of them), ``seeds`` are all.
    """
    parts = {str(policy): mine for policy, mine in rows.groupby("policy")}
    seeds = parts.get(AGENT, rows.iloc[:0])
    parts["seeds"] = seeds
    if shipped is not None and (seeds["training_seed"] == shipped).any():
        parts[AGENT] = seeds[seeds["training_seed"] == shipped]
    return parts


def gap_closed(parts: Mapping[str, pd.DataFrame], own: str) -> float:
    """Fraction of the gap between BiScale's own controller and the oracle that the agent closes.

    On the oracle's workloads; NaN without an oracle.
    """
    if ORACLE not in parts or own not in parts:
        return float("nan")
    bound = per_workload(parts[ORACLE])
    mine, theirs = (per_workload(parts[name]).reindex(bound.index).mean() for name in (AGENT, own))
    return float((theirs - mine) / (theirs - bound.mean()))


def percent(interval: Interval) -> str:
    """A difference of energy ratios in points of max clock's energy, with its interval if any."""
    if not np.isfinite(interval.estimate):
        return "-"
    if not np.isfinite(interval.low):
        return f"{100 * interval.estimate:+.1f}"
    return f"{100 * interval.estimate:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _seeds(rows: pd.DataFrame, asked: float) -> tuple[str, str]:
    """Mean and range of the energy ratio over training seeds, and how many of them meet the SLO."""
    means = by_seed(rows).mean(axis=1)
    met = sum(
        one.met
        for _, mine in rows.groupby("training_seed")
        if (one := shown(mine, asked)) is not None
    )
    return f"{means.mean():.3f} [{means.min():.3f}, {means.max():.3f}]", f"{met} of {len(means)}"


def point_row(
    rows: pd.DataFrame, windows: pd.DataFrame, phase: str, shipped: int | None
) -> list[str]:
    """Cells of one operating point, without phase, scenario and load."""
    point = PairedWindows(rows, windows)
    own, parts = BISCALE_OWN[phase], split(rows, shipped)
    nothing, asked = rows.iloc[:0], target(rows)
    cells = [
        str(shown(parts.get(name, nothing), asked, point) or "-")
        for name in ("max", STATIC_HINDSIGHT, own, AGENT)
    ]
    against = [
        percent(point.energy_difference(parts[AGENT], parts[name])) if name in parts else "-"
        for name in (own, STATIC_HINDSIGHT)
    ]
    closed = gap_closed(parts, own)
    oracle = str(shown(parts.get(ORACLE, nothing), asked, point) or "-")
    return [
        *cells,
        *against,
        oracle,
        f"{closed:.0%}" if np.isfinite(closed) else "-",
        *_seeds(parts["seeds"], asked),
    ]


def point_rows(
    results: pd.DataFrame, windows: pd.DataFrame, phase: str, shipped: int | None = None
) -> list[list[str]]:
    """One row of text per operating point of a phase."""
    mine = results[results["phase"] == phase]
    return [
        [str(scenario), f"{load:.0%}", *point_row(rows, windows, phase, shipped)]
        for (_, scenario, load), rows in mine.groupby(POINT, sort=False)
    ]


class ScoredPoint(NamedTuple):
    """Scores of one policy at one point: per training seed, and that under resampling."""

    nominal: NDArray[np.float64]
    resampled: NDArray[np.float64]


def scores(results: pd.DataFrame, windows: pd.DataFrame, phase: str) -> dict[str, Any]:
    """IQM of the scores over operating points x training seeds.

    A score is 0 at max clock and 1 at the oracle; without an oracle it is the saving against max
    clock. Points that max clock itself cannot serve within the SLO, or without BiScale's own
    controller, are left out (``points`` says how many are left; with none there is nothing else).
    Windows of time are resampled within each point, training seeds together for all points;
    ``better`` is the probability that an agent saves more than BiScale's own controller in a window
    of time.
    """
    found: dict[str, list[ScoredPoint]] = {"agent": [], "own": [], "better": []}
    for _, rows in results[results["phase"] == phase].groupby(POINT, sort=False):
        parts = split(rows, None)
        served = attainment(parts.get("max", rows.iloc[:0]))
        there = not parts["seeds"].empty and BISCALE_OWN[phase] in parts
        if not there or not served >= float(rows["slo_attainment"].iloc[0]):
            continue
        room = 1.0 - float(parts[ORACLE]["energy_ratio"].mean()) if ORACLE in parts else 1.0
        point, own = PairedWindows(rows, windows), parts[BISCALE_OWN[phase]]
        seeds = [mine for _, mine in parts["seeds"].groupby("training_seed")]
        found["agent"].append(scored_point(point, seeds, room))
        found["own"].append(scored_point(point, [own], room))
        found["better"].append(better_point(point, seeds, own))
    if not found["agent"]:
        return {"points": 0}
    rng = np.random.default_rng(SEED)
    intervals = {
        name: crossed_interval(
            np.stack([one.nominal for one in each]),
            np.stack([one.resampled for one in each], axis=1),
            rng,
            mean_of_all if name == "better" else iqm,
        )
        for name, each in found.items()
    }
    return {
        **intervals,
        "better": of_a_probability(intervals["better"]),
        "points": len(found["agent"]),
        "oracle": ORACLE in set(results["policy"]),
    }


def mean_of_all(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis."""
    return np.asarray(np.mean(values, axis=-1))


def scored_point(point: PairedWindows, seeds: Sequence[pd.DataFrame], room: float) -> ScoredPoint:
    """Score of each training seed's runs at a point, all workloads together."""
    each = [point.resampled_energy_ratio(mine) for mine in seeds]
    nominal = np.array([ratio for ratio, _ in each])
    resampled = np.stack([moved for _, moved in each], axis=1)
    return ScoredPoint((1.0 - nominal) / room, (1.0 - resampled) / room)


def better_point(
    point: PairedWindows, seeds: Sequence[pd.DataFrame], own: pd.DataFrame
) -> ScoredPoint:
    """Fraction of windows in which each training seed saves more than BiScale's own controller."""
    less = np.stack([point.uses_less(mine, own) for mine in seeds])
    usable = np.isfinite(less).astype(np.float64)
    return ScoredPoint(*resampled_ratios(np.nan_to_num(less), usable, point.weights))


def as_agent(results: pd.DataFrame, judged: str) -> pd.DataFrame:
    """Results in which the policy that a table is about is the ``agent``; another one is left out.

    Args:
        results: completed results frame.
        judged: the policy's label.
    """
    if judged == AGENT:
        return results
    left = results[results["policy"] != AGENT]
    return left.assign(policy=left["policy"].replace(judged, AGENT))


def headed(head: Sequence[str], judged: str) -> list[str]:
    """Heads of columns with the policy's own label."""
    return [judged + text.removeprefix(AGENT) if text.startswith(AGENT) else text for text in head]


def markdown(
    results: pd.DataFrame,
    windows: pd.DataFrame,
    shipped: Mapping[str, int] | None = None,
    judged: str = AGENT,
) -> str:
    """The whole table and the scores below it, phase by phase.

    Args:
        results: completed results frame.
        windows: totals per run and window of time (``Run.windows``).
        shipped: per phase the training seed that is shown as ``agent``; without it all seeds are.
        judged: label of the policy that the table is about.
    """
    parts = []
    results = as_agent(results, judged)
    for phase in dict.fromkeys(results["phase"]):
        rows = point_rows(results, windows, phase, (shipped or {}).get(phase))
        table = markdown_table(headed(HEAD, judged), rows)
        parts.append(f"**{phase}**\n\n{table}\n\n{summary(results, windows, phase)}")
    return "\n\n".join(parts) + "\n"


def summary(results: pd.DataFrame, windows: pd.DataFrame, phase: str) -> str:
    """The scores of a phase in one sentence."""
    s = scores(results, windows, phase)
    if not s["points"]:
        return (
            f"{phase}: no scores, since there is no point that max clock serves with the agent and "
            f"{BISCALE_OWN[phase]} among the policies."
        )
    what = (
        "IQM of the score (0: max clock, 1: oracle)"
        if s["oracle"]
        else "IQM of the saving against max clock"
    )
    return (
        f"{phase}: {what} {_with_interval(s['agent'])} (all training seeds), "
        f"{_with_interval(s['own'])} ({BISCALE_OWN[phase]}), "
        f"over the {s['points']} points that max clock serves; "
        "probability that an agent saves more in a random window of time of them: "
        f"{_with_interval(s['better'])}."
    )


def _with_interval(interval: Interval) -> str:
    if not np.isfinite(interval.low):
        return f"{interval.estimate:.3f}"
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
