"""Batches of raw columns out of JSON: lines, arrays, one document, results of benchmarks.

JSON lines with plain keys go through Arrow, everything else row by row through Python.
"""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.json

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.checks import Where
from biscale_env.traces.prompts.raw_blocks import json_types, row_blocks
from biscale_env.traces.prompts.session_files import DELAY, is_session_row, session_columns
from biscale_env.traces.request_classes import RequestClasses
from biscale_env.traces.rows import raw_columns
from biscale_env.traces.rows.benchmark_results import (
    as_float,
    benchmark_columns,
    is_aiperf_record,
    refuse_summary,
)
from biscale_env.traces.rows.failed_requests import arrow_type, failure_columns, row_failed
from biscale_env.traces.rows.json_documents import (
    Row,
    flat_row,
    has_layout,
    holds_rows,
    inner_rows,
    lists_of,
    merged_row,
)
from biscale_env.traces.rows.json_objects import JsonLineName, array_rows, json_object, line_rows
from biscale_env.traces.rows.layouts import (
    BLOCK_KEY,
    BLOCK_SIZES,
    N_COLUMNS,
    UNIT_KEY,
    Layout,
    find_layout,
)
from biscale_env.traces.rows.raw_columns import (
    ZONE,
    RawColumns,
    RowNumber,
    date_type,
    growing,
    raw_batch,
)
from biscale_env.traces.rows.text_files import (
    UTF8,
    UTF8_MARK,
    encoding_of,
    first_bytes,
    open_bytes,
    open_text,
)

Shape = Literal["lines", "array", "document"]
SAMPLE_ROWS: Final = 100  # rows, and characters of them, that tell the keys of a file
SAMPLE_CHARS: Final = 1 << 24


def json_batches(path: Path, **columns: Any) -> Iterator[RawColumns]:
    """Batches of a JSON file.

    One object per line, an array of objects, one object that holds such an array or arrays of
    numbers, or results of AIPerf and ``vllm bench serve``. Of other keys, ``hash_ids`` and those of
    sessions are kept.

    Args:
        path: file, may be compressed.
        columns: options of `find_layout`.

    Raises:
        BiscaleError: empty file, missing keys, or a malformed row with its line.
    """
    shape, first = _shape(path, columns)
    refuse_summary(path, first)
    if shape == "document":
        yield from _document_batches(path, first, columns)
    elif shape == "array":
        rows = enumerate(array_rows(path), start=1)
        yield from _row_batches(path, rows, "item", columns)
    elif is_aiperf_record(first):
        yield from _parsed_lines(path, columns)
    elif is_session_row(first) and _has_delays(path):
        with contextlib.closing(line_rows(path)) as lines:
            yield session_columns(path, lines)
    else:
        yield from _line_batches(path, first, columns)


def _shape(path: Path, columns: dict[str, Any]) -> tuple[Shape, Row]:
    """How the file is built, and its first object (of a document: all of it)."""
    with open_text(path) as file:
        line = next((text for text in file if text.strip()), "")
        if line.lstrip().startswith("["):
            return "array", {}
        first = json_object(line)
        rest = next((text for text in file if text.strip()), "")
    if first is not None:
        if is_aiperf_record(first) or not holds_rows(path, first, columns):
            return "lines", first
        if rest:
            raise BiscaleError(f"{path} holds several results, one per line: keep one of them")
        return "document", first
    if not rest:
        return "lines", {}
    with open_text(path) as file, contextlib.suppress(ValueError):
        whole = json.load(file)
        if isinstance(whole, dict):
            return "document", whole
    return "lines", {}


def _has_delays(path: Path) -> bool:
    """Whether turns of a session file say how long after the turn before they come."""
    with contextlib.closing(line_rows(path)) as rows:
        return any(DELAY in row for _, row in rows)


def _document_batches(path: Path, document: Row, columns: dict[str, Any]) -> Iterator[RawColumns]:
    """Batches of one object: rows under a key, or columns of its own."""
    rows = inner_rows(path, document, columns)
    if rows is not None:
        yield from _row_batches(path, enumerate(rows, start=1), "item", columns)
        return
    lists = lists_of(document)
    layout = find_layout(path, list(lists), **columns)
    lengths = {name: len(lists[name]) for name in layout.columns}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise BiscaleError(f"{path}: its columns are not equally long: {shown}")
    errors = document.get("errors")
    failed = None
    if isinstance(errors, list) and len(errors) == lengths[layout.time]:
        failed = np.array([bool(error) for error in errors])
    where = RowNumber(path, 1, "item")
    values = [_column(lists[name], name, where) for name in layout.columns]
    yield RawColumns(values[0], values[1], values[2], where, layout, failed)


