"""Scores across operating points and training seeds, and what they speak of.

Two things are sampled: which seeds an agent was trained with, and which stretch of time the
workloads are. Each moves the statistic by itself, and the interval is made of the sum of both
(exact for a mean of both effects, first order for an IQM). Few training seeds are as few windows:
Student's factor widens their part.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biscale_env.evaluation.stats.bootstrap import LEVEL, Interval, iqm, percentile_interval
from biscale_env.evaluation.stats.windows import MIN_UNITS, student_factor

Floats = NDArray[np.float64]


def crossed_interval(
    scores: ArrayLike,
    resampled: ArrayLike,
    rng: np.random.Generator,
    statistic: Callable[[Floats], float | Floats] = iqm,
    level: float = LEVEL,
) -> Interval:
    """Interval of a statistic over operating points and training seeds.

    A resample takes training seeds once for all points (a lucky seed is lucky everywhere).

    Args:
        scores: one per point and training seed, shape (n_points, n_seeds), the seeds in the same
            order at every point.
        resampled: the same under resampled windows of time, shape (n_resamples, n_points, n_seeds).
        rng: source of randomness.
        statistic: function of the pooled values, along the last axis.
        level: confidence level.

    Returns:
        The interval; its ends are NaN for two training seeds, which cannot tell. For a single seed
        (or a policy that is not trained) it speaks of that one.
    """
    nominal, moved = np.asarray(scores, dtype=np.float64), np.asarray(resampled, dtype=np.float64)
    n_resamples, n_points, n_seeds = moved.shape
    estimate = float(statistic(nominal.ravel()))
    windows = statistic(moved.reshape(n_resamples, n_points * n_seeds)) - estimate
    if n_seeds == 1:
        return percentile_interval(estimate, estimate + windows, level)
    if n_seeds < MIN_UNITS:
        return percentile_interval(estimate, [], level)
    taken = rng.integers(0, n_seeds, (n_resamples, n_seeds))
    drawn = np.moveaxis(nominal[:, taken], 0, 1).reshape(n_resamples, n_points * n_seeds)
    seeds = student_factor(n_seeds) * (statistic(drawn) - estimate)
    return percentile_interval(estimate, estimate + windows + seeds, level)
