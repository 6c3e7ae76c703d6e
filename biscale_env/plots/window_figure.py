"""Any window of a run, controllers side by side, and the whole run above it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from biscale_env.config.slo import within
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.report.drawing import figdata
from biscale_env.evaluation.report.drawing.figure_style import (
    at_point,
    axis,
    base_layout,
    draw_bound,
    without_variants,
)
from biscale_env.evaluation.report.drawing.figures_time import (
    chosen_runs,
    common_runs,
    shown_at_first,
)
from biscale_env.evaluation.report.drawing.palette import DASHES, INK, MUTED, Style, styles
from biscale_env.evaluation.report.tables import ordered
from biscale_env.evaluation.runs.record import INSTANCE
from biscale_env.evaluation.runs.run_view import Run

Columns = Mapping[str, NDArray[np.float64]]
WINDOW_BINS: Final = 240
WHOLE_BINS: Final = 300
_METRICS: Final = {"prefill": ("ttft",), "decode": ("tpot",), "cluster": ("ttft", "tpot")}
_STATE: Final = (
    ("clock, MHz", ("freq_requested_mhz", "freq_effective_mhz")),
    ("power, W/GPU", ("power_w",)),
    ("queue, requests", ("queue_requests",)),
    ("batch, requests", ("batch_requests",)),
)
_ROW_PX: Final = 118
WHOLE_PX: Final = 190
"""Height of :func:`draw_whole`, px."""


@dataclass(frozen=True)
class PointRuns:
    """One run per controller at one operating point, all of the same workload, read once.

    Attributes:
        phase: phase of the point.
        runs: results row by label, with its ``timeline`` and ``requests``.
        latencies: by label and metric, judged latency and arrival of each request, s.
        bounds_s: bound of the SLO by metric, s.
        first: labels that are shown when nobody chose.
        end_s: end of the longest run, s.
    """

    phase: str
    runs: Mapping[str, Mapping[str, Any]]
    latencies: Mapping[str, Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]]
    bounds_s: Mapping[str, float]
    first: Sequence[str]
    end_s: float

    @classmethod
    def of(cls, run: Run, point: Mapping[str, Any]) -> "PointRuns":
        """Read the runs of a point.

        Args:
            run: the opened run directory.
            point: one of ``Run.points()``.

        Raises:
            BiscaleError: no timeline was kept of it.
        """
        rows = at_point(run.results, point)
        summary = without_variants(ordered(at_point(run.summary(), point)))
        runs = common_runs(run, rows, summary)
        metrics = _METRICS[str(point["phase"])]
        latencies = {
            label: {m: found for m in metrics if (found := run.latencies(row["run_id"], m))}
            for label, row in runs.items()
        }
        bounds_s = {m: float(summary[f"slo_{m}_s"].iloc[0]) for m in metrics}
        first = [name for name in shown_at_first(summary) if name in runs]
        end_s = max(float(row["duration_s"]) for row in runs.values())
        return cls(str(point["phase"]), runs, latencies, bounds_s, first or list(runs)[:1], end_s)

    def chosen(self, labels: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        """Runs of the given controllers; of those shown at first when none is given.

        Raises:
            BiscaleError: a label without a timeline.
        """
        return chosen_runs(self.runs, labels or self.first)

    def styles(self) -> dict[str, Style]:
        """Style by policy, the same as in every other figure of the run."""
        return styles([str(row["policy"]) for row in self.runs.values()])


@dataclass(frozen=True)
class InstanceMeans:
    """Means over equal bins of a window, of one instance.

    Attributes:
        name: of the instance; empty where the run has one only.
        n_gpus: its GPUs.
        table: see ``figdata.binned_timeline``.
    """

    name: str
    n_gpus: int
    table: pd.DataFrame


def by_instance(row: Mapping[str, Any]) -> dict[str, tuple[int, Columns]]:
    """GPUs and timeline of every instance of a run by name; an empty name where there is one.

    Args:
        row: results row with its ``timeline``.
    """
    timeline = row["timeline"]
    names = str(row.get("instance_names", "")).split() if INSTANCE in timeline else []
    if len(names) < 2:
        return {"": (int(row["n_gpus"]), timeline)}
    gpus = [int(n) for n in str(row["instance_gpus"]).split()]
    numbers = timeline[INSTANCE].astype(np.int64)
    return {
        name: (gpus[k], {column: values[numbers == k] for column, values in timeline.items()})
        for k, name in enumerate(names)
    }


def means_of(row: Mapping[str, Any], window: tuple[float, float], bins: int) -> list[InstanceMeans]:
    """Means of every instance over equal bins of a window.

    Only the iterations around the window are read, so that a long run costs no more.

    Raises:
        BiscaleError: iterations overlap and the run kept no number of their instance.
    """
    found = []
    for name, (n_gpus, table) in by_instance(row).items():
        first, last = np.searchsorted(table["time_s"], window)
        near = slice(max(int(first) - 1, 0), int(last) + 1)
        inside = {column: values[near] for column, values in table.items()}
        if not inside["time_s"].size:
            continue
        means = figdata.binned_timeline(inside, *window, bins, n_gpus)
        if means is None:
            raise BiscaleError(
                "iterations of several instances overlap: there is no single clock to draw"
            )
        found.append(InstanceMeans(name, n_gpus, means))
    return found


def draw_window(
    data: PointRuns, labels: Sequence[str], start_s: float, width_s: float
) -> go.Figure:
    """A column per controller: clock, power, queue, batch and latency, a line per instance.

    Args:
        data: the runs.
        labels: controllers; empty: those shown at first.
        start_s: begin of the window, s; moved so that the window lies within the run.
        width_s: its length, s.

    Raises:
        BiscaleError: a label without a timeline.
    """
    runs, look = data.chosen(labels), data.styles()
    window = window_within(data.end_s, start_s, width_s)
    titles = [title for title, _ in _STATE] + [f"{m.upper()}, ms" for m in data.bounds_s]
    figure = make_subplots(
        rows=len(titles),
        cols=len(runs),
        shared_xaxes=True,
        vertical_spacing=0.025,
        horizontal_spacing=0.03,
        column_titles=[f"<b>{label}</b>" for label in runs],
    )
    for column, (label, row) in enumerate(runs.items(), start=1):
        style = look[str(row["policy"])]
        for trace, place in _lines(label, row, window, style):
            figure.add_trace(trace, row=place, col=column)
        for place, metric in enumerate(data.bounds_s, start=len(_STATE) + 1):
            figure.add_trace(_marks(data, label, metric, window, style), row=place, col=column)
            draw_bound(figure, 1e3 * data.bounds_s[metric], place, column)
    _finish(figure, titles, len(runs), window)
    return figure


def window_within(end_s: float, start_s: float, width_s: float) -> tuple[float, float]:
    """A window of a length that lies within 0 and the end of a run, s.

    Raises:
        BiscaleError: a start or a length that is no number above 0.
    """
    if not (math.isfinite(start_s) and math.isfinite(width_s) and width_s > 0):
        raise BiscaleError(
            f"window: start {start_s:g} s and width {width_s:g} s are none; the width is above 0"
        )
    width = min(width_s, end_s)
    begin = min(max(start_s, 0.0), end_s - width)
    return begin, begin + width


def _lines(
    label: str, row: Mapping[str, Any], window: tuple[float, float], style: Style
) -> list[tuple[dict[str, Any], int]]:
    """Lines of one controller and the row of each: requested clocks thin, instances by dash."""
    found = []
    for order, part in enumerate(means_of(row, window, WINDOW_BINS)):
        name, table = ", ".join(filter(None, (label, part.name))), part.table
        for place, (_, columns) in enumerate(_STATE, start=1):
            for column in columns:
                thin = column == "freq_requested_mhz"
                trace = {
                    "type": "scatter",
                    "x": table["time_s"].to_numpy(dtype=np.float32),
                    "y": table[column].to_numpy(dtype=np.float32),
                    "mode": "lines",
                    "name": f"{name}, requested" if thin else name,
                    "line": {
                        "shape": "hv",
                        "color": style.color,
                        "width": 0.8 if thin else 1.6,
                        "dash": DASHES[order % len(DASHES)],
                    },
                    "opacity": 0.45 if thin else 1.0,
                    "hovertemplate": "%{fullData.name}: %{y:.4g} at %{x:.2f} s<extra></extra>",
                }
                found.append((trace, place))
    return found


def _marks(
    data: PointRuns, label: str, metric: str, window: tuple[float, float], style: Style
) -> dict[str, Any]:
    """A marker per request that arrives in the window; those above the bound are open."""
    latency_s, arrival_s = data.latencies[label].get(metric, (np.zeros(0), np.zeros(0)))
    inside = (arrival_s >= window[0]) & (arrival_s < window[1]) & np.isfinite(latency_s)
    late = ~within(latency_s[inside], data.bounds_s[metric])
    x, y = figdata.thin(arrival_s[inside], 1e3 * latency_s[inside], late)
    symbols = np.where(within(y / 1e3, data.bounds_s[metric]), style.symbol, f"{style.symbol}-open")
    return {
        "type": "scatter",
        "x": x.astype(np.float32),
        "y": y.astype(np.float32),
        "mode": "markers",
        "name": label,
        "marker": {"color": style.color, "symbol": symbols.tolist(), "size": 6, "opacity": 0.8},
        "hovertemplate": "%{fullData.name}: %{y:.0f} ms, arrived at %{x:.1f} s<extra></extra>",
    }


def _finish(
    figure: go.Figure, titles: list[str], columns: int, window: tuple[float, float]
) -> None:
    """Axes in the common style, the same range in every column."""
    figure.update_xaxes(axis(range=list(window)))
    for row, title in enumerate(titles, start=1):
        look = axis(nticks=5, range=_row_range(figure, row), showticklabels=False)
        figure.update_yaxes(look, row=row)
        figure.update_yaxes(axis(title, showticklabels=True), row=row, col=1)
    figure.update_xaxes(axis("time, s", range=list(window)), row=len(titles))
    layout = base_layout(
        margin={"l": 70, "r": 20, "t": 40, "b": 48},
        height=90 + _ROW_PX * len(titles),
        font={**base_layout()["font"], "size": 12},
    )
    figure.update_layout(layout)


def _row_range(figure: go.Figure, row: int) -> list[float]:
    """Range that holds all columns of a row and its bound; the clock's need not begin at 0."""
    values = [np.asarray(t.y, dtype=np.float64) for t in figure.select_traces(row=row)]
    bounds = [s.y0 for s in figure.select_shapes(row=row)]
    known = np.concatenate([*values, np.asarray(bounds, dtype=np.float64)])
    known = known[np.isfinite(known)]
    high = float(known.max(initial=0.0)) or 1.0
    low = float(known.min(initial=high)) if row == 1 else 0.0
    room = 0.08 * ((high - low) or high)
    return [low - (room if row == 1 else 0.0), high + room]


