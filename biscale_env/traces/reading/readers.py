"""Reading request traces as they are found: every known format, and files with named columns."""

import contextlib
import lzma
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.prompts.block_numbers import finished
from biscale_env.traces.prompts.prompt_blocks import PromptBlocks, joined
from biscale_env.traces.reading.arrivals_of_rows import RequestRows, checked_rows, tell_part
from biscale_env.traces.reading.formats import RowBatches, TraceFormat, format_of, read_batches
from biscale_env.traces.reading.reading_options import ReadingOptions
from biscale_env.traces.reading.recognised import Recognised
from biscale_env.traces.reading.time_units import mean_rate_rps
from biscale_env.traces.request_classes import RequestClasses
from biscale_env.traces.rows.json_objects import count_lines
from biscale_env.traces.rows.raw_columns import parquet_duration_s
from biscale_env.traces.trace import Trace

Joined = tuple[
    NDArray[np.float64],
    NDArray[np.int32],
    NDArray[np.int32],
    PromptBlocks | None,
    RequestClasses | None,
]


@dataclass(frozen=True)
class LoadedTrace:
    """A trace, and what was recognised in its file.

    Attributes:
        trace: the requests.
        recognised: None for a trace that was generated.
    """

    trace: Trace
    recognised: Recognised | None = None


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever a file that cannot be read raises becomes one sentence."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError):
        raise BiscaleError(f"{path} is a damaged archive") from None
    except UnicodeError:
        raise BiscaleError(f"{path} is not UTF-8 text and no Parquet file") from None
    except OSError as error:
        raise BiscaleError(f"cannot read {path}: {error.strerror or error}") from None


def _format(path: Path) -> TraceFormat:
    with _readable(path):
        return format_of(path)


def _batches(form: TraceFormat, path: Path, options: ReadingOptions) -> RowBatches:
    names = ("time_column", "prompt_column", "output_column", "class_column", "time_unit")
    columns = {name: getattr(options, name) for name in names}
    with _readable(path), contextlib.closing(read_batches(form, path, columns)) as batches:
        yield from batches


def _rows(
    form: TraceFormat, path: Path, options: ReadingOptions, about: Recognised
) -> Generator[RequestRows, None, None]:
    raw = _batches(form, path, options)
    with contextlib.closing(raw):
        yield from checked_rows(path, raw, options, about)


def stream_rows(
    path: Path, options: ReadingOptions | None, about: Recognised
) -> Generator[RequestRows, None, None]:
    """Requests of a sorted file, piece by piece.

    Times count from the start of the part that was asked for.

    Args:
        path: the file.
        options: how to read it, but for ``sort``.
        about: what was recognised, filled meanwhile.

    Raises:
        BiscaleError: as `read_trace`, when the faulty row is reached.
    """
    options = options or ReadingOptions()
    if options.sort:
        raise BiscaleError(
            f"{path} is read piece by piece, which cannot sort it: sort it once with 'biscale "
            "traces convert --sort'"
        )
    with contextlib.closing(_rows(_format(path), path, options, about)) as pieces:
        for piece in pieces:
            if piece.arrival_s.size:
                yield piece.after(piece.part_s[0])


def join_rows(rows: list[RequestRows]) -> Joined:
    """Times, prompt and output lengths, blocks and classes of consecutive pieces."""
    classes = [r.classes for r in rows if r.classes is not None]
    blocks = [r.blocks for r in rows if r.blocks is not None]
    return (
        np.concatenate([r.arrival_s for r in rows]),
        np.concatenate([r.prompt_tokens for r in rows]),
        np.concatenate([r.output_tokens for r in rows]),
        joined(blocks) if len(blocks) == len(rows) else None,
        RequestClasses.joined(classes) if len(classes) == len(rows) else None,
    )


def _options(options: ReadingOptions | None, given: dict[str, Any]) -> ReadingOptions:
    if not given:
        return options or ReadingOptions()
    from biscale_env.config.loader import validate

    base = (options or ReadingOptions()).model_dump()
    return validate(base | given, ReadingOptions, "options of a trace")


