"""``biscale dashboard``: a run in the browser."""

from pathlib import Path
from typing import Annotated

import typer

from biscale_env.core.errors import BiscaleError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("dashboard")(dashboard)


def dashboard(
    run: Annotated[
        Path, typer.Argument(help="Folder of compare, evaluate, replay or train.", metavar="RUN")
    ],
    *,
    host: Annotated[
        str, typer.Option(help="Address to listen at; the default keeps others out.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8050,
) -> None:
    """Scrub through a finished run, or follow a training run or a replay while it goes."""
    try:
        from biscale_env.dashboard.web_app import is_loopback, serve
    except ImportError as error:
        if error.name is None or error.name.startswith("biscale_env"):
            raise
        raise BiscaleError(
            f"the dashboard needs {error.name}: pip install 'biscale-env[dashboard]'"
        ) from None
    if not is_loopback(host):
        typer.echo(f"anyone who reaches {host} can read this run: there is no password", err=True)
    typer.echo(f"http://{host}:{port} shows {run}; Ctrl-C ends it")
    serve(run, host, port)
