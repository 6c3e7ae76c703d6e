"""Batches of raw columns out of JSON: lines, arrays, one document, results of benchmarks.

JSON lines with plain keys go through Arrow, everything else row by row through Python.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.json

from biscale_env.core.errors import BiscaleError
from biscale_env.traces import raw_columns
from biscale_env.traces.benchmark_results import (
    as_float,
    benchmark_columns,
    is_aiperf_record,
    refuse_summary,
)
from biscale_env.traces.checks import Where
from biscale_env.traces.layouts import UNIT_KEY, Layout, find_layout
from biscale_env.traces.raw_columns import RawColumns, RowNumber, date_type, growing, raw_batch
from biscale_env.traces.text_files import UTF8_MARK, UTF16, first_bytes, open_bytes, open_text

Shape = Literal["lines", "array", "document"]
READ_CHARS: Final = 1 << 20
WRAPPERS: Final = ("requests", "data", "records", "trace", "traces", "items")

N_COLUMNS: Final = 3  # time, prompt, output
Row = dict[str, Any]


def json_batches(path: Path, **columns: Any) -> Iterator[RawColumns]:
    """Batches of a JSON file.

    One object per line, an array of objects, one object that holds such an array or arrays of
    numbers, or results of AIPerf and ``vllm bench serve``. Other keys, such as ``hash_ids``, are
    not kept.

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
        rows = enumerate(_array_rows(path), start=1)
        yield from _row_batches(path, rows, "item", columns)
    elif is_aiperf_record(first):
        with contextlib.closing(_json_rows(path)) as lines:
            yield from _row_batches(path, lines, "line", columns)
    else:
        yield from _line_batches(path, first, columns)


def _shape(path: Path, columns: dict[str, Any]) -> tuple[Shape, Row]:
    """How the file is built, and its first object (of a document: all of it)."""
    with open_text(path) as file:
        line = next((text for text in file if text.strip()), "")
        if line.lstrip().startswith("["):
            return "array", {}
        first = _object(line)
        rest = next((text for text in file if text.strip()), "")
    if first is not None:
        if is_aiperf_record(first) or not _holds_rows(path, first, columns):
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


def _holds_rows(path: Path, first: Row, columns: dict[str, Any]) -> bool:
    """Whether an object is no row, but holds rows or columns."""
    with contextlib.suppress(BiscaleError):
        find_layout(path, [k for k, v in first.items() if not isinstance(v, list)], **columns)
        return False
    inner = any(isinstance(first.get(name), list) for name in (*WRAPPERS, "experiments"))
    return inner or len(_lists(first)) >= N_COLUMNS


def _object(text: str) -> Row | None:
    with contextlib.suppress(ValueError):
        row = json.loads(text)
        return row if isinstance(row, dict) else None
    return None


