"""What a trace is like: rates, burstiness over several time scales, lengths."""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.trace import Trace

WINDOWS_S = (1.0, 10.0, 60.0, 300.0)
MIN_WINDOWS = 10


@dataclass(frozen=True)
class LengthStatistics:
    """Mean, standard deviation, quantiles and maximum of a length, tokens."""

    mean: float
    std: float
    p50: float
    p90: float
    p99: float
    max: int


@dataclass(frozen=True)
class TraceStatistics:
    """Statistics of a trace; a value that the trace is too short for is None.

    Attributes:
        name: name of the trace.
        requests: number of requests.
        duration_s: observed time, s.
        rate_rps: mean rate, requests/s.
        gap_cv: coefficient of variation of the inter-arrival times.
        dispersion: index of dispersion of counts (variance / mean; 1 for Poisson) by window, e.g.
            ``1s``.
        busiest_second_requests: most arrivals in one second of the trace's own seconds.
        prompt_tokens: prompt lengths.
        output_tokens: output lengths.
        prompt_tokens_per_s: mean prompt work, tokens/s.
        output_tokens_per_s: mean output work, tokens/s.
        rank_correlation: Spearman correlation of prompt and output length.
        source: where the trace comes from.
        sha256: digest of the requests.
    """

    name: str
    requests: int
    duration_s: float
    rate_rps: float
    gap_cv: float | None
    dispersion: dict[str, float]
    busiest_second_requests: int
    prompt_tokens: LengthStatistics
    output_tokens: LengthStatistics
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    rank_correlation: float | None
    source: str
    sha256: str

    def as_dict(self) -> dict[str, object]:
        """Plain nested dictionary, ready for JSON."""
        return asdict(self)


def counts_per_window(trace: Trace, window_s: float) -> NDArray[np.int64]:
    """Arrivals in each whole window of ``window_s`` seconds, shape (floor(duration / window),)."""
    windows = int(trace.duration_s / window_s)
    index = np.floor_divide(trace.arrival_s, window_s).astype(np.int64)
    return np.bincount(index[index < windows], minlength=windows)


def dispersion(trace: Trace, window_s: float) -> float | None:
    """Index of dispersion of counts over disjoint windows.

    None with fewer than ten windows or no request.
    """
    counts = counts_per_window(trace, window_s)
    return (
        float(counts.var() / counts.mean()) if counts.size >= MIN_WINDOWS and counts.any() else None
    )


def gap_cv(trace: Trace) -> float | None:
    """Coefficient of variation of the inter-arrival times; None with fewer than three requests."""
    gaps_s = np.diff(trace.arrival_s)
    return float(gaps_s.std() / gaps_s.mean()) if gaps_s.size >= 2 and gaps_s.any() else None


def _lengths(tokens: NDArray[np.int32]) -> LengthStatistics:
    p50, p90, p99 = (float(q) for q in np.quantile(tokens, (0.5, 0.9, 0.99)))
    return LengthStatistics(
        float(tokens.mean()), float(tokens.std()), p50, p90, p99, int(tokens.max())
    )


def rank_correlation(trace: Trace) -> float | None:
    """Spearman correlation of prompt and output length; None where one of them does not vary."""
    if len(trace) < 3 or np.ptp(trace.prompt_tokens) == 0 or np.ptp(trace.output_tokens) == 0:
        return None
    from scipy.stats import spearmanr  # half a second that generating workloads does not need

    return float(spearmanr(trace.prompt_tokens, trace.output_tokens).statistic)


def describe(trace: Trace) -> TraceStatistics:
    """Compute the statistics of a trace.

    Raises:
        BiscaleError: the trace has no request.
    """
    if not len(trace):
        raise BiscaleError(f"{trace.name} has no request to describe")
    by_window = {f"{w:g}s": dispersion(trace, w) for w in WINDOWS_S}
    duration_s = trace.duration_s
    seconds = np.bincount(trace.arrival_s.astype(np.int64))
    return TraceStatistics(
        name=trace.name,
        requests=len(trace),
        duration_s=duration_s,
        rate_rps=trace.rate_rps,
        gap_cv=gap_cv(trace),
        dispersion={window: value for window, value in by_window.items() if value is not None},
        busiest_second_requests=int(seconds.max()),
        prompt_tokens=_lengths(trace.prompt_tokens),
        output_tokens=_lengths(trace.output_tokens),
        prompt_tokens_per_s=float(trace.prompt_tokens.sum(dtype=np.int64) / duration_s)
        if duration_s
        else 0.0,
        output_tokens_per_s=float(trace.output_tokens.sum(dtype=np.int64) / duration_s)
        if duration_s
        else 0.0,
        rank_correlation=rank_correlation(trace),
        source=trace.source,
        sha256=trace.sha256,
    )
