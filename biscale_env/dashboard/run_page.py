"""Scrub through a finished run: controllers side by side, a window that moves."""

from typing import Any

import pandas as pd
from dash import Dash, Input, Output, State, ctx, dcc, html, no_update

from biscale_env.core.errors import BiscaleError
from biscale_env.dashboard.graph_config import GRAPH_CONFIG
from biscale_env.dashboard.run_session import WIDTHS_S, RunSession
from biscale_env.plots.window_figure import (
    WHOLE_PX,
    PointRuns,
    draw_whole,
    draw_window,
    window_figures,
    window_within,
)

PLAY_MS = 700
_HEAD = {
    "controller": ("controller", "{}"),
    "clock_mhz": ("clock, MHz", "{:,.0f}"),
    "power_w": ("power, W per GPU", "{:,.0f}"),
    "energy_j": ("energy, J", "{:,.0f}"),
    "queue": ("queue", "{:.1f}"),
    "batch": ("batch", "{:.1f}"),
    "requests": ("requests arriving", "{:,d}"),
    "late": ("SLO bounds missed", "{:,d}"),
}


def run_layout(session: RunSession) -> html.Div:
    """The page of a finished run."""
    titles = session.titles()
    first = session.first_points()
    data = session.at(first[0])
    end_s = max(session.at(k).end_s for k in first)
    widths = [w for w in WIDTHS_S if w < end_s] or [end_s]
    width = widths[min(2, len(widths) - 1)]
    return html.Div(
        [
            html.Div(
                [
                    _control(
                        "Operating points",
                        dcc.Dropdown(
                            {str(k): title for k, title in enumerate(titles)},
                            [str(k) for k in first],
                            multi=True,
                            id="points",
                            clearable=False,
                        ),
                    ),
                    _control(
                        "Controllers",
                        dcc.Dropdown(list(data.runs), list(data.first), multi=True, id="policies"),
                    ),
                    _control(
                        "Window",
                        dcc.Dropdown(
                            {str(w): f"{w:g} s" for w in widths},
                            str(width),
                            id="width",
                            clearable=False,
                        ),
                    ),
                    html.Button("Play", id="play", n_clicks=0),
                ],
                className="controls",
            ),
            # without a figure yet it has no height, and what follows would lie on it
            dcc.Graph(id="whole", config=GRAPH_CONFIG, style={"height": WHOLE_PX}),
            dcc.Slider(0, 1, value=0, id="start", updatemode="drag", marks=None),
            html.Div(id="told", className="told"),
            html.Div(id="spent"),
            html.Div(id="windows"),
            dcc.Interval(id="player", interval=PLAY_MS, disabled=True),
        ]
    )


def _control(title: str, control: Any) -> html.Div:
    return html.Div([html.Label(title), control], className="control")


def register_run(app: Dash, session_of: Any) -> None:
    """Add what happens on the page.

    Args:
        app: the application.
        session_of: gives the opened run.
    """

    @app.callback(
        Output("policies", "options"),
        Output("policies", "value"),
        Input("points", "value"),
        State("policies", "value"),
    )
    def offer(points: list[Any], chosen: list[str]) -> tuple[list[str], list[str]]:
        shown = _shown(session_of(), points)
        common = [n for n in shown[0].runs] if shown else []
        for data in shown[1:]:
            common += [name for name in data.runs if name not in common]
        kept = [name for name in chosen or [] if name in common]
        return common, kept or list(shown[0].first if shown else ())

    @app.callback(
        Output("start", "max"),
        Output("start", "step"),
        Output("start", "value"),
        Input("points", "value"),
        Input("width", "value"),
        Input("player", "n_intervals"),
        State("start", "value"),
    )
    def move(points: list[Any], width: str, _: int | None, start: float) -> tuple[Any, Any, Any]:
        end_s = max((d.end_s for d in _shown(session_of(), points)), default=1.0)
        step = float(width) / 20
        last = max(end_s - float(width), step)
        if ctx.triggered_id == "player":
            after = float(start or 0.0) + float(width) / 10
            return no_update, no_update, 0.0 if after > last else after
        return last, step, min(float(start or 0.0), last)

    @app.callback(
        Output("player", "disabled"), Output("play", "children"), Input("play", "n_clicks")
    )
    def play(clicks: int) -> tuple[bool, str]:
        return clicks % 2 == 0, "Pause" if clicks % 2 else "Play"

    @app.callback(
        Output("whole", "figure"),
        Output("told", "children"),
        Output("spent", "children"),
        Output("windows", "children"),
        Input("points", "value"),
        Input("policies", "value"),
        Input("width", "value"),
        Input("start", "value"),
    )
    def show(
        points: list[Any], policies: list[str], width: str, start: float
    ) -> tuple[Any, Any, Any, Any]:
        session = session_of()
        try:
            return _drawn(session, [int(p) for p in points or []], policies, float(width), start)
        except BiscaleError as error:
            return no_update, html.Strong(str(error)), no_update, no_update


def _shown(session: RunSession, points: list[Any]) -> list[PointRuns]:
    return [session.at(int(p)) for p in points or []]


def _drawn(
    session: RunSession, points: list[int], policies: list[str], width_s: float, start: float
) -> tuple[Any, Any, Any, Any]:
    """Figures and table of the chosen window."""
    if not points:
        raise BiscaleError("choose an operating point")
    begin_s, titles = float(start or 0.0), session.titles()
    graphs: list[html.H2 | dcc.Graph] = []
    tables = []
    for number in points:
        data = session.at(number)
        names = [name for name in policies or [] if name in data.runs]
        figure = draw_window(data, names, begin_s, width_s)
        figure.update_layout(uirevision="kept")
        place = {"type": "window", "point": number}
        graphs.append(html.H2(titles[number]))
        graphs.append(dcc.Graph(figure=figure, id=place, config=GRAPH_CONFIG))
        tables.append(_table(titles[number], window_figures(data, names, begin_s, width_s)))
    first = session.at(points[0])
    names = [name for name in policies or [] if name in first.runs]
    begin, end = window_within(first.end_s, begin_s, width_s)
    told = f"{begin:.1f} to {end:.1f} s of {first.end_s:.0f} s"
    return draw_whole(first, names, (begin, end)), told, tables, graphs


def _table(title: str, frame: pd.DataFrame) -> html.Table:
    rows = [
        html.Tr([html.Td(pattern.format(row[name])) for name, (_, pattern) in _HEAD.items()])
        for row in frame.to_dict("records")
    ]
    head = html.Tr([html.Th(text) for text, _ in _HEAD.values()])
    return html.Table([html.Caption(title), html.Thead(head), html.Tbody(rows)])
