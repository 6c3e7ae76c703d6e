"""A replay while it goes: the last seconds of what its logs hold so far."""

from collections.abc import Mapping
from typing import Any, Final

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from biscale_env.evaluation.report.drawing.figure_style import axis, base_layout, draw_bound
from biscale_env.evaluation.report.drawing.palette import DASHES, INK

_COLORS: Final = ("#0072b2", "#d55e00", "#00875f", "#c0629a", "#d69200", "#2fa3dc", "#7448b0")
ROWS: Final = (
    ("clock, MHz", "telemetry", "freq_mhz"),
    ("power, W/GPU", "telemetry", "power_w"),
    ("queue, requests", "iterations", "queue"),
    ("batch, requests", "iterations", "batch"),
    ("TTFT, ms", "requests", "ttft_ms"),
    ("TPOT, ms", "requests", "tpot_ms"),
)
"""Rows from top to bottom: title, which table, which of its columns."""


def live_replay(
    tables: Mapping[str, pd.DataFrame],
    bounds_ms: Mapping[str, float] | None = None,
    width_s: float = 60.0,
) -> go.Figure:
    """The last seconds of a replay: clock, power, queue and batch per instance, TTFT and TPOT.

    Args:
        tables: ``telemetry`` (``time_s, group, freq_mhz, power_w``: means over the GPUs of a
            group), ``iterations`` (``time_s, group, queue, batch``) and ``requests`` (``time_s``:
            when it ended, ``ttft_ms``, ``tpot_ms``); times in s, on one clock. Missing ones are
            empty.
        bounds_ms: bounds of the SLO by ``ttft`` and ``tpot``, ms.
        width_s: how much is shown, s.
    """
    ends = [float(t["time_s"].max()) for t in tables.values() if len(t)]
    end_s = max(ends, default=width_s)
    begin_s = max(end_s - width_s, 0.0)
    figure = make_subplots(rows=len(ROWS), cols=1, shared_xaxes=True, vertical_spacing=0.025)
    for place, (title, name, column) in enumerate(ROWS, start=1):
        table = tables.get(name)
        if table is not None and len(table):
            recent = table[(table["time_s"] >= begin_s) & table[column].notna()]
            for trace in _traces(recent, column, place):
                figure.add_trace(trace, row=place, col=1)
        figure.update_yaxes(axis(title, nticks=5, rangemode="tozero"), row=place)
        bound_ms = (bounds_ms or {}).get(column.removesuffix("_ms"))
        if bound_ms is not None:
            draw_bound(figure, bound_ms, place, 1)
    figure.update_xaxes(axis(range=[begin_s, max(end_s, begin_s + 1.0)]))
    figure.update_xaxes(axis("time since the start, s"), row=len(ROWS))
    legend = {"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom", "font": {"color": INK}}
    layout = base_layout(height=780, showlegend=True, legend=legend)
    figure.update_layout(layout)
    return figure


def _traces(table: pd.DataFrame, column: str, place: int) -> list[dict[str, Any]]:
    """A line per group, in the order of their names; requests are markers."""
    if "group" not in table:
        marker = {"color": INK, "size": 5, "opacity": 0.7}
        return [_trace(table, column) | {"mode": "markers", "marker": marker, "showlegend": False}]
    found = []
    for order, (name, rows) in enumerate(table.groupby("group", sort=True)):
        line = {
            "color": _COLORS[order % len(_COLORS)],
            "dash": DASHES[order % len(DASHES)],
            "width": 1.5,
            "shape": "hv",
        }
        common = {"name": str(name), "legendgroup": str(name), "showlegend": place == 1}
        found.append(_trace(rows, column) | {"mode": "lines", "line": line} | common)
    return found


def _trace(rows: pd.DataFrame, column: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "x": rows["time_s"].to_numpy(),
        "y": rows[column].to_numpy(),
        "hovertemplate": "%{y:.4g} at %{x:.1f} s<extra>%{fullData.name}</extra>",
    }