def _row_batches(
    path: Path, rows: Iterable[tuple[int, Any]], what: str, columns: dict[str, Any]
) -> Iterator[RawColumns]:
    """Batches of parsed rows, each with its number in the file."""
    layout: Layout | None = None
    is_nested = False
    for chunk in _chunks(rows):
        numbers = np.array([number for number, _ in chunk])
        where = _Numbered(path, what, numbers)
        for number, row in chunk:
            if not isinstance(row, dict):
                raise BiscaleError(f"{path}, {what} {number}: malformed row: not a JSON object")
        if is_aiperf_record(chunk[0][1]):
            yield benchmark_columns([row for _, row in chunk], where)
            continue
        if (
            layout is None
            and len(lists_of(chunk[0][1])) >= N_COLUMNS
            and not has_layout(
                path, [k for k, v in chunk[0][1].items() if not isinstance(v, list)], columns
            )
        ):  # no row, but columns: a benchmark's result inside an array, or under a key
            if len(chunk) > 1:
                raise BiscaleError(f"{path} holds several results: keep one of them")
            refuse_summary(path, chunk[0][1])
            yield from _document_batches(path, chunk[0][1], columns)
            continue
        found = [row for _, row in chunk]
        if layout is None:
            sample = merged_row(found[:SAMPLE_ROWS])
            is_nested = not has_layout(path, list(sample), columns)
            sample = merged_row([flat_row(row) for row in found[:SAMPLE_ROWS]])
            layout = _told(find_layout(path, list(sample), **columns), sample)
        found = [flat_row(row) for row in found] if is_nested else found
        yield _raw_rows(found, layout, where)


def _parsed_lines(path: Path, columns: dict[str, Any], done: int = 0) -> Iterator[RawColumns]:
    """Batches of objects on a line each, from row ``done`` on."""
    with contextlib.closing(line_rows(path)) as rows:
        yield from _row_batches(path, itertools.islice(rows, done, None), "line", columns)


def _raw_rows(rows: list[Row], layout: Layout, where: Where) -> RawColumns:
    values = [_column([row.get(name) for row in rows], name, where) for name in layout.columns]
    name = layout.slo_class
    classes = RequestClasses.of([row.get(name) for row in rows]) if name else None
    names = list(dict.fromkeys(name for row in rows for name in row))
    blocks = row_blocks(rows, names, where)
    failed = row_failed(rows, names)
    return RawColumns(
        values[0], values[1], values[2], where, layout, failed, blocks=blocks, classes=classes
    )


