"""How long blocks of windows are, and how much few and correlated ones widen an interval.

Blocks: Andrews' rule for an AR(1) process (1991, Bartlett's kernel, to which a block bootstrap
corresponds), at least the third root of the number of windows. Widening: the factor at which the
interval of a mean covers it at 95 %, for a Gaussian AR(1) process, by simulation (that the length
of a block must count: Shao and Politis 2013); for independent units it is Student's.
"""

import math
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from biscale_env.evaluation.stats.bootstrap import LEVEL

Floats = NDArray[np.float64]

MIN_BLOCKS: Final = 5
"""A block is never longer than this fraction of the time (assumed; see the tests of coverage)."""
_GAUSS: Final = float(stats.norm.ppf(0.5 + LEVEL / 2))


def block_windows(n_windows: int, correlation: float = 0.0) -> int:
    """Windows per block: as many as the autocorrelation asks, a fifth of all at most.

    Args:
        n_windows: windows of one day.
        correlation: autocorrelation of neighbouring windows, in [0, 1).
    """
    strength = 4 * correlation**2 / (1 - correlation**2) ** 2
    wanted = max(1.447 * (strength * n_windows) ** (1 / 3), n_windows ** (1 / 3))
    return max(1, min(math.ceil(wanted - 1e-9), n_windows // MIN_BLOCKS))


def student_factor(n_units: int) -> float:
    """By how much the bootstrap of a few independent units must be widened, at 95 %.

    Student's quantile over the normal one, and the variance of a sample over that of its resamples.

    Args:
        n_units: number of units, at least 2.
    """
    student = float(stats.t.ppf(0.5 + LEVEL / 2, n_units - 1))
    return student * math.sqrt(n_units / (n_units - 1)) / _GAUSS


@lru_cache(maxsize=256)
def expansion(
    lengths: tuple[int, ...],
    blocks: tuple[int, ...],
    correlation: float,
    load: tuple[tuple[float, ...], ...] = (),
) -> float:
    """By how much the deviations must grow for the percentiles to cover a mean at 95 %.

    Args:
        lengths: windows of each stratum.
        blocks: windows per block in each.
        correlation: autocorrelation of neighbouring windows.
        load: direction (of length 1, mean 0) that resamples keep in each stratum, one number per
            window; empty for none.
    """
    n_windows = sum(lengths)
    n_samples = int(np.clip(4_000_000 // n_windows, 2_000, 40_000))
    rng = np.random.default_rng(0)
    error, variance = np.zeros(n_samples), np.zeros(n_samples)
    for n, block, kept in zip(lengths, blocks, load or [()] * len(lengths), strict=True):
        sample = _ar1(n, correlation, n_samples, rng)
        error += sample.sum(axis=1) / n_windows
        if kept:
            sample = sample - np.outer(sample @ np.asarray(kept), kept)
        variance += _bootstrap_variance(sample, block) / n_windows**2
    needed = np.abs(error) / np.sqrt(np.maximum(variance, 1e-300))
    return float(np.quantile(needed, LEVEL)) / _GAUSS


def _ar1(n: int, correlation: float, n_samples: int, rng: np.random.Generator) -> Floats:
    """Stationary Gaussian series, shape (n_samples, n)."""
    series = rng.normal(size=(n_samples, n))
    fresh = math.sqrt(1 - correlation**2)
    if correlation > 0:
        for t in range(1, n):
            series[:, t] = correlation * series[:, t - 1] + fresh * series[:, t]
    return series


def _bootstrap_variance(series: Floats, length: int) -> Floats:
    """Variance of the resampled sum of each series, shape (n_samples,), in closed form.

    As blocks are taken for the weights: independent, from every place, the last one cut.
    """
    n = series.shape[1]
    deviation = series - series.mean(axis=1, keepdims=True)
    whole, rest = divmod(n, length)
    total = whole * _block_square(deviation, length)
    return total + (_block_square(deviation, rest) if rest else 0.0)


def _block_square(deviation: Floats, length: int) -> Floats:
    """Mean square of the sums over all circular blocks of a length."""
    wrapped = np.concatenate([deviation, deviation[:, : length - 1]], axis=1)
    running = np.cumsum(wrapped, axis=1)
    sums = running[:, length - 1 :].copy()
    sums[:, 1:] -= running[:, :-length]
    return np.asarray(np.mean(sums**2, axis=1))