def _lists(document: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Keys that hold lists of numbers (or of dates): columns, where three of them are."""
    return {
        key: value
        for key, value in document.items()
        if isinstance(value, list) and (not value or isinstance(value[0], int | float | str))
    }


def _document_batches(path: Path, document: Row, columns: dict[str, Any]) -> Iterator[RawColumns]:
    """Batches of one object: rows under a key, or columns of its own."""
    rows = next((document[k] for k in WRAPPERS if isinstance(document.get(k), list)), None)
    if rows is not None:
        yield from _row_batches(path, enumerate(rows, start=1), "item", columns)
        return
    lists = _lists(document)
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
    for chunk in _chunks(rows):
        numbers = np.array([number for number, _ in chunk])
        where = _Numbered(path, what, numbers)
        for number, row in chunk:
            if not isinstance(row, dict):
                raise BiscaleError(f"{path}, {what} {number}: malformed row: not a JSON object")
        if is_aiperf_record(chunk[0][1]):
            yield benchmark_columns([row for _, row in chunk], where)
            continue
        first = chunk[0][1]
        layout = layout or _told_unit(find_layout(path, list(first), **columns), first)
        values = [
            _column([row.get(name) for _, row in chunk], name, where) for name in layout.columns
        ]
        yield RawColumns(values[0], values[1], values[2], where, layout)


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
    kind = date_type(values[0]) if values and isinstance(values[0], str) else None
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
                raise BiscaleError(
                    f"{where(i)}: {name}: '{text}' is not a date of the expected form"
                ) from None
        raise


def _line_batches(path: Path, first: Row, columns: dict[str, Any]) -> Iterator[RawColumns]:
    """One flat object per line, through Arrow."""
    layout = find_layout(path, list(first), **columns)
    layout = _told_unit(layout, first)
    sample = first.get(layout.time)
    dated = date_type(sample) if isinstance(sample, str) else None
    kinds = {name: pa.float64() for name in layout.columns}
    if dated is not None:
        kinds[layout.time] = pa.string()
    start = first_bytes(path)
    if start[:2] in UTF16 or start.startswith(UTF8_MARK):  # Arrow takes plain UTF-8 only
        with contextlib.closing(_json_rows(path)) as lines:
            yield from _row_batches(path, lines, "line", columns)
        return
    done = 0
    try:
        for record in growing(lambda block, _: _json_records(path, kinds, block)):
            where = _JsonLineName(path, done)
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
        raise BiscaleError(
            f"{path} is not a readable JSON-lines file: {str(error).splitlines()[0]}"
        ) from None


def _told_unit(layout: Layout, row: Row) -> Layout:
    """The layout with the unit that the row itself tells, as our own JSON lines do."""
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
    with contextlib.closing(_json_rows(path)) as rows:
        for line, row in rows:
            for name in layout.columns:
                value = row.get(name)
                if dated and name == layout.time and isinstance(value, str):
                    continue
                if not isinstance(value, int | float) or isinstance(value, bool):
                    raise BiscaleError(
                        f"{path}, line {line}: {name} is missing or not a number"
                    ) from None


def count_lines(path: Path) -> int:
    """Lines of a text file, which may be compressed; one without an end counts too."""
    count, last = 0, b"\n"
    with open_bytes(path) as file:
        while piece := file.read(READ_CHARS):
            count, last = count + piece.count(b"\n"), piece[-1:]
    return count + (last != b"\n")


def _json_rows(path: Path) -> Generator[tuple[int, Row], None, None]:
    with open_text(path) as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            row = _object(text)
            if row is None:
                raise BiscaleError(f"{path}, line {line}: malformed row: not a JSON object")
            yield line, row


def _json_row(path: Path, k: int) -> tuple[int, Row]:
    """Line and content of JSON row ``k``, counted from 0; (0, {}) behind the last."""
    with contextlib.closing(_json_rows(path)) as rows:
        return next(itertools.islice(rows, k, None), (0, {}))


@dataclass(frozen=True)
class _JsonLineName:
    """Name of a row; blank lines are allowed, so its line is counted when an error needs it."""

    path: Path
    done: int

    def __call__(self, i: int) -> str:
        return f"{self.path}, line {_json_row(self.path, self.done + i)[0]}"


def _array_rows(path: Path) -> Iterator[Any]:
    """Items of a JSON array, parsed one after the other as the file is read.

    Raises:
        BiscaleError: an item cannot be parsed.
    """
    decoder = json.JSONDecoder()
    between = re.compile(r"[\s,]*")
    with open_text(path) as file:
        text, at, count, wanted = file.read(READ_CHARS), 0, 0, READ_CHARS
        at = text.index("[") + 1
        while True:
            at = between.match(text, at).end()  # type: ignore[union-attr]
            if text.startswith("]", at):
                return
            try:
                item, end = decoder.raw_decode(text, at)
                if end == len(text):  # a number may go on in the next part
                    raise ValueError
            except ValueError:
                more = file.read(wanted)
                if not more:
                    raise BiscaleError(
                        f"{path}, item {count + 1}: malformed row: not a JSON object"
                    ) from None
                # an item that is longer than what was read: read twice as much the next time
                text, at, wanted = text[at:] + more, 0, 2 * wanted
                continue
            yield item
            at, count, wanted = end, count + 1, READ_CHARS
