"""The two sides of a fold: what tunes and what is judged, halves of a trace or windows of days."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.loads.capacity import Capacity, mean_rate_rps
from biscale_env.evaluation.runs.blocks import Copies
from biscale_env.traces import Trace, TraceWindow


@dataclass(frozen=True)
class Side:
    """What workloads of one side are made of, and what loads are shares of.

    Workload ``k`` is choice ``k // n`` of the requests of window ``k % n``, so the first ``n``
    workloads are all windows, and more choices leave them as they are. All windows run at one
    multiple of their own rates: a busy day stays busy.

    Attributes:
        capacity: of one instance at max clock, requests/s: the mean rate over all windows at the
            highest multiple that meets the SLO on all their requests together.
        windows: parts of the trace; none for generated workloads.
        days: whether windows are of several days, and results say which.
    """

    capacity: Capacity
    windows: tuple[TraceWindow, ...] = ()
    days: bool = False

    @property
    def traces(self) -> tuple[Trace, ...]:
        """The requests of each window."""
        return tuple(window.trace for window in self.windows)

    @property
    def n_windows(self) -> int:
        """Windows of time; generated workloads and a part of a trace count as one."""
        return max(len(self.windows), 1)

    def numbers(self, choices: int | None, all_choices: range) -> tuple[int, ...]:
        """Numbers of the workloads of the first ``choices`` (None: all) of some choices."""
        kept = all_choices[:choices]
        return tuple(range(kept.start * self.n_windows, kept.stop * self.n_windows))

    def rate_rps(self, load: float, k: int) -> float:
        """Request rate of workload ``k`` at a share of the capacity, requests/s."""
        window = self.windows[k % self.n_windows].trace
        mean_rps = mean_rate_rps(self.traces)
        return load * self.capacity.rate_rps * (window.rate_rps / mean_rps)

    def workload(self, load: float, k: int) -> Trace:
        """Workload ``k`` at a share of the capacity."""
        return self.windows[k % self.n_windows].trace.scaled_to(self.rate_rps(load, k), k)

    def copies(self, load: float, k: int) -> Copies:
        """What workload ``k`` is put together of, see :meth:`Trace.copies_at`."""
        return self.windows[k % self.n_windows].trace.copies_at(self.rate_rps(load, k), k)

    def labels(self, k: int) -> dict[str, str | float]:
        """Columns of results that say which window workload ``k`` is of; none without days."""
        window = self.windows[k % self.n_windows] if self.days else None
        return {} if window is None else {"day": window.label, "window_start_s": window.start_s}


def halves(trace: Trace, fraction: float) -> tuple[list[TraceWindow], list[TraceWindow]]:
    """The first part of a trace and the rest, as windows of no day."""
    first, rest = trace.split(fraction)
    cut_s = fraction * trace.duration_s
    return [TraceWindow(first, 0.0, 0, "")], [TraceWindow(rest, cut_s, 0, "")]


def early_and_late(
    windows: Sequence[TraceWindow], fraction: float, name: str
) -> tuple[list[TraceWindow], list[TraceWindow]]:
    """Windows of the first days and of the others: no day is on both sides.

    Args:
        windows: in the order of time.
        fraction: share of the days that are the first, at least one; the others are at least one.
        name: the trace, for messages.

    Raises:
        BiscaleError: all windows are of one day.
    """
    days = list(dict.fromkeys(window.day for window in windows))
    if len(days) < 2:
        raise BiscaleError(
            f"{name}: its windows are all of one day ({windows[0].label}), but tuning and judging "
            "need windows of two days at least"
        )
    n_first = min(max(math.floor(fraction * len(days)), 1), len(days) - 1)
    first = set(days[:n_first])
    early = [window for window in windows if window.day in first]
    return early, [window for window in windows if window.day not in first]


def cut_to(windows: Sequence[TraceWindow], seconds: float | None) -> list[TraceWindow]:
    """The first seconds of each window; None leaves them as they are."""
    return [
        TraceWindow(window.trace.window(0.0, seconds), window.start_s, window.day, window.label)
        if seconds is not None and seconds < window.trace.duration_s
        else window
        for window in windows
    ]