def draw_whole(
    data: PointRuns, labels: Sequence[str], shown: tuple[float, float] | None = None
) -> go.Figure:
    """The whole run: arriving tokens, and the mean effective clock of each controller.

    Args:
        data: the runs.
        labels: controllers; empty: those shown at first.
        shown: a window to mark, s.

    Raises:
        BiscaleError: a label without a timeline.
    """
    runs, look = data.chosen(labels), data.styles()
    span = (0.0, max(data.end_s, 1e-6))
    figure = go.Figure(_arriving(next(iter(data.runs.values())), data.phase, span))
    for label, row in runs.items():
        style = look[str(row["policy"])]
        parts = means_of(row, span, WHOLE_BINS)
        if not parts:
            continue
        clocks = np.stack([part.table["freq_effective_mhz"] for part in parts])
        known = np.isfinite(clocks)
        mean = np.divide(
            np.where(known, clocks, 0.0).sum(axis=0),
            known.sum(axis=0),
            out=np.full(clocks.shape[1], np.nan),
            where=known.any(axis=0),
        )
        line = {"color": style.color, "dash": style.dash, "width": 1.4}
        figure.add_scatter(
            x=parts[0].table["time_s"].to_numpy(),
            y=mean,
            yaxis="y2",
            mode="lines",
            name=label,
            line=line,
        )
    layout = base_layout(
        height=WHOLE_PX,
        margin={"l": 70, "r": 70, "t": 28, "b": 40},
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"color": INK}},
        xaxis=axis("time, s", range=list(span)),
        yaxis=axis("tokens/s arriving", rangemode="tozero", nticks=4),
        yaxis2=axis(
            "clock, MHz", overlaying="y", side="right", nticks=4, showgrid=False, tickmode="auto"
        ),
    )
    figure.update_layout(layout)
    if shown is not None:
        figure.add_vrect(*shown, fillcolor=INK, opacity=0.12, line_width=1)
    return figure


