"""The report's figures by name, as Plotly figures."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import pandas as pd
import plotly.graph_objects as go

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.report.drawing.figure_style import at_point, without_variants
from biscale_env.evaluation.report.drawing.figures_energy import energy_attainment
from biscale_env.evaluation.report.drawing.figures_latency import latency_cdf
from biscale_env.evaluation.report.drawing.figures_time import clock_strips, timeline
from biscale_env.evaluation.report.drawing.figures_tuning import tuning_curves
from biscale_env.evaluation.report.tables import ordered
from biscale_env.evaluation.runs.run_view import Run

Draw = Callable[[Run, Mapping[str, Any], pd.DataFrame], go.Figure]
"""Draws one operating point of a run, given its summary in the order of the tables."""


def _energy(run: Run, point: Mapping[str, Any], summary: pd.DataFrame) -> go.Figure:
    return energy_attainment(summary)


def _tuning(run: Run, point: Mapping[str, Any], summary: pd.DataFrame) -> go.Figure:
    return tuning_curves(run, point)


def _latency(metric: str) -> Draw:
    def draw(run: Run, point: Mapping[str, Any], summary: pd.DataFrame) -> go.Figure:
        return latency_cdf(run, at_point(run.results, point), without_variants(summary), metric)

    return draw


def _over_time(draw_rows: Callable[[Run, pd.DataFrame, pd.DataFrame], go.Figure]) -> Draw:
    def draw(run: Run, point: Mapping[str, Any], summary: pd.DataFrame) -> go.Figure:
        return draw_rows(run, at_point(run.results, point), without_variants(summary))

    return draw


FIGURES: Final[dict[str, Draw]] = {
    "energy": _energy,
    "tuning": _tuning,
    "ttft": _latency("ttft"),
    "tpot": _latency("tpot"),
    "clocks": _over_time(clock_strips),
    "timeline": _over_time(timeline),
}
NAMES: Final = tuple(FIGURES)


def figure(run: Run, name: str, point: Mapping[str, Any] | int = 0) -> go.Figure:
    """A figure of the report.

    Args:
        run: the opened run directory.
        name: one of ``NAMES``.
        point: an operating point of ``run.points()``, or its number.

    Raises:
        BiscaleError: an unknown name, or a figure that the phase or the kept data do not allow.
    """
    if name not in FIGURES:
        raise BiscaleError(f"unknown figure '{name}'; known: {', '.join(NAMES)}")
    chosen = run.points()[point] if isinstance(point, int) else point
    return FIGURES[name](run, chosen, ordered(at_point(run.summary(), chosen)))
