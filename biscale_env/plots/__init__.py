"""Figures: one function each, on a run directory or a frame; each returns a Plotly figure.

The report draws the same ones. A controller has the same colour, dash and marker everywhere (after
Okabe and Ito, 2008: told apart by the colour-blind, and by marker in grey print); axes have units;
95 % intervals are drawn where a figure shows an estimate. :func:`save` writes them for print.
"""

from biscale_env.plots.figure_files import save
from biscale_env.plots.learning_figure import learning_curves
from biscale_env.plots.live_figure import live_replay
from biscale_env.plots.of_runs import (
    burst,
    clocks,
    energy,
    energy_by_attainment,
    latency,
    savings,
    timeline,
    whole_run,
    window,
)

__all__ = [
    "burst",
    "clocks",
    "energy",
    "energy_by_attainment",
    "latency",
    "learning_curves",
    "live_replay",
    "save",
    "savings",
    "timeline",
    "whole_run",
    "window",
]
