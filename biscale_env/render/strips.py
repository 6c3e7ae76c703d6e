"""Strips of the last seconds: what is drawn, without saying how."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SPAN_S = 10.0  # seconds shown by the environments of one instance; assumed: one burst
MISSES = "misses"  # key of the requests of a step that missed their SLO


@dataclass(frozen=True)
class Strip:
    """One quantity over time.

    Attributes:
        name: key of its values.
        title: what it is, with its unit.
        low: lower end of the axis.
        high: upper end; None follows the values.
        bound: a line to be kept (the slack's 0), None: none.
        digits: decimals of the value that is written beside the title.
    """

    name: str
    title: str
    low: float = 0.0
    high: float | None = None
    bound: float | None = None
    digits: int = 0


class ShownStep(NamedTuple):
    """One step on the screen: from when to when, and its values by name."""

    begin_s: float
    end_s: float
    values: Mapping[str, float]


class Recent:
    """The steps of the last seconds.

    Attributes:
        title: heading.
        strips: from top to bottom.
        span_s: how much is kept, s.
        steps: oldest first.
        misses: requests of the whole episode that missed their SLO.
        finished: requests of the whole episode that are finished.
    """

    def __init__(self, title: str, strips: Sequence[Strip], span_s: float = SPAN_S) -> None:
        """Nothing has happened yet."""
        self.title, self.strips, self.span_s = title, tuple(strips), span_s
        self.clear()

    def clear(self) -> None:
        """A new episode begins."""
        self.steps: deque[ShownStep] = deque()
        self.misses, self.finished = 0.0, 0.0

    def add(self, begin_s: float, end_s: float, values: Mapping[str, float]) -> None:
        """Take in a step; what is older than ``span_s`` is dropped.

        Args:
            begin_s: when it began, s.
            end_s: when it ended, s.
            values: by names of the strips, NaN: nothing to show; also ``misses`` and ``finished``.
        """
        self.steps.append(ShownStep(begin_s, end_s, values))
        self.misses += values.get(MISSES, 0.0)
        self.finished += values.get("finished", 0.0)
        while self.steps[0].end_s < end_s - self.span_s:
            self.steps.popleft()

    @property
    def now_s(self) -> float:
        """Time of the right edge, s."""
        return self.steps[-1].end_s if self.steps else 0.0

    def series(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Begin and end (n, 2), s, and values (n,) of one strip."""
        times = np.array([step[:2] for step in self.steps], dtype=np.float64).reshape(-1, 2)
        values = [step.values.get(name, np.nan) for step in self.steps]
        return times, np.array(values, dtype=np.float64)

    def axis(self, strip: Strip) -> tuple[float, float]:
        """Lower and upper end of a strip's axis, the upper always above the lower."""
        values = self.series(strip.name)[1]
        seen = values[np.isfinite(values)]
        low = min(strip.low, float(seen.min())) if seen.size else strip.low
        top = float(seen.max()) if seen.size else strip.low
        high = max(strip.high, top) if strip.high is not None else rounded_up(top)
        return low, high if high > low else low + 1.0

    def headline(self) -> str:
        """Heading with time and SLO misses."""
        missed = f"{self.misses:.0f} of {self.finished:.0f} requests missed the SLO"
        share = ""
        if self.finished:
            share = f" ({100 * (1 - self.misses / self.finished):.1f} % in time)"
        return f"{self.title}   t = {self.now_s:.2f} s   {missed}{share}"

    def latest(self, strip: Strip) -> str:
        """The newest value of a strip that is one, as text."""
        values = self.series(strip.name)[1]
        seen = values[np.isfinite(values)]
        return f"{seen[-1]:,.{strip.digits}f}" if seen.size else "-"


def rounded_up(value: float) -> float:
    """The next of 1, 2 or 5 times a power of ten, so that an axis does not move all the time."""
    if not value > 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(step * power for step in (1.0, 2.0, 5.0, 10.0) if step * power >= value))
