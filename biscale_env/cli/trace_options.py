"""The options of reading a trace, the same in every command that takes one."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Annotated, Any, Final

import typer

from biscale_env.cli.added_options import with_options

if TYPE_CHECKING:
    from biscale_env.traces.reading.reading_options import ReadingOptions

PANEL: Final = "How the trace is read"
LOGGER: Final = "biscale_env.traces"
READING: Final = "reading"  # the parameter of a command that the options are handed over in


def _option(name: str, help_: str) -> Any:
    return typer.Option(name, help=help_, rich_help_panel=PANEL)


_TEXTS: Final = {
    "time_column": ("--time-column", "Column of the arrival time, where it is not recognised."),
    "prompt_column": ("--prompt-column", "Column of the prompt length."),
    "output_column": ("--output-column", "Column of the output length."),
    "class_column": ("--class-column", "Column of SLO classes; default: slo_class, if there."),
    "time_unit": ("--time-unit", "Unit of a numeric time: s, ms, us or ns."),
    "block_tokens": ("--block-tokens", "Tokens of a block of hash_ids, if not as recognised."),
    "start": ("--from", "Use requests from here on: 600, 15min, 2h, 1d, or a date."),
    "stop": ("--to", "Use requests before this, written as for --from."),
}
_FLAGS: Final = {
    "sort": ("--sort", "Accept unsorted times and sort them."),
    "drop_failed": ("--drop-failed", "Leave out requests without an answer (or output)."),
}


def reads_trace(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of reading a trace.

    The command has a parameter ``reading``, which the user does not see: it receives
    :class:`~biscale_env.traces.reading.reading_options.ReadingOptions`. What was recognised in a
    file is told on stdout, or on stderr where the output is for a program (``--json``).
    """

    def call(mine: dict[str, Any], given: dict[str, Any]) -> None:
        from biscale_env.config.loader import validate
        from biscale_env.traces.reading.reading_options import ReadingOptions

        reading = validate(mine, ReadingOptions, "options of the trace")
        # what another program reads on stdout stays clean
        machine = given.get("as_json") or given.get("as_profile")
        with told_on(sys.stderr if machine else sys.stdout):
            command(**given, **{READING: reading})

    texts = {name: (Annotated[str | None, _option(*words)], None) for name, words in _TEXTS.items()}
    flags = {name: (Annotated[bool, _option(*words)], False) for name, words in _FLAGS.items()}
    return with_options(command, READING, {**texts, **flags}, call)


class _Telling(logging.Handler):
    """Prints every sentence once, in the process of the command only."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(logging.INFO)
        self._stream = stream
        self._process = os.getpid()
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        sentence = record.getMessage()
        if os.getpid() == self._process and sentence not in self._told:
            self._told.add(sentence)
            print(sentence, file=self._stream)


@contextmanager
def told_on(stream: IO[str]) -> Iterator[None]:
    """What readers recognise is printed on a stream meanwhile."""
    logger, handler = logging.getLogger(LOGGER), _Telling(stream)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def only_given(reading: "ReadingOptions") -> "ReadingOptions | None":
    """The options, or None where none was given."""
    return None if reading.is_default else reading
