"""Sampling prompt and output lengths from a profile: two marginals and a copula."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from biscale_env.traces.synthetic.inverse_cdf import FloatArray, InverseCdf, LevelIndex
from biscale_env.traces.synthetic.profiles import LengthProfile, LogNormal, Quantiles


@dataclass(frozen=True)
class LengthSampler:
    """A length profile ready to be sampled.

    Attributes:
        prompt: distribution of the prompt length.
        output: distribution of the output length.
        cells: index of the cumulated fractions of the rank grid, row by row; None where the copula
            is Gaussian.
        corners: row and column of each cell, shape (2, side * side).
        correlation: Pearson correlation of the normals of the Gaussian copula.
    """

    prompt: InverseCdf
    output: InverseCdf
    cells: LevelIndex | None
    corners: FloatArray
    correlation: float

    @classmethod
    def of(cls, profile: LengthProfile) -> Self:
        """The sampler of a profile."""
        cells, corners = None, np.empty((2, 0))
        if profile.rank_grid is not None:
            fractions, side = np.cumsum(np.ravel(profile.rank_grid)), len(profile.rank_grid)
            cells = LevelIndex.of(fractions / fractions[-1])
            corners = np.array(np.divmod(np.arange(side * side), side), dtype=np.float64)
        # Pearson correlation of the normals that gives the Spearman correlation: r = 2 sin(pi s/6)
        # (Pearson 1907)
        correlation = float(2 * np.sin(np.pi * profile.rank_correlation / 6))
        prompt, output = InverseCdf.of(profile.prompt_tokens), InverseCdf.of(profile.output_tokens)
        return cls(prompt, output, cells, corners, correlation)

    def _ranks(self, n: int, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        """Pairs of uniform ranks, each of shape (n,), that depend as the profile says."""
        if self.cells is not None:
            k = round(self.corners.shape[1] ** 0.5)
            cell = np.minimum(self.cells.count(rng.random(n)), k * k - 1)
            row, column = self.corners
            return (row[cell] + rng.random(n)) / k, (column[cell] + rng.random(n)) / k
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
