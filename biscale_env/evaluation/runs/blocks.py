"""Totals of a run per window of time: what intervals need, small enough to keep for every run.

Windows are those of the original trace. A workload at a higher rate than its trace is several
copies of it, shifted against each other: one minute of the run is then made of several minutes of
the trace, and its totals are given back to them in proportion. ``copies`` says how many there are
in effect, since all of them are busy or calm together when another stretch of time is taken.
"""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.evaluation.runs.record import RunRecord
from biscale_env.evaluation.stats.class_metrics import judged_counts
from biscale_env.evaluation.stats.judging import judge
from biscale_env.evaluation.stats.metrics import finished
from biscale_env.evaluation.stats.windows import WINDOW_S, window_of, window_starts

TOTALS: Final = ("energy_j", "n_counted", "n_met", "output_tokens")
WINDOW_COLUMNS: Final = ("window", "begin_s", *TOTALS, "copies")


def windows_of(record: RunRecord, window_s: float = WINDOW_S) -> NDArray[np.float64]:
    """Where the windows of a run begin, s; the same for every policy on its workload.

    Where the workload's own length is not known, windows are exactly ``window_s`` long and end with
    the arrivals, so that subsamples of one trace are cut alike.
    """
    if math.isfinite(record.workload_s):
        return window_starts(record.workload_s, window_s)
    arrival_s = np.asarray(record.requests["arrival_s"], dtype=np.float64)
    last_s = float(arrival_s.max()) if arrival_s.size else 0.0
    return window_starts(max(1, math.floor(last_s / window_s)) * window_s, window_s)


def window_totals(record: RunRecord, window_s: float = WINDOW_S) -> dict[str, NDArray[np.float64]]:
    """Energy spent, requests judged and met, tokens made, per window of time.

    A request and its tokens belong to the window it arrives in, energy to the one it is spent in;
    all of it is then given back to the windows of the original trace. Energy after the workload's
    end (its end is no chance of the last window), and what the timeline does not hold (GPUs outside
    the placement), is spread evenly, and tokens of unfinished requests in proportion to the others,
    so that windows add up to the run's totals.

    Args:
        record: the run.
        window_s: least length of a window, s.

    Returns:
        Arrays of one length, by the names of ``WINDOW_COLUMNS``.
    """
    begin_s = windows_of(record, window_s)
    n_windows = begin_s.size
    verdict = judge(record.requests, record.slo, record.phase, record.duration_s)
    window = window_of(record.requests["arrival_s"], begin_s)
    judged = judged_counts(record.requests, verdict, record.slo)

    def total(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(window, values, minlength=n_windows).astype(np.float64)

    end_s = record.workload_s if math.isfinite(record.workload_s) else record.duration_s
    in_timeline = _energy_per_window(record, np.append(begin_s[1:], end_s))
    rest_j = float(record.totals["energy_j"]) - float(in_timeline.sum())
    tokens = np.asarray(record.requests["output_tokens"], dtype=np.float64)
    made = total(np.where(finished(record), tokens, 0.0))
    produced = float(record.totals.get("output_tokens", 0.0))
    if record.phase != "prefill" and produced > 0 and made.sum() > 0:
        made *= produced / made.sum()
    in_run = {
        "energy_j": in_timeline + rest_j / n_windows,
        "n_counted": total(judged.counted),
        "n_met": total(judged.met),
        "output_tokens": made,
    }
    origin = origin_of(record.copies, record.workload_s, n_windows)
    return {
        "window": np.arange(n_windows, dtype=np.float64),
        "begin_s": begin_s,
        **{name: in_run[name] @ origin for name in TOTALS},
        "copies": np.full(n_windows, effective_copies(record.copies)),
    }


Copies = tuple[tuple[float, float], ...]
"""Shift (s) and share of each copy of a trace, see :class:`RunRecord`."""


def effective_copies(copies: Copies) -> float:
    """How many equal copies have as even a load: 1 over the sum of squared shares."""
    return 1.0 / sum(share**2 for _, share in copies)


def origin_of(copies: Copies, workload_s: float, n_windows: int) -> NDArray[np.float64]:
    """Which part of each window of a run stems from which of the original trace; rows add to 1.

    Totals per window of the run times it are totals per window of the trace. A copy is shifted
    forward, circularly, by any time: its requests in a window of the run come from two neighbours.

    Args:
        copies: what the workload is put together of.
        workload_s: observed time of the workload, s.
        n_windows: number of windows.

    Returns:
        Shape (n_windows, n_windows).
    """
    origin, at = np.zeros((n_windows, n_windows)), np.arange(n_windows)
    for offset_s, share in copies:
        whole, part = divmod(offset_s / workload_s * n_windows if offset_s else 0.0, 1.0)
        origin[at, (at - int(whole)) % n_windows] += share * (1 - part)
        origin[at, (at - int(whole) - 1) % n_windows] += share * part
    return origin


def _energy_per_window(record: RunRecord, ends_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Energy of the timeline per window, given where they end.

    An entry that crosses a boundary is divided in proportion to time.
    """
    begin = np.asarray(record.timeline["time_s"], dtype=np.float64)
    length = np.asarray(record.timeline["duration_s"]) + np.asarray(
        record.timeline["idle_s"], dtype=np.float64
    )
    energy = np.asarray(record.timeline["energy_j"], dtype=np.float64)
    before = [
        float(np.sum(energy * np.clip((t - begin) / np.maximum(length, 1e-12), 0.0, 1.0)))
        for t in ends_s
    ]
    return np.diff(before, prepend=0.0)
