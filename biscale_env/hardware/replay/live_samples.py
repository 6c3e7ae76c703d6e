"""Clock and power while a replay goes: twice a second, for whoever watches."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

PERIOD_S: Final = 0.5


class LiveSample(msgspec.Struct):
    """Means over the GPUs of a group (a phase or an instance); NaN is null."""

    time_s: float
    group: str
    freq_mhz: float = math.nan
    power_w: float = math.nan


class LiveSamples:
    """Writes at most one sample per group and :data:`PERIOD_S` as JSON lines.

    The telemetry itself is written when the replay ends. A file that cannot be written is given
    up: nobody's measurement depends on it.
    """

    def __init__(self, path: Path | None) -> None:
        """Write to a file; None: nowhere."""
        self._path, self._file = path, None if path is None else _opened(path)
        self._next_s: dict[str, float] = {}

    def take(self, samples: Iterable[tuple[Any, ...]]) -> None:
        """Look at samples of GPUs, rows of ``recorder.TELEMETRY_COLUMNS``; keep what is due."""
        if self._file is None:
            return
        by_group: dict[str, list[tuple[Any, ...]]] = {}
        for row in samples:
            if row[0] >= self._next_s.get(row[1], -math.inf):
                by_group.setdefault(row[1], []).append(row)
        for group, rows in by_group.items():
            time_s = max(row[0] for row in rows)
            self._next_s[group] = time_s + PERIOD_S
            means = (_mean([row[k] for row in rows]) for k in (3, 4))
            self._write(LiveSample(time_s, group, *means))

    def _write(self, sample: LiveSample) -> None:
        try:
            if self._file is not None:
                self._file.write(msgspec.json.encode(sample) + b"\n")
                self._file.flush()
        except OSError:
            self.close()

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:  # the disk is full: what is missing is told by the replay's own logs
                return


def _opened(path: Path) -> BinaryIO | None:
    try:
        return path.open("ab")
    except OSError:
        return None


def _mean(values: list[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
