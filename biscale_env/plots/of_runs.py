"""Figures of a comparison, by what they show."""

import os
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.report.drawing.figure_style import at_point, without_variants
from biscale_env.evaluation.report.drawing.figures import figure
from biscale_env.evaluation.report.drawing.figures_energy import energy_attainment
from biscale_env.evaluation.report.tables import as_summary, ordered
from biscale_env.evaluation.runs.run_view import Run, load_run
from biscale_env.plots.burst_figure import side_by_side
from biscale_env.plots.savings_figure import savings_bars
from biscale_env.plots.window_figure import PointRuns, draw_whole, draw_window

RunLike = Run | str | os.PathLike[str]
"""An opened run directory, or its path."""


def _opened(run: RunLike) -> Run:
    return run if isinstance(run, Run) else load_run(run)


def _point(run: Run, number: int) -> dict[str, object]:
    points = run.points()
    if not 0 <= number < len(points):
        raise BiscaleError(
            f"{run.path} has {len(points)} operating points; there is no number {number}"
        )
    return points[number]


def energy(run: RunLike | pd.DataFrame, point: int = 0) -> go.Figure:
    """Energy against attainment, a marker per controller with 95 % intervals.

    Args:
        run: a run directory, or a results or summary frame with one operating point.
        point: number of the operating point, in the order of ``Run.points()``.

    Raises:
        BiscaleError: no such point, or no such run.
    """
    if isinstance(run, pd.DataFrame):
        return energy_attainment(ordered(as_summary(run)))
    return _named(run, "energy", point)


def latency(run: RunLike, metric: str = "ttft", point: int = 0) -> go.Figure:
    """Distribution of a latency over all requests, ms, with the corner that the SLO leaves free.

    Args:
        run: a run directory.
        metric: ``ttft`` or ``tpot``.
        point: number of the operating point.

    Raises:
        BiscaleError: another metric, or none of it was kept.
    """
    if metric not in ("ttft", "tpot"):
        raise BiscaleError(f"latency: metric '{metric}' is none; there are ttft and tpot")
    return _named(run, metric, point)


def timeline(run: RunLike, point: int = 0) -> go.Figure:
    """Clock, power, requests and latencies of all controllers in the busiest minute."""
    return _named(run, "timeline", point)


def clocks(run: RunLike, point: int = 0) -> go.Figure:
    """The effective clock of every controller in the busiest minute, a strip each, MHz."""
    return _named(run, "clocks", point)


def energy_by_attainment(run: RunLike, point: int = 0) -> go.Figure:
    """Energy against attainment of every setting that tuning tried, a curve per controller."""
    return _named(run, "tuning", point)


def _named(run: RunLike, name: str, point: int) -> go.Figure:
    opened = _opened(run)
    return figure(opened, name, _point(opened, point))


def savings(run: RunLike | pd.DataFrame, point: int = 0) -> go.Figure:
    """Where the savings against max clock come from: clock, batches and idle power, % of energy.

    Args:
        run: a run directory, or a results frame with one operating point.
        point: number of the operating point.

    Raises:
        BiscaleError: the runs say nothing of their energy at max clock, or max clock is missing.
    """
    if isinstance(run, pd.DataFrame):
        return savings_bars(run)
    opened = _opened(run)
    return savings_bars(at_point(opened.results, _point(opened, point)))


def burst(
    run: RunLike, policies: Sequence[str] = (), point: int = 0, width_s: float = 60.0
) -> go.Figure:
    """A burst side by side: a column per controller; clock, power, requests, latency in rows.

    Args:
        run: a run directory.
        policies: labels as in the tables. Default: max clock and the best that meets the SLO.
        point: number of the operating point.
        width_s: length of the window around the burst, s.

    Raises:
        BiscaleError: a label without a timeline.
    """
    opened = _opened(run)
    chosen = _point(opened, point)
    summary = without_variants(ordered(at_point(opened.summary(), chosen)))
    return side_by_side(opened, at_point(opened.results, chosen), summary, policies, width_s)


def window(
    run: RunLike,
    start_s: float = 0.0,
    width_s: float = 30.0,
    policies: Sequence[str] = (),
    point: int = 0,
) -> go.Figure:
    """Any window of a run: a column per controller; clock, power, queue, batch, latency in rows.

    Several instances of a phase are a line each.

    Args:
        run: a run directory.
        start_s: begin of the window, s.
        width_s: length of the window, s.
        policies: labels as in the tables. Default: max clock and the best that meets the SLO.
        point: number of the operating point.

    Raises:
        BiscaleError: a label without a timeline, or no such point.
    """
    opened = _opened(run)
    return draw_window(PointRuns.of(opened, _point(opened, point)), policies, start_s, width_s)


def whole_run(run: RunLike, policies: Sequence[str] = (), point: int = 0) -> go.Figure:
    """Arriving tokens and the mean effective clock of controllers over the whole run.

    Args:
        run: a run directory.
        policies: labels as in the tables. Default: max clock and the best that meets the SLO.
        point: number of the operating point.

    Raises:
        BiscaleError: a label without a timeline, or no such point.
    """
    opened = _opened(run)
    return draw_whole(PointRuns.of(opened, _point(opened, point)), policies)
