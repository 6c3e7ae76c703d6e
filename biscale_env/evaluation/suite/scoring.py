"""From the runs of a suite to scores: 0 is max clock, 1 is the bound, a missed SLO is 0.

The bound is what no policy with as many misses as the SLO allows can go below at any delay, on the
workloads that it was computed for, against max clock on the same ones; it is taken as known, as in
the table of agents. Where the optimum leaves no bound, the best plan found takes its place.
"""

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from biscale_env.evaluation.report.agent_table import (
    ScoredPoint,
    attainment,
    better_point,
    mean_of_all,
    scored_point,
    shown,
    target,
)
from biscale_env.evaluation.stats.bootstrap import Interval, iqm, of_a_probability
from biscale_env.evaluation.stats.paired_windows import SEED, PairedWindows
from biscale_env.evaluation.stats.scores import crossed_interval
from biscale_env.evaluation.suite.score_card import ALL, Aggregate, Estimate, TaskResult
from biscale_env.evaluation.suite.tasks import FrozenTask
from biscale_env.policies.policy_source import BISCALE_OWN, ORACLE

LEAST_ROOM: Final = 0.005
"""Below this saving of the bound a score would be noise over noise (assumed)."""


class Bound(NamedTuple):
    """Least energy ratio, and whether it is a proven ``bound`` or the best ``plan`` found."""

    ratio: float
    of: str


class ScoredTask(NamedTuple):
    """A policy on one task: what the card keeps, and what intervals are made of.

    ``score`` and ``better`` have one value per training seed.
    """

    result: TaskResult
    score: ScoredPoint
    better: ScoredPoint


def task_rows(results: pd.DataFrame, task: FrozenTask) -> pd.DataFrame:
    """Rows of all policies on a task."""
    mine = (results["phase"] == task.tier) & (results["scenario"] == task.scenario.name)
    return results[mine]


def bound_of(rows: pd.DataFrame) -> Bound:
    """What score 1 is, relative to max clock on the workloads of the bound.

    Args:
        rows: rows of all policies on a task.
    """
    found = rows[rows["policy"] == ORACLE]
    key = ["workload_seed", "ensemble_member"]
    top_j = rows[rows["policy"] == "max"].set_index(key)["energy_j"]
    base_j = float(sum(top_j[tuple(pair)] for pair in found[key].to_numpy()))
    bounds_j = found["oracle_lower_bound_any_delay_j"].to_numpy(dtype=np.float64)
    if np.isfinite(bounds_j).all():
        return Bound(float(bounds_j.sum()) / base_j, "bound")
    return Bound(float(found["energy_j"].sum()) / base_j, "plan")


def why_unscored(rows: pd.DataFrame) -> str:
    """Why nobody can be scored on a task; empty where everybody can."""
    tops = rows[rows["policy"] == "max"]
    served, asked = attainment(tops), float(tops["slo_attainment"].iloc[0])
    if not served >= asked:
        return f"max clock itself misses the SLO ({served:.2%} of {asked:.0%})"
    room = 1.0 - bound_of(rows).ratio
    if not room >= LEAST_ROOM:
        return f"the bound saves {room:.2%} against max clock, too little for a score"
    return ""


def scored_task(
    task: FrozenTask, rows: pd.DataFrame, windows: pd.DataFrame, label: str
) -> ScoredTask:
    """The score of one policy on one task.

    Args:
        task: the task.
        rows: rows of all policies on it.
        windows: totals per run and window of time (``Run.windows``).
        label: the policy.
    """
    point, asked, bound = PairedWindows(rows, windows), target(rows), bound_of(rows)
    own = rows[rows["policy"] == BISCALE_OWN[task.tier]]
    mine = rows[rows["policy"] == label]
    seeds = [one for _, one in mine.groupby("training_seed")]
    met = np.array([_met(one, asked) for one in seeds])
    raw = scored_point(point, seeds, 1.0 - bound.ratio)
    score = ScoredPoint(np.where(met, raw.nominal, 0.0), np.where(met, raw.resampled, 0.0))
    better = _better(better_point(point, seeds, own), met, _met(own, asked))
    result = TaskResult(
        task=task.key,
        split=task.split,
        score=float(score.nominal.mean()),
        seed_scores=tuple(score.nominal.tolist()),
        met=bool(met.all()),
        energy_ratio=_ratio(point, seeds),
        own_ratio=_ratio(point, [own]),
        bound_ratio=bound.ratio,
        bound_of=bound.of,
        attainment=min(attainment(one) for one in seeds),
        target=asked,
        better=float(better.nominal.mean()),
        tuned=bool((mine["variant"] == "tuned").all()) or label == "static-best",
        settings=tuple(str(one["setting"].iloc[0]) for one in seeds),
        decision_median_s=_known(mine["decision_time_median_s"].median()),
        decision_p99_s=_known(mine["decision_time_p99_s"].median()),
    )
    return ScoredTask(result, score, better)


def _met(rows: pd.DataFrame, asked: float) -> bool:
    one = shown(rows, asked)
    return one is not None and one.met


def _ratio(point: PairedWindows, seeds: Sequence[pd.DataFrame]) -> float:
    return float(np.mean([point.resampled_energy_ratio(one)[0] for one in seeds]))


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _better(windows: ScoredPoint, met: NDArray[np.bool_], own_met: bool) -> ScoredPoint:
    """Where one of both misses the SLO, the other is better whatever it spends; both: a tie."""
    decided = np.where(met, np.nan, 0.0) if own_met else np.where(met, 1.0, 0.5)
    open_ = np.isnan(decided)
    return ScoredPoint(*(np.where(open_, each, decided) for each in windows))


def aggregate(tier: str, split: str, scored: Sequence[ScoredTask]) -> Aggregate:
    """The scores of several tasks with the same training seeds.

    Args:
        tier: ``prefill``, ``decode`` or ``all``.
        split: of the suite, or ``all``.
        scored: the tasks, at least one.
    """
    rng = np.random.default_rng(SEED)
    score, better = (
        crossed_interval(
            np.stack([one.nominal for one in each]),
            np.stack([one.resampled for one in each], axis=1),
            rng,
            statistic,
        )
        for each, statistic in (
            ([one.score for one in scored], iqm),
            ([one.better for one in scored], mean_of_all),
        )
    )
    return Aggregate(
        tier=tier,
        split=split,
        score=_estimate(score),
        mean=float(np.mean([one.score.nominal for one in scored])),
        better=_estimate(of_a_probability(better)),
        n_tasks=len(scored),
        missed=tuple(one.result.task for one in scored if not one.result.met),
    )


def _estimate(interval: Interval) -> Estimate:
    return Estimate(
        estimate=interval.estimate, low=_known(interval.low), high=_known(interval.high)
    )


def aggregates(scored: Sequence[ScoredTask]) -> tuple[Aggregate, ...]:
    """All tasks together, then per tier and per split of it.

    There is no whole where tiers differ in their number of training seeds.
    """
    tiers = list(dict.fromkeys(_tier(one) for one in scored))
    found = []
    if len(tiers) > 1 and len({one.score.nominal.size for one in scored}) == 1:
        found.append(aggregate(ALL, ALL, scored))
    for tier in tiers:
        mine = [one for one in scored if _tier(one) == tier]
        found.append(aggregate(tier, ALL, mine))
        for split in dict.fromkeys(one.result.split for one in mine):
            chosen = [one for one in mine if one.result.split == split]
            found.append(aggregate(tier, split, chosen))
    return tuple(found)


def _tier(one: ScoredTask) -> str:
    return one.result.task.partition("/")[0]
