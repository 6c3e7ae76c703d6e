"""The numbers behind each figure, as plain arrays.

Reduced enough for a page, faithful enough to be tested.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Box = tuple[float, float, float, float]

NINES_FLOOR: Final = 2e-4
"""Smallest fraction of misses that the scale of nines can tell from none."""
WINDOW_S: Final = 60.0
_SMOOTH_S: Final = 10.0
_GRID_S: Final = 0.5


def nines(share: ArrayLike) -> Floats:
    """Scale on which 90 %, 99 % and 99.9 % lie evenly.

    ``-log10(1 - share)``, with 100 % at a finite place.
    """
    return -np.log10(1.0 - np.asarray(share, dtype=np.float64) + NINES_FLOOR) + np.log10(
        1.0 + NINES_FLOOR
    )


def tail_cdf(values: ArrayLike, points: int = 240) -> tuple[Floats, Floats]:
    """Cumulative distribution with its points spread evenly on the scale of nines.

    The maximum is included.

    Args:
        values: the sample.
        points: number of points.

    Returns:
        ``(value, share)``: the given fraction of the sample is at most that value.
    """
    sample = np.sort(np.asarray(values, dtype=np.float64))
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return np.array([]), np.array([])
    wanted = 1.0 - np.power(10.0, -np.linspace(0.0, -np.log10(NINES_FLOOR), points))
    rank = np.unique(np.append(np.ceil(wanted * sample.size).astype(np.int64).clip(1), sample.size))
    return sample[rank - 1], rank / sample.size


def busiest_window(
    time_s: ArrayLike,
    weight: ArrayLike,
    end_s: float,
    width_s: float = WINDOW_S,
    core_s: float = _SMOOTH_S,
) -> tuple[float, float]:
    """The window around the ``core_s`` seconds with the greatest weight, within the run.

    Some calm before, the burst, its after-effects; with ``core_s`` as wide as the window, the
    window with the greatest weight itself. On a grid of 0.5 s.

    Args:
        time_s: when the weight falls, s.
        weight: tokens that arrive, or requests that run.
        end_s: end of the run, s.
        width_s: width of the window, s.
        core_s: seconds whose weight counts, s.
    """
    time, load = np.asarray(time_s, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    if end_s <= width_s or not time.size:
        return 0.0, max(end_s, 1e-6)
    cells = np.bincount(
        (time / _GRID_S).astype(np.int64), weights=load, minlength=int(end_s / _GRID_S) + 1
    )
    span = int(core_s / _GRID_S)
    total = np.concatenate(([0.0], np.cumsum(cells)))
    first = int(np.argmax(total[span:] - total[:-span]))
    middle = (first + span / 2) * _GRID_S
    start = min(max(0.0, middle - width_s / 2), end_s - width_s)
    return start, start + width_s


def binned_timeline(
    timeline: Mapping[str, ArrayLike] | pd.DataFrame,
    start_s: float,
    end_s: float,
    bins: int,
    n_gpus: int,
) -> pd.DataFrame | None:
    """Means of a timeline over equal bins of time.

    The power times the bins is exactly the energy spent in them.

    Args:
        timeline: the columns of a run's timeline.
        start_s: start of the first bin, s.
        end_s: end of the last bin, s.
        bins: number of bins.
        n_gpus: GPUs that share the energy.

    Returns:
        One row per bin: ``time_s`` (its start), ``power_w`` (mean per GPU, idle time included), and
        time-weighted means of the clocks, the queue and the batch (nobody waits or runs while
        idle), NaN before and after the run. None when iterations overlap (several instances in one
        timeline), for then there is no single clock.
    """
    columns = {name: np.asarray(timeline[name], dtype=np.float64) for name in _NEEDED}
    begin, busy = columns["time_s"], columns["duration_s"]
    knots = np.stack([begin, begin + busy, begin + busy + columns["idle_s"]], axis=1)
    if not begin.size or (np.diff(knots.ravel()) < -1e-6).any():
        return None
    edges = np.linspace(start_s, end_s, bins + 1)
    lengths = np.diff(knots, axis=1)
    covered = _integral(knots, lengths, edges)
    energy = columns["energy_j"]
    busy_j = np.where(
        lengths[:, 1] > 0, np.minimum(columns["power_w"] * busy * n_gpus, energy), energy
    )
    spent = _integral(knots, np.stack([busy_j, energy - busy_j], axis=1), edges)
    result = {"time_s": edges[:-1], "power_w": spent / (np.diff(edges) * n_gpus)}
    for name in _MEANS:
        pieces = columns[name][:, None] * lengths
        pieces[:, 1] *= name.startswith("freq")
        total = _integral(knots, pieces, edges)
        result[name] = np.divide(total, covered, out=np.full(bins, np.nan), where=covered > 1e-9)
    return pd.DataFrame(result)


_MEANS: Final = (
    "freq_requested_mhz",
    "freq_effective_mhz",
    "queue_requests",
    "batch_requests",
    "batch_tokens",
)
_NEEDED: Final = ("time_s", "duration_s", "idle_s", "energy_j", "power_w", *_MEANS)


def _integral(knots: Floats, pieces: Floats, edges: Floats) -> Floats:
    """Integral per bin of what accrues linearly within each piece of the timeline.

    A piece is busy, then idle.
    """
    accrued = np.cumsum(pieces.ravel())
    # before a decision stands what had accrued until then: knots are (begin, begin + busy, end) per
    # decision
    at_knots = np.stack(
        [np.concatenate(([0.0], accrued[1:-1:2])), accrued[0::2], accrued[1::2]], axis=1
    )
    return np.diff(np.interp(edges, knots.ravel(), at_knots.ravel()))


def thin(
    time_s: Floats, value: Floats, keep: NDArray[np.bool_], at_most: int = 700
) -> tuple[Floats, Floats]:
    """At most about ``at_most`` of the points, evenly chosen, and all violations."""
    if time_s.size <= at_most:
        return time_s, value
    chosen = keep.copy()
    chosen[:: int(np.ceil(time_s.size / at_most))] = True
    return time_s[chosen], value[chosen]


def heaps(x: Floats, y: Floats, width: float, height: float) -> NDArray[np.intp]:
    """For each marker the first one that it lies on (itself where none).

    Such markers share one label.

    Args:
        x: markers, as a fraction of the plot's width.
        y: markers, as a fraction of its height.
        width: of the plot, px.
        height: of the plot, px.
    """
    leader = np.arange(len(x))
    for i in range(len(x)):
        near = np.hypot((x[:i] - x[i]) * width, (y[:i] - y[i]) * height) < 2 * _MARK_PX
        heads = np.flatnonzero(near & (leader[:i] == np.arange(i)))
        leader[i] = heads[0] if len(heads) else i
    return leader


def label_positions(
    x: Floats, y: Floats, lengths: list[int], width: float, height: float, bars: Sequence[Box] = ()
) -> list[str]:
    """Where to write each marker's label so that labels cover neither markers nor one another.

    Greedy, six places.

    Args:
        x: markers, as a fraction of the plot's width.
        y: markers, as a fraction of its height.
        lengths: letters of each label.
        width: of the plot, px.
        height: of the plot, px.
        bars: further things to keep free, such as error bars: (left, bottom, right, top) as
            fractions.

    Returns:
        Plotly's ``textposition`` for each label.
    """
    taken = [_box(px, py, "middle center", 0, width, height) for px, py in zip(x, y, strict=True)]
    thick = (1.5 / width, 1.5 / height)
    taken += [(b[0] - thick[0], b[1] - thick[1], b[2] + thick[0], b[3] + thick[1]) for b in bars]
    orders = (
        -np.asarray(y),
        -np.asarray(lengths),
        np.asarray(x),
    )  # who chooses first; the best of three attempts
    attempts = [
        _greedy(x, y, lengths, width, height, taken, np.argsort(o, kind="stable")) for o in orders
    ]
    return min(attempts, key=lambda attempt: attempt[0])[1]


def _greedy(
    x: Floats,
    y: Floats,
    lengths: list[int],
    width: float,
    height: float,
    taken: list[Box],
    order: NDArray[np.intp],
) -> tuple[float, list[str]]:
    """Each label in turn takes its cheapest place: (area covered twice or outside, the places)."""
    chosen, taken, spent = [_PLACES[0]] * len(lengths), list(taken), 0.0
    for i in (k for k in order if lengths[k]):
        boxes = {
            place: _box(float(x[i]), float(y[i]), place, lengths[i], width, height)
            for place in _PLACES
        }
        cost = {
            place: sum(_overlap(box, other) for other in taken) + _outside(box)
            for place, box in boxes.items()
        }
        chosen[i] = min(_PLACES, key=lambda place: cost[place])
        taken.append(boxes[chosen[i]])
        spent += cost[chosen[i]]
    return spent, chosen


_PLACES: Final = (
    "top right",
    "bottom right",
    "top left",
    "bottom left",
    "top center",
    "bottom center",
)
"""Never beside a marker: there run its error bars."""
_LETTER_PX, _LINE_PX, _MARK_PX = 7.6, 17.0, 5.0


def _box(x: float, y: float, place: str, letters: int, width: float, height: float) -> Box:
    vertical, horizontal = place.split()
    w, h = max(letters * _LETTER_PX, 2 * _MARK_PX) / width, _LINE_PX / height
    left = {"right": x + _MARK_PX / width, "left": x - w - _MARK_PX / width, "center": x - w / 2}[
        horizontal
    ]
    low = {"top": y + _MARK_PX / height, "bottom": y - h - _MARK_PX / height, "middle": y - h / 2}[
        vertical
    ]
    return left, low, left + w, low + h


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box) -> float:
    return sum(max(0.0, -box[i]) + max(0.0, box[i + 2] - 1.0) for i in (0, 1))
