"""Profiles out of traces.

Quantiles and rank grid of the lengths, arrivals by moments, hourly rates.

`biscale traces describe FILE --as-profile lengths|workload|rates` prints them; the shipped
``azure-*`` profiles are its output.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.synthetic.mmpp import mmpp_dispersion, mmpp_gap_cv
from biscale_env.traces.synthetic.profiles import (
    Arrivals,
    LengthProfile,
    Modulation,
    Quantiles,
    WorkloadProfile,
)
from biscale_env.traces.trace import Trace
from biscale_env.traces.trace_statistics import describe, rank_correlation

LEVELS = (0.0, 0.001, 0.005, *(round(0.01 * i, 2) for i in range(1, 100)), 0.995, 0.999, 1.0)
GRID = 10
MIN_REQUESTS = 1000
POISSON_TOLERANCE = 0.05


def _quantiles(tokens: NDArray[np.int32]) -> Quantiles:
    values = np.quantile(tokens, LEVELS)
    return Quantiles(levels=LEVELS, tokens=tuple(round(float(v), 1) for v in values))


def _rank_grid(trace: Trace) -> tuple[tuple[float, ...], ...]:
    """Shares of requests by tenth of prompt and of output rank.

    Equal lengths are ranked in order of arrival.
    """
    n = len(trace)
    tenths = [np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)]
    for tenth, tokens in zip(tenths, (trace.prompt_tokens, trace.output_tokens), strict=True):
        tenth[np.argsort(tokens, kind="stable")] = np.arange(n) * GRID // n
    shares = (
        np.bincount(tenths[0] * GRID + tenths[1], minlength=GRID * GRID).reshape(GRID, GRID) / n
    )
    return tuple(tuple(round(float(v), 5) for v in row) for row in shares)


def fit_lengths(trace: Trace, name: str, source: str) -> LengthProfile:
    """Quantiles of both lengths, their Spearman correlation and their 10 x 10 rank grid.

    Raises:
        BiscaleError: fewer than 1000 requests.
    """
    _check_size(trace)
    return LengthProfile(
        name=name,
        prompt_tokens=_quantiles(trace.prompt_tokens),
        output_tokens=_quantiles(trace.output_tokens),
        rank_correlation=round(rank_correlation(trace) or 0.0, 4),
        rank_grid=_rank_grid(trace),
        source=source,
    )


def _check_size(trace: Trace) -> None:
    if len(trace) < MIN_REQUESTS:
        raise BiscaleError(
            f"{trace.name} has {len(trace)} requests; a profile needs at least {MIN_REQUESTS}"
        )


def _modulation(log_parameters: NDArray[np.float64]) -> tuple[float, Modulation]:
    gap_cv, mean_high_s, mean_low_s = (float(v) for v in np.exp(log_parameters[:3]))
    share = mean_high_s / (mean_high_s + mean_low_s)
    factor = 1 + (1 / share - 1) / (1 + np.exp(-float(log_parameters[3])))
    modulation = Modulation(
        high_factor=min(factor, 1 / share), mean_high_s=mean_high_s, mean_low_s=mean_low_s
    )
    return gap_cv, modulation


def fit_arrivals(trace: Trace) -> Arrivals:
    """Gap CV and two-state modulation whose moments come closest to the trace's, in relative terms.

    Moments are the squared CV of the gaps and the dispersion of counts at 1, 10, 60 and 300 s. The
    modulation's are exact for Poisson gaps; gaps of CV c are taken to add c^2 - 1 to each, which
    holds when states last for many gaps. A trace whose dispersion is that of its gaps at every
    scale gets no modulation.
    """
    _check_size(trace)
    statistics = describe(trace)
    windows_s = np.array([float(w.removesuffix("s")) for w in statistics.dispersion])
    counts = np.array(list(statistics.dispersion.values()))
    cv = statistics.gap_cv or 1.0
    if (
        abs(counts - cv**2)
        < POISSON_TOLERANCE * cv**2 + 4 * cv**2 / np.sqrt(trace.duration_s / windows_s)
    ).all():
        return Arrivals(gap_cv=round(cv, 3))

    def residuals(log_parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        inner_cv, modulation = _modulation(log_parameters)
        model = mmpp_dispersion(modulation, trace.rate_rps, windows_s) - 1 + inner_cv**2
        cv2 = mmpp_gap_cv(modulation, trace.rate_rps) ** 2 - 1 + inner_cv**2
        weights = np.minimum(1.0, np.sqrt(trace.duration_s / windows_s) / 20)
        return np.append(weights * np.log(model / counts), np.log(cv2 / cv**2))

    bounds = (
        np.log([0.3, 0.5, 0.5, np.exp(-8)]),
        np.log([5.0, trace.duration_s, trace.duration_s, np.exp(12)]),
    )
    starts = [
        np.array([0.0, np.log(high), np.log(low), x])
        for high in (5, 100)
        for low in (20, 200)
        for x in (-2, 5)
    ]
    fits = [least_squares(residuals, start, bounds=bounds) for start in starts]
    inner_cv, m = _modulation(min(fits, key=lambda fit: float(fit.cost)).x)
    high_s, low_s = float(f"{m.mean_high_s:.4g}"), float(f"{m.mean_low_s:.4g}")
    factor = min(round(m.high_factor, 4), (high_s + low_s) / high_s)
    return Arrivals(
        gap_cv=round(inner_cv, 3),
        modulation=Modulation(high_factor=factor, mean_high_s=high_s, mean_low_s=low_s),
    )


def fit_workload(trace: Trace, name: str, lengths: str, source: str) -> WorkloadProfile:
    """A whole workload profile; ``lengths`` names the length profile to go with it."""
    s = describe(trace)
    measured = {
        "requests": float(s.requests),
        "rate_rps": s.rate_rps,
        "gap_cv": s.gap_cv or 0.0,
        **{f"dispersion_{window}": value for window, value in s.dispersion.items()},
        "busiest_second_requests": float(s.busiest_second_requests),
        "prompt_tokens_mean": s.prompt_tokens.mean,
        "prompt_tokens_p99": s.prompt_tokens.p99,
        "output_tokens_mean": s.output_tokens.mean,
        "output_tokens_p99": s.output_tokens.p99,
    }
    return WorkloadProfile(
        name=name,
        rate_rps=round(s.rate_rps, 3),
        duration_s=round(s.duration_s),
        arrivals=fit_arrivals(trace),
        lengths=lengths,
        measured={key: float(f"{value:.5g}") for key, value in measured.items()},
        source=source,
    )
