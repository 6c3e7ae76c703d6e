"""Rewards of recorded decisions at any SLO-violation penalty, made after the fact.

Energy and lost requests are recorded apart, so that one data set holds the reward at every price::

    cost   = energy + price x request_cost x lost
    reward = (cost_rate x elapsed - cost) / spread

``cost_rate``, the average cost per second of the recorded data set that costs least at that price,
makes decisions of different length comparable (as in :mod:`agents.training.worlds.reward`);
``spread``, the root mean square of the numerator, lets groups count alike. Both are per group.
"""

import numpy as np
from numpy.typing import NDArray

from agents.offline.transitions import Ints, RecordedDecisions

Floats = NDArray[np.float64]


class PricedReward:
    """Rewards of some transitions; numbers are prepared once."""

    def __init__(
        self, data: RecordedDecisions, prices: tuple[float, float], steps: int = 25
    ) -> None:
        """Measure cost rates and spreads on a grid of prices.

        Args:
            data: what is learned from.
            prices: range of the penalty, mean energies of a request at max clock.
            steps: of the grid, logarithmic.
        """
        self._data, self._low, self._high = data, *np.log(prices)
        self._unit = data.request_cost[data.group]
        grid = np.exp(np.linspace(self._low, self._high, steps))
        n = len(data.request_cost)
        self._rate, self._spread = np.empty((n, steps)), np.empty((n, steps))
        for g in range(n):
            self._measure(g, grid)

    def _measure(self, g: int, grid: Floats) -> None:
        data, rows = self._data, np.flatnonzero(self._data.group == g)
        _, source = np.unique(data.source[rows], return_inverse=True)
        sums = [np.bincount(source, v[rows]) for v in (data.energy, data.lost, data.elapsed_s)]
        for k, price in enumerate(grid):
            weight = price * data.request_cost[g]
            rate = float(((sums[0] + weight * sums[1]) / sums[2]).min())
            cost = data.energy[rows] + weight * data.lost[rows]
            value = rate * data.elapsed_s[rows] - cost
            self._rate[g, k], self._spread[g, k] = rate, np.sqrt(np.mean(value**2))

    def draw(self, rng: np.random.Generator, n: int) -> Floats:
        """Prices (n,), log-uniform."""
        return np.exp(rng.uniform(self._low, self._high, n))

    def __call__(self, rows: Ints, price: Floats) -> NDArray[np.float32]:
        """Rewards (n,) of transitions ``rows`` (n,) at prices (n,)."""
        data, steps = self._data, self._rate.shape[1]
        width = max(self._high - self._low, 1e-9)
        near = np.rint((np.log(price) - self._low) / width * (steps - 1)).astype(np.int64)
        group = data.group[rows]
        cost = data.energy[rows] + price * self._unit[rows] * data.lost[rows]
        value = self._rate[group, near] * data.elapsed_s[rows] - cost
        return (value / self._spread[group, near]).astype(np.float32)
