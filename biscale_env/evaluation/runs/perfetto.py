"""A run as a timeline that Perfetto and ``chrome://tracing`` open.

Written in the Trace Event Format (JSON): a process per run; in it the iterations in lanes, counters
for clock, power, queue, batch and KV cache, and the requests as asynchronous slices. Times are
microseconds since the run's start.
"""

import json
import math
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import open_whole
from biscale_env.evaluation.runs.results import policy_label
from biscale_env.evaluation.runs.run_view import Run

Event = dict[str, Any]
Columns = Mapping[str, NDArray[np.float64]]

COUNTERS: Final = {
    "clock, MHz": {
        "requested": "freq_requested_mhz",
        "applied": "freq_applied_mhz",
        "effective": "freq_effective_mhz",
    },
    "power per GPU, W": {"power": "power_w"},
    "queue, requests": {"waiting": "queue_requests"},
    "batch, requests": {"running": "batch_requests"},
    "KV cache, share in use": {"in use": "kv_use"},
}
"""Counter tracks: their series and the column of the timeline behind each."""

STAGES: Final = (
    ("wait", "arrival_s", "start_s"),
    ("first token", "start_s", "first_token_s"),
    ("output", "first_token_s", "finish_s"),
)
"""Parts of a request, each from one column of its times to another; those without length are
left out."""


def lanes(start: NDArray[np.float64], end: NDArray[np.float64]) -> NDArray[np.intp]:
    """The lowest free lane of each interval, so that those in one lane do not overlap.

    Instances of a cluster overlap in one timeline; a single instance stays in lane 0.

    Args:
        start: beginnings, ascending.
        end: ends, none before its beginning.
    """
    free_at: list[float] = []
    chosen = np.zeros(len(start), dtype=np.intp)
    for i, (begin, finish) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        lane = next((k for k, free in enumerate(free_at) if free <= begin + 1e-9), len(free_at))
        if lane == len(free_at):
            free_at.append(finish)
        free_at[lane] = finish
        chosen[i] = lane
    return chosen


def trace_events(
    name: str, pid: int, timeline: Columns, requests: Columns | None, window_s: tuple[float, float]
) -> Iterator[Event]:
    """Events of one run.

    Args:
        name: of its process.
        pid: number of its process.
        timeline: its decisions, columns as in :class:`RunRecord`.
        requests: its requests, or None when they were not kept.
        window_s: iterations that begin, and requests that arrive, in this time are written, s.
    """
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
    inside = (timeline["time_s"] >= window_s[0]) & (timeline["time_s"] < window_s[1])
    rows = {key: values[inside] for key, values in timeline.items()}
    yield from _iterations(pid, rows)
    yield from _counters(pid, rows)
    if requests is not None:
        yield from _requests(pid, requests, window_s)


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _iterations(pid: int, rows: Columns) -> Iterator[Event]:
    start = rows["time_s"]
    lane = lanes(start, start + rows["duration_s"])
    for tid in range(int(lane.max(initial=0)) + 1):
        title = {"name": f"iterations {tid + 1}"}
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": title}
    told = ("batch_requests", "batch_tokens", "freq_effective_mhz", "power_w", "energy_j")
    columns = [rows[name].tolist() for name in told]
    spans = (start.tolist(), rows["duration_s"].tolist(), lane.tolist())
    for begin, length, tid, *values in zip(*spans, *columns, strict=True):
        args = {key: v for key, v in zip(told, values, strict=True) if math.isfinite(v)}
        where = {"pid": pid, "tid": tid, "ts": _us(begin), "dur": _us(length)}
        yield {"ph": "X", "name": "iteration", "cat": "iteration", **where, "args": args}


def _counters(pid: int, rows: Columns) -> Iterator[Event]:
    times = rows["time_s"].tolist()
    for track, series in COUNTERS.items():
        values = zip(*(rows[column].tolist() for column in series.values()), strict=True)
        last: dict[str, float] = {}
        for time, now in zip(times, values, strict=True):
            args = {key: v for key, v in zip(series, now, strict=True) if math.isfinite(v)}
            if args and args != last:  # a counter keeps its value until the next event
                yield {"ph": "C", "name": track, "pid": pid, "ts": _us(time), "args": args}
                last = args


def _requests(pid: int, requests: Columns, window_s: tuple[float, float]) -> Iterator[Event]:
    arrived = requests["arrival_s"]
    for i in np.flatnonzero((arrived >= window_s[0]) & (arrived < window_s[1])).tolist():
        tokens = {k: requests[k][i] for k in ("prompt_tokens", "output_tokens")}
        args = {key: v for key, v in tokens.items() if math.isfinite(v)}
        times = [requests[k][i] for k in ("start_s", "first_token_s", "finish_s")]
        ends = [t for t in times if math.isfinite(t)]
        if not ends:  # never begun: there is no end to draw
            continue
        slices = [("request", arrived[i], max(ends), args)]
        slices += [
            (name, requests[a][i], requests[b][i], {})
            for name, a, b in STAGES
            if math.isfinite(requests[b][i]) and requests[b][i] > requests[a][i]
        ]
        common = {"cat": "request", "pid": pid, "tid": 0, "id": f"{pid}.{i}"}
        for name, begin, _, told in slices[:1]:
            yield {"ph": "b", "name": name, "ts": _us(begin), "args": told, **common}
        for name, begin, end, _ in slices[1:]:
            yield {"ph": "b", "name": name, "ts": _us(begin), **common}
            yield {"ph": "e", "name": name, "ts": _us(end), **common}
        yield {"ph": "e", "name": "request", "ts": _us(slices[0][2]), **common}


def write_perfetto(
    run: Run,
    path: Path,
    run_ids: list[str],
    window_s: tuple[float, float] = (0.0, math.inf),
) -> int:
    """Write runs, a process each, as one file of trace events.

    Args:
        run: the opened run directory.
        path: the file.
        run_ids: which runs.
        window_s: what begins in this time is written, s.

    Returns:
        Number of events.

    Raises:
        BiscaleError: no timeline was kept of one of the runs, or nothing begins in the window.
    """
    parts = [_events_of(run, name, pid, window_s) for pid, name in enumerate(run_ids, start=1)]
    count = 0
    with open_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for event in chain.from_iterable(parts):
            file.write((",\n" if count else "") + json.dumps(event, allow_nan=False))
            count += 1
        file.write("\n]}\n")
    return count


def _events_of(run: Run, run_id: str, pid: int, window_s: tuple[float, float]) -> Iterator[Event]:
    row, timeline = run.row(run_id), run.timeline_of(run_id)
    if timeline is None:
        raise BiscaleError(f"no timeline of run '{run_id}' was kept in {run.path}")
    times = timeline["time_s"]
    if not ((times >= window_s[0]) & (times < window_s[1])).any():
        last = f"the last at {times[-1]:.6g} s" if times.size else "it has none"
        raise BiscaleError(
            f"no iteration of run '{run_id}' begins in {window_s[0]:g}-{window_s[1]:g} s: {last}"
        )
    name = f"{policy_label(row)} ({row['phase']}, {row['scenario']}, seed {row['workload_seed']})"
    return trace_events(name, pid, timeline, run.requests_of(run_id), window_s)
