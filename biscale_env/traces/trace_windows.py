"""Windows of a given length out of a long trace, each with its day; long files are streamed."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import Field, model_validator

from biscale_env.config.loader import Config
from biscale_env.core.errors import BiscaleError
from biscale_env.traces.prompts.block_numbers import finished
from biscale_env.traces.reading.arrivals_of_rows import RequestRows
from biscale_env.traces.reading.readers import join_rows, stream_rows
from biscale_env.traces.reading.reading_options import ReadingOptions, moment_s
from biscale_env.traces.reading.recognised import LOGGER, Recognised
from biscale_env.traces.trace import Trace

DAY_S: Final = 86400.0


class WindowSpacing(Config):
    """How a long trace is cut into windows of several days.

    Also read from text, ``LENGTH/EVERY`` with units as in ``30min/1d``.

    Attributes:
        length_s: length of a window, s.
        every_s: time from one start to the next, s, at least the length.
    """

    length_s: float = Field(gt=0)
    every_s: float = Field(gt=0)

    @classmethod
    def of_text(cls, text: str) -> "WindowSpacing":
        """A plan from ``LENGTH/EVERY``.

        Raises:
            BiscaleError: another form, a time that cannot be read, or windows that overlap.
        """
        length, found, every = text.partition("/")
        if not found or "/" in every:
            raise BiscaleError(
                "--windows takes LENGTH/EVERY, such as 30min/1d for half an hour of every day, "
                f"got '{text}'"
            )
        length_s, every_s = (moment_s(part, "--windows", None, "") for part in (length, every))
        _checked(length_s, every_s, 0.0)
        return cls(length_s=length_s, every_s=every_s)

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        return cls.of_text(value).model_dump() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _in_order(self) -> "WindowSpacing":
        _checked(self.length_s, self.every_s, 0.0)
        return self


@dataclass(frozen=True)
class TraceWindow:
    """A window of a trace.

    Attributes:
        trace: its requests, times counted from its start; it lasts exactly the window's length.
        start_s: its start, s after the start of the trace.
        day: number of the day that it starts in, from 0: calendar days (UTC) where the trace has
            dates, else days after its start.
        label: the day for tables: a date, or ``day 0``.
    """

    trace: Trace
    start_s: float
    day: int
    label: str

    def sentence(self, file: str) -> str:
        """One line on it, for whoever waits for a long file."""
        stop_s = self.start_s + self.trace.duration_s
        return (
            f"{file}: {self.label}, {self.start_s:.9g} to {stop_s:.9g} s of the trace: "
            f"{len(self.trace):,} requests"
        )


def windows_of(
    trace: Trace,
    length_s: float,
    every_s: float | None = None,
    first_s: float = 0.0,
    origin_unix_s: float | None = None,
) -> list[TraceWindow]:
    """Windows ``[first + k every, first + k every + length)`` that lie wholly in a trace.

    Args:
        trace: the trace.
        length_s: length of a window, s.
        every_s: time from one start to the next, s, at least the length; default the length, so
            that windows touch.
        first_s: start of the first window, s.
        origin_unix_s: Unix time of the trace's start, for the days; None where it is not known.

    Raises:
        BiscaleError: an impossible length or distance, or no whole window.
    """
    every_s = _checked(length_s, every_s, first_s)
    found = []
    # a rounding error must not cost the last window
    count = int(np.floor((trace.duration_s - first_s - length_s) / every_s + 1e-9)) + 1
    for k in range(max(count, 0)):
        start_s = first_s + k * every_s
        day, label = _day(start_s, origin_unix_s)
        stop_s = min(start_s + length_s, trace.duration_s)
        found.append(TraceWindow(trace.window(start_s, stop_s), start_s, day, label))
    if not found:
        raise BiscaleError(_none(trace.name, length_s, trace.duration_s))
    return found


def read_windows(
    path: str | Path,
    length_s: float,
    every_s: float | None = None,
    first_s: float = 0.0,
    options: ReadingOptions | None = None,
) -> Iterator[TraceWindow]:
    """Windows of a trace file as `windows_of`, holding one window (and a read buffer) in memory.

    The requests between windows are read, but not kept; days are those of the file's dates.

    Args:
        path: trace file, sorted by time.
        length_s: length of a window, s.
        every_s: time from one start to the next, s; default the length.
        first_s: start of the first window, s after the start of the trace.
        options: how to read the file.

    Raises:
        BiscaleError: as `windows_of`, and as `read_trace` when a faulty row is reached.
    """
    every_s = _checked(length_s, every_s, first_s)
    path, about = Path(path), Recognised(str(path))
    k, last_s = 0, 0.0
    held: list[RequestRows] = []
    with contextlib.closing(stream_rows(path, options, about)) as pieces:
        for piece in pieces:
            if not held and k == 0:
                LOGGER.info(about.kind())
            held.append(piece)
            last_s = float(piece.arrival_s[-1])
            # a window is done once a request behind it was seen
            while last_s >= first_s + k * every_s + length_s:
                window = _cut(held, first_s + k * every_s, length_s, about)
                LOGGER.info(window.sentence(about.file))
                yield window
                k += 1
            held = [piece for piece in held if piece.arrival_s[-1] >= first_s + k * every_s]
    if k == 0:
        raise BiscaleError(_none(str(path), length_s, last_s))


def _cut(
    held: list[RequestRows], start_s: float, length_s: float, about: Recognised
) -> TraceWindow:
    """One window out of consecutive pieces of a trace."""
    inside = [
        piece.part(slice(*np.searchsorted(piece.arrival_s, (start_s, start_s + length_s))))
        for piece in held
    ]
    times, prompts, outputs, blocks, classes = join_rows(inside)
    # days are the file's, times those after the start of the part that was asked for
    day, label = _day(held[0].part_s[0] + start_s, about.origin_unix_s)
    name = f"{Path(about.file).name.split('.')[0]}[{start_s:g}:{start_s + length_s:g}s]"
    relative_s = np.clip(times - start_s, 0.0, length_s)
    trace = Trace(
        name,
        relative_s,
        prompts,
        outputs,
        about.file,
        duration_s=length_s,
        blocks=finished(blocks),
        classes=classes,
    )
    return TraceWindow(trace, start_s, day, label)


def _checked(length_s: float, every_s: float | None, first_s: float) -> float:
    every_s = length_s if every_s is None else every_s
    if not 0 < length_s < np.inf or not length_s <= every_s < np.inf or first_s < 0:
        raise BiscaleError(
            f"windows need a positive length and start at least that far apart, got {length_s:g} s "
            f"every {every_s:g} s from {first_s:g} s on"
        )
    return every_s


def _day(start_s: float, origin_unix_s: float | None) -> tuple[int, str]:
    if origin_unix_s is None:
        day = int(start_s // DAY_S)
        return day, f"day {day}"
    when = origin_unix_s + start_s
    day = int(when // DAY_S - origin_unix_s // DAY_S)
    return day, f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d}"


def _none(name: str, length_s: float, duration_s: float) -> str:
    return f"{name} lasts {duration_s:g} s: not one whole window of {length_s:g} s lies in it"
