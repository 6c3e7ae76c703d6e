"""Sampling prompt and output lengths from a profile: two marginals and a copula."""

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from biscale_env.traces.synthetic.profiles import LengthProfile, LogNormal, Quantiles

FloatArray = NDArray[np.float64]


def marginal_tokens(marginal: Quantiles | LogNormal, level: FloatArray) -> NDArray[np.int32]:
    """Lengths at the given probabilities (inverse distribution function), whole tokens of at least
    1.

    Args:
        marginal: length distribution.
        level: probabilities strictly between 0 and 1, shape (n,).
    """
    if isinstance(marginal, Quantiles):
        tokens = np.interp(level, marginal.levels, marginal.tokens)
    else:
        sigma2 = np.log1p(marginal.cv**2)
        tokens = np.exp(np.log(marginal.mean_tokens) - sigma2 / 2 + np.sqrt(sigma2) * ndtri(level))
        tokens = np.minimum(tokens, marginal.max_tokens)
    return np.maximum(np.rint(tokens), 1).astype(np.int32)


def _ranks(
    profile: LengthProfile, n: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Pairs of uniform ranks, each of shape (n,), that depend on each other as the profile says."""
    if profile.rank_grid is not None:
        k = len(profile.rank_grid)
        cells = np.cumsum(np.ravel(profile.rank_grid))
        cell = np.minimum(
            np.searchsorted(cells / cells[-1], rng.random(n), side="right"), k * k - 1
        )
        return (cell // k + rng.random(n)) / k, (cell % k + rng.random(n)) / k
    # Pearson correlation of the normals that gives the Spearman correlation: r = 2 sin(pi s / 6)
    # (Pearson 1907)
    r = 2 * np.sin(np.pi * profile.rank_correlation / 6)
    first, second = rng.standard_normal((2, n))
    return ndtr(first), ndtr(r * first + np.sqrt(1 - r * r) * second)


def sample_lengths(
    profile: LengthProfile, n: int, rng: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Draw ``n`` independent pairs of prompt and output length, tokens.

    Args:
        profile: the distributions.
        n: number of requests.
        rng: source of randomness.

    Returns:
        Prompt and output lengths, int32, each of shape (n,).
    """
    prompt_rank, output_rank = _ranks(profile, n, rng)
    return marginal_tokens(profile.prompt_tokens, prompt_rank), marginal_tokens(
        profile.output_tokens, output_rank
    )
