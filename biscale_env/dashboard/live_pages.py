"""Pages that follow what another process does: a training run, or a replay."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pandas as pd
from dash import Dash, Input, Output, dcc, html

from agents.training.progress.curves import EVALUATIONS
from agents.training.progress.curves import learning_curves as read_curves
from biscale_env.config.loader import read_yaml
from biscale_env.core.errors import BiscaleError
from biscale_env.dashboard.graph_config import GRAPH_CONFIG
from biscale_env.dashboard.log_tail import ReplayLogs
from biscale_env.dashboard.watched_folder import kind_of
from biscale_env.evaluation.runs import run_files
from biscale_env.plots import learning_curves, live_replay
from biscale_env.plots.learning_figure import TITLES

REFRESH_MS: Final = 2000


def training_layout() -> html.Div:
    """Learning curves that grow."""
    graphs = [dcc.Graph(id=f"curve-{name}", config=GRAPH_CONFIG) for name in TITLES]
    return html.Div(
        [
            html.Div(id="training-told", className="told"),
            *graphs,
            dcc.Interval(id="training-clock", interval=REFRESH_MS),
        ]
    )


def register_training(app: Dash, folder: Path) -> None:
    """Draw the curves anew every two seconds.

    Args:
        app: the application.
        folder: of ``biscale train``.
    """

    @app.callback(
        Output("training-told", "children"),
        *(Output(f"curve-{name}", "figure") for name in TITLES),
        Input("training-clock", "n_intervals"),
    )
    def follow(_: int | None) -> tuple[Any, ...]:
        try:
            frame = read_curves(folder)
        except BiscaleError:  # none written yet, or being replaced
            frame = pd.DataFrame()
        if frame.empty:
            return ("no evaluation yet", *({} for _ in TITLES))
        return progress_of(folder, frame), *(learning_curves(frame, name) for name in TITLES)


def progress_of(folder: Path, curves: pd.DataFrame) -> str:
    """How far training is: steps of every seed, its best score, and when it was last heard of."""
    told = []
    for seed, rows in curves.groupby("seed"):
        home = folder if (folder / EVALUATIONS).is_file() else folder / f"seed-{seed}"
        steps = int(rows["step"].iloc[-1])
        ago_s = time.time() - (home / EVALUATIONS).stat().st_mtime
        name = "" if home == folder else f"seed {seed}: "
        told.append(
            f"{name}{steps:,} of {_total_steps(home)} steps, best score {rows['score'].min():.4f}, "
            f"last evaluated {ago_s:.0f} s ago"
        )
    return "; ".join(told)


def _total_steps(folder: Path) -> str:
    try:
        return f"{int(read_yaml(folder / run_files.CONFIG)['total_timesteps']):,}"
    except (BiscaleError, OSError, KeyError, TypeError, ValueError):
        return "?"


def replay_layout() -> html.Div:
    """The last minute of a replay."""
    return html.Div(
        [
            html.Div(id="replay-told", className="told"),
            dcc.Graph(id="replay-figure", config=GRAPH_CONFIG),
            dcc.Interval(id="replay-clock", interval=REFRESH_MS),
        ]
    )


def register_replay(app: Dash, folder: Path, logs_of: Callable[[], ReplayLogs]) -> None:
    """Read new lines of the logs and draw the last minute, every two seconds.

    Args:
        app: the application.
        folder: of ``biscale replay``.
        logs_of: gives the logs.
    """

    @app.callback(
        Output("replay-told", "children"),
        Output("replay-figure", "figure"),
        Input("replay-clock", "n_intervals"),
    )
    def follow(_: int | None) -> tuple[Any, Any]:
        logs = logs_of()
        tables = logs.tables()
        figure = live_replay(tables, logs.bounds_ms).update_layout(uirevision="kept")
        told: Any = f"{logs.finished} requests finished, {logs.failed} of them failed"
        if kind_of(folder) == "run":
            told = html.A("The replay has ended: open its results", href="/")
        return told, figure
