"""The ``biscale`` command: its groups, and mistakes as one sentence and exit code 2."""

import contextlib
import errno
import importlib
import importlib.util
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import typer

from biscale_env.core.errors import BiscaleError, BiscaleWarning

GROUPS = (
    "predict",
    "models",
    "fit",
    "traces",
    "capacity",
    "compare",
    "place",
    "reproduce",
    "train",
    "offline",
    "evaluate",
    "benchmark",
    "export",
    "dashboard",
    "hw",
)
INTERRUPTED = 130

app = typer.Typer(
    name="biscale",
    help="Energy control of disaggregated LLM serving: compare controllers, train agents, replay "
    "on hardware.",
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


@contextlib.contextmanager
def polite_process() -> Iterator[None]:
    """Signals and warnings as a command has them, put back at its end.

    A polite kill ends like Ctrl-C, and so does a closed terminal (but not under nohup): what is
    finished is kept, clocks are reset. Our own warnings are a sentence on stderr, without the
    place in the source.
    """
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():  # others may not set handlers
        for number in ending_signals():
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, signal.default_int_handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show(warnings.showwarning)
            with _any_encoding(sys.stdout, sys.stderr):
                yield
    finally:
        for ended, handler in before.items():
            signal.signal(ended, handler)


@contextlib.contextmanager
def _any_encoding(*streams: object) -> Iterator[None]:
    """A letter that an output cannot encode is a question mark, not a traceback: code pages."""
    strict = [s for s in streams if isinstance(s, io.TextIOWrapper) and s.errors == "strict"]
    for stream in strict:
        stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        for stream in strict:
            with contextlib.suppress(OSError, ValueError):  # full, or closed meanwhile
                stream.reconfigure(errors="strict")


def ending_signals() -> list[signal.Signals]:
    """The signals that ask a command to end; SIGHUP where the system has it."""
    names = ("SIGTERM", "SIGHUP")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def _show(usual: Callable[..., None]) -> Callable[..., None]:
    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, BiscaleWarning):
            print(f"biscale: {message}", file=sys.stderr)
        else:
            usual(message, category, *where, **more)

    return show


def main() -> None:
    """Entry point of the command.

    Errors of the user and files that cannot be used are one sentence on stderr and exit code 2,
    Ctrl-C is 130.
    """
    with polite_process():
        _run()


def _run() -> None:
    try:
        try:
            build()()
        finally:
            if sys.stdout is not None:  # closed by the caller
                sys.stdout.flush()  # a disk that is full under the output is told here, not at exit
    except BiscaleError as error:
        print(f"biscale: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        _tell_os_error(error)
    except KeyboardInterrupt:
        print("biscale: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _tell_os_error(error: OSError) -> NoReturn:
    """End with one sentence about a file, or about a disk that is full wherever that was.

    Raises:
        OSError: it says neither: a fault of ours.
    """
    if error.filename is None and error.errno == errno.EPIPE:  # nobody reads the output any more
        _drop_output()
        sys.exit(1)
    full = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    if error.filename is None and error.errno not in full:
        raise error
    reason = (error.strerror or "it failed").lower()
    if error.filename is None:
        _drop_output()
        print(f"biscale: a file or the output cannot be written: {reason}", file=sys.stderr)
    else:
        print(f"biscale: cannot use {error.filename}: {reason}", file=sys.stderr)
    sys.exit(2)


def _drop_output() -> None:
    """Let what is left of the output go nowhere: flushing it at exit must not fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
