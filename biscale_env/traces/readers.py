"""Reading request traces: Azure, Mooncake, any file with named columns, and installed formats."""

import contextlib
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.checks import check_lengths, check_times
from biscale_env.traces.formats import RowBatches, TraceFormat, format_of, read_batches
from biscale_env.traces.layouts import NS_PER_UNIT
from biscale_env.traces.raw_columns import count_lines, parquet_duration_s
from biscale_env.traces.trace import Trace

UNIX_TIME_S = 1e8


@dataclass(frozen=True)
class _Rows:
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    zero_outputs: int

    def part(self, rows: slice) -> "_Rows":
        return _Rows(
            self.arrival_s[rows],
            self.prompt_tokens[rows],
            self.output_tokens[rows],
            self.zero_outputs,
        )


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever a file that cannot be read raises becomes one sentence."""
    try:
        yield
    except (EOFError, zlib.error):
        raise BiscaleError(f"{path} is a damaged archive") from None
    except UnicodeDecodeError:
        raise BiscaleError(f"{path} is not UTF-8 text and no Parquet file") from None
    except OSError as error:
        raise BiscaleError(f"cannot read {path}: {error.strerror or error}") from None


def _format(path: Path) -> TraceFormat:
    with _readable(path):
        return format_of(path)


def _batches(form: TraceFormat, path: Path, columns: dict[str, Any]) -> RowBatches:
    with _readable(path), contextlib.closing(read_batches(form, path, columns)) as batches:
        yield from batches


def _rows(
    form: TraceFormat, path: Path, columns: dict[str, Any], is_sorted: bool = True
) -> Generator[_Rows, None, None]:
    """Checked batches.

    Dates and Unix times are counted from the first request, other numbers are kept.
    """
    origin: Any = None
    is_relative = False
    last_s = -np.inf
    for batch in _batches(form, path, columns):
        if not batch.time.size:
            continue
        layout = batch.layout
        is_date = batch.time.dtype.kind == "i"
        scale = 1 if is_date else NS_PER_UNIT[layout.unit]
        if origin is None:
            is_relative = is_date or bool(batch.time[0] * (scale / 1e9) >= UNIX_TIME_S)
            origin = batch.time[0] if is_relative else 0
        arrival_s = (batch.time - origin) / (1_000_000_000 / scale)
        check_times(arrival_s, batch.where, layout.time, last_s, is_sorted, is_relative)
        check_lengths(batch.prompt, layout.prompt, batch.where)
        check_lengths(batch.output, layout.output, batch.where, minimum=0)
        zeros = int(np.count_nonzero(batch.output == 0))
        yield _Rows(
            arrival_s,
            batch.prompt.astype(np.int32),
            np.maximum(batch.output, 1).astype(np.int32),
            zeros,
        )
        last_s = float(arrival_s[-1])


def _join(rows: list[_Rows]) -> tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.int32]]:
    return (
        np.concatenate([r.arrival_s for r in rows]),
        np.concatenate([r.prompt_tokens for r in rows]),
        np.concatenate([r.output_tokens for r in rows]),
    )


def _trace(
    rows: list[_Rows], path: Path, name: str | None, first_line: int, sort: bool = False
) -> Trace:
    arrival_s, prompt, output = _join(rows)
    if sort:
        order = np.argsort(arrival_s, kind="stable")
        arrival_s, prompt, output = (
            arrival_s[order] - min(0.0, arrival_s.min()),
            prompt[order],
            output[order],
        )
    zeros = sum(r.zero_outputs for r in rows)
    source = str(path) + (f"; {zeros} outputs of 0 tokens read as 1" if zeros else "")
    for column in (arrival_s, prompt, output):
        column.setflags(write=False)
    return Trace(
        name or path.name.split(".")[0], arrival_s, prompt, output, source, first_line=first_line
    )


def _first_line(path: Path, form: TraceFormat, n_rows: int) -> int:
    """Line of the first request where every line behind it holds one request, else 0."""
    if form.name == "jsonl":
        return 1 if count_lines(path) == n_rows else 0
    return 2 if form.name == "csv" else 0


def read_trace(
    path: str | Path, name: str | None = None, sort: bool = False, **columns: Any
) -> Trace:
    """Read a trace file; its format follows from the suffix (else the first bytes) and the header.

    Formats of installed packages go first, see :mod:`biscale_env.traces.formats`. Dates and Unix
    times are counted from the first request, other times are kept. An output of 0 tokens is read as
    1, since prefill itself makes the first token; how many there were stands in ``source``.

    Args:
        path: CSV, JSON-lines (either may be ``.gz`` or ``.bz2``) or Parquet file.
        name: name of the trace, default the file's.
        sort: accept unsorted times and sort them, instead of refusing the file.
        columns: ``time_column``, ``prompt_column``, ``output_column``, ``time_unit`` (s, ms, us,
            ns) of other headers.

    Raises:
        BiscaleError: one sentence that names the file, the line and the field.
    """
    path = Path(path)
    form = _format(path)
    rows = list(_rows(form, path, columns, is_sorted=not sort))
    if not rows:
        raise BiscaleError(f"{path} holds a header but no request")
    trace = _trace(
        rows,
        path,
        name,
        0 if sort else _first_line(path, form, sum(len(r.arrival_s) for r in rows)),
        sort,
    )
    duration_s = parquet_duration_s(path) if form.name == "parquet" else 0.0
    return replace(trace, duration_s=max(duration_s, trace.duration_s))


def iter_trace(
    path: str | Path, window_s: float, name: str | None = None, **columns: Any
) -> Iterator[Trace]:
    """Read a long file as successive windows, holding one window (and one read buffer) in memory.

    Window k holds the arrivals in ``[k window_s, (k + 1) window_s)``, counted from its start.
    Windows without requests are yielded too; the last one ends with the last arrival. Options and
    errors are those of `read_trace`.

    Args:
        path: CSV, JSON-lines or Parquet file, sorted by time.
        window_s: length of a window, s.
        name: name of the trace, default the file's.
        columns: as in `read_trace`.

    Raises:
        BiscaleError: as `read_trace`, when the faulty row is reached.
    """
    if not 0 < window_s < np.inf:
        raise BiscaleError(f"a window must last a positive time, got {window_s:g} s")
    path = Path(path)
    name = name or path.name.split(".")[0]
    held: list[_Rows] = []
    k = 0
    with contextlib.closing(_rows(_format(path), path, columns)) as batches:
        for rows in batches:
            held.append(rows)
            while held[-1].arrival_s.size and held[-1].arrival_s[-1] >= (k + 1) * window_s:
                cut = int(np.searchsorted(held[-1].arrival_s, (k + 1) * window_s))
                first = [*held[:-1], held[-1].part(slice(0, cut))]
                yield _window(first, name, path, k, window_s, window_s)
                held = [held[-1].part(slice(cut, None))]
                k += 1
    if not held:
        raise BiscaleError(f"{path} holds a header but no request")
    yield _window(held, name, path, k, window_s, float(held[-1].arrival_s[-1]) - k * window_s)


def _window(
    rows: list[_Rows], name: str, path: Path, k: int, window_s: float, duration_s: float
) -> Trace:
    arrival_s, prompt, output = _join(rows)
    title = f"{name}[{k * window_s:g}:{k * window_s + duration_s:g}s]"
    relative_s = np.clip(arrival_s - k * window_s, 0.0, duration_s)
    return Trace(title, relative_s, prompt, output, str(path), duration_s=duration_s)
