"""Confidence intervals for the summary: one resampling of windows of time per operating point."""

import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from biscale_env.evaluation.runs.record import SCENARIO_COLUMNS
from biscale_env.evaluation.runs.results import LATENCIES
from biscale_env.evaluation.stats.judging import QUANTILES, quantiles
from biscale_env.evaluation.stats.paired_windows import PairedWindows

Latencies = Callable[[str, str], tuple[NDArray[np.float64], NDArray[np.float64]] | None]
"""``(run_id, metric) -> (latency_s, arrival_s)`` of judged requests; None: they were not kept."""


def add_intervals(
    summary: pd.DataFrame,
    results: pd.DataFrame,
    windows: pd.DataFrame,
    latencies: Latencies | None = None,
) -> pd.DataFrame:
    """Add ``<name>_ci_low`` and ``<name>_ci_high`` (95 %).

    For attainment, energy ratio and P99 latencies.

    Where requests were kept, the latency quantiles are replaced by those of all requests of all
    workloads together, the sample that the attainment speaks of (the mean of each run's P99 is not
    the P99).

    What is resampled are windows of time (:mod:`biscale_env.evaluation.stats.windows`); a window
    holds all subsamples, ensemble members and training seeds that saw it. So the intervals speak of
    the chance of the workload alone, of another stretch of time like this one: how much the plant's
    coefficients matter is shown by the spread over members (``energy_ratio_low`` and ``_high``).

    Args:
        summary: from :func:`biscale_env.evaluation.runs.results.summarise`.
        results: the completed results frame.
        windows: per run and window, from
            :func:`biscale_env.evaluation.runs.blocks.window_totals` with a ``run_id``.
        latencies: gives the latencies of a run; without it the P99 intervals are NaN.
    """
    found: dict[Hashable, dict[str, float]] = {}
    for _, group in results.groupby(list(SCENARIO_COLUMNS), dropna=False, sort=False):
        point = PairedWindows(group, windows)
        for (policy, variant), runs in group.groupby(["policy", "variant"], sort=False):
            key = (*_key(runs.iloc[0]), policy, variant)
            found[key] = _intervals(point, runs, latencies)
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


def _intervals(
    point: PairedWindows, runs: pd.DataFrame, latencies: Latencies | None
) -> dict[str, float]:
    """Interval columns of one policy, and its latency quantiles where requests were kept."""
    found = {"attainment": point.attainment(runs), "energy_ratio": point.energy_ratio(runs)}
    pooled: dict[str, float] = {}
    for metric in ("ttft", "tpot"):
        samples = list(_samples(runs, metric, latencies))
        found[f"{metric}_p99_s"] = point.quantile(samples, 0.99)
        values = np.concatenate([np.array([]), *(latency_s for _, latency_s, _ in samples)])
        if values.size:
            names = [f"{metric}_p{round(100 * p)}_s" for p in QUANTILES]
            pooled |= dict(zip(names, quantiles(values), strict=True))
    return pooled | {
        f"{name}_ci_{side}": getattr(interval, side)
        for name, interval in found.items()
        for side in ("low", "high")
    }


def _samples(
    runs: pd.DataFrame, metric: str, latencies: Latencies | None
) -> Iterator[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    for run in runs["run_id"]:
        found = latencies(run, metric) if latencies else None
        if found is not None and found[0].size:
            yield str(run), *found
