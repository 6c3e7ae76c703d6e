"""What all figures of the report share: layout, axes, the look of the SLO, rows of a point."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from biscale_env.evaluation.report.drawing import figdata
from biscale_env.evaluation.report.drawing.palette import GRID, INK, LIMIT, MUTED
from biscale_env.evaluation.runs.record import SCENARIO_COLUMNS

FONT: Final = (
    'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif'
)
FRACTIONS: Final = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
_TICKS: Final = (0.99, 1.0, 0.9, 0.999, 0.5, 0.95, 0.98, 0.995, 0.8, 0.0)
"""The more important first: later ones give way where there is no room."""


LIMIT_LINE: Final = {"color": LIMIT, "width": 1.5, "dash": "dash"}
LIMIT_AREA: Final = {
    "type": "rect",
    "fillcolor": LIMIT,
    "opacity": 0.07,
    "line": {"width": 0},
    "layer": "below",
}


def limit_note(text: str, **place: Any) -> dict[str, Any]:
    """A short text in the colour of the SLO."""
    return {"text": text, "showarrow": False, "font": {"color": LIMIT, "size": 12}} | place


def draw_bound(figure: go.Figure, bound_ms: float, row: int, column: int) -> None:
    """Draw a bound of the SLO, ms, across one panel of ``make_subplots``, named at its right."""
    figure.add_hline(y=bound_ms, line=LIMIT_LINE, row=row, col=column)
    note = limit_note(f"SLO {bound_ms:.4g} ms", x=1, y=bound_ms, xref="x domain")
    figure.add_annotation(note | {"xanchor": "right", "yanchor": "bottom"}, row=row, col=column)


def at_point(frame: pd.DataFrame, point: Mapping[str, Any]) -> pd.DataFrame:
    """Rows of one operating point."""
    chosen = np.ones(len(frame), dtype=np.bool_)
    for name in SCENARIO_COLUMNS:
        value = point[name]
        chosen &= frame[name].isna() if pd.isna(value) else frame[name].eq(value)
    return frame[chosen]


def without_variants(summary: pd.DataFrame) -> pd.DataFrame:
    """A summary without variants of policies that are there in their default setting too."""
    default = set(summary.loc[summary["variant"].eq(""), "policy"])
    return summary[summary["variant"].eq("") | ~summary["policy"].isin(default)]


def base_layout(**changes: Any) -> dict[str, Any]:
    """Layout that all figures share: quiet grid, transparent ground, no decoration."""
    layout: dict[str, Any] = {
        "template": "none",
        "font": {"family": FONT, "size": 13, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 64, "r": 24, "t": 24, "b": 52},
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": MUTED, "activecolor": INK},
        "showlegend": False,
    }
    return layout | changes


LEGEND_BELOW: Final = {
    "orientation": "h",
    "x": 0,
    "y": -0.2,
    "yanchor": "top",
    "font": {"size": 12},
    "itemwidth": 30,
}
"""Legend of many names under a figure."""


def axis(title: str | None = None, **changes: Any) -> dict[str, Any]:
    """One axis in the common style."""
    settings: dict[str, Any] = {
        "gridcolor": GRID,
        "linecolor": GRID,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": GRID,
        "automargin": True,
        "title": {"text": title, "font": {"size": 13, "color": MUTED}},
    }
    return settings | changes


def fraction_axis(
    title: str, low: float, high: float = 1.0, apart: float = 0.11, **changes: Any
) -> dict[str, Any]:
    """An axis of fractions on the scale of nines, from ``low`` to ``high``.

    Ticks are at least ``apart`` of its length from each other.
    """
    span = (float(figdata.nines(low)), float(figdata.nines(high)))
    ticks: list[float] = []
    for candidate in [s for s in _TICKS if low <= s <= high]:
        near = [abs(float(figdata.nines(candidate) - figdata.nines(s))) for s in ticks]
        if not near or min(near) > apart * (span[1] - span[0]):
            ticks.append(candidate)
    ticks.sort()
    return axis(
        title,
        tickvals=figdata.nines(ticks).tolist(),
        ticktext=[f"{100 * s:.4g} %" for s in ticks],
        range=[span[0], span[1] + 0.04 * (span[1] - span[0])],
        **changes,
    )
