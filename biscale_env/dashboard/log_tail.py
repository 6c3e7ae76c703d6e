"""New lines of logs that another process writes, and the tables of a replay made of them."""

import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd

from biscale_env.config import load_slo
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.runs import run_files

KEPT_S: Final = 600.0
"""Seconds of a replay that are kept, so that hours of it cost no more memory."""
_TABLES: Final = {
    "telemetry": ("time_s", "group", "freq_mhz", "power_w"),
    "iterations": ("time_s", "group", "queue", "batch"),
    "requests": ("time_s", "ttft_ms", "tpot_ms"),
}


class LogTail:
    """Reads what was appended to a file since the last call, whole lines only."""

    def __init__(self, path: Path) -> None:
        """Nothing has been read yet; the file need not be there."""
        self.path, self._read_bytes = path, 0

    def new_lines(self) -> bytes:
        """The whole lines that are new; from the start where the file was begun anew."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._read_bytes:
                    self._read_bytes = 0
                file.seek(self._read_bytes)
                data = file.read()
        except OSError:
            return b""
        whole = data[: data.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        return whole


class ReplayLogs:
    """The last minutes of a replay, read from its raw logs as they grow.

    Attributes:
        raw: folder of the logs.
        bounds_ms: bounds of its SLO by metric, ms; empty where they are not known.
    """

    def __init__(self, raw: Path) -> None:
        """Follow a raw folder.

        Raises:
            BiscaleError: the packages of the extra ``hw`` are missing.
        """
        try:
            from biscale_env.hardware.replay import live_samples, raw_log, recorder, request_record
        except ImportError as error:
            raise BiscaleError(
                f"following a replay needs {error.name}: pip install 'biscale-env[hw]'"
            ) from None
        self.raw = raw
        self.bounds_ms = bounds_of(raw.parent)
        self._guard = threading.Lock()
        self._decode = raw_log.decoded_lines
        self._start_s = math.nan
        kinds: dict[str, tuple[str, Any, Callable[[Any], tuple[Any, ...]]]] = {
            "telemetry": (raw_log.LIVE, live_samples.LiveSample, _of_sample),
            "iterations": (raw_log.ITERATIONS, recorder.IterationRow, _of_iteration),
            "requests": (raw_log.REQUESTS, request_record.RequestRecord, _of_request),
        }
        self._sources = {k: (LogTail(raw / f), kind, row) for k, (f, kind, row) in kinds.items()}
        self._rows: dict[str, list[tuple[Any, ...]]] = {name: [] for name in kinds}
        self.finished, self.failed = 0, 0

    def tables(self) -> dict[str, pd.DataFrame]:
        """What is known by now; times in s since the first that was seen."""
        with self._guard:
            for name, (tail, kind, row_of) in self._sources.items():
                found = self._decode(tail.new_lines(), kind)
                if name == "requests":
                    self.finished += len(found)
                    self.failed += sum(bool(r.error) for r in found)
                rows = self._rows[name]
                rows += [row_of(record) for record in found]
                newest_s = max((row[0] for row in rows), default=math.nan)
                self._rows[name] = [row for row in rows if row[0] >= newest_s - KEPT_S]
            return {name: self._table(name) for name in _TABLES}

    def _table(self, name: str) -> pd.DataFrame:
        firsts = [rows[0][0] for rows in self._rows.values() if rows]
        if math.isnan(self._start_s) and firsts:
            self._start_s = min(firsts)
        frame = pd.DataFrame(self._rows[name], columns=list(_TABLES[name]))
        return frame.assign(time_s=frame["time_s"].astype(float) - self._start_s)


def _of_sample(sample: Any) -> tuple[Any, ...]:
    return sample.time_s, sample.group, sample.freq_mhz, sample.power_w


def _of_iteration(row: Any) -> tuple[Any, ...]:
    return row.time_s, row.phase, row.queued_requests, row.prefill_requests + row.decode_requests


def _of_request(request: Any) -> tuple[Any, ...]:
    """When it ended and its latencies as the client saw them, ms; NaN where there is none."""
    ends = (request.last_chunk_s, request.first_chunk_s, request.prefill_done_s)
    ended_s = next((t for t in ends if math.isfinite(t)), request.scheduled_s)
    done_s = request.prefill_done_s
    first_s = done_s if math.isfinite(done_s) else request.first_chunk_s
    tokens = request.output_tokens - 1
    tpot_s = (request.last_chunk_s - request.first_chunk_s) / tokens if tokens > 0 else math.nan
    return ended_s, 1e3 * (first_s - request.scheduled_s), 1e3 * tpot_s


def bounds_of(folder: Path) -> dict[str, float]:
    """Bounds of the SLO that a replay's configuration names, ms; empty where it names none."""
    try:
        config = run_files.flat(run_files.read_config(folder))
        names: Sequence[Any] = [v for k, v in config.items() if k.split(".")[-1] == "slo"]
        slo = load_slo(str(names[0]))
        return {"ttft": 1e3 * slo.ttft_s, "tpot": 1e3 * slo.tpot_s}
    except (BiscaleError, IndexError):
        return {}
