"""The report's figures in Plotly: energy against attainment, and distributions of TTFT and TPOT."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.report import figdata
from biscale_env.evaluation.report.palette import GRID, INK, LIMIT, MUTED, Style, styles
from biscale_env.evaluation.report.tables import ordered
from biscale_env.evaluation.runs.record import SCENARIO_COLUMNS
from biscale_env.evaluation.runs.run_view import Run

FONT: Final = (
    'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif'
)
NAMES: Final = ("energy", "tuning", "ttft", "tpot", "clocks", "timeline")
_SHARES: Final = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
_TICKS: Final = (0.99, 1.0, 0.9, 0.999, 0.5, 0.95, 0.98, 0.995, 0.8, 0.0)
"""The more important first: later ones give way where there is no room."""


def figure(run: Run, name: str, point: Mapping[str, Any]) -> go.Figure:
    """Figure ``name`` (one of ``NAMES``) of one operating point.

    Raises:
        BiscaleError: an unknown name, or a figure that the phase or the kept data do not allow.
    """
    from biscale_env.evaluation.report import figures_time, figures_tuning

    if name not in NAMES:
        raise BiscaleError(f"unknown figure '{name}'; known: {', '.join(NAMES)}")
    summary = ordered(at_point(run.summary(), point))
    if name == "energy":
        return energy_attainment(summary)
    if name == "tuning":
        return figures_tuning.tuning_curves(run, point)
    summary = without_variants(summary)
    rows = at_point(run.results, point)
    if name in ("ttft", "tpot"):
        return latency_cdf(run, rows, summary, name)
    builder = figures_time.clock_strips if name == "clocks" else figures_time.timeline
    return builder(run, rows, summary)


def at_point(frame: pd.DataFrame, point: Mapping[str, Any]) -> pd.DataFrame:
    """Rows of one operating point."""
    chosen = np.ones(len(frame), dtype=np.bool_)
    for name in SCENARIO_COLUMNS:
        value = point[name]
        chosen &= frame[name].isna() if pd.isna(value) else frame[name].eq(value)
    return frame[chosen]


def without_variants(summary: pd.DataFrame) -> pd.DataFrame:
    """A summary without the variants of policies that are there in their default setting as well."""
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


def share_axis(
    title: str, low: float, high: float = 1.0, apart: float = 0.11, **changes: Any
) -> dict[str, Any]:
    """An axis of shares on the scale of nines, from ``low`` to ``high``, with ticks at least
    ``apart`` of its length.
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
    low = max([s for s in _SHARES if s < low], default=0.0)
    y_range = _padded(summary, column)
    x_axis = share_axis("requests that meet the SLO", low)
    y_axis = axis(
        "energy relative to max clock" if relative else "energy, J per output token", range=y_range
    )
    places = _label_places(without_variants(summary), column, x_axis["range"], y_range)
    traces = [
        _energy_trace(group.sort_values("attainment"), column, look[str(policy)], places)
        for policy, group in summary.groupby("policy", sort=False)
    ]
    return go.Figure(
        data=traces,
        layout=base_layout(
            height=430, xaxis=x_axis, yaxis=y_axis, **_requirement(need, x_axis["range"][0])
        ),
    )


def _padded(summary: pd.DataFrame, column: str) -> list[float]:
    ends = [f"{column}_ci_low", f"{column}_ci_high"] if f"{column}_ci_low" in summary else []
    values = summary[[column, *ends]].to_numpy(dtype=np.float64)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    pad = 0.12 * max(high - low, 0.05 * abs(high), 1e-9)
    return [low - pad, high + pad]


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


def _requirement(need: float, left: float) -> dict[str, Any]:
    """Line and area of the required share: shapes and annotations of a layout."""
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
        "hovertemplate": "%{hovertext}<br>%{customdata[0]:.2f} % meet the SLO<br>%{customdata[1]:.4g} J per output token"
        "<br>%{y:.3f} on this axis<extra></extra>",
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
        yaxis=share_axis("requests within", 0.0, apart=0.05),
        legend={
            "orientation": "h",
            "x": 0,
            "y": -0.2,
            "yanchor": "top",
            "font": {"size": 12},
            "itemwidth": 30,
        },
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
        "mode": "lines",
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