def _chunks(rows: Iterable[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    source = iter(rows)
    while chunk := list(itertools.islice(source, raw_columns.BLOCK_ROWS)):
        yield chunk


@dataclass(frozen=True)
class _Numbered:
    path: Path
    what: str
    numbers: Any

    def __call__(self, i: int) -> str:
        return f"{self.path}, {self.what} {self.numbers[i]}"


def _column(values: list[Any], name: str, where: Where) -> Any:
    """Numbers or dates as an array.

    Raises:
        BiscaleError: a value is neither.
    """
    first = next((value for value in values if value is not None), None)
    kind = date_type(first) if isinstance(first, str) else None
    if kind is not None:
        return _dates(pa.array(values), kind, name, where)
    out = np.empty(len(values))
    for i, value in enumerate(values):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise BiscaleError(f"{where(i)}: {name} is missing or not a number")
        out[i] = np.nan if value is None else as_float(value)
    return out


def _dates(texts: pa.Array, kind: pa.DataType, name: str, where: Where) -> Any:
    """Nanoseconds since 1970 of dates in text."""
    try:
        return np.asarray(texts.cast(kind).cast(pa.int64()))
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        for i, text in enumerate(texts.to_pylist()):
            try:
                pa.array([text], pa.string()).cast(kind)
            except pa.ArrowInvalid:
                has = bool(ZONE.search(text.strip()))
                fault = "is not a date of the expected form"
                if date_type(text) is not None and has != (kind.tz is not None):
                    fault = f"has {'a' if has else 'no'} zone offset, unlike others"
                raise BiscaleError(f"{where(i)}: {name}: '{text}' {fault}") from None
        raise


def _line_batches(path: Path, first: Row, columns: dict[str, Any]) -> Iterator[RawColumns]:
    """One flat object per line, through Arrow."""
    sample = _sample(path) or first
    start = first_bytes(path)
    is_plain = encoding_of(start) == UTF8 and not start.startswith(UTF8_MARK)
    kinds = json_types(sample)
    if kinds is None or not is_plain or not has_layout(path, list(sample), columns):
        yield from _parsed_lines(path, columns)  # Arrow takes plain UTF-8 and rows only
        return
    layout = _told(find_layout(path, list(sample), **columns), sample)
    written = sample.get(layout.time)
    dated = date_type(written) if isinstance(written, str) else None
    kinds |= {name: pa.float64() for name in layout.columns}
    if layout.slo_class:
        kinds[layout.slo_class] = pa.string()
    for column in failure_columns(list(sample)):
        kinds[column.name] = arrow_type(sample[column.name]) or pa.string()
    if dated is not None:
        kinds[layout.time] = pa.string()
    done = 0
    try:
        for record in growing(lambda block, _: _json_records(path, kinds, block)):
            where = JsonLineName(path, done)
            done += record.num_rows
            if dated is None:
                yield raw_batch(record, layout, where)
                continue
            texts = record.column(record.schema.get_field_index(layout.time))
            at = record.schema.get_field_index(layout.time)
            stamps = pa.array(_dates(texts, dated, layout.time, where)).cast(pa.timestamp("ns"))
            yield raw_batch(record.set_column(at, layout.time, stamps), layout, where)
    except pa.ArrowInvalid as error:
        _refuse_first_fault(path, layout, dated is not None)
        if len(kinds) > N_COLUMNS:  # hashes or sessions that are not all alike: row by row
            yield from _parsed_lines(path, columns, done)
            return
        raise BiscaleError(
            f"{path} is not a readable JSON-lines file: {str(error).splitlines()[0]}"
        ) from None


def _sample(path: Path) -> Row:
    """A row with every key of the first rows: what is told late is told too."""
    rows: list[Row] = []
    chars = 0
    with open_text(path) as file:
        for text in file:
            chars += len(text)
            row = json_object(text)
            if row is not None:
                rows.append(row)
            if len(rows) == SAMPLE_ROWS or chars > SAMPLE_CHARS or (row is None and text.strip()):
                break
    return merged_row(rows)


def _told(layout: Layout, row: Row) -> Layout:
    """The layout with unit and block size that the row itself tells, as our own JSON lines do."""
    size = next((row[k] for k in (BLOCK_KEY, *BLOCK_SIZES) if isinstance(row.get(k), int)), None)
    if size is not None and size > 0:
        layout = replace(layout, block_told=size)
    unit = row.get(UNIT_KEY)
    if unit not in ("s", "ms", "us", "ns"):
        return layout
    return replace(layout, unit=unit, rival=None, keeps_zero=True)


def _json_records(
    path: Path, kinds: dict[str, pa.DataType], block_bytes: int
) -> Iterator[pa.RecordBatch]:
    options = pa.json.ParseOptions(
        explicit_schema=pa.schema(list(kinds.items())), unexpected_field_behavior="ignore"
    )
    reading = pa.json.ReadOptions(use_threads=False, block_size=block_bytes)
    with open_bytes(path) as file:
        yield from pa.json.open_json(file, reading, options)


def _refuse_first_fault(path: Path, layout: Layout, dated: bool) -> None:
    """Name the first row whose columns are not numbers, if there is one."""
    with contextlib.closing(line_rows(path)) as rows:
        for line, row in rows:
            for name in layout.columns:
                value = row.get(name)
                if dated and name == layout.time and isinstance(value, str):
                    continue
                if not isinstance(value, int | float) or isinstance(value, bool):
                    raise BiscaleError(
                        f"{path}, line {line}: {name} is missing or not a number"
                    ) from None
