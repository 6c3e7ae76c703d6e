"""Metrics of one run, from named timestamps.

What counts. A run starts with an empty system at 0 and ends at ``duration_s``; normally it ends
when the last request has been served, so nothing is cut off and there is no warm-up to discard:
every policy begins empty on the same workload. When a run is cut short, a request that has not
finished is a *violation* if its deadline has passed by then (whatever came later would have been
late) and is *excluded* otherwise (nobody can know). A request that *failed* (measured runs only) is
a violation whatever the time. Such a violation enters quantiles with the latency it had reached at
the end of the run, a lower bound: dropping it would flatter the tail. For steady-state metrics
``warmup_s`` leaves out the requests that arrive earlier and the energy spent earlier.

Deadlines. Prefill: ``arrival_s + ttft_s`` for the first token. Decode: ``first_token_s + tpot_s *
(output_tokens - 1)`` for the last one. A request of one output token has no interval between
tokens: it has met any TPOT bound by definition, and it takes no part in TPOT quantiles.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.config.slo import Slo, within
from biscale_env.evaluation.runs.record import Column, RunRecord

Floats = NDArray[np.float64]
QUANTILES: Final = (0.50, 0.90, 0.99)
FAILED: Final = "failed"


def ttft_s(requests: Mapping[str, Column]) -> Floats:
    """Time to first token of each request, s: ``first_token_s - arrival_s``.

    NaN where it never came.
    """
    return np.asarray(requests["first_token_s"], dtype=np.float64) - np.asarray(
        requests["arrival_s"]
    )


def tpot_s(requests: Mapping[str, Column]) -> Floats:
    """Time per output token of each request, s.

    ``(finish_s - first_token_s) / (output_tokens - 1)``.

    0 for a request of one token (which has no interval), NaN where the last token never came.
    """
    tokens = np.asarray(requests["output_tokens"], dtype=np.float64)
    span_s = np.asarray(requests["finish_s"], dtype=np.float64) - np.asarray(
        requests["first_token_s"]
    )
    return np.where(tokens > 1, span_s / np.maximum(tokens - 1, 1), 0.0)


def verdicts(
    latency_s: Floats, bound_s: float, started_s: Floats, intervals: Floats, end_s: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Judge requests against a bound, with the cut at the end of the run.

    Args:
        latency_s: TTFT or TPOT of each request, s; NaN when it did not finish within the run.
        bound_s: the bound, s.
        started_s: when the latency began to count, s; NaN when it never began.
        intervals: number of bounds until the deadline: 1 for TTFT, ``output_tokens - 1`` for TPOT.
        end_s: end of the run, s.

    Returns:
        ``(counted, met)``, boolean arrays: whether the request can be judged, and whether it met
        the bound.
    """
    finished = np.isfinite(latency_s)
    deadline_s = started_s + bound_s * intervals
    counted = finished | (deadline_s <= end_s)
    return counted, within(latency_s, bound_s)


def judge(
    requests: Mapping[str, Column], slo: Slo, phase: str, end_s: float, warmup_s: float = 0.0
) -> dict[str, NDArray[np.bool_]]:
    """Which requests can be judged and which met the SLO.

    In the phase ``cluster`` a request whose first token never came has no TPOT deadline of its own;
    if its TTFT deadline has passed it counts, and as missed for both bounds.

    Returns:
        Boolean arrays over the requests: ``counted``, ``met`` (every bound that applies to the
        phase), ``met_ttft`` and ``met_tpot`` (True where the bound does not apply to the phase).
    """
    arrival_s = np.asarray(requests["arrival_s"], dtype=np.float64)
    everyone = np.ones(arrival_s.shape, dtype=np.bool_)
    counted, met_ttft, met_tpot = everyone.copy(), everyone.copy(), everyone.copy()
    if phase in ("prefill", "cluster"):
        counted, met_ttft = verdicts(
            ttft_s(requests), slo.ttft_s, arrival_s, np.ones_like(arrival_s), end_s
        )
    if phase in ("decode", "cluster"):
        intervals = np.maximum(np.asarray(requests["output_tokens"], dtype=np.float64) - 1, 0)
        started_s = np.asarray(requests["first_token_s"], dtype=np.float64)
        latency_s = np.where(np.isfinite(started_s), tpot_s(requests), np.nan)
        known, met_tpot = verdicts(latency_s, slo.tpot_s, started_s, intervals, end_s)
        counted = known | (counted & ~met_ttft) if phase == "cluster" else known
    failed = failures(requests)
    counted = (counted | failed) & (arrival_s >= warmup_s)
    return {
        "counted": counted,
        "met": met_ttft & met_tpot & ~failed,
        "met_ttft": met_ttft & ~failed,
        "met_tpot": met_tpot & ~failed,
    }


