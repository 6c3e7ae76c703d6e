"""Distributions of TTFT and TPOT."""

from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.report.drawing import figdata
from biscale_env.evaluation.report.drawing.figure_style import (
    LEGEND_BELOW,
    LIMIT_AREA,
    LIMIT_LINE,
    axis,
    base_layout,
    fraction_axis,
    limit_note,
)
from biscale_env.evaluation.report.drawing.palette import Style, styles
from biscale_env.evaluation.runs.run_view import Run


def latency_cdf(run: Run, rows: pd.DataFrame, summary: pd.DataFrame, metric: str) -> go.Figure:
    """Distribution of TTFT or TPOT over all workloads, tail magnified.

    A policy meets the SLO left of the corner point.

    Raises:
        BiscaleError: no requests of this metric were kept.
    """
    bound_s, need = (
        float(summary[f"slo_{metric}_s"].iloc[0]),
        float(summary["slo_attainment"].iloc[0]),
    )
    look = styles(rows["policy"].tolist())
    traces, widest = [], 0.0
    for row in summary.to_dict("records"):
        mine = rows[rows["policy"].eq(row["policy"]) & rows["variant"].eq(row["variant"])]
        found = [run.latencies(run_id, metric) for run_id in mine["run_id"]]
        values = np.concatenate([f[0] for f in found if f is not None] or [np.array([])])
        if values.size:
            x, share = figdata.tail_cdf(values)
            widest = max(widest, float(np.quantile(values, 0.999)))
            traces.append(_cdf_trace(1e3 * x, share, row["label"], look[row["policy"]]))
    if not traces:
        raise BiscaleError(f"no {metric.upper()} of single requests was kept for this phase")
    right_ms = 1e3 * min(max(1.6 * bound_s, widest * 1.05), 3.0 * bound_s)
    legend_rows = -(-len(traces) // _LEGEND_COLUMNS)
    layout = base_layout(
        height=430 + 20 * (legend_rows - 1),
        showlegend=True,
        xaxis=axis(f"{metric.upper()}, ms", range=[0, right_ms]),
        yaxis=fraction_axis("requests within", 0.0, apart=0.05),
        legend=LEGEND_BELOW,
        **_bound(bound_s, need, right_ms),
    )
    return go.Figure(data=traces, layout=layout)


_LEGEND_COLUMNS: Final = 4


def _cdf_trace(
    x_ms: figdata.Floats, share: figdata.Floats, label: str, style: Style
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "x": np.asarray(x_ms, dtype=np.float32),
        "y": figdata.nines(share).astype(np.float32),
        "customdata": np.asarray(100 * share, dtype=np.float32),
        "mode": "lines+markers",
        "marker": {  # a few, to tell lines apart in grey print
            "color": style.color,
            "symbol": style.symbol,
            "size": 7,
            "maxdisplayed": 8,
        },
        "name": label,
        "line": {"color": style.color, "width": 2, "dash": style.dash},
        "hovertemplate": f"{label}: %{{customdata:.2f}} % within %{{x:.0f}} ms<extra></extra>",
    }


def _bound(bound_s: float, need: float, right_ms: float) -> dict[str, Any]:
    """The corner that a curve must pass on the left: shapes and annotations of a layout."""
    at, x, bottom = float(figdata.nines(need)), 1e3 * bound_s, float(figdata.nines(0.0))
    shapes = [
        LIMIT_AREA | {"x0": x, "x1": right_ms, "y0": bottom, "y1": at},
        {"type": "line", "x0": x, "x1": x, "y0": bottom, "y1": at, "line": LIMIT_LINE},
        {"type": "line", "x0": x, "x1": right_ms, "y0": at, "y1": at, "line": LIMIT_LINE},
    ]
    place = {"x": right_ms, "y": bottom, "xanchor": "right", "yanchor": "bottom", "align": "right"}
    text = f"SLO: {100 * need:.4g} %<br>within {x:.4g} ms"
    return {"shapes": shapes, "annotations": [limit_note(text, xshift=-4, yshift=2, **place)]}
