"""Decomposition of savings as bars."""

from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.report.drawing.figure_style import axis, base_layout
from biscale_env.evaluation.report.drawing.palette import INK
from biscale_env.evaluation.runs.record import PAIR_COLUMNS, REFERENCE_POLICY
from biscale_env.evaluation.runs.results import policy_label
from biscale_env.evaluation.stats.decomposition import PARTS, decompose

_LOOK: Final = {  # colours after Okabe and Ito, patterns for grey print
    "clock": ("#0072b2", "", "fewer joules per iteration (clock)"),
    "batches": ("#d69200", "/", "fewer, larger iterations (batches)"),
    "idle": ("#2fa3dc", ".", "idle power"),
}


def savings_bars(results: pd.DataFrame) -> go.Figure:
    """Stacked bars of the parts, and a marker at their sum, least energy on top.

    Args:
        results: rows of one operating point.

    Raises:
        BiscaleError: nothing can be decomposed.
    """
    parts = decompose(results)
    if len(parts):
        parts = parts[~(parts["policy"].eq(REFERENCE_POLICY) & parts["variant"].eq(""))]
    if parts.empty:
        raise BiscaleError(
            "no savings to decompose: the runs lack busy_at_max_clock_j, or max clock is missing"
        )
    parts = parts.sort_values("total", ascending=False, kind="stable")
    labels = [policy_label(row) for row in parts.to_dict("records")]
    low, high = _range_over_workloads(results, labels)
    traces = [_bar(parts, labels, name) for name in PARTS]
    total: dict[str, Any] = {
        "type": "scatter",
        "x": 100 * parts["total"].to_numpy(),
        "y": labels,
        "mode": "markers",
        "name": "sum, range over workloads",
        "error_x": {
            "array": np.maximum(100 * (high - parts["total"].to_numpy()), 0.0),
            "arrayminus": np.maximum(100 * (parts["total"].to_numpy() - low), 0.0),
            "color": INK,
            "thickness": 1.2,
        },
        "marker": {"color": INK, "symbol": "diamond", "size": 9, "line": {"color": "white"}},
        "hovertemplate": "%{y}: %{x:+.1f} % in all<extra></extra>",
    }
    layout = base_layout(
        height=150 + 30 * len(labels),
        barmode="relative",
        showlegend=True,
        xaxis=axis("change of energy against max clock, %", zeroline=True, zerolinecolor=INK),
        yaxis=axis(showgrid=False, ticks=""),
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    return go.Figure(data=[*traces, total], layout=layout)


def _range_over_workloads(
    results: pd.DataFrame, labels: list[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least and greatest total of each controller over single workloads and members."""
    groups = results.groupby(list(PAIR_COLUMNS), dropna=False, sort=False)
    single = pd.concat([decompose(group) for _, group in groups])
    names = [policy_label(row) for row in single.to_dict("records")]
    totals = single["total"].groupby(names).agg(["min", "max"]).loc[labels]
    return totals["min"].to_numpy(dtype=np.float64), totals["max"].to_numpy(dtype=np.float64)


def _bar(parts: pd.DataFrame, labels: list[str], name: str) -> dict[str, Any]:
    color, shape, title = _LOOK[name]
    return {
        "type": "bar",
        "orientation": "h",
        "x": 100 * parts[name].to_numpy(),
        "y": labels,
        "name": title,
        "marker": {
            "color": color,  # below the pattern; without "overlay" it would be see-through
            "pattern": {"shape": shape, "fgcolor": "white", "size": 6, "fillmode": "overlay"},
        },
        "hovertemplate": f"%{{y}}: %{{x:+.1f}} %, {title}<extra></extra>",
    }
