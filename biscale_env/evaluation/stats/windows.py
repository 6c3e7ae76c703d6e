"""Intervals over windows of time: what a run of a workload says about the next half hour like it.

The requests of a workload are not independent, nor are neighbouring minutes: a burst makes many
late together, and a load that swings slowly makes whole minutes alike. So what is resampled are
stretches of time of the original trace, the same for all policies; a window of time holds all
subsamples, ensemble members and training seeds that saw it, since those repeat the same minutes
and are no further evidence.

- *Windows* are equal, at least 120 s long (assumed: several times the longest request and the
  length of the bursts in the traces shipped).
- *Blocks* of neighbouring windows are taken with replacement from every place, circularly (Politis
  and Romano 1992). A block is as long as the autocorrelation asks (Andrews 1991, rule for an AR(1)
  process with Bartlett's kernel, to which a block bootstrap corresponds), at least the third root
  of the number of windows, and never longer than a fifth of the time.
- *Few windows.* With five to fifteen windows a percentile interval is much too narrow. The
  deviations of the weights are multiplied by the factor at which an interval of a mean covers it at
  95 % for a Gaussian AR(1) process with the autocorrelation at hand, so many windows, and blocks of
  that length; the factor is simulated (Shao and Politis 2013 on why the length of a block must
  count; for independent windows this is Student's interval). The autocorrelation, of what the
  interval is wanted of, is corrected for its bias in short series (Marriott and Pope 1954) and
  taken half a standard error higher. Measured coverage: docs/intervals.md.
- *Copies.* A load above the trace's own is made of shifted copies of it. They smooth the load, but
  stay one stretch of time: each window of the original moves all its copies at once, so deviations
  count as often as there are copies (first order; cross terms make it somewhat wider).
- *Load.* Another stretch of time would have another mean load, and intervals include that, although
  an experiment scales the load to a share of capacity: where a policy's saving depends on the load
  they are on the safe side. Of a workload of several copies the load is even by construction; there
  resamples keep the total load (linear calibration, Deville and Sarndal 1992).
- *Days.* Four or more days (or independently generated workloads) are clusters: whole days are
  taken with replacement, the interval is Student's over days and speaks of days like them (copies
  of a day's requests are shifted within the day, so they need no correction there). Fewer
  are strata: blocks are taken within each, and the interval speaks of those days alone.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.stats.bootstrap import LEVEL, N_RESAMPLES, Interval, percentile_interval
from biscale_env.evaluation.stats.few_windows import block_windows, expansion, student_factor

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

WINDOW_S: Final = 120.0
MIN_UNITS: Final = 3
"""Fewer windows (or days) than this give no interval."""
MIN_CLUSTERS: Final = 4
"""From so many days on, days are what is resampled: with three, Student's factor is above 4."""
_MAX_AUTOCORRELATION: Final = 0.9
"""Beyond it a few windows cannot tell a swing from a trend (assumed)."""


# --- windows


def window_starts(duration_s: float, window_s: float = WINDOW_S) -> Floats:
    """Where the windows of a workload begin, s, shape (n_windows,).

    As many equal windows as there is room for at ``window_s`` or longer, and at least one.

    Args:
        duration_s: observed time of the workload, the same for every policy, s.
        window_s: least length of a window, s.

    Raises:
        BiscaleError: the length of a window is not positive.
    """
    if not window_s > 0:
        raise BiscaleError(f"the length of a window must be positive, got {window_s:g} s")
    n_windows = max(1, math.floor(duration_s / window_s * (1 + 1e-9)))
    return np.arange(n_windows, dtype=np.float64) * (max(duration_s, 0.0) / n_windows)


def window_of(time_s: ArrayLike, starts_s: Floats) -> Ints:
    """Window that each instant falls into; what comes after the end belongs to the last one."""
    at = np.searchsorted(starts_s, np.asarray(time_s, dtype=np.float64), side="right") - 1
    return np.maximum(at, 0).astype(np.int64)


# --- weights


def autocorrelation(series: ArrayLike, days: ArrayLike | None = None) -> float:
    """Autocorrelation of neighbouring windows, in [0, 0.9], corrected for the bias of few windows.

    Half its standard error is added, since too small is worse than too large: an interval that is
    much too narrow is not made up for by one that is too wide as often.

    Args:
        series: one value per window, shape (n_windows,); NaN is taken as the mean.
        days: label of each window; the last window of a day has no neighbour in the next one.
    """
    values = np.asarray(series, dtype=np.float64)
    product, square = 0.0, 0.0
    parts = _parts(values.size, days)
    for part in parts:
        known = values[part]
        if np.isfinite(known).any():
            deviation = np.nan_to_num(known - np.nanmean(known))
            product += float(deviation[1:] @ deviation[:-1])
            square += float(deviation @ deviation)
    if square <= 1e-24 * float(np.nansum(values**2)):
        return 0.0
    raw = product / square
    corrected = raw + (1 + 4 * raw) * len(parts) / values.size
    corrected += 0.5 * math.sqrt(max(1 - corrected**2, 0.0) / values.size)
    return min(max(corrected, 0.0), _MAX_AUTOCORRELATION)


