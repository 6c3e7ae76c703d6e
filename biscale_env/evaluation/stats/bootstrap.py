"""Intervals and scores.

Block bootstrap for requests, paired differences for claims, IQM for scores and only for them.

Requests of one workload are not independent: a burst makes many late together. Resampling single
requests would give intervals several times too narrow. So the unit that is resampled is a *block*:
all requests of one workload that arrive within ``block_s`` seconds; blocks are taken with
replacement within each workload, and a pair of policies is always given the same blocks (both saw
the same requests). Blocks must be longer than bursts and their after-effects; the default of 30 s
is assumed, and intervals from fewer than about 20 blocks are too narrow.

The inter-quartile mean (IQM) throws away the worst quarter, which is the very thing an SLO is
about: it serves normalised scores across scenarios, never latencies or attainment.

Sources: Kuensch 1989 (block bootstrap); Agarwal et al. 2021, "Deep RL at the edge of the
statistical precipice" (IQM, stratified bootstrap, probability of improvement); Clopper and Pearson
1934 (the case of no violation). SciPy's bootstrap is not used: it knows neither blocks that two
policies share nor strata.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from biscale_env.core.errors import BiscaleError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BLOCK_S: Final = 30.0
LEVEL: Final = 0.95
N_RESAMPLES: Final = 2000


class Interval(NamedTuple):
    """An estimate and its confidence interval; the ends are NaN where the data cannot tell."""

    estimate: float
    low: float
    high: float


def percentile_interval(estimate: float, resampled: ArrayLike, level: float) -> Interval:
    """An estimate with the percentiles of its resampled values; NaN is left out."""
    values = np.asarray(resampled, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return Interval(estimate, math.nan, math.nan)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high))


# --- scores across scenarios


def iqm(scores: ArrayLike) -> float | Floats:
    """Inter-quartile mean over the last axis: the mean of the middle half.

    For scores, never for SLOs.

    A float for a flat sample (NaN for an empty one), an array for a stack of samples.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not values.size:
        return math.nan
    mean = stats.trim_mean(values, 0.25, axis=-1)
    return float(mean) if values.ndim == 1 else np.asarray(mean)


def normalised_score(energy_j: ArrayLike, max_clock_j: ArrayLike, oracle_j: ArrayLike) -> Floats:
    """0 for the energy of max clock, 1 for that of the oracle, on the same workload.

    NaN where these two do not differ.

    More than 1 would mean that the oracle is no bound; below 0 is worse than max clock.
    """
    top = np.asarray(max_clock_j, dtype=np.float64)
    span = top - np.asarray(oracle_j, dtype=np.float64)
    usable = span > 1e-12 * np.abs(top)
    return np.where(
        usable, (top - np.asarray(energy_j, dtype=np.float64)) / np.where(usable, span, 1.0), np.nan
    )


