"""Confidence intervals for the summary.

One block bootstrap per operating point, shared by all policies in it.
"""

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from biscale_env.evaluation.runs.blocks import BLOCK_COLUMNS
from biscale_env.evaluation.runs.record import PAIR_COLUMNS, REFERENCE_POLICY, SCENARIO_COLUMNS
from biscale_env.evaluation.runs.results import LATENCIES
from biscale_env.evaluation.stats.bootstrap import (
    BLOCK_S,
    Interval,
    attainment_interval,
    block_weights,
    quantile_interval,
    ratio_interval,
    time_blocks,
)
from biscale_env.evaluation.stats.metrics import QUANTILES, quantiles

Latencies = Callable[[str, str], tuple[NDArray[np.float64], NDArray[np.float64]] | None]
"""``(run_id, metric) -> (latency_s, arrival_s)`` of judged requests; None: they were not kept."""

SEED: Final = 20240229
"""Of the resampling; any number would do, a fixed one makes tables repeatable."""
N_RESAMPLES: Final = 1000


def add_intervals(
    summary: pd.DataFrame,
    results: pd.DataFrame,
    blocks: pd.DataFrame,
    latencies: Latencies | None = None,
) -> pd.DataFrame:
    """Add ``<name>_ci_low`` and ``<name>_ci_high`` (95 %).

    For attainment, energy ratio and P99 latencies.

    Where requests were kept, the latency quantiles are replaced by those of all requests of all
    workloads together, the sample that the attainment speaks of (the mean of each run's P99 is not
    the P99).

    What is resampled are blocks of 30 s of each workload; a block holds all ensemble members and
    training seeds that saw it. So the intervals speak of the workload's chance alone: how much the
    plant's coefficients matter is shown by the spread over members (``energy_ratio_low`` and
    ``_high``).

    Args:
        summary: from :func:`biscale_env.evaluation.runs.results.summarise`.
        results: the completed results frame.
        blocks: per run and block, from :func:`biscale_env.evaluation.runs.blocks.block_totals` with
            a ``run_id``.
        latencies: gives the latencies of a run; without it the P99 intervals are NaN.
    """
    found: dict[Hashable, dict[str, float]] = {}
    for _, group in results.groupby(list(SCENARIO_COLUMNS), dropna=False, sort=False):
        point = _Point(group, blocks)
        for (policy, variant), runs in group.groupby(["policy", "variant"], sort=False):
            key = (*_key(runs.iloc[0]), policy, variant)
            found[key] = point.intervals(runs, latencies)
    keys = [(*_key(row), row["policy"], row["variant"]) for _, row in summary.iterrows()]
    added = pd.DataFrame(
        [found.get(key, {}) for key in keys], index=summary.index, dtype=np.float64
    )
    result = summary.copy()
    for name in added:
        result[name] = added[name].fillna(result[name]) if name in LATENCIES else added[name]
    return result


def _key(row: Any) -> tuple[Any, ...]:
    return tuple(
        None if isinstance(row[n], float) and math.isnan(row[n]) else row[n]
        for n in SCENARIO_COLUMNS
    )


class _Point:
    """Resampling of one operating point.

    Its blocks, and the weights every policy is given alike.
    """

    def __init__(self, group: pd.DataFrame, blocks: pd.DataFrame) -> None:
        mine = blocks[blocks["run_id"].isin(group["run_id"])]
        runs = dict(zip(group["run_id"], group["workload_seed"], strict=True))
        counts = (mine.groupby("run_id")["block"].max() + 1).groupby(runs).max().astype(np.int64)
        self.offset = dict(zip(counts.index, np.cumsum(counts) - counts, strict=True))
        self.n_units = int(counts.sum())
        rng = np.random.default_rng(SEED)
        if "one_trace" in group and group["one_trace"].fillna(False).astype(bool).all():
            # subsamples of one trace have its bursts in common: a resample takes block b in all of
            # them or in none
            shared = block_weights(np.zeros(int(counts.max()), dtype=np.int64), rng, N_RESAMPLES)
            self.weights = np.concatenate([shared[:, :n] for n in counts], axis=1)
        else:
            self.weights = block_weights(
                np.repeat(counts.index.to_numpy(), counts), rng, N_RESAMPLES
            )
        self.blocks = {
            str(run): {name: rows[name].to_numpy(dtype=np.float64) for name in BLOCK_COLUMNS}
            for run, rows in mine.groupby("run_id")
        }
        self.seeds = runs
        reference = group[(group["policy"] == REFERENCE_POLICY) & (group["variant"] == "")]
        names = ["workload_seed", "ensemble_member", "run_id", "output_tokens"]
        self.reference = {
            (seed, member): (run, tokens)
            for seed, member, run, tokens in reference.drop_duplicates(list(PAIR_COLUMNS))[
                names
            ].itertuples(index=False)
        }

    def _sum(self, runs: Mapping[str, float], column: str) -> NDArray[np.float64]:
        """Total per unit over some runs, each multiplied by its own factor."""
        total = np.zeros(self.n_units)
        for run, factor in runs.items():
            values = self.blocks[run][column]
            first = self.offset[self.seeds[run]]
            total[first : first + values.size] += factor * values
        return total

    def intervals(self, runs: pd.DataFrame, latencies: Latencies | None) -> dict[str, float]:
        each = dict.fromkeys(runs["run_id"], 1.0)
        found = {
            "attainment": attainment_interval(
                self._sum(each, "n_met"), self._sum(each, "n_counted"), self.weights
            ),
            "energy_ratio": self._energy_ratio(runs),
        }
        pooled: dict[str, float] = {}
        for metric in ("ttft", "tpot"):
            values, units = self._pooled(runs, metric, latencies)
            found[f"{metric}_p99_s"] = quantile_interval(values, units, 0.99, self.weights)
            if values.size:
                names = [f"{metric}_p{round(100 * p)}_s" for p in QUANTILES]
                pooled |= dict(zip(names, quantiles(values), strict=True))
        return pooled | {
            f"{n}_ci_{s}": getattr(i, s) for n, i in found.items() for s in ("low", "high")
        }

    def _energy_ratio(self, runs: pd.DataFrame) -> Interval:
        """Energy per output token against the reference, blocks paired.

        The reference is taken on the same workloads and members.
        """
        own: dict[str, float] = {}
        base: dict[str, float] = {}
        names = ["run_id", "workload_seed", "ensemble_member", "output_tokens"]
        for run, seed, member, tokens in runs[names].itertuples(index=False):
            other, other_tokens = self.reference.get((seed, member), ("", 0.0))
            if tokens > 0 and other_tokens > 0:
                own[run] = 1.0 / tokens
                base[other] = base.get(other, 0.0) + 1.0 / other_tokens
        return ratio_interval(self._sum(own, "energy_j"), self._sum(base, "energy_j"), self.weights)

    def _pooled(
        self, runs: pd.DataFrame, metric: str, latencies: Latencies | None
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Latencies of all runs together, and the unit that each request belongs to."""
        values, units = [np.array([])], [np.array([], dtype=np.int64)]
        for run in runs["run_id"]:
            found = latencies(run, metric) if latencies else None
            if found is not None and found[0].size:
                last = self.blocks[run]["block"].size - 1
                values.append(found[0])
                units.append(
                    self.offset[self.seeds[run]] + np.minimum(time_blocks(found[1], BLOCK_S), last)
                )
        return np.concatenate(values), np.concatenate(units)