def _arriving(row: Mapping[str, Any], phase: str, span: tuple[float, float]) -> dict[str, Any]:
    edges = np.linspace(*span, WHOLE_BINS + 1)
    tokens, requests = np.zeros(WHOLE_BINS), row["requests"]
    if requests is not None:
        column = "output_tokens" if phase == "decode" else "prompt_tokens"
        tokens = np.histogram(requests["arrival_s"], edges, weights=requests[column])[0]
    return {
        "type": "scatter",
        "x": edges[:-1],
        "y": tokens / np.diff(edges),
        "mode": "lines",
        "name": "arriving tokens",
        "line": {"shape": "hv", "color": MUTED, "width": 0.8},
        "fill": "tozeroy",
        "hovertemplate": "%{y:.0f} tokens/s at %{x:.0f} s<extra></extra>",
    }


def window_figures(
    data: PointRuns, labels: Sequence[str], start_s: float, width_s: float
) -> pd.DataFrame:
    """What each controller spent and missed in a window, a row each.

    Args:
        data: the runs.
        labels: controllers; empty: those shown at first.
        start_s: begin of the window, s.
        width_s: its length, s.

    Returns:
        Columns ``controller, clock_mhz`` (mean effective clock while busy), ``power_w`` (mean per
        GPU), ``energy_j`` (all GPUs), ``queue``, ``batch`` (means over instances), ``requests``
        that arrive, ``late``: how often they miss a bound of the SLO.

    Raises:
        BiscaleError: a label without a timeline.
    """
    window = window_within(data.end_s, start_s, width_s)
    return pd.DataFrame(
        [
            {
                "controller": label,
                **_means(row, window),
                **_requests(data, label, window),
            }
            for label, row in data.chosen(labels).items()
        ]
    )


