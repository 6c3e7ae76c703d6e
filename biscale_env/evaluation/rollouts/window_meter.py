"""Totals per window of time of runs whose steps are not kept.

A curve is many runs of which only a few numbers per window are wanted; keeping every step would
take four times as long. So energy is read where a step crosses the end of a window, and requests
are judged afterwards.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biscale_env.envs.plant import Plant
from biscale_env.evaluation.stats.class_metrics import judged_counts
from biscale_env.evaluation.stats.judging import judge
from biscale_env.evaluation.stats.windows import window_of, window_starts

Floats = NDArray[np.float64]


class WindowTotals(NamedTuple):
    """Totals per window, each of shape (n_windows,).

    Attributes:
        energy_j: energy spent in the window, J; what the last tokens need after the end of the
            workload is spread over all, since that end is no chance of the last window.
        n_met: requests that arrive in it and meet the SLO.
        n_counted: requests that arrive in it.
        output_tokens: tokens that these ask for.
    """

    energy_j: Floats
    n_met: Floats
    n_counted: Floats
    output_tokens: Floats


def window_edges(duration_s: float) -> Floats:
    """Ends of the windows of a workload, s; the last is its own.

    The same for every policy, since only the workload counts and not how long a run took.
    """
    return np.append(window_starts(duration_s)[1:], duration_s)


@dataclass
class WindowMeter:
    """Reads energy where steps of a batch cross edges of windows.

    Attributes:
        edges_s: ends of windows per row.
    """

    edges_s: list[Floats]
    _points: list[list[tuple[float, float]]] = field(init=False)
    _next_s: Floats = field(init=False)
    _before_s: Floats = field(init=False)
    _before_j: Floats = field(init=False)

    def __post_init__(self) -> None:
        n = len(self.edges_s)
        self._points = [[(0.0, 0.0)] for _ in range(n)]
        self._next_s = np.array([edges[0] if edges.size else np.inf for edges in self.edges_s])
        self._before_s, self._before_j = np.zeros(n), np.zeros(n)

    def add(
        self, states: NDArray[Any], actions: NDArray[np.float32], active: NDArray[np.bool_]
    ) -> None:
        """Look at the states after a step; a row that has ended stands still."""
        time_s, energy_j = states["time_s"], states["energy_j"]
        crossed = time_s >= self._next_s
        if crossed.any():
            for i in np.flatnonzero(crossed):
                now = float(time_s[i]), float(energy_j[i])
                self._points[i] += [(float(self._before_s[i]), float(self._before_j[i])), now]
                later = self.edges_s[i][self.edges_s[i] > now[0]]
                self._next_s[i] = later[0] if later.size else np.inf
        self._before_s[:], self._before_j[:] = time_s, energy_j

    def energy_j(self, row: int, total_j: float) -> Floats:
        """Energy per window of a row that has ended; a step is divided in proportion to time.

        What is spent after the last end is spread evenly.
        """
        last = float(self._before_s[row]), float(self._before_j[row])
        times, sums = np.array([*self._points[row], last]).T
        until = np.interp(self.edges_s[row], times, sums)
        return np.diff(until, prepend=0.0) + (total_j - until[-1]) / until.size


def judged_windows(
    requests: dict[str, NDArray[Any]],
    plant: Plant,
    duration_s: float,
    edges_s: Floats,
    energy_j: Floats,
    worst: int | None = None,
) -> WindowTotals:
    """Totals of a run whose requests and energy per window are known.

    Args:
        requests: columns of a rollout's requests.
        plant: phase, and the SLO that they are judged by.
        duration_s: length of the run, s.
        edges_s: ends of the windows.
        energy_j: energy per window.
        worst: class of the SLO whose requests are counted; None: the one worst off in this run.
    """
    verdict = judge(requests, plant.slo, plant.phase, duration_s)
    window = window_of(requests["arrival_s"], np.concatenate(([0.0], edges_s[:-1])))
    judged = judged_counts(requests, verdict, plant.slo, worst)

    def per_window(weight: NDArray[Any]) -> Floats:
        found = np.bincount(window, weights=weight, minlength=edges_s.size)
        return np.asarray(found, dtype=np.float64)

    return WindowTotals(
        energy_j,
        per_window(judged.met),
        per_window(judged.counted),
        per_window(requests["output_tokens"]),
    )
