"""Sampling prompt and output lengths from a profile: two marginals and a copula.

``scipy.special`` is imported where a profile needs it: an environment with measured quantiles does
not, and it is a third of the time that making one takes.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from biscale_env.traces.synthetic.profiles import LengthProfile, LogNormal, Quantiles

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class InverseCdf:
    """Inverse distribution function of one length, its tables as arrays.

    Attributes:
        levels: rising probabilities, shape (k,); empty for a log-normal distribution.
        tokens: length at each level, shape (k,), tokens.
        normal: mean and standard deviation of the logarithm, and the greatest length.
    """

    levels: FloatArray
    tokens: FloatArray
    normal: tuple[float, float, float]

    @classmethod
    def of(cls, marginal: Quantiles | LogNormal) -> Self:
        """The distribution that a profile describes."""
        if isinstance(marginal, Quantiles):
            return cls(np.array(marginal.levels), np.array(marginal.tokens), (0.0, 0.0, 0.0))
        sigma2 = float(np.log1p(marginal.cv**2))
        mean = float(np.log(marginal.mean_tokens) - sigma2 / 2)
        normal = (mean, float(np.sqrt(sigma2)), float(marginal.max_tokens))
        return cls(np.empty(0), np.empty(0), normal)

    def at(self, level: FloatArray) -> NDArray[np.int32]:
        """Lengths at the given probabilities, whole tokens of at least 1.

        Args:
            level: probabilities strictly between 0 and 1, shape (n,).
        """
        if self.levels.size:
            tokens = np.interp(level, self.levels, self.tokens)
        else:
            from scipy.special import ndtri

            mean, sigma, greatest = self.normal
            tokens = np.minimum(np.exp(mean + sigma * ndtri(level)), greatest)
        return np.maximum(np.rint(tokens), 1).astype(np.int32)


@dataclass(frozen=True)
class LengthSampler:
    """A length profile ready to be sampled.

    Attributes:
        prompt: distribution of the prompt length.
        output: distribution of the output length.
        cells: cumulated fractions of the rank grid, row by row, shape (side * side,); empty where
            the copula is Gaussian.
        side: rows of the rank grid.
        correlation: Pearson correlation of the normals of the Gaussian copula.
    """

    prompt: InverseCdf
    output: InverseCdf
    cells: FloatArray
    side: int
    correlation: float

    @classmethod
    def of(cls, profile: LengthProfile) -> Self:
        """The sampler of a profile."""
        cells, side = np.empty(0), 0
        if profile.rank_grid is not None:
            cells, side = np.cumsum(np.ravel(profile.rank_grid)), len(profile.rank_grid)
            cells = cells / cells[-1]
        # Pearson correlation of the normals that gives the Spearman correlation: r = 2 sin(pi s/6)
        # (Pearson 1907)
        correlation = float(2 * np.sin(np.pi * profile.rank_correlation / 6))
        prompt, output = InverseCdf.of(profile.prompt_tokens), InverseCdf.of(profile.output_tokens)
        return cls(prompt, output, cells, side, correlation)

    def _ranks(self, n: int, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        """Pairs of uniform ranks, each of shape (n,), that depend as the profile says."""
        k = self.side
        if k:
            cell = np.minimum(np.searchsorted(self.cells, rng.random(n), side="right"), k * k - 1)
            return (cell // k + rng.random(n)) / k, (cell % k + rng.random(n)) / k
        from scipy.special import ndtr

        r = self.correlation
        first, second = rng.standard_normal((2, n))
        return ndtr(first), ndtr(r * first + np.sqrt(1 - r * r) * second)

    def sample(
        self, n: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Sample ``n`` independent pairs of prompt and output length, tokens.

        Args:
            n: number of requests.
            rng: source of randomness.

        Returns:
            Prompt and output lengths, int32, each of shape (n,).
        """
        prompt_rank, output_rank = self._ranks(n, rng)
        return self.prompt.at(prompt_rank), self.output.at(output_rank)


def marginal_tokens(marginal: Quantiles | LogNormal, level: FloatArray) -> NDArray[np.int32]:
    """Lengths at the given probabilities, see :meth:`InverseCdf.at`."""
    return InverseCdf.of(marginal).at(level)


def sample_lengths(
    profile: LengthProfile, n: int, rng: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Sample ``n`` pairs of prompt and output length, see :meth:`LengthSampler.sample`."""
    return LengthSampler.of(profile).sample(n, rng)