def failures(requests: Mapping[str, Column]) -> NDArray[np.bool_]:
    """Requests that were refused or broke off: the optional column ``failed`` of measured runs."""
    none = np.zeros(np.shape(requests["arrival_s"]), dtype=np.bool_)
    return np.asarray(requests.get(FAILED, none), dtype=np.bool_)


def attainments(verdict: Mapping[str, NDArray[np.bool_]], slo: Slo, phase: str) -> dict[str, float]:
    """Fractions of the judged requests that met the SLO; 1.0 when nothing could be judged.

    Returns:
        ``attainment_ttft`` and ``attainment_tpot`` (NaN where the phase has none),
        ``attainment_joint`` and ``attainment``, the one the SLO is judged by: the joint one when
        ``slo.statistic`` is ``joint``, else the worse of the two single ones.
    """
    counted = verdict["counted"]
    fraction = {
        name: float(np.mean(verdict[name][counted])) if counted.any() else 1.0 for name in _MET
    }
    each = min(fraction["met_ttft"], fraction["met_tpot"])
    return {
        "attainment": fraction["met"] if slo.statistic == "joint" else each,
        "attainment_ttft": math.nan if phase == "decode" else fraction["met_ttft"],
        "attainment_tpot": math.nan if phase == "prefill" else fraction["met_tpot"],
        "attainment_joint": fraction["met"],
    }


_MET: Final = ("met", "met_ttft", "met_tpot")


def quantiles(values: Floats, probabilities: Sequence[float] = QUANTILES) -> list[float]:
    """Quantiles of the finite values (linear interpolation); NaN for an empty sample."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return [math.nan] * len(probabilities)
    return [float(q) for q in np.quantile(finite, probabilities)]


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


def judged_latency_s(
    requests: Mapping[str, Column], metric: str, counted: NDArray[np.bool_], end_s: float
) -> Floats:
    """Latencies of the judged requests, s.

    One that never finished stands with what it had reached at the end.

    Args:
        requests: the requests of the run.
        metric: ``ttft``, or ``tpot`` (requests of one output token are left out: they have no
            interval).
        counted: which requests are judged, from :func:`judge`.
        end_s: end of the run, s.
    """
    tokens = np.asarray(requests["output_tokens"], dtype=np.float64)
    if metric == "ttft":
        latency_s, selected = ttft_s(requests), counted
        so_far_s = end_s - np.asarray(requests["arrival_s"], dtype=np.float64)
    else:
        latency_s, selected = tpot_s(requests), counted & (tokens > 1)
        so_far_s = (end_s - np.asarray(requests["first_token_s"], dtype=np.float64)) / np.maximum(
            tokens - 1, 1
        )
    return np.where(np.isfinite(latency_s), latency_s, so_far_s)[selected]


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
    attained = attainments(verdict, record.slo, record.phase)
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
        **_timeline_columns(record.timeline),
        "decision_time_median_s": float(totals.get("decision_time_median_s", math.nan)),
        "decision_time_p99_s": float(totals.get("decision_time_p99_s", math.nan)),
        "solver_failures": float(totals.get("solver_failures", 0.0)),
        "preemptions": int(totals.get("preemptions", 0)),
        **{str(name): value for name, value in record.labels.items()},
    }
