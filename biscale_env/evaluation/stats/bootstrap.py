"""What every interval is made of: an estimate, the percentiles of resampled values, a mean."""

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]

LEVEL: Final = 0.95
N_RESAMPLES: Final = 2000


class Interval(NamedTuple):
    """An estimate and its confidence interval; the ends are NaN where the data cannot tell."""

    estimate: float
    low: float
    high: float


def percentile_interval(estimate: float, resampled: ArrayLike, level: float = LEVEL) -> Interval:
    """An estimate with the percentiles of its resampled values; NaN is left out."""
    values = np.asarray(resampled, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return Interval(estimate, math.nan, math.nan)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high))


def of_a_probability(interval: Interval) -> Interval:
    """An interval with its ends in [0, 1]: those of a linear resampling may lie outside."""
    low, high = np.clip([interval.low, interval.high], 0.0, 1.0)
    return Interval(interval.estimate, float(low), float(high))


def student_interval(values: ArrayLike, level: float = LEVEL) -> Interval:
    """Mean of independent values with Student's interval; NaN is left out.

    Only for values that repeat the whole experiment, as workloads generated independently of each
    other do. Subsamples of one trace repeat the same minutes: they need
    :mod:`biscale_env.evaluation.stats.windows`.
    """
    x = np.asarray(values, dtype=np.float64)
    x = x[np.isfinite(x)]
    if x.size < 2:
        return Interval(float(x[0]) if x.size else math.nan, math.nan, math.nan)
    mean = float(x.mean())
    quantile = float(stats.t.ppf(0.5 + level / 2, x.size - 1))
    half = quantile * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(mean, mean - half, mean + half)


def iqm(scores: ArrayLike) -> float | Floats:
    """Inter-quartile mean over the last axis: the mean of the middle half.

    It throws away the worst quarter, which is the very thing an SLO is about: it serves normalised
    scores across scenarios, never latencies or attainment (Agarwal et al. 2021).

    A float for a flat sample (NaN for an empty one), an array for a stack of samples.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not values.size:
        return math.nan
    mean = stats.trim_mean(values, 0.25, axis=-1)
    return float(mean) if values.ndim == 1 else np.asarray(mean)
