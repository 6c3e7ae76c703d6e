"""A burst, controllers side by side on the same axes."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from biscale_env.evaluation.report.drawing.figure_style import (
    LIMIT_LINE,
    axis,
    base_layout,
    limit_note,
)
from biscale_env.evaluation.report.drawing.figures_time import (
    TIMELINE_BINS,
    binned_runs,
    chosen_runs,
    common_runs,
    latency_marks,
    shown_at_first,
    state_lines,
    window_of,
)
from biscale_env.evaluation.report.drawing.palette import styles
from biscale_env.evaluation.runs.run_view import Run

Trace = dict[str, Any]
_ROWS: Final = 4
_GAP: Final = 0.04


def side_by_side(
    run: Run, rows: pd.DataFrame, summary: pd.DataFrame, labels: Sequence[str], width_s: float
) -> go.Figure:
    """A column per controller: clock, power, requests and latencies of the same requests.

    Args:
        run: the opened run directory.
        rows: its results at one operating point.
        summary: its summary there.
        labels: controllers by label; empty: max clock and the best that meets the SLO.
        width_s: length of the window, s.

    Raises:
        BiscaleError: a label without a timeline.
    """
    kept = common_runs(run, rows, summary)
    wanted = list(labels) or [name for name in shown_at_first(summary) if name in kept]
    runs = chosen_runs(kept, wanted)
    window = _within(window_of(kept), width_s)
    phase = str(rows["phase"].iloc[0])
    metric, look = "tpot" if phase == "decode" else "ttft", styles(rows["policy"].tolist())
    traces: list[Trace] = []
    for column, (name, table) in enumerate(binned_runs(runs, window, TIMELINE_BINS).items()):
        style = look[runs[name]["policy"]]
        found = state_lines(table, phase, style)
        found += latency_marks(run, runs[name], metric, style, window)
        traces += [_placed(trace, column) | {"name": name, "showlegend": False} for trace in found]
    bound_ms = 1e3 * float(summary[f"slo_{metric}_s"].iloc[0])
    return go.Figure(data=traces, layout=_layout(list(runs), traces, window, metric, bound_ms))


def _within(window: tuple[float, float], width_s: float) -> tuple[float, float]:
    middle, half = sum(window) / 2, min(width_s, window[1] - window[0]) / 2
    return middle - half, middle + half


def _number(column: int, row: int) -> str:
    """Suffix of an axis: 1 has none."""
    number = column * _ROWS + row + 1
    return "" if number == 1 else str(number)


def _placed(trace: Trace, column: int) -> Trace:
    row = int(trace["yaxis"].removeprefix("y") or 1) - 1
    suffix = _number(column, row)
    return trace | {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}


def _layout(
    labels: list[str],
    traces: list[Trace],
    window: tuple[float, float],
    metric: str,
    bound_ms: float,
) -> dict[str, Any]:
    titles = ("clock, MHz", "power, W per GPU", "requests", f"{metric.upper()}, ms")
    width = (1 - _GAP * (len(labels) - 1)) / len(labels)
    axes: dict[str, Any] = {}
    notes: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    for column, label in enumerate(labels):
        left = column * (width + _GAP)
        for row, title in enumerate(titles):
            suffix, last = _number(column, row), row == _ROWS - 1
            axes[f"xaxis{suffix}"] = axis(
                "time, s" if last else None,
                domain=[left, left + width],
                range=list(window),
                anchor=f"y{suffix}",
                showticklabels=last,
            )
            axes[f"yaxis{suffix}"] = axis(
                None if column else title,
                domain=[0.76 - 0.25 * row, 0.97 - 0.25 * row],
                range=_common_range(traces, row, bound_ms if last else 0.0),
                anchor=f"x{suffix}",
                showticklabels=not column,
                nticks=5,
            )
        place = {"xref": "paper", "yref": "paper", "x": left + width / 2, "y": 1.0}
        look = {"showarrow": False, "yanchor": "bottom", "xanchor": "center"}
        notes.append({"text": f"<b>{label}</b>"} | place | look)
        across = {"x0": window[0], "x1": window[1], "y0": bound_ms, "y1": bound_ms}
        ends = {"xref": f"x{suffix}", "yref": f"y{suffix}"}
        shapes.append({"type": "line", "line": LIMIT_LINE} | across | ends)
    where = {"x": window[1], "y": bound_ms, "xanchor": "right", "yanchor": "bottom"}
    notes.append(limit_note(f"SLO {bound_ms:.4g} ms", **where, **ends))
    return base_layout(
        margin={"l": 64, "r": 24, "t": 56, "b": 52},  # the tool bar is above the names
        height=700,
        width=max(420, 380 * len(labels)),
        shapes=shapes,
        annotations=notes,
        **axes,
    )


def _common_range(traces: list[Trace], row: int, at_least: float) -> list[float]:
    """The range of one row, the same in every column: the clock's need not begin at 0."""
    mine = [t["y"] for t in traces if (int(t["yaxis"][1:] or 1) - 1) % _ROWS == row]
    values = np.concatenate([np.asarray(v, dtype=np.float64) for v in mine] or [np.zeros(1)])
    values = values[np.isfinite(values)]
    high = max(float(values.max(initial=0.0)), at_least, 1.0)
    low = float(values.min(initial=high)) if row == 0 else 0.0
    return [low - 0.05 * (high - low) if row == 0 else 0.0, high + 0.08 * (high - low or high)]
