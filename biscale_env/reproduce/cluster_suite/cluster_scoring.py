"""From rows of days and workloads of clusters to score cards: as for single instances.

0 is max clock, 1 the bound, a missed SLO is 0. The units that intervals are made of are whole days
or workloads, drawn anew for all policies alike.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.report.agent_table import ScoredPoint
from biscale_env.evaluation.stats.bootstrap import N_RESAMPLES
from biscale_env.evaluation.stats.paired_windows import SEED
from biscale_env.evaluation.stats.windows import student_factor
from biscale_env.evaluation.suite.score_card import ScoreCard, TaskResult, Unscored
from biscale_env.evaluation.suite.scoring import LEAST_ROOM, ScoredTask, aggregates
from biscale_env.reproduce.cluster_suite.cluster_tasks import ClusterSuite, ClusterTask
from biscale_env.reproduce.cluster_suite.suite_rows import BOUND, MAX, OWN

KEPT: Final = ("late_ttft", "late_tpot")
Floats = NDArray[np.float64]


class JudgedTask:
    """A task with the rows of everybody on it."""

    def __init__(self, task: ClusterTask, rows: pd.DataFrame) -> None:
        """Take the rows of the task out of all."""
        self.task = task
        mine = rows[rows["task"] == task.key]
        self._of = {str(label): one for label, one in mine.groupby("policy", sort=False)}
        self.top_j = self._of[MAX]["energy_j"].to_numpy()
        self.bound_ratio = float(self._of[BOUND]["energy_j"].sum() / self.top_j.sum())
        self.required = float(self._of[MAX]["required"].iloc[0])
        rng = np.random.default_rng(SEED)
        self._drawn = rng.integers(len(self.top_j), size=(N_RESAMPLES, len(self.top_j)))

    def rows(self, label: str) -> pd.DataFrame:
        """Rows of an entrant, one per unit."""
        return self._of[label]

    def attainment(self, label: str) -> float:
        """Fraction of the requests that kept the bound which more of them missed."""
        mine = self._of[label]
        return float(1.0 - max(mine[name].sum() for name in KEPT) / mine["requests"].sum())

    def met(self, label: str) -> bool:
        """Whether an entrant keeps both bounds."""
        return self.attainment(label) >= self.required - 1e-12

    def why_unscored(self) -> str:
        """Why nobody can be scored; empty where everybody can."""
        if not self.met(MAX):
            kept = self.attainment(MAX)
            return f"max clock itself misses the SLO ({kept:.2%} of {self.required:.0%})"
        room = 1.0 - self.bound_ratio
        if not room >= LEAST_ROOM:
            return f"the bound saves {room:.2%} against max clock, too little for a score"
        return ""

    def ratio(self, label: str) -> float:
        """Energy relative to max clock."""
        return float(self._of[label]["energy_j"].sum() / self.top_j.sum())

    def score(self, label: str) -> ScoredPoint:
        """Score, and that over resampled units."""
        if not self.met(label):
            return ScoredPoint(np.zeros(1), np.zeros((N_RESAMPLES, 1)))
        mine_j, room = self._of[label]["energy_j"].to_numpy(), 1.0 - self.bound_ratio
        drawn = mine_j[self._drawn].sum(axis=1) / self.top_j[self._drawn].sum(axis=1)
        return self._point((1.0 - self.ratio(label)) / room, (1.0 - drawn) / room)

    def better(self, label: str) -> ScoredPoint:
        """Fraction of the units in which an entrant needs less than BiScale's own.

        Where one of both misses the SLO, the other is better; both: a tie.
        """
        own = OWN[self.task.tier]
        if self.met(label) != self.met(own) or not self.met(own):
            value = 0.5 if self.met(label) == self.met(own) else float(self.met(label))
            return ScoredPoint(np.full(1, value), np.full((N_RESAMPLES, 1), value))
        mine_j, own_j = (self._of[name]["energy_j"].to_numpy() for name in (label, own))
        wins = np.where(mine_j == own_j, 0.5, (mine_j < own_j).astype(np.float64))
        return self._point(float(wins.mean()), wins[self._drawn].mean(axis=1))

    def _point(self, value: float, drawn: Floats) -> ScoredPoint:
        """Resampled values, moved away from the value as few units ask for."""
        wide = value + student_factor(len(self.top_j)) * (drawn - value)
        return ScoredPoint(np.full(1, value), wide[:, None])

    def result(self, label: str) -> ScoredTask:
        """What the card keeps of an entrant."""
        mine, score, better = self._of[label], self.score(label), self.better(label)
        times_s = mine["decision_s"].median()
        told = TaskResult(
            task=self.task.key,
            split=self.task.split,
            score=float(score.nominal[0]),
            seed_scores=(float(score.nominal[0]),),
            met=self.met(label),
            energy_ratio=self.ratio(label),
            own_ratio=self.ratio(OWN[self.task.tier]),
            bound_ratio=self.bound_ratio,
            bound_of=BOUND,
            attainment=self.attainment(label),
            target=self.required,
            better=float(better.nominal[0]),
            tuned=bool(mine["tuned"].all()),
            settings=(str(mine["setting"].iloc[0]),),
            decision_median_s=float(times_s) if np.isfinite(times_s) else None,
            decision_p99_s=None,
        )
        return ScoredTask(told, score, better)


def cluster_cards(
    rows: pd.DataFrame,
    suite: ClusterSuite,
    tasks: Sequence[ClusterTask],
    entrants: Mapping[str, str],
    made_by: Mapping[str, Any],
) -> list[ScoreCard]:
    """Score cards of a finished run, one per entrant.

    Args:
        rows: of :func:`biscale_env.reproduce.cluster_suite.suite_rows.judged_row`.
        suite: the suite.
        tasks: those that were run.
        entrants: label and name of each.
        made_by: provenance.

    Raises:
        BiscaleError: no task can be scored.
    """
    judged = [JudgedTask(task, rows) for task in tasks]
    reasons = {one.task.key: why for one in judged if (why := one.why_unscored())}
    if len(reasons) == len(judged):
        raise BiscaleError(f"no task can be scored; {tasks[0].key}: {reasons[tasks[0].key]}")
    cards = []
    for label, build in entrants.items():
        scored = [one.result(label) for one in judged if one.task.key not in reasons]
        card = ScoreCard(
            suite=suite.name,
            suite_version=suite.version,
            suite_digest=suite.digest,
            policy=label,
            build=build,
            scores=aggregates(scored),
            results=tuple(each.result for each in scored),
            unscored=tuple(Unscored(task=key, reason=why) for key, why in reasons.items()),
            provenance=dict(made_by),
        )
        cards.append(card)
    return cards
