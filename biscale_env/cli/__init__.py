"""The ``biscale`` command: assembles the command groups and turns mistakes into one sentence and
exit code 2.
"""

import importlib
import importlib.util
import signal
import sys
import warnings
from typing import Any

import typer

from biscale_env.core.errors import BiscaleError, BiscaleWarning

GROUPS = (
    "predict",
    "fit",
    "traces",
    "capacity",
    "compare",
    "place",
    "reproduce",
    "train",
    "evaluate",
    "hw",
    "bench",
)
INTERRUPTED = 130

app = typer.Typer(
    name="biscale",
    help="Energy control of disaggregated LLM serving: compare controllers, train agents, replay on hardware.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def build() -> typer.Typer:
    """Register every command group that is part of this installation and return the application."""
    if not app.registered_commands and not app.registered_groups:
        for group in GROUPS:
            if importlib.util.find_spec(f"biscale_env.cli.{group}_command"):
                importlib.import_module(f"biscale_env.cli.{group}_command").register(app)
    return app


def say_warnings() -> None:
    """Print our own warnings as a sentence on stderr, without the place in the source."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, BiscaleWarning):
            print(f"biscale: {message}", file=sys.stderr)
        else:
            usual(message, category, *where, **more)

    warnings.showwarning = show


def main() -> None:
    """Entry point: errors of the user and files that cannot be used are one sentence on stderr and
    exit code 2, Ctrl-C is 130.
    """
    # a polite kill ends like Ctrl-C, and so does a closed terminal (but not under nohup): what is
    # finished is kept, clocks are given back
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    say_warnings()
    try:
        build()()
    except BiscaleError as error:
        print(f"biscale: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:  # not about a file that was named
            raise
        print(
            f"biscale: cannot use {error.filename}: {(error.strerror or 'it failed').lower()}",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("biscale: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
