"""Batches that an engine has formed and not finished: how far ahead of them a record is."""

from collections import deque

FLYING = 16  # batches formed and not ended; engines keep two at most


class InFlight:
    """Counts batches from forming to their results, which come in the same order.

    Times are CLOCK_MONOTONIC seconds.

    Attributes:
        wall_time: duration of the last one that has ended, s.
        ends_seen: results that were told; an engine that tells none says nothing about overlap.
    """

    def __init__(self) -> None:
        self._formed: deque[float] = deque(maxlen=FLYING)  # when formed; 0 for an empty step
        self._ended_s = 0.0
        self.wall_time = 0.0
        self.ends_seen = 0

    def forms(self, now: float, empty: bool = False) -> tuple[int, float]:
        """A batch was formed.

        Returns:
            How many before it have not ended, and since when the oldest of them runs (0: none).
        """
        before = [formed_s for formed_s in self._formed if formed_s]
        self._formed.append(0.0 if empty else now)
        return len(before), max(before[0], self._ended_s) if before else 0.0

    def ends(self, now: float) -> None:
        """The results of the oldest one have come back."""
        self.ends_seen += 1
        formed_s = self._formed.popleft() if self._formed else 0.0
        if formed_s:
            self.wall_time = now - max(formed_s, self._ended_s)
            self._ended_s = now
