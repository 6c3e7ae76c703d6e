"""The dashboard's application: one folder, the page that fits what it holds now."""

import ipaddress
import logging
import socket
from functools import lru_cache
from pathlib import Path
from typing import Final

from dash import Dash, html

from biscale_env.core.errors import BiscaleError
from biscale_env.dashboard.live_pages import (
    register_replay,
    register_training,
    replay_layout,
    training_layout,
)
from biscale_env.dashboard.log_tail import ReplayLogs
from biscale_env.dashboard.run_page import register_run, run_layout
from biscale_env.dashboard.run_session import RunSession
from biscale_env.dashboard.watched_folder import RAW, kind_of

LOOPBACK: Final = "127.0.0.1"
PORT: Final = 8050


def make_app(folder: Path, hosts: tuple[str, ...] = (LOOPBACK, "localhost")) -> Dash:
    """The application of a folder, not yet served.

    Args:
        folder: of ``biscale compare``, ``evaluate``, ``replay`` or ``train``.
        hosts: names under which a browser may ask; another name is refused, so that a page from
            elsewhere cannot read runs through a name of its own. Empty: any.

    Raises:
        BiscaleError: the folder holds none of these.
    """
    kind_of(folder)
    app = Dash(
        "biscale_env.dashboard",
        title=f"{folder.name} · biscale",
        update_title="",
        serve_locally=True,
        suppress_callback_exceptions=True,
        assets_folder=str(Path(__file__).with_name("assets")),
    )
    if hosts:
        app.server.config["TRUSTED_HOSTS"] = list(hosts)
    session = lru_cache(maxsize=1)(lambda: RunSession(folder))
    logs = lru_cache(maxsize=1)(lambda: ReplayLogs(folder / RAW))

    def page() -> html.Div:
        try:
            kind = kind_of(folder)
            if kind == "run":
                body = run_layout(session())
            elif kind == "replay":
                logs()
                body = replay_layout()
            else:
                body = training_layout()
        except BiscaleError as error:
            body = html.Div(str(error), className="told")
        head = html.Header([html.H1(folder.name), html.Code(str(folder.resolve()))])
        return html.Div([head, body], className="page")

    app.layout = page
    register_run(app, session)
    register_training(app, folder)
    register_replay(app, folder, logs)
    return app


def serve(folder: Path, host: str = LOOPBACK, port: int = PORT) -> None:
    """Serve until interrupted.

    Args:
        folder: what to show.
        host: address to listen at; loopback keeps everybody else out.
        port: to listen at.

    Raises:
        BiscaleError: the folder holds nothing to show, or the address is taken or not ours.
    """
    local = is_loopback(host)
    app = make_app(folder, (host, LOOPBACK, "localhost") if local else ())
    must_be_free_address(host, port)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line per request
    app.logger.setLevel(logging.WARNING)
    app.run(host=host, port=str(port), debug=False)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def must_be_free_address(host: str, port: int) -> None:
    """Refuse an address before anything is started on it.

    Raises:
        BiscaleError: it is taken, or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise BiscaleError(
                f"cannot listen at {host} port {port}: {reason}; choose another --port or --host"
            ) from None
