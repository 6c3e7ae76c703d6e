"""The clock of another machine, from one-way messages; no synchronisation is needed.

CLOCK_MONOTONIC of two machines differ by anything, and drift apart slowly. The smallest difference
between arrival here and time stamp there is the difference of the clocks plus the fastest transit;
what a message took longer than that is its age.
"""

import math

WINDOW_S = 30.0  # half of how long the smallest difference counts; drift of 50 ppm is 3 ms in it


class PeerTime:
    """Difference of two monotonic clocks: time here minus time there, s; NaN before any message."""

    def __init__(self) -> None:
        self._least = [math.inf, math.inf]  # of this window and of the one before
        self._since_s = -math.inf

    @property
    def offset_s(self) -> float:
        """Time here minus time there."""
        least = min(self._least)
        return least if math.isfinite(least) else math.nan

    def hear(self, sent_s: float, now_s: float) -> float:
        """Take note of a message.

        Args:
            sent_s: when it was sent, by the other clock.
            now_s: when it came, by ours.

        Returns:
            When it was sent, by our clock; never later than ``now_s``.
        """
        if not math.isfinite(sent_s):
            return now_s
        if now_s - self._since_s > WINDOW_S:
            self._least = [math.inf, self._least[0]]
            self._since_s = now_s
        self._least[0] = min(self._least[0], now_s - sent_s)
        return self.here(sent_s)

    def here(self, there_s: float) -> float:
        """A time of the other machine by our clock; NaN stays NaN."""
        return there_s + self.offset_s
