"""The runs of one operating point on their common windows of time.

One resampling, shared by all policies, so that differences are paired.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from biscale_env.evaluation.runs.record import PAIR_COLUMNS, REFERENCE_POLICY
from biscale_env.evaluation.stats.bootstrap import Interval, percentile_interval
from biscale_env.evaluation.stats.equal_attainment import AttainmentCurve
from biscale_env.evaluation.stats.windows import (
    attainment_interval,
    quantile_interval,
    resampled_ratios,
    window_of,
    window_weights,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SEED: Final = 20240229
"""Of the resampling; any number would do, a fixed one makes tables repeatable."""
N_RESAMPLES: Final = 1000
SEVERAL_COPIES: Final = 1.5
"""From so many copies of a trace on, the load of a workload is even by construction (assumed)."""


def realisations(runs: pd.DataFrame) -> "pd.Series[str]":
    """Which independent piece of time each run saw: its day, or its generated workload.

    All subsamples of one trace (label ``one_trace``) saw the same; so did all ensemble members and
    training seeds on a workload.
    """
    shared = "one_trace" in runs and runs["one_trace"].fillna(False).astype(bool).all()
    own = pd.Series("", index=runs.index) if shared else runs["workload_seed"].astype(str)
    day = runs["day"].astype(object).fillna("").astype(str) if "day" in runs else ""
    return day + "/" + own


def stretches(runs: pd.DataFrame) -> "pd.Series[str]":
    """Which stretch of time each run saw: its day, and of several windows a day which one."""
    start_s = runs["window_start_s"] if "window_start_s" in runs else pd.Series(0.0, runs.index)
    return realisations(runs) + "/" + start_s.astype(float).fillna(0.0).map("{:015.3f}".format)


def point_weights(
    days: ArrayLike,
    load: Floats,
    series: Sequence[Floats],
    copies: float,
    n_resamples: int = N_RESAMPLES,
) -> Floats:
    """Weights of the windows of one operating point, the same in every table.

    Args:
        days: realisation of each window.
        load: requests per window.
        series: what intervals are wanted of, one value per window.
        copies: copies of the original trace in effect.
        n_resamples: number of resamples.
    """
    n_windows = np.size(days)
    return window_weights(
        n_windows,
        np.random.default_rng(SEED),
        n_resamples,
        days=days,
        series=series,
        copies=copies,
        load=load,
        keep_load=copies >= SEVERAL_COPIES,
    )


class PairedWindows:
    """Totals of all runs of one operating point, and the weights every policy is given alike.

    A *unit* is one window of one stretch of time (of a day, or a generated workload); it holds all
    subsamples, ensemble members and training seeds that saw it.

    Attributes:
        weights: shape (n_resamples, n_units), from
            :func:`~biscale_env.evaluation.stats.windows.window_weights`.
        days: realisation of each unit, shape (n_units,), those of a day in the order of time.
    """

    def __init__(
        self, runs: pd.DataFrame, windows: pd.DataFrame, n_resamples: int = N_RESAMPLES
    ) -> None:
        """Put the runs of a point on their common windows.

        Args:
            runs: rows of the results frame, of one operating point.
            windows: totals per run and window of time, with a ``run_id``
                (:func:`biscale_env.evaluation.runs.blocks.window_totals`).
            n_resamples: number of resamples.
        """
        mine = windows[windows["run_id"].isin(runs["run_id"])]
        self._windows = {
            str(run): {str(n): rows[n].to_numpy() for n in rows if n != "run_id"}
            for run, rows in mine.groupby("run_id")
        }
        known = runs[runs["run_id"].isin(set(self._windows))]
        self._stretch_of = dict(zip(known["run_id"], stretches(known), strict=True))
        day_of = dict(zip(self._stretch_of.values(), realisations(known), strict=True))
        counts: dict[str, int] = {}
        for run, stretch in self._stretch_of.items():
            counts[stretch] = max(counts.get(stretch, 0), self._windows[run]["window"].size)
        days = list(dict.fromkeys(day_of[stretch] for stretch in counts))
        ordered = sorted(counts, key=lambda stretch: (days.index(day_of[stretch]), stretch))
        lengths = [counts[stretch] for stretch in ordered]
        self._offset = dict(zip(ordered, np.cumsum([0, *lengths]).tolist()[:-1], strict=True))
        self.days = np.repeat([day_of[stretch] for stretch in ordered], lengths)
        self._reference = _reference_of(known)
        copies = float(mine["copies"].mean()) if len(mine) else 1.0
        self.weights = point_weights(self.days, *self._series(known), copies, n_resamples)

    def _series(self, runs: pd.DataFrame) -> tuple[Floats, list[Floats]]:
        """What tells how alike neighbours are: the load, and all policies against max clock."""
        load = self._sum(dict.fromkeys(runs["run_id"], 1.0), "n_counted")
        own, base = self._energies(runs[runs["policy"] != REFERENCE_POLICY])
        usable = base > 0
        if not usable.any():
            return load, []
        return load, [np.where(usable, own / np.where(usable, base, 1.0), np.nan)]

    def _sum(self, factors: Mapping[str, float], column: str) -> Floats:
        """Total per unit over some runs, each multiplied by its own factor."""
        total = np.zeros(self.days.size)
        for run, factor in factors.items():
            if run in self._windows:
                values = self._windows[run][column]
                first = self._offset[self._stretch_of[run]]
                total[first : first + values.size] += factor * values
        return total

    def _energies(self, runs: pd.DataFrame) -> tuple[Floats, Floats]:
        """Energy per output token of runs and of max clock on the same workloads, per unit."""
        own: dict[str, float] = {}
        base: dict[str, float] = {}
        names = ["run_id", "workload_seed", "ensemble_member", "output_tokens"]
        for run, seed, member, tokens in runs[names].itertuples(index=False):
            other, other_tokens = self._reference.get((seed, member), ("", 0.0))
            if tokens > 0 and other_tokens > 0:
                own[run] = 1.0 / tokens
                base[other] = base.get(other, 0.0) + 1.0 / other_tokens
        return self._sum(own, "energy_j"), self._sum(base, "energy_j")

    def curve(self, settings: Sequence[pd.DataFrame]) -> AttainmentCurve:
        """A policy's settings on the units, for energy at equal attainment with ``weights``.

        Args:
            settings: the runs of each setting.
        """
        each = [dict.fromkeys(runs["run_id"], 1.0) for runs in settings]
        columns = ("energy_j", "n_met", "n_counted", "output_tokens")
        return AttainmentCurve(*(np.stack([self._sum(f, c) for f in each]) for c in columns))

    def attainment(self, runs: pd.DataFrame) -> Interval:
        """Interval of the attainment of some runs, requests pooled.

        Several runs on the same stretch of time count as one run's number of requests.
        """
        seen = [self._stretch_of[run] for run in runs["run_id"] if run in self._stretch_of]
        repeats = max((seen.count(stretch) for stretch in set(seen)), default=1)
        each = dict.fromkeys(runs["run_id"], 1.0 / repeats)
        return attainment_interval(
            self._sum(each, "n_met"), self._sum(each, "n_counted"), self.weights
        )

    def energy_ratio(self, runs: pd.DataFrame) -> Interval:
        """Interval of energy per output token against max clock on the same workloads."""
        ratio, resampled = self.resampled_energy_ratio(runs)
        return percentile_interval(ratio, resampled)

    def resampled_energy_ratio(self, runs: pd.DataFrame) -> tuple[float, Floats]:
        """The energy ratio of some runs and its value in each resample, shape (n_resamples,)."""
        ratio, resampled = resampled_ratios(*self._energies(runs), self.weights)
        return float(ratio), resampled

    def energy_difference(self, runs: pd.DataFrame, others: pd.DataFrame) -> Interval:
        """Energy ratio of some runs less that of others, on the workloads that both ran."""
        pairs = [set(map(tuple, rows[_WORKLOAD].to_numpy())) for rows in (runs, others)]
        common = pairs[0] & pairs[1]
        mine, theirs = (
            self.resampled_energy_ratio(
                rows[np.array([tuple(r) in common for r in rows[_WORKLOAD].to_numpy()], dtype=bool)]
            )
            for rows in (runs, others)
        )
        return percentile_interval(mine[0] - theirs[0], mine[1] - theirs[1])

    def uses_less(self, runs: pd.DataFrame, others: pd.DataFrame) -> Floats:
        """Where some runs spend less energy per token than others, per unit: 1, 0, a tie a half.

        NaN in units that not both have.
        """
        ours, base = self._energies(runs)
        theirs, other_base = self._energies(others)
        usable = (base > 0) & (other_base > 0)
        a, b = (
            np.divide(x, y, out=np.zeros_like(x), where=usable)
            for x, y in ((ours, base), (theirs, other_base))
        )
        return np.where(usable, (a < b) + 0.5 * (a == b), np.nan)

    def quantile(
        self, samples: Iterable[tuple[str, Floats, Floats]], probability: float
    ) -> Interval:
        """Interval of a quantile of the latencies of several runs together.

        By the windows of the run; of several copies of a trace that is somewhat wider than need be.

        Args:
            samples: run, latencies and arrivals, s.
            probability: which quantile.
        """
        values, units = [np.array([])], [np.array([], dtype=np.int64)]
        for run, latency_s, arrival_s in samples:
            if run in self._windows:
                values.append(latency_s)
                window = window_of(arrival_s, self._windows[run]["begin_s"])
                units.append(self._offset[self._stretch_of[run]] + window)
        return quantile_interval(
            np.concatenate(values), np.concatenate(units), probability, self.weights
        )


_WORKLOAD: Final = ["workload_seed", "ensemble_member"]


def _reference_of(runs: pd.DataFrame) -> dict[tuple[int, int], tuple[str, float]]:
    """Max clock's run and its tokens, by workload seed and ensemble member."""
    rows = runs[(runs["policy"] == REFERENCE_POLICY) & (runs["variant"] == "")]
    rows = rows.drop_duplicates(list(PAIR_COLUMNS))[[*_WORKLOAD, "run_id", "output_tokens"]]
    return {
        (seed, member): (run, tokens) for seed, member, run, tokens in rows.itertuples(index=False)
    }