def stratified_bootstrap(
    strata: Sequence[ArrayLike],
    rng: np.random.Generator,
    statistic: Callable[[Floats], float | Floats] = iqm,
    n_resamples: int = N_RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Interval of a statistic of all values together, resampling runs within each stratum.

    A stratum is a scenario.

    Args:
        strata: one array of scores per scenario.
        rng: source of randomness.
        statistic: function of the pooled values, along the last axis.
        n_resamples: number of resamples.
        level: confidence level.
    """
    groups = [np.asarray(s, dtype=np.float64).ravel() for s in strata if np.size(s)]
    if not groups:
        return Interval(math.nan, math.nan, math.nan)
    resampled = [group[rng.integers(0, group.size, (n_resamples, group.size))] for group in groups]
    return percentile_interval(
        float(statistic(np.concatenate(groups))),
        statistic(np.concatenate(resampled, axis=1)),
        level,
    )


def crossed_bootstrap(
    strata: Sequence[ArrayLike],
    rng: np.random.Generator,
    statistic: Callable[[Floats], float | Floats] = np.mean,
    n_resamples: int = N_RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Interval of a statistic of all values, where strata are matrices of seeds by workloads.

    A resample takes training seeds once for all strata (a lucky seed is lucky everywhere) and
    workloads within each stratum.

    Args:
        strata: one matrix per scenario, the same training seeds in the same order in each.
        rng: source of randomness.
        statistic: function of the pooled flat values.
        n_resamples: number of resamples.
        level: confidence level.

    Raises:
        BiscaleError: the strata have different numbers of training seeds.
    """
    tables = [np.atleast_2d(np.asarray(s, dtype=np.float64)) for s in strata]
    if not tables:
        return Interval(math.nan, math.nan, math.nan)
    n_seeds = tables[0].shape[0]
    if any(t.shape[0] != n_seeds for t in tables):
        raise BiscaleError("the crossed bootstrap needs the same training seeds in every scenario")
    resampled = []
    for _ in range(n_resamples):
        seeds = rng.integers(0, n_seeds, size=(n_seeds,))
        resampled.append(
            float(statistic(np.concatenate([_crossed(t, seeds, rng) for t in tables])))
        )
    together = float(statistic(np.concatenate([t.ravel() for t in tables])))
    return percentile_interval(together, resampled, level)


def _crossed(table: Floats, seeds: Ints, rng: np.random.Generator) -> Floats:
    return table[np.ix_(seeds, rng.integers(0, table.shape[1], table.shape[1]))].ravel()


def _wins(a: Floats, b: Floats) -> float:
    difference = a[:, None] - b[None, :]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def probability_of_improvement(
    a: Sequence[ArrayLike],
    b: Sequence[ArrayLike],
    rng: np.random.Generator,
    n_resamples: int = N_RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Probability that a run of A scores higher than one of B in a scenario chosen at random.

    Ties count half.

    Args:
        a: scores of A, one array per scenario (higher is better).
        b: scores of B, the same scenarios in the same order.
        rng: source of randomness.
        n_resamples: number of resamples.
        level: confidence level.

    Raises:
        BiscaleError: the two have different numbers of scenarios.
    """
    if len(a) != len(b):
        raise BiscaleError(
            f"probability of improvement needs the same scenarios: got {len(a)} and {len(b)}"
        )
    pairs = [
        (np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64))
        for x, y in zip(a, b, strict=True)
    ]
    if not pairs or not all(x.size and y.size for x, y in pairs):
        return Interval(math.nan, math.nan, math.nan)
    resampled = [
        np.mean([_wins(rng.choice(x, x.size), rng.choice(y, y.size)) for x, y in pairs])
        for _ in range(n_resamples)
    ]
    return percentile_interval(float(np.mean([_wins(x, y) for x, y in pairs])), resampled, level)


# --- claims about two policies


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = LEVEL) -> Interval:
    """Mean of ``a - b`` over common workloads, with Student's interval.

    It is right also for the few workloads that a comparison has.

    Args:
        a: one number of A per workload.
        b: the same of B, the same workloads in the same order.
        level: confidence level.

    Raises:
        BiscaleError: the two have different lengths.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise BiscaleError(
            f"paired differences need common workloads: got {left.size} and {right.size} values"
        )
    if left.size < 2:
        return Interval(float(left[0] - right[0]) if left.size else math.nan, math.nan, math.nan)
    with warnings.catch_warnings():  # equal differences: an interval without width is right
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = stats.ttest_rel(left, right).confidence_interval(level)
    return Interval(float(np.mean(left - right)), float(low), float(high))


# --- requests: block bootstrap


def time_blocks(arrival_s: ArrayLike, block_s: float = BLOCK_S) -> Ints:
    """Block of each request: the whole number of ``block_s`` before its arrival."""
    if not block_s > 0:
        raise BiscaleError(f"the block length must be positive, got {block_s} s")
    return np.floor(np.asarray(arrival_s, dtype=np.float64) / block_s).astype(np.int64)


def block_weights(
    strata: ArrayLike, rng: np.random.Generator, n_resamples: int = N_RESAMPLES
) -> Ints:
    """How often each block is taken in each resample, with replacement within its stratum.

    A stratum is a workload.

    Args:
        strata: stratum of each block, shape (n_blocks,).
        rng: source of randomness.
        n_resamples: number of resamples.

    Returns:
        Counts, shape (n_resamples, n_blocks); within a stratum each row adds up to the number of
        its blocks.
    """
    label = np.asarray(strata)
    weights = np.zeros((n_resamples, label.size), dtype=np.int64)
    for stratum in np.unique(label):
        members = np.flatnonzero(label == stratum)
        weights[:, members] = rng.multinomial(
            members.size, np.full(members.size, 1 / members.size), n_resamples
        )
    return weights


def ratio_interval(
    numerator: ArrayLike, denominator: ArrayLike, weights: Ints, level: float = LEVEL
) -> Interval:
    """Interval of ``sum(numerator) / sum(denominator)`` over blocks.

    An energy ratio, or a fraction such as attainment.

    Args:
        numerator: total per block, shape (n_blocks,).
        denominator: total per block, the same blocks.
        weights: from :func:`block_weights`; give two policies the same ones.
        level: confidence level.
    """
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    total = float(bottom.sum())
    if total <= 0:
        return Interval(math.nan, math.nan, math.nan)
    tops, bottoms = weights @ top, weights @ bottom
    usable = bottoms > 0
    return percentile_interval(float(top.sum()) / total, tops[usable] / bottoms[usable], level)


def attainment_interval(
    met: ArrayLike, counted: ArrayLike, weights: Ints, level: float = LEVEL
) -> Interval:
    """Interval of the attainment: a ratio over blocks.

    With no violation seen, the binomial bound for its lower end.

    Without a violation the bootstrap cannot see how rare one is. The bound ``((1 -
    level)/2)**(1/n)`` then takes the n requests as independent, so in bursty workloads it is
    optimistic.

    Args:
        met: requests per block that met the SLO.
        counted: requests per block that could be judged.
        weights: from :func:`block_weights`.
        level: confidence level.
    """
    interval = ratio_interval(met, counted, weights, level)
    n = float(np.sum(counted))
    if n > 0 and float(np.sum(met)) >= n:
        return Interval(1.0, ((1 - level) / 2) ** (1 / n), 1.0)
    return interval


def quantile_interval(
    values: ArrayLike, blocks: ArrayLike, probability: float, weights: Ints, level: float = LEVEL
) -> Interval:
    """Interval of a quantile of single requests under the block bootstrap.

    Args:
        values: one latency per request; NaN is left out.
        blocks: index of each request's block, into the columns of ``weights``.
        probability: which quantile, e.g. 0.99.
        weights: from :func:`block_weights`.
        level: confidence level.
    """
    latency, block = np.asarray(values, dtype=np.float64), np.asarray(blocks)
    latency, block = latency[np.isfinite(latency)], block[np.isfinite(latency)]
    if not latency.size:
        return Interval(math.nan, math.nan, math.nan)
    order = np.argsort(-latency)
    latency, block = latency[order], block[order]
    totals = weights @ np.bincount(block, minlength=weights.shape[1])
    above = totals - np.maximum(np.ceil(probability * totals).astype(np.int64), 1)
    resampled = [
        _from_the_top(latency, row, block, int(n))
        for row, n in zip(weights, above, strict=True)
        if n >= 0
    ]
    return percentile_interval(float(np.quantile(latency, probability)), resampled, level)


def _from_the_top(descending: Floats, weight: Ints, block: Ints, above: int) -> float:
    """The value with ``above`` weighted values before it.

    Looks at the tail first, for it mostly suffices.
    """
    for size in (min(4 * above + 100, descending.size), descending.size):
        reached = np.cumsum(weight[block[:size]])
        if reached[-1] > above:
            return float(descending[int(np.searchsorted(reached, above, side="right"))])
    return math.nan
