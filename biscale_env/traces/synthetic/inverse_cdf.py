"""Inverse distribution functions, sampled without bisection.

A length is looked up at a random level. Bisection of a hundred levels costs a mispredicted branch
at each of seven halvings, which was a quarter of the time that an episode's workload takes to make;
a table of 1024 equal cells says where a level lies but for the few levels within its cell.
``scipy.special`` is imported where a profile needs it: an environment with measured quantiles does
not, and it is a third of the time that making one takes.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from biscale_env.traces.synthetic.profiles import LogNormal, Quantiles

FloatArray = NDArray[np.float64]
CELLS = 1024  # a power of two, so that scaling a level by it rounds nothing


@dataclass(frozen=True)
class LevelIndex:
    """Counts the levels up to a value, ``np.searchsorted(levels, x, side="right")``.

    Attributes:
        levels: rising, between 0 and 1, shape (k,), with infinity behind them.
        first: levels up to the beginning of each cell, shape (CELLS + 1,).
        within: levels that any cell holds at most.
    """

    levels: FloatArray
    first: NDArray[np.intp]
    within: int

    @classmethod
    def of(cls, levels: FloatArray) -> Self:
        """The index of rising levels between 0 and 1."""
        first = np.searchsorted(levels, np.arange(CELLS + 1) / CELLS, side="right")
        padded = np.append(levels, np.inf)
        return cls(padded, first, int(np.diff(first).max(initial=0)))

    def count(self, x: FloatArray) -> NDArray[np.intp]:
        """How many levels lie at or below each ``x``, shape (n,), from 0 to 1."""
        found: NDArray[np.intp] = self.first[(x * CELLS).astype(np.intp)]
        for _ in range(self.within):
            found += self.levels[found] <= x
        return found


@dataclass(frozen=True)
class Segments:
    """A piecewise linear function between 0 and 1, as ``np.interp`` has it.

    Attributes:
        index: of the levels, shape (k,).
        start: level where each segment begins, shape (k + 1,); before and behind all levels too.
        value: there.
        slope: behind it; 0 outside of the levels.
    """

    index: LevelIndex
    start: FloatArray
    value: FloatArray
    slope: FloatArray

    @classmethod
    def of(cls, levels: FloatArray, values: FloatArray) -> Self:
        """The function that has ``values`` at strictly rising ``levels``."""
        slope = np.concatenate([[0.0], np.diff(values) / np.diff(levels), [0.0]])
        start, value = np.append(levels[:1], levels), np.append(values[:1], values)
        return cls(LevelIndex.of(levels), start, value, slope)

    def at(self, x: FloatArray) -> FloatArray:
        """Values at ``x``, from 0 to 1, shape (n,)."""
        segment = self.index.count(x)
        return self.slope[segment] * (x - self.start[segment]) + self.value[segment]


@dataclass(frozen=True)
class InverseCdf:
    """Inverse distribution function of one length.

    Attributes:
        quantiles: length (tokens) over probability; None for a log-normal distribution.
        normal: mean and standard deviation of the logarithm, and the greatest length.
    """

    quantiles: Segments | None
    normal: tuple[float, float, float]

    @classmethod
    def of(cls, marginal: Quantiles | LogNormal) -> Self:
        """The distribution that a profile describes."""
        if isinstance(marginal, Quantiles):
            segments = Segments.of(np.array(marginal.levels), np.array(marginal.tokens))
            return cls(segments, (0.0, 0.0, 0.0))
        sigma2 = float(np.log1p(marginal.cv**2))
        mean = float(np.log(marginal.mean_tokens) - sigma2 / 2)
        return cls(None, (mean, float(np.sqrt(sigma2)), float(marginal.max_tokens)))

    def at(self, level: FloatArray) -> NDArray[np.int32]:
        """Lengths at the given probabilities, whole tokens of at least 1.

        Args:
            level: probabilities between 0 and 1, shape (n,).
        """
        if self.quantiles is not None:
            tokens = self.quantiles.at(level)
        else:
            from scipy.special import ndtri

            mean, sigma, greatest = self.normal
            tokens = np.minimum(np.exp(mean + sigma * ndtri(level)), greatest)
        return np.maximum(np.rint(tokens), 1).astype(np.int32)
