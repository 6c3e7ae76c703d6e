"""How far long work is: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from typing import Final, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S: Final = 20.0  # a log of a run of minutes has tens of lines

_COLUMNS: Final = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


class JobProgress:
    """Tells on stderr how many of some jobs are finished, and about how long the rest takes."""

    def __init__(
        self, what: str, total: int | None = None, done: int = 0, transient: bool = False
    ) -> None:
        """Start with nothing told.

        Args:
            what: the jobs, in the plural.
            total: how many; None until the first :meth:`tell`, which says it and how many were
                finished before.
            done: of them finished before.
            transient: a bar goes away at the end.
        """
        self._bar = Progress(*_COLUMNS, console=Console(stderr=True), transient=transient)
        self._task = self._bar.add_task(what, total=total, completed=done)
        self._lines = not sys.stderr.isatty()  # and the bar is never started
        self._what, self._total, self._before = what, total, done
        self._cpu_s, self._begin_s = 0.0, time.monotonic()
        self._told_s = self._begin_s

    def __enter__(self) -> Self:
        if not self._lines:
            self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if not self._lines:
            self._bar.stop()

    def tell(
        self,
        done: int,
        total: int | None = None,
        name: str = "",
        cpu_s: float | None = None,
        note: str = "",
    ) -> None:
        """Say how many are finished; at most one line in ``LINE_EVERY_S`` where there is no bar.

        Args:
            done: number of finished jobs.
            total: how many there are, if that is new.
            name: of the one that has just finished.
            cpu_s: processor time that it took, s; without it the rest is told in time that passes.
            note: on those that are finished, such as how many have failed.
        """
        if self._total is None:
            self._before, self._begin_s = done, time.monotonic()
        self._total = self._total if total is None else total
        self._cpu_s += cpu_s or 0.0
        note = f", {note}" if note else ""
        self._bar.update(
            self._task,
            completed=done,
            total=self._total,
            description=(name or self._what) + note,
        )
        now_s = time.monotonic()
        if not self._lines or done <= self._before or now_s - self._told_s < LINE_EVERY_S:
            return
        self._told_s = now_s
        spent_s = now_s - self._begin_s if cpu_s is None else self._cpu_s
        left_s = spent_s * ((self._total or done) - done) / (done - self._before)
        last = f", last {name}" if name else ""
        kind = "" if cpu_s is None else " of processor time"
        print(
            f"biscale: {done} of {self._total or '?'} {self._what}{last}{note}; {spent_s / 60:.1f} "
            f"minutes{kind}, about {left_s / 60:.1f} to go",
            file=sys.stderr,
            flush=True,
        )
