"""Learning curves over training seeds."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from agents.training.progress.curves import learning_curves as read_curves
from agents.training.progress.curves import spread
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.report.drawing.figure_style import axis, base_layout
from biscale_env.evaluation.report.drawing.palette import INK

_COLOR = "#0072b2"
TITLES = {
    "score": "held-out score (lower is better)",
    "energy_ratio": "held-out energy relative to max clock",
    "lowest_attainment": "lowest held-out attainment, fraction of requests",
}


def learning_curves(
    curves: pd.DataFrame | str | os.PathLike[str], column: str = "score"
) -> go.Figure:
    """A held-out figure by env step: median, quartiles and range over training seeds.

    Args:
        curves: the folder of ``biscale train``, with or without ``--seeds``, or a frame with the
            columns of ``agents.training.progress.curves``.
        column: ``score``, ``energy_ratio`` or ``lowest_attainment``.

    Raises:
        BiscaleError: another column, or no run in the folder.
    """
    if column not in TITLES:
        raise BiscaleError(f"learning curves: '{column}' is none of {', '.join(TITLES)}")
    frame = curves if isinstance(curves, pd.DataFrame) else read_curves(Path(curves))
    found = spread(frame, column)
    x = found.index.to_numpy(dtype=np.float64) / 1e6
    seeds = int(found["seeds"].max())
    bands = [
        _band(x, found["low"], found["high"], 0.15, "range over seeds"),
        _band(x, found["q25"], found["q75"], 0.35, "quartiles"),
    ]
    traces = [
        *(bands if seeds > 1 else ()),
        {
            "type": "scatter",
            "x": x,
            "y": found["median"].to_numpy(),
            "mode": "lines+markers",
            "name": f"median of {seeds} seeds" if seeds > 1 else "one seed",
            "line": {"color": _COLOR, "width": 2},
            "marker": {"color": _COLOR, "size": 5},
            "hovertemplate": "%{y:.4g} at %{x:.3g} million steps<extra></extra>",
        },
    ]
    layout = base_layout(
        height=380,
        showlegend=True,
        xaxis=axis("environment steps, millions"),
        yaxis=axis(TITLES[column]),
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": INK}},
    )
    return go.Figure(data=traces, layout=layout)


def _band(
    x: np.ndarray, low: "pd.Series[float]", high: "pd.Series[float]", opacity: float, name: str
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "x": np.concatenate([x, x[::-1]]),
        "y": np.concatenate([high.to_numpy(), low.to_numpy()[::-1]]),
        "fill": "toself",
        "fillcolor": f"rgba(0, 114, 178, {opacity})",
        "line": {"width": 0},
        "mode": "lines",
        "name": name,
        "hoverinfo": "skip",
    }
