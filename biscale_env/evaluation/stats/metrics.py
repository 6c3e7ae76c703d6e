"""The flat results row of one run: energy, latencies, attainment, clocks, decisions.

What counts and what is a violation: :mod:`biscale_env.evaluation.stats.judging`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.evaluation.runs.record import Column, RunRecord
from biscale_env.evaluation.stats.class_metrics import class_columns
from biscale_env.evaluation.stats.judging import (
    CACHED,
    QUANTILES,
    attainments,
    class_of_each,
    failures,
    judge,
    judged_latency_s,
    quantiles,
)

Floats = NDArray[np.float64]


def energy_between(
    timeline: Mapping[str, Column], start_s: float, end_s: float = math.inf
) -> float:
    """Energy of the timeline's entries within [start_s, end_s], J.

    An entry that straddles counts by its overlap.
    """
    begin = np.asarray(timeline["time_s"], dtype=np.float64)
    length = np.asarray(timeline["duration_s"], dtype=np.float64) + np.asarray(
        timeline["idle_s"], dtype=np.float64
    )
    overlap = np.clip(np.minimum(begin + length, end_s) - np.maximum(begin, start_s), 0.0, None)
    inside = np.where(
        length > 0,
        overlap / np.where(length > 0, length, 1.0),
        (begin >= start_s) & (begin <= end_s),
    )
    return float(np.sum(np.asarray(timeline["energy_j"], dtype=np.float64) * inside))


def _quantile_columns(record: RunRecord, counted: NDArray[np.bool_]) -> dict[str, float]:
    columns: dict[str, float] = {}
    for metric, absent in (("ttft", "decode"), ("tpot", "prefill")):
        values = (
            np.array([])
            if record.phase == absent
            else judged_latency_s(record.requests, metric, counted, record.duration_s)
        )
        for probability, value in zip(QUANTILES, quantiles(values), strict=True):
            columns[f"{metric}_p{round(100 * probability)}_s"] = value
    return columns


def finished(record: RunRecord) -> NDArray[np.bool_]:
    """Requests that the phase has completed within the run."""
    last = "first_token_s" if record.phase == "prefill" else "finish_s"
    reached = np.isfinite(np.asarray(record.requests[last], dtype=np.float64))
    return np.asarray(reached & ~failures(record.requests))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan


def _energy_columns(
    record: RunRecord, done: NDArray[np.bool_], warmup_s: float
) -> dict[str, float]:
    """Energy and its ratios.

    Decode counts the tokens it produced, prefill those of the requests it completed.
    """
    energy_j = float(record.totals["energy_j"])
    energy_j -= energy_between(record.timeline, 0.0, warmup_s) if warmup_s > 0 else 0.0
    produced = float(np.sum(np.asarray(record.requests["output_tokens"], dtype=np.float64)[done]))
    if record.phase != "prefill" and warmup_s <= 0:
        produced = float(record.totals.get("output_tokens", produced))
    return {
        "energy_j": energy_j,
        "energy_idle_j": float(record.totals.get("energy_idle_j", math.nan)),
        "busy_at_max_clock_j": float(record.totals.get("busy_at_max_clock_j", math.nan)),
        "iterations": float(record.totals.get("iterations", math.nan)),
        "energy_per_output_token_j": _ratio(energy_j, produced),
        "energy_per_request_j": _ratio(energy_j, float(np.sum(done))),
        "mean_power_w": _ratio(energy_j, (record.duration_s - warmup_s) * record.n_gpus),
        "output_tokens": produced,
    }


def _timeline_columns(timeline: Mapping[str, Column]) -> dict[str, float]:
    busy = np.asarray(timeline["duration_s"], dtype=np.float64)
    idle = np.asarray(timeline["idle_s"], dtype=np.float64)
    total = float(busy.sum())
    mean = {
        n: _ratio(float(np.sum(busy * timeline[f"freq_{n}_mhz"])), total)
        for n in ("applied", "effective")
    }
    return {
        "utilisation": _ratio(total, total + float(idle.sum())),
        "freq_applied_mean_mhz": mean["applied"],
        "freq_effective_mean_mhz": mean["effective"],
        "decisions": float(busy.size),
    }


def cached_share(requests: Mapping[str, Column]) -> float:
    """Share of all prompt tokens that the prefix cache had; NaN where nobody asked."""
    if CACHED not in requests:
        return math.nan
    cached = float(np.sum(requests[CACHED], dtype=np.float64))
    return _ratio(cached, float(np.sum(requests["prompt_tokens"], dtype=np.float64)))


def results_row(record: RunRecord, warmup_s: float = 0.0) -> dict[str, Any]:
    """The flat results row of one run.

    Key, setting, energy, latency, attainment, goodput, decisions.

    Columns that need the reference policy (``energy_ratio``, ``feasible``) are added by
    :func:`biscale_env.evaluation.runs.results.complete` when all rows are together.

    Args:
        record: the run.
        warmup_s: requests that arrive earlier, and energy spent earlier, are left out, s.
    """
    end_s = record.duration_s
    verdict = judge(record.requests, record.slo, record.phase, end_s, warmup_s)
    counted = verdict["counted"]
    done = finished(record) & (np.asarray(record.requests["arrival_s"]) >= warmup_s)
    numbers = class_of_each(record.requests)
    attained = attainments(verdict, record.slo, record.phase, numbers)
    if np.any(done) and not np.any(counted):  # served, but no latency is known
        attained = dict.fromkeys(attained, math.nan)
    totals = record.totals
    return {
        "run_id": record.run_id,
        **record.key,
        "slo_ttft_s": record.slo.ttft_s,
        "slo_tpot_s": record.slo.tpot_s,
        "slo_attainment": record.slo.attainment,
        "slo_statistic": record.slo.statistic,
        "rate_rps": float(record.rate_rps),
        "n_gpus": int(record.n_gpus),
        "duration_s": end_s,
        "n_requests": int(np.size(counted)),
        "n_counted": int(np.sum(counted)),
        "n_finished": int(np.sum(done)),
        "n_violations": int(np.sum(counted & ~verdict["met"])),
        **_energy_columns(record, done, warmup_s),
        **attained,
        "slo_met": bool(attained["attainment"] >= record.slo.attainment),
        "goodput_rps": _ratio(float(np.sum(counted & verdict["met"])), end_s - warmup_s),
        **_quantile_columns(record, counted),
        **class_columns(record, verdict, numbers),
        **_timeline_columns(record.timeline),
        "decision_time_median_s": float(totals.get("decision_time_median_s", math.nan)),
        "decision_time_p99_s": float(totals.get("decision_time_p99_s", math.nan)),
        "solver_failures": float(totals.get("solver_failures", 0.0)),
        "preemptions": int(totals.get("preemptions", 0)),
        "cached_share": cached_share(record.requests),
        **{str(name): value for name, value in record.labels.items()},
    }
