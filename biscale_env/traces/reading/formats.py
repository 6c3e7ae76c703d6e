"""Trace formats: which reader a file gets, the built-in ones and those of installed packages.

A package adds a format with an entry point of the group ``biscale.trace_formats``::

    [project.entry-points."biscale.trace_formats"]
    burst = "burst_traces:FORMAT"

that names a :class:`TraceFormat`::

    def batches(path, **columns):
        times_s, prompts, outputs = ...  # arrays of the next requests of the file
        yield RawColumns.of(path, times_s, prompts, outputs)

    FORMAT = TraceFormat(lambda path, head: head.startswith(b"BURST"), batches)

What it yields is checked like any other file: finite times that rise, whole lengths of at least 1.
"""

import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Final, Protocol

from biscale_env.core.errors import BiscaleError, BiscaleWarning
from biscale_env.traces.rows.csv_rows import csv_batches
from biscale_env.traces.rows.json_rows import json_batches
from biscale_env.traces.rows.raw_columns import RawColumns, parquet_batches
from biscale_env.traces.rows.text_files import HEAD_BYTES, UTF16, FileFormat, text_format

ENTRY_POINTS: Final = "biscale.trace_formats"

RowBatches = Generator[RawColumns, None, None]


class Batches(Protocol):
    """Reads a file in batches of consecutive rows."""

    def __call__(self, path: Path, **columns: str | None) -> Iterator[RawColumns]:
        """Batches of a file.

        Args:
            path: the file.
            columns: options of :func:`biscale_env.traces.read_trace` that name columns; a format
                that knows its own may ignore them.

        Raises:
            BiscaleError: the file is not what it should be; one sentence with the line.
        """


@dataclass(frozen=True)
class TraceFormat:
    """How to tell a file and how to read it.

    Attributes:
        recognises: whether a file is of this format, from its path and its first ``HEAD_BYTES``
            bytes (as they are on the disk, compressed or not).
        batches: reads it.
        name: for messages; that of the entry point.
    """

    recognises: Callable[[Path, bytes], bool]
    batches: Batches
    name: str = ""


def _is(kind: FileFormat) -> Callable[[Path, bytes], bool]:
    return lambda path, head: text_format(path, head) == kind


BUILT_IN: Final = (
    TraceFormat(_is("csv"), csv_batches, "csv"),
    TraceFormat(_is("jsonl"), json_batches, "jsonl"),
    TraceFormat(_is("parquet"), parquet_batches, "parquet"),
)


def installed_formats() -> tuple[TraceFormat, ...]:
    """Formats of installed packages, by the name of their entry points."""
    return _installed(tuple(sys.path))


@lru_cache(maxsize=4)
def _installed(_: tuple[str, ...]) -> tuple[TraceFormat, ...]:
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    found = (_loaded(point) for point in sorted(points, key=lambda point: point.name))
    return tuple(form for form in found if form is not None)


def _loaded(point: importlib.metadata.EntryPoint) -> TraceFormat | None:
    """The format of an entry point; a broken one is warned about and left out."""
    try:
        made = point.load()
        fault = f"it is a {type(made).__name__} and no TraceFormat"
    except Exception as error:  # whatever an import of foreign code raises
        made, fault = None, f"{type(error).__name__}: {error}"
    if isinstance(made, TraceFormat):
        return replace(made, name=point.name)
    warnings.warn(
        f"trace format '{point.name}' ({point.value}) is left out: {fault}",
        BiscaleWarning,
        stacklevel=2,
    )
    return None


def format_of(path: Path) -> TraceFormat:
    """The format of a file: the first installed one that recognises it, else a built-in one.

    Raises:
        BiscaleError: no such file, an empty one, or a format that fails to look at it.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise BiscaleError(f"there is no trace file {path}")
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head.strip() or head in UTF16:
        raise BiscaleError(f"{path} is empty; a trace needs a header and at least one request")
    for form in installed_formats():
        try:
            mine = form.recognises(path, head)
        except Exception as error:  # foreign code
            raise _failed(form, path, error) from error
        if mine:
            return form
    return next(form for form in BUILT_IN if form.recognises(path, head))


def read_batches(form: TraceFormat, path: Path, columns: dict[str, str | None]) -> RowBatches:
    """Batches of a file; a foreign reader that fails is one sentence.

    Raises:
        BiscaleError: see :class:`Batches`.
        OSError: the file cannot be read.
    """
    if form in BUILT_IN:
        yield from form.batches(path, **columns)
        return
    try:
        yield from form.batches(path, **columns)
    except (BiscaleError, OSError):
        raise
    except Exception as error:  # foreign code
        raise _failed(form, path, error) from error


def _failed(form: TraceFormat, path: Path, error: Exception) -> BiscaleError:
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    return BiscaleError(f"{path}: the installed trace format '{form.name}' fails: {said}")