def _means(row: Mapping[str, Any], window: tuple[float, float]) -> dict[str, float]:
    parts = means_of(row, window, WINDOW_BINS)
    means = [part.table.mean(numeric_only=True) for part in parts]
    watts = [m["power_w"] * part.n_gpus for m, part in zip(means, parts, strict=True)]
    n_gpus = sum(part.n_gpus for part in parts)
    energy_j = sum(watts) * (window[1] - window[0])
    return {
        "clock_mhz": _mean_of(means, "freq_effective_mhz"),
        "power_w": sum(watts) / n_gpus if n_gpus else math.nan,
        "energy_j": energy_j,
        "queue": _mean_of(means, "queue_requests"),
        "batch": _mean_of(means, "batch_requests"),
    }


def _requests(data: PointRuns, label: str, window: tuple[float, float]) -> dict[str, int]:
    inside, late = 0, 0
    for metric, (latency_s, arrival_s) in data.latencies[label].items():
        here = (arrival_s >= window[0]) & (arrival_s < window[1])
        inside = max(inside, int(here.sum()))
        late += int((~within(latency_s[here], data.bounds_s[metric])).sum())
    return {"requests": inside, "late": late}


def _mean_of(means: Sequence["pd.Series[float]"], name: str) -> float:
    return float(np.mean([m[name] for m in means])) if means else math.nan
