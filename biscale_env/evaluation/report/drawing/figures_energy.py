"""Energy against attainment."""

from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from biscale_env.evaluation.report.drawing import figdata
from biscale_env.evaluation.report.drawing.figure_style import (
    FRACTIONS,
    LEGEND_BELOW,
    LIMIT_AREA,
    LIMIT_LINE,
    axis,
    base_layout,
    fraction_axis,
    limit_note,
    without_variants,
)
from biscale_env.evaluation.report.drawing.palette import INK, Style, styles

MOST_LABELS: Final = 6
"""Names of more policies than that stand in a legend: beside their markers they would collide."""


def energy_attainment(summary: pd.DataFrame) -> go.Figure:
    """Energy against attainment: one marker per policy with 95 % intervals.

    Right of the line the SLO is met.

    Variants of a policy are joined by a line. Energy is relative to max clock where that was run,
    else J per token.
    """
    relative = bool(summary["energy_ratio"].notna().all())
    column = "energy_ratio" if relative else "energy_per_output_token_j"
    look = styles(summary["policy"].tolist())
    need = float(summary["slo_attainment"].iloc[0])
    low = min(float(summary["attainment_ci_low"].fillna(summary["attainment"]).min()), need)
    low = max([s for s in FRACTIONS if s < low], default=0.0)
    y_range = _padded(summary, column)
    x_axis = fraction_axis("requests that meet the SLO", low)
    y_axis = axis(
        "energy relative to max clock" if relative else "energy, J per output token", range=y_range
    )
    crowded = summary["policy"].nunique() > MOST_LABELS
    places = _label_places(without_variants(summary), column, x_axis["range"], y_range)
    if crowded:
        places = {label: (position, "") for label, (position, _) in places.items()}
    traces = [
        _energy_trace(group.sort_values("attainment"), column, look[str(policy)], places)
        for policy, group in summary.groupby("policy", sort=False)
    ]
    return go.Figure(
        data=traces,
        layout=base_layout(
            height=490 if crowded else 430,
            xaxis=x_axis,
            yaxis=y_axis,
            showlegend=crowded,
            legend=LEGEND_BELOW,
            **_requirement(need, x_axis["range"][0]),
        ),
    )


def _padded(summary: pd.DataFrame, column: str) -> list[float]:
    ends = [f"{column}_ci_low", f"{column}_ci_high"] if f"{column}_ci_low" in summary else []
    values = summary[[column, *ends]].to_numpy(dtype=np.float64)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    pad = 0.12 * max(high - low, 0.05 * abs(high), 1e-9)
    return [low - pad, high + pad]


def _requirement(need: float, left: float) -> dict[str, Any]:
    """Line and area of the required fraction: shapes and annotations of a layout."""
    at, whole = float(figdata.nines(need)), {"yref": "paper", "y0": 0, "y1": 1}
    shapes = [LIMIT_AREA | whole | {"x0": left, "x1": at}]
    shapes += [{"type": "line", "x0": at, "x1": at, "line": LIMIT_LINE} | whole]
    text = f"SLO: {100 * need:.4g} % of requests"
    place = {"x": at, "y": 1, "yref": "paper", "xanchor": "left", "yanchor": "bottom", "xshift": -4}
    return {"shapes": shapes, "annotations": [limit_note(text, **place)]}


PLOT_PX: Final = (480.0, 340.0)
"""Size of the plot for which labels are placed."""


def _label_places(
    summary: pd.DataFrame, column: str, x_range: list[float], y_range: list[float]
) -> dict[str, tuple[str, str]]:
    """Position and text of each label.

    Markers that lie on one another share the text of the first.
    """

    def across(name: str) -> figdata.Floats:
        return (figdata.nines(summary[name]) - x_range[0]) / (x_range[1] - x_range[0])

    x, low, high = across("attainment"), across("attainment_ci_low"), across("attainment_ci_high")
    y = (summary[column].to_numpy(dtype=np.float64) - y_range[0]) / (y_range[1] - y_range[0])
    bars = [
        (float(a), float(h), float(b), float(h))
        for a, b, h in zip(low, high, y, strict=True)
        if a < b
    ]
    labels = summary["label"].tolist()
    leader = figdata.heaps(x, y, *PLOT_PX)
    texts = [", ".join(labels[k] for k in np.flatnonzero(leader == i)) for i in range(len(labels))]
    places = figdata.label_positions(x, y, [len(s) for s in texts], *PLOT_PX, bars)
    return dict(zip(labels, zip(places, texts, strict=True), strict=True))


def _energy_trace(
    group: pd.DataFrame, column: str, style: Style, places: dict[str, tuple[str, str]]
) -> dict[str, Any]:
    """One policy: its markers; those of variants are smaller and speak only when pointed at."""
    x = figdata.nines(group["attainment"])
    y = group[column].to_numpy(dtype=np.float64)
    x_low, x_high = (figdata.nines(group[f"attainment_ci_{side}"]) for side in ("low", "high"))
    missing = np.full(len(group), np.nan)
    y_low, y_high = (
        np.asarray(group.get(f"{column}_ci_{side}", missing), float) for side in ("low", "high")
    )
    named = [label in places for label in group["label"]]
    x_low, x_high = np.where(named, x_low, np.nan), np.where(named, x_high, np.nan)
    y_low, y_high = np.where(named, y_low, np.nan), np.where(named, y_high, np.nan)
    notes = [places.get(label, ("top center", "")) for label in group["label"]]
    marker = {
        "color": style.color,
        "symbol": style.symbol,
        "size": np.where(named, 12, 6),
        "opacity": 1,
    }
    return {
        "type": "scatter",
        "x": x,
        "y": y,
        "mode": "markers+text+lines" if len(group) > 1 else "markers+text",
        "text": [text for _, text in notes],
        "hovertext": group["label"].tolist(),
        "textposition": [position for position, _ in notes],
        "textfont": {
            "color": INK if any(", " in text for _, text in notes) else style.color,
            "size": 13,
        },
        "cliponaxis": False,
        "line": {"color": style.color, "width": 1, "dash": style.dash},
        "marker": marker | {"line": {"color": "white", "width": 1}},
        "error_x": _error(x, x_low, x_high, style),
        "error_y": _error(y, y_low, y_high, style),
        "customdata": np.stack(
            [100 * group["attainment"], group["energy_per_output_token_j"]], axis=1
        ),
        "hovertemplate": "%{hovertext}<br>%{customdata[0]:.2f} % meet the SLO"
        "<br>%{customdata[1]:.4g} J per output token<br>%{y:.3f} on this axis<extra></extra>",
        "name": str(group["policy"].iloc[0]),
    }


def _error(
    at: figdata.Floats, low: figdata.Floats, high: figdata.Floats, style: Style
) -> dict[str, Any]:
    clean = [np.nan_to_num(np.maximum(side, 0.0)) for side in (high - at, at - low)]
    return {
        "array": clean[0],
        "arrayminus": clean[1],
        "color": style.color,
        "thickness": 1.2,
        "width": 3,
    }
