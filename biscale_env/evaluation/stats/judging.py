"""Which requests of a run count, and which met what they were promised.

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
from typing import Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.config.slo import Slo, per_class, within
from biscale_env.evaluation.runs.record import SLO_CLASS, Column

Floats = NDArray[np.float64]
QUANTILES: Final = (0.50, 0.90, 0.99)
FAILED: Final = "failed"
CACHED: Final = "cached_tokens"


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
    latency_s: Floats, bound_s: float | Floats, started_s: Floats, intervals: Floats, end_s: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Judge requests against a bound, with the cut at the end of the run.

    Args:
        latency_s: TTFT or TPOT of each request, s; NaN when it did not finish within the run.
        bound_s: the bound, s; of each request where it is not the same for all.
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
    """Which requests can be judged and which met the SLO, each the bound of its class.

    In the phase ``cluster`` a request whose first token never came has no TPOT deadline of its own;
    if its TTFT deadline has passed it counts, and as missed for both bounds.

    Returns:
        Boolean arrays over the requests: ``counted``, ``met`` (every bound that applies to the
        phase), ``met_ttft`` and ``met_tpot`` (True where the bound does not apply to the phase).
    """
    arrival_s = np.asarray(requests["arrival_s"], dtype=np.float64)
    promised = requests.get(SLO_CLASS)
    everyone = np.ones(arrival_s.shape, dtype=np.bool_)
    counted, met_ttft, met_tpot = everyone.copy(), everyone.copy(), everyone.copy()
    if phase in ("prefill", "cluster"):
        counted, met_ttft = verdicts(
            ttft_s(requests),
            slo.bounds_s("prefill", promised),
            arrival_s,
            np.ones_like(arrival_s),
            end_s,
        )
    if phase in ("decode", "cluster"):
        intervals = np.maximum(np.asarray(requests["output_tokens"], dtype=np.float64) - 1, 0)
        started_s = np.asarray(requests["first_token_s"], dtype=np.float64)
        latency_s = np.where(np.isfinite(started_s), tpot_s(requests), np.nan)
        bound_s = slo.bounds_s("decode", promised)
        known, met_tpot = verdicts(latency_s, bound_s, started_s, intervals, end_s)
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


def class_of_each(requests: Mapping[str, Column]) -> NDArray[np.int64]:
    """Number of each request's class; 0 where nobody says."""
    none = np.zeros(np.shape(requests["arrival_s"]))
    return np.asarray(requests.get(SLO_CLASS, none), dtype=np.int64)


def attainments(
    verdict: Mapping[str, NDArray[np.bool_]],
    slo: Slo,
    phase: str,
    slo_class: NDArray[np.int64] | None = None,
) -> dict[str, float]:
    """Fractions of the judged requests that met the SLO; 1.0 when nothing could be judged.

    With classes each is that of the class that is worst off (:meth:`Slo.worst_off`).

    Args:
        verdict: from :func:`judge`.
        slo: what requests were promised.
        phase: ``prefill``, ``decode`` or ``cluster``.
        slo_class: number of each request's class; needed where the SLO has classes.

    Returns:
        ``attainment_ttft`` and ``attainment_tpot`` (NaN where the phase has none),
        ``attainment_joint`` and ``attainment``, the one the SLO is judged by: the joint one when
        ``slo.statistic`` is ``joint``, else the worse of the two single ones.
    """
    counted = verdict["counted"]
    fraction = {name: _fraction(verdict[name], counted, slo, slo_class) for name in _MET}
    each = min(fraction["met_ttft"], fraction["met_tpot"])
    return {
        "attainment": fraction["met"] if slo.statistic == "joint" else each,
        "attainment_ttft": math.nan if phase == "decode" else fraction["met_ttft"],
        "attainment_tpot": math.nan if phase == "prefill" else fraction["met_tpot"],
        "attainment_joint": fraction["met"],
    }


_MET: Final = ("met", "met_ttft", "met_tpot")


def _fraction(
    met: NDArray[np.bool_], counted: NDArray[np.bool_], slo: Slo, slo_class: Column | None
) -> float:
    if slo.classes and slo_class is not None:
        found = per_class(slo_class[counted], ~met[counted], len(slo.class_names))
        return slo.worst_off(*found)[0]
    return float(np.mean(met[counted])) if counted.any() else 1.0


def quantiles(values: Floats, probabilities: Sequence[float] = QUANTILES) -> list[float]:
    """Quantiles of the finite values (linear interpolation); NaN for an empty sample."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return [math.nan] * len(probabilities)
    return [float(q) for q in np.quantile(finite, probabilities)]


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