def read_trace(
    path: str | Path,
    name: str | None = None,
    options: ReadingOptions | None = None,
    **given: Any,
) -> Trace:
    """Read a trace file; its format follows from what is in it.

    Formats of installed packages go first, see :mod:`biscale_env.traces.reading.formats`. Times
    count from the first request, but for our own schema, whose zero is kept. An output of 0 tokens
    is read as 1, since prefill itself makes the first token; how many there were stands in
    ``source``.
    `load_file` says what was recognised.

    Args:
        path: CSV, JSON (either may be compressed: gzip, bzip2, Zstandard, xz, lz4) or Parquet.
        name: name of the trace, default the file's.
        options: how to read it.
        given: single options of
            :class:`~biscale_env.traces.reading.reading_options.ReadingOptions`: ``time_column``,
            ``prompt_column``, ``output_column``, ``time_unit`` (s, ms, us, ns) of
            other headers, ``sort``, ``start``, ``stop``, ``drop_failed``.

    Raises:
        BiscaleError: one sentence that names the file, the line and the field.
    """
    return load_file(path, name, options, **given).trace


def load_file(
    path: str | Path,
    name: str | None = None,
    options: ReadingOptions | None = None,
    **given: Any,
) -> LoadedTrace:
    """Read a trace file as `read_trace`, with what was recognised in it.

    Raises:
        BiscaleError: as `read_trace`.
    """
    path, options = Path(path), _options(options, given)
    form, about = _format(path), Recognised(str(path))
    rows = [part for part in _rows(form, path, options, about) if part.arrival_s.size]
    if not rows:
        raise BiscaleError(_nothing(path, options, about, form.name != "jsonl"))
    trace = _trace(rows, path, name, options, about)
    duration_s = 0.0
    if form.name == "parquet" and not (options.sort and about.part):
        # what was observed to the end of the part
        first_s, last_s = rows[0].part_s
        duration_s = max(min(parquet_duration_s(path), last_s) - first_s, 0.0)
    first_line = _first_line(path, form, rows, options, about)
    trace = replace(trace, duration_s=max(duration_s, trace.duration_s), first_line=first_line)
    late_s = 0.0 if about.part else float(trace.arrival_s[0])
    about.tell(mean_rate_rps(trace.arrival_s), late_s)
    return LoadedTrace(trace, about)


def _nothing(
    path: Path, options: ReadingOptions, about: Recognised, has_header: bool = True
) -> str:
    if about.rows_dropped:
        return f"{path}: no request is left without the {about.rows_dropped} rows that failed"
    if about.part:
        return f"{path} has no request in the {about.part}"
    return f"{path} holds {'a header but ' if has_header else ''}no request"


def _trace(
    rows: list[RequestRows],
    path: Path,
    name: str | None,
    options: ReadingOptions,
    about: Recognised,
) -> Trace:
    arrival_s, prompt, output, blocks, classes = join_rows(rows)
    (first_s, last_s), is_cut = rows[0].part_s, rows[-1].is_cut
    if options.sort:
        order = np.argsort(arrival_s, kind="stable")
        arrival_s, prompt, output = arrival_s[order], prompt[order], output[order]
        blocks = None if blocks is None else blocks.take(order)
        classes = None if classes is None else classes.take(order)
        shift_s = 0.0 if rows[0].keeps_zero else float(arrival_s[0])
        first_s, last_s = _from_the_earliest(shift_s, options, about)
        arrival_s = arrival_s - shift_s
        is_cut = bool(arrival_s[-1] >= last_s)
        inside = slice(*np.searchsorted(arrival_s, (first_s, last_s)))
        arrival_s, prompt, output = arrival_s[inside], prompt[inside], output[inside]
        blocks = None if blocks is None else blocks.take(inside)
        classes = None if classes is None else classes.take(inside)
        if not arrival_s.size:
            raise BiscaleError(_nothing(path, options, about))
    about.requests = int(arrival_s.size)
    source = str(path) + (
        f"; {about.zero_outputs} outputs of 0 tokens read as 1" if about.zero_outputs else ""
    )
    source += f"; {about.part}" if about.part else ""
    arrival_s = arrival_s - first_s
    for column in (arrival_s, prompt, output):
        column.setflags(write=False)
    observed_s = last_s - first_s if is_cut else 0.0
    title = name or path.name.split(".")[0]
    blocks = finished(blocks)
    return Trace(
        title, arrival_s, prompt, output, source, observed_s, blocks=blocks, classes=classes
    )