def window_weights(
    n_windows: int,
    rng: np.random.Generator,
    n_resamples: int = N_RESAMPLES,
    days: ArrayLike | None = None,
    series: Sequence[ArrayLike] = (),
    copies: float = 1.0,
    load: ArrayLike | None = None,
    keep_load: bool = False,
) -> Floats:
    """Weight of each window in each resample; give all policies of an operating point the same.

    A weight is 1 plus the deviation of the window's count in a block bootstrap, multiplied by the
    factor for few and correlated windows. So weights may be negative, and each row adds up to
    ``n_windows`` (where days are of equal length). Percentiles of a statistic that is linear in the
    weights are its interval.

    Args:
        n_windows: windows of the workload.
        rng: source of randomness.
        n_resamples: number of resamples.
        days: label of each window, shape (n_windows,), neighbours in time next to each other; one
            day if left out. Independently generated workloads are labels too.
        series: what intervals are wanted of, e.g. the energy ratio, each of shape (n_windows,); the
            largest autocorrelation counts, for the length of blocks and for the factor.
        copies: of how many copies of the original trace, shifted against each other, the workload
            is made in effect; totals must be given back to the windows of the original. Days that
            are taken whole hold all copies of theirs, so for them it does not count.
        load: requests per window; its autocorrelation counts for the length of blocks.
        keep_load: every resample keeps the total of the load of each day.

    Returns:
        Shape (n_resamples, n_windows); NaN where there are too few windows for an interval.
    """
    parts = _parts(n_windows, days)
    lengths = tuple(part.size for part in parts)
    if not lengths:
        return np.empty((n_resamples, 0))
    clusters = len(parts) >= MIN_CLUSTERS or (len(parts) > 1 and min(lengths) < MIN_UNITS)
    if (len(parts) if clusters else min(lengths)) < MIN_UNITS:
        return np.full((n_resamples, n_windows), np.nan)
    if clusters:
        n_days = len(parts)
        taken = rng.multinomial(n_days, np.full(n_days, 1 / n_days), n_resamples)
        day_of = np.empty(n_windows, dtype=np.int64)
        for day, part in enumerate(parts):
            day_of[part] = day
        # all copies of a day are of that day, so its total holds its whole deviation already
        return 1 + student_factor(n_days) * (taken[:, day_of].astype(np.float64) - 1)
    correlation = max((autocorrelation(one, days) for one in series), default=0.0)
    of_load = 0.0 if load is None else autocorrelation(load, days)
    blocks = tuple(block_windows(n, max(correlation, of_load)) for n in lengths)
    moved = np.empty((n_resamples, n_windows))
    kept: list[tuple[float, ...]] = []
    for part, block in zip(parts, blocks, strict=True):
        own = _block_counts(part.size, block, n_resamples, rng) - 1
        kept.append(_direction(np.asarray(load)[part]) if keep_load and load is not None else ())
        if kept[-1]:
            own -= np.outer(own @ np.asarray(kept[-1]), kept[-1])
        moved[:, part] = own
    return 1 + copies * expansion(lengths, blocks, round(correlation, 2), tuple(kept)) * moved


def _direction(load: ArrayLike) -> tuple[float, ...]:
    """The load less its mean, of length 1; empty where it does not vary, or for three windows."""
    values = np.asarray(load, dtype=np.float64)
    deviation = values - float(values.mean())
    length = float(np.linalg.norm(deviation))
    if values.size <= MIN_UNITS or length <= 1e-9 * float(np.abs(values).sum()):
        return ()
    return tuple((deviation / length).tolist())


def _parts(n_windows: int, days: ArrayLike | None) -> list[Ints]:
    """Indices of the windows of each day, in order of time."""
    if days is None:
        return [np.arange(n_windows)]
    label = np.asarray(days)
    if label.shape != (n_windows,):
        raise BiscaleError(
            f"every window needs the label of its day: got {label.size} labels for {n_windows} "
            "windows"
        )
    return [np.flatnonzero(label == day) for day in dict.fromkeys(label.tolist())]


