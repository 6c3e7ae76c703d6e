"""Figures over time: what each controller did in the busiest minute."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from biscale_env.config.slo import within
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.report.drawing import figdata
from biscale_env.evaluation.report.drawing.figure_style import (
    LIMIT_LINE,
    axis,
    base_layout,
    limit_note,
)
from biscale_env.evaluation.report.drawing.palette import MUTED, Style, styles
from biscale_env.evaluation.runs.record import REFERENCE_POLICY, is_bound
from biscale_env.evaluation.runs.results import policy_label
from biscale_env.evaluation.runs.run_files import flat
from biscale_env.evaluation.runs.run_view import Run

STRIP_BINS: Final = 240
TIMELINE_BINS: Final = 600
_STRIP_PX: Final = 24
_TRACE = dict[str, Any]
R = TypeVar("R")


def common_runs(run: Run, rows: pd.DataFrame, summary: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """One run per policy, all of the same workload and plant, with its timeline.

    The first that has any.

    Returns:
        By label, in the order of the summary: the results row with its ``timeline`` and
        ``requests``.

    Raises:
        BiscaleError: no timeline was kept.
    """
    names = ["policy", "variant", "run_id"]
    for _, group in rows.groupby(["workload_seed", "ensemble_member"], sort=True):
        ids = {
            policy_label(row): row["run_id"]
            for row in group.drop_duplicates(names[:2])[names].to_dict("records")
        }
        found = {}
        for label in summary["label"]:
            timeline = run.timeline_of(ids[label]) if label in ids else None
            if timeline is not None:
                found[label] = {
                    **run.row(ids[label]),
                    "timeline": timeline,
                    "requests": run.requests_of(ids[label]),
                }
        if found:
            return found
    raise BiscaleError("no timeline was kept for this operating point")


def chosen_runs(kept: Mapping[str, R], labels: Sequence[str]) -> dict[str, R]:
    """Some of the runs of :func:`common_runs`, in the order of the labels.

    Raises:
        BiscaleError: a label without a timeline.
    """
    missing = [name for name in labels if name not in kept]
    if missing:
        raise BiscaleError(f"no timeline of '{missing[0]}' was kept; there are: {', '.join(kept)}")
    return {name: kept[name] for name in labels}


def window_of(runs: dict[str, dict[str, Any]]) -> tuple[float, float]:
    """The busiest minute of the workload.

    By prompt tokens that arrive (prefill), else by requests that run.
    """
    first = next(iter(runs.values()))
    end_s = max(row["duration_s"] for row in runs.values())
    if first["phase"] == "prefill" and first["requests"] is not None:
        return figdata.busiest_window(
            first["requests"]["arrival_s"], first["requests"]["prompt_tokens"], end_s
        )
    timeline = first["timeline"]
    return figdata.busiest_window(
        timeline["time_s"], timeline["batch_requests"] * timeline["duration_s"], end_s
    )


def binned_runs(
    runs: dict[str, dict[str, Any]], window: tuple[float, float], bins: int
) -> dict[str, pd.DataFrame]:
    """Means of the timelines over equal bins of the window, by label.

    Raises:
        BiscaleError: iterations overlap, so that there is no single clock.
    """
    tables = {
        k: figdata.binned_timeline(row["timeline"], *window, bins, row["n_gpus"])
        for k, row in runs.items()
    }
    found = {label: table for label, table in tables.items() if table is not None}
    if not found:
        raise BiscaleError(
            "iterations of several instances overlap: there is no single clock to draw"
        )
    return found


def clock_strips(run: Run, rows: pd.DataFrame, summary: pd.DataFrame) -> go.Figure:
    """The effective clock of every controller in the busiest minute.

    One coloured strip each, under the arriving work.
    """
    runs = common_runs(run, rows, summary)
    window = window_of(runs)
    tables = binned_runs(runs, window, STRIP_BINS)
    height = 168 + _STRIP_PX * len(tables)
    strips = _STRIP_PX * len(tables) / (height - 76)
    unit = "prompt tokens/s" if rows["phase"].iloc[0] == "prefill" else "output tokens/s"
    layout = base_layout(
        height=height,
        xaxis=axis("time, s", range=list(window), showgrid=False),
        yaxis=axis(domain=[0, strips], autorange="reversed", showgrid=False, ticks=""),
        yaxis2=axis(unit, domain=[strips + 0.04, 1], nticks=3, rangemode="tozero"),
    )
    first = next(iter(runs.values()))
    return go.Figure(data=[_strips(tables), _arrivals(first, window)], layout=layout)


def _arrivals(row: dict[str, Any], window: tuple[float, float]) -> _TRACE:
    """Work that arrives per second: prompt tokens for prefill, output tokens for decode."""
    requests, edges = row["requests"], np.arange(window[0], window[1] + 0.5, 1.0)
    column = "prompt_tokens" if row["phase"] == "prefill" else "output_tokens"
    tokens = np.zeros(edges.size - 1)
    if requests is not None:
        tokens = np.histogram(requests["arrival_s"], edges, weights=requests[column])[0]
    return {
        "type": "scatter",
        "x": edges.astype(np.float32),
        "y": np.append(tokens, tokens[-1:]).astype(np.float32),
        "yaxis": "y2",
        "mode": "lines",
        "line": {"shape": "hv", "color": MUTED, "width": 1},
        "fill": "tozeroy",
        "hovertemplate": "%{y:.0f} tokens/s arriving at %{x:.0f} s<extra></extra>",
    }


def _strips(tables: dict[str, pd.DataFrame]) -> _TRACE:
    time = next(iter(tables.values()))["time_s"].to_numpy()
    half = (time[1] - time[0]) / 2 if time.size > 1 else 0.0
    return {
        "type": "heatmap",
        "x": (time + half).astype(np.float32),
        "y": list(tables),
        "z": np.stack([table["freq_effective_mhz"] for table in tables.values()]).astype(
            np.float32
        ),
        "colorscale": "Cividis",
        "ygap": 3,
        "colorbar": {
            "title": {
                "text": "effective clock, MHz",
                "side": "right",
                "font": {"size": 12, "color": MUTED},
            },
            "thickness": 12,
            "outlinewidth": 0,
            "dtick": 250,
        },
        "hovertemplate": "%{y}: %{z:.0f} MHz at %{x:.1f} s<extra></extra>",
    }


def timeline(run: Run, rows: pd.DataFrame, summary: pd.DataFrame) -> go.Figure:
    """Clock, power, queue or batch, and every request's latency, in the busiest minute.

    Max clock and the best controller that meets the SLO are shown at first; the legend shows and
    hides the others.
    """
    runs = common_runs(run, rows, summary)
    window = window_of(runs)
    phase = str(rows["phase"].iloc[0])
    metric = "tpot" if phase == "decode" else "ttft"
    look, visible = styles(rows["policy"].tolist()), shown_at_first(summary)
    traces = []
    for label, table in binned_runs(runs, window, TIMELINE_BINS).items():
        state = True if label in visible else "legendonly"
        common = {"name": label, "legendgroup": label, "visible": state}
        style = look[runs[label]["policy"]]
        traces += [common | trace for trace in state_lines(table, phase, style)]
        traces += [
            common | trace for trace in latency_marks(run, runs[label], metric, style, window)
        ]
    return go.Figure(data=traces, layout=_timeline_layout(run, summary, metric, window, len(runs)))


def shown_at_first(summary: pd.DataFrame) -> list[str]:
    """Max clock and the controller of least energy that meets the SLO (a bound is none)."""
    able = summary[~summary["policy"].eq(REFERENCE_POLICY) & ~summary["policy"].map(is_bound)]
    able = able.assign(_missed=~able["target_met"].astype(bool)).sort_values(
        ["_missed", "energy_per_output_token_j"]
    )
    return [REFERENCE_POLICY, *able["label"].head(1)]


def state_lines(table: pd.DataFrame, phase: str, style: Style) -> list[_TRACE]:
    """Clock (effective, requested), power and requests of one controller, on axes y to y3."""
    table = table.assign(
        present=table["batch_requests"] + (table["queue_requests"] if phase == "prefill" else 0.0)
    )
    lines: list[tuple[str, str, float, float, str]] = [
        ("freq_effective_mhz", "y", 1.8, 1.0, "MHz"),
        ("freq_requested_mhz", "y", 0.8, 0.45, "MHz requested"),
        ("power_w", "y2", 1.4, 1.0, "W"),
        ("present", "y3", 1.4, 1.0, "requests"),
    ]
    return [
        {
            "type": "scatter",
            "x": table["time_s"].to_numpy(dtype=np.float32),
            "y": table[column].to_numpy(dtype=np.float32),
            "yaxis": place,
            "mode": "lines",
            "line": {"shape": "hv", "color": style.color, "width": width, "dash": style.dash},
            "opacity": opacity,
            "showlegend": column == "freq_effective_mhz",
            "hovertemplate": f"%{{fullData.name}}: %{{y:.0f}} {unit} at %{{x:.2f}} s"
            "<extra></extra>",
        }
        for column, place, width, opacity, unit in lines
    ]


def latency_marks(
    run: Run, row: dict[str, Any], metric: str, style: Style, window: tuple[float, float]
) -> list[_TRACE]:
    """Latency of each request by its arrival in the window, ms, on axis y4."""
    found = run.latencies(row["run_id"], metric)
    if found is None:
        return []
    latency_s, arrival_s = found
    inside = (arrival_s >= window[0]) & (arrival_s < window[1])
    late = ~within(latency_s[inside], row[f"slo_{metric}_s"])
    x, y = figdata.thin(arrival_s[inside], 1e3 * latency_s[inside], late)
    return [
        {
            "type": "scatter",
            "x": x.astype(np.float32),
            "y": y.astype(np.float32),
            "yaxis": "y4",
            "mode": "markers",
            "marker": {"color": style.color, "symbol": style.symbol, "size": 5, "opacity": 0.75},
            "showlegend": False,
            "hovertemplate": "%{fullData.name}: %{y:.0f} ms, arrived at %{x:.1f} s<extra></extra>",
        }
    ]


def _timeline_layout(
    run: Run, summary: pd.DataFrame, metric: str, window: tuple[float, float], n_policies: int
) -> dict[str, Any]:
    """Four rows on one axis of time, with their titles, the SLO and the power cap."""
    waiting = summary["phase"].iloc[0] == "prefill"
    amount = "requests waiting or in the batch" if waiting else "running requests"
    titles = (
        "effective clock, MHz (thin: requested)",
        "power, W per GPU",
        amount,
        f"{metric.upper()} by arrival, ms",
    )
    bound_ms = 1e3 * float(summary[f"slo_{metric}_s"].iloc[0])
    limits: list[tuple[str, float, str]] = [("y4", bound_ms, f"SLO {bound_ms:.4g} ms")]
    cap_w = next((v for k, v in flat(run.config).items() if k.endswith("power_cap_w")), None)
    if isinstance(cap_w, int | float):
        limits.append(("y2", float(cap_w), f"cap {cap_w:.0f} W"))
    place = {"xref": "paper", "xanchor": "right", "x": 1, "yanchor": "bottom"}
    notes = [limit_note(text, yref=row, y=value, **place) for row, value, text in limits]
    rows, row_titles = _rows(titles)
    notes += row_titles
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "line": LIMIT_LINE}
    shapes = [line | {"yref": row, "y0": value, "y1": value} for row, value, _ in limits]
    legend_px = 24 * -(-n_policies // 8)
    return base_layout(
        height=660 + legend_px,
        showlegend=True,
        margin={"l": 64, "r": 24, "t": 34 + legend_px, "b": 48},
        legend={"orientation": "h", "x": 0, "y": 1.045, "yanchor": "bottom", "font": {"size": 13}},
        xaxis=axis("time, s", range=list(window), anchor="y4"),
        shapes=shapes,
        annotations=notes,
        **rows,
    )


def _rows(titles: tuple[str, ...]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Axes of rows above one another, and their titles as annotations."""
    rows: dict[str, Any] = {}
    notes: list[dict[str, Any]] = []
    for i, title in enumerate(titles):
        top = 1 - i * 0.26
        suffix = str(i + 1) if i else ""
        rows[f"yaxis{suffix}"] = axis(
            domain=[max(top - 0.21, 0), top], rangemode="tozero" if i else "normal", nticks=5
        )
        note = {"text": title, "x": 0, "y": top, "xref": "paper", "yref": "paper"}
        look = {"showarrow": False, "font": {"size": 13, "color": MUTED}}
        notes.append(note | {"xanchor": "left", "yanchor": "bottom"} | look)
    return rows, notes