def _from_the_earliest(
    shift_s: float, options: ReadingOptions, about: Recognised
) -> tuple[float, float]:
    """The part of a file that was sorted: its start is the earliest request, not the first row."""
    if about.origin_unix_s is None:
        about.offset_s += shift_s
    else:
        about.origin_unix_s += shift_s
    part_s = options.part_s(about.origin_unix_s, about.file)
    tell_part(part_s, about)
    return part_s


def _first_line(
    path: Path,
    form: TraceFormat,
    rows: list[RequestRows],
    options: ReadingOptions,
    about: Recognised,
) -> int:
    """Line of the first request where every line behind it holds one request, else 0."""
    if options.sort or about.rows_dropped:
        return 0
    if form.name == "jsonl" and not about.part:
        return 1 if count_lines(path) == about.requests else 0
    return rows[0].first_line if form.name == "csv" else 0


def iter_trace(
    path: str | Path,
    window_s: float,
    name: str | None = None,
    options: ReadingOptions | None = None,
    **given: Any,
) -> Iterator[Trace]:
    """Read a long file as successive windows, holding one window (and one read buffer) in memory.

    Window k holds the arrivals in ``[k window_s, (k + 1) window_s)``, counted from its start.
    Windows without requests are yielded too; the last one ends with the last arrival. Options and
    errors are those of `read_trace`.

    Args:
        path: CSV, JSON-lines or Parquet file, sorted by time.
        window_s: length of a window, s.
        name: name of the trace, default the file's.
        options: how to read it, but for ``sort``.
        given: as in `read_trace`.

    Raises:
        BiscaleError: as `read_trace`, when the faulty row is reached.
    """
    if not 0 < window_s < np.inf:
        raise BiscaleError(f"a window must last a positive time, got {window_s:g} s")
    path, options = Path(path), _options(options, given)
    name = name or path.name.split(".")[0]
    about = Recognised(str(path))
    held: list[RequestRows] = []
    k = 0
    with contextlib.closing(stream_rows(path, options, about)) as pieces:
        for rows in pieces:
            held.append(rows)
            while held[-1].arrival_s.size and held[-1].arrival_s[-1] >= (k + 1) * window_s:
                cut = int(np.searchsorted(held[-1].arrival_s, (k + 1) * window_s))
                first = [*held[:-1], held[-1].part(slice(0, cut))]
                yield _window(first, name, path, k, window_s, window_s)
                held = [held[-1].part(slice(cut, None))]
                k += 1
    if not held:
        raise BiscaleError(_nothing(path, options, about))
    yield _window(held, name, path, k, window_s, float(held[-1].arrival_s[-1]) - k * window_s)


def _window(
    rows: list[RequestRows], name: str, path: Path, k: int, window_s: float, duration_s: float
) -> Trace:
    arrival_s, prompt, output, blocks, classes = join_rows(rows)
    title = f"{name}[{k * window_s:g}:{k * window_s + duration_s:g}s]"
    relative_s = np.clip(arrival_s - k * window_s, 0.0, duration_s)
    return Trace(
        title,
        relative_s,
        prompt,
        output,
        str(path),
        duration_s=duration_s,
        blocks=finished(blocks),
        classes=classes,
    )
