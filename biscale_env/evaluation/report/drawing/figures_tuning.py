"""The energy-attainment curve of each controller.

What its free parameters can buy, on the workloads that they are tuned on.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.report.drawing import figdata
from biscale_env.evaluation.report.drawing.figure_style import (
    LEGEND_BELOW,
    LIMIT_LINE,
    axis,
    base_layout,
    fraction_axis,
    limit_note,
)
from biscale_env.evaluation.report.drawing.palette import Style, styles
from biscale_env.evaluation.runs.run_view import Run

POINT = ("phase", "scenario", "slo", "load")  # columns of tuning.csv that name an operating point
LOWEST = 0.95  # settings that miss more are left out: the axis would show nothing else
HIGHEST_RATIO = 1.02


def at_point(tuning: pd.DataFrame, point: Mapping[str, Any]) -> pd.DataFrame:
    """Rows of one operating point, in its first ensemble member, with ``energy_ratio``.

    Energy relative to max clock on the same workloads.
    """
    if tuning.empty or "reference_j" not in tuning:
        return pd.DataFrame()
    mine = np.all([tuning[name].eq(point[name]) for name in POINT], axis=0)
    rows = tuning[mine & tuning["reference_j"].notna().to_numpy()]
    rows = rows[rows["ensemble_member"].eq(rows["ensemble_member"].min())]
    return rows.assign(energy_ratio=rows["energy_j"] / rows["reference_j"])


def frontier(rows: pd.DataFrame) -> pd.DataFrame:
    """Settings that no other of the same controller beats in both energy and attainment.

    By rising attainment.
    """
    ranked = rows.sort_values(["energy_ratio", "attainment"], ascending=[True, False])
    best = ranked["attainment"].cummax()
    return ranked[(ranked["attainment"] == best) & ~ranked["attainment"].duplicated()]


def tuning_curves(run: Run, point: Mapping[str, Any]) -> go.Figure:
    """Curves of all tuned controllers at one operating point.

    The large marker is the setting that was chosen.

    Raises:
        BiscaleError: nothing was tuned here.
    """
    rows = at_point(run.tuning, point)
    if rows.empty:
        raise BiscaleError("no controller was tuned at this operating point")
    target, look = float(rows["target"].iloc[0]), styles(run.results["policy"].tolist())
    low = min(max(float(rows["attainment"].min()), LOWEST), target)
    x_axis = fraction_axis(
        "requests that meet the SLO, tuning workloads", 0.99 if low > 0.99 else LOWEST
    )
    traces = [
        trace
        for name, group in rows.groupby("policy", sort=False)
        for trace in _curve(group, str(name), look[str(name)])
    ]
    shown = rows[rows["attainment"].ge(LOWEST) & rows["energy_ratio"].le(HIGHEST_RATIO)]
    bottom = float(shown["energy_ratio"].min()) if len(shown) else 0.5
    layout = base_layout(
        height=470,
        showlegend=True,
        xaxis=x_axis,
        yaxis=axis("energy relative to max clock", range=[bottom - 0.02, HIGHEST_RATIO]),
        legend=LEGEND_BELOW,
        **_target_line(target, x_axis["range"]),
    )
    return go.Figure(data=traces, layout=layout)


def _target_line(target: float, x_range: list[float]) -> dict[str, Any]:
    """Line and text of the attainment aimed at: shapes and annotations of a layout."""
    at = float(figdata.nines(target))
    side, shift = ("left", 4) if at < 0.5 * sum(x_range) else ("right", -4)
    whole = {"yref": "paper", "y0": 0, "y1": 1}
    place = {"yref": "paper", "y": 1, "yanchor": "top", "xanchor": side, "xshift": shift}
    text = f"target of tuning: {100 * target:.2f} %"
    return {
        "shapes": [{"type": "line", "x0": at, "x1": at, "line": LIMIT_LINE} | whole],
        "annotations": [limit_note(text, x=at, **place)],
    }


def _curve(group: pd.DataFrame, name: str, style: Style) -> list[dict[str, Any]]:
    """The frontier of one controller as a line, and its chosen setting as a marker."""
    common = {
        "type": "scatter",
        "name": name,
        "legendgroup": name,
        "hovertemplate": f"{name}<br>%{{text}}<br>%{{customdata:.2f}} % meet the SLO"
        "<br>%{y:.3f} of max clock<extra></extra>",
    }
    best, chosen = frontier(group), group[group["chosen"].astype(bool)]
    line = {
        "mode": "lines+markers",
        "line": {"color": style.color, "width": 1.5, "dash": style.dash},
        "marker": {"color": style.color, "symbol": style.symbol, "size": 5},
    }
    mark = {
        "mode": "markers",
        "showlegend": False,
        "marker": {
            "color": style.color,
            "symbol": style.symbol,
            "size": 12,
            "line": {"color": "white", "width": 1},
        },
    }
    return [common | look | _places(rows) for rows, look in ((best, line), (chosen, mark))]


def _places(rows: pd.DataFrame) -> dict[str, Any]:
    return {
        "x": figdata.nines(rows["attainment"]).astype(np.float32),
        "y": rows["energy_ratio"].to_numpy(dtype=np.float32),
        "customdata": (100 * rows["attainment"]).to_numpy(dtype=np.float32),
        "text": rows["setting"].tolist(),
    }