def _block_counts(n: int, length: int, n_resamples: int, rng: np.random.Generator) -> Floats:
    """How often each window is taken when circular blocks fill the time; the last one is cut."""
    n_blocks = -(-n // length)
    first = rng.integers(0, n, (n_resamples, n_blocks))
    taken = ((first[:, :, None] + np.arange(length)) % n).reshape(n_resamples, -1)[:, :n]
    row = n * np.arange(n_resamples)[:, None]
    return (
        np.bincount((row + taken).ravel(), minlength=n * n_resamples)
        .reshape(n_resamples, n)
        .astype(np.float64)
    )


# --- intervals


def resampled_ratios(
    numerator: ArrayLike, denominator: ArrayLike, weights: Floats
) -> tuple[Floats, Floats]:
    """Ratio of totals over windows, and its value in every resample.

    Resampled ratios are linear in the weights (the ratio plus the weighted mean of its residuals),
    so that weights far from 1 do no harm.

    Args:
        numerator: total per window, shape (..., n_windows).
        denominator: total per window, likewise.
        weights: from :func:`window_weights`.

    Returns:
        The ratio, shape (...), NaN where the denominator is 0; and the resampled ones, shape
        (n_resamples, ...).
    """
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    total = bottom.sum(axis=-1)
    safe = np.where(total > 0, total, 1.0)
    ratio = np.where(total > 0, top.sum(axis=-1) / safe, np.nan)
    residual = top - ratio[..., None] * bottom
    moved = np.moveaxis(residual @ (weights - 1).T, -1, 0) / safe
    return ratio, ratio + moved


def ratio_interval(
    numerator: ArrayLike, denominator: ArrayLike, weights: Floats, level: float = LEVEL
) -> Interval:
    """Interval of ``sum(numerator) / sum(denominator)`` over windows.

    Args:
        numerator: total per window, shape (n_windows,).
        denominator: total per window, the same windows.
        weights: from :func:`window_weights`; give two policies the same ones.
        level: confidence level; the factor for few windows is that of 95 %.
    """
    ratio, resampled = resampled_ratios(numerator, denominator, weights)
    return percentile_interval(float(ratio), resampled, level)


def attainment_interval(
    met: ArrayLike, counted: ArrayLike, weights: Floats, level: float = LEVEL
) -> Interval:
    """Interval of the attainment, inside [0, 1] and wider towards the side where it can be worse.

    Clopper and Pearson's interval for as many independent requests as have the variance of the
    resampled attainment (Korn and Graubard 1998). Without a violation in any window there is no
    variance to go by: requests then count as independent, which is optimistic in bursts.

    Args:
        met: requests per window that met the SLO.
        counted: requests per window that could be judged.
        weights: from :func:`window_weights`.
        level: confidence level.
    """
    share, resampled = resampled_ratios(met, counted, weights)
    p, n = float(share), float(np.sum(counted))
    if not n > 0 or np.isnan(resampled).any():
        return Interval(p, math.nan, math.nan)
    variance = float(np.var(resampled))
    if 0 < p < 1:
        n = min(n, p * (1 - p) / variance) if variance > 0 else n
    tail = (1 - level) / 2
    low = float(stats.beta.ppf(tail, p * n, (1 - p) * n + 1)) if p > 0 else 0.0
    high = float(stats.beta.ppf(1 - tail, p * n + 1, (1 - p) * n)) if p < 1 else 1.0
    return Interval(p, low, high)


def quantile_interval(
    values: ArrayLike, windows: ArrayLike, probability: float, weights: Floats, level: float = LEVEL
) -> Interval:
    """Interval of a quantile of single requests, by that of the fraction below it (Woodruff 1952).

    Args:
        values: one latency per request; NaN is left out.
        windows: window of each request, into the columns of ``weights``.
        probability: which quantile, e.g. 0.99.
        weights: from :func:`window_weights`.
        level: confidence level.
    """
    latency, window = np.asarray(values, dtype=np.float64), np.asarray(windows)
    latency, window = latency[np.isfinite(latency)], window[np.isfinite(latency)]
    if not latency.size:
        return Interval(math.nan, math.nan, math.nan)
    quantile = float(np.quantile(latency, probability))
    counted = np.bincount(window, minlength=weights.shape[1])
    below = np.bincount(window[latency <= quantile], minlength=weights.shape[1])
    at = attainment_interval(below, counted, weights, level)
    if math.isnan(at.low):
        return Interval(quantile, math.nan, math.nan)
    # the sample's own share below its quantile is not quite the probability (ties, few values)
    shift = probability - at.estimate
    ends = np.clip([at.low + shift, at.high + shift], 0.0, 1.0)
    low, high = np.quantile(latency, ends)
    return Interval(quantile, float(min(low, quantile)), float(max(high, quantile)))
