"""Batches of raw columns out of CSV, JSON lines and Parquet files, with little memory."""

import bz2
import contextlib
import csv
import gzip
import itertools
import json
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from numpy.typing import ArrayLike, NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.checks import Where
from biscale_env.traces.layouts import META_KEY, Layout, find_layout

BLOCK_BYTES = 1 << 20
BLOCK_ROWS = 1 << 18
ZONE = re.compile(r"(Z|[+-]\d\d:?\d\d)$")
ARROW_ROW = re.compile(
    r"(?:In CSV column #(?P<column>\d+): )?Row #(?P<row>\d+): (?P<what>.*)", re.DOTALL
)


@dataclass(frozen=True)
class RawColumns:
    """Some consecutive rows.

    Attributes:
        time: int64 nanoseconds since the epoch where the column holds dates, else float64 in the
            unit of the layout.
        prompt: prompt lengths as they stand in the file, float64.
        output: output lengths, float64.
        where: names a row of this batch.
        layout: columns of the file.
    """

    time: NDArray[Any]
    prompt: NDArray[np.float64]
    output: NDArray[np.float64]
    where: Where
    layout: Layout

    @classmethod
    def of(
        cls,
        path: Path,
        time_s: ArrayLike,
        prompt: ArrayLike,
        output: ArrayLike,
        first_row: int = 1,
    ) -> Self:
        """Rows of a format of one's own.

        Args:
            path: the file, for messages.
            time_s: arrival times, shape (n,), s; from 1e8 on they are Unix times.
            prompt: prompt lengths, shape (n,), tokens.
            output: output lengths, shape (n,), tokens.
            first_row: number of the first of these rows in the file, counted from 1.
        """
        time, prompts, outputs = (np.asarray(c, dtype=np.float64) for c in (time_s, prompt, output))
        where = _RowNumber(path, first_row)
        return cls(time, prompts, outputs, where, Layout("time", "prompt", "output"))


def _open(path: Path) -> IO[str]:
    opener: Callable[..., IO[str]] = {".gz": gzip.open, ".bz2": bz2.open}.get(
        path.suffix.lower(), open
    )  # type: ignore[assignment]
    return opener(path, mode="rt", encoding="utf-8-sig", newline="")


def _times(column: pa.ChunkedArray | pa.Array) -> NDArray[Any]:
    if pa.types.is_timestamp(column.type):
        if column.null_count:
            return np.where(column.is_null().to_numpy(zero_copy_only=False), np.nan, 0.0)
        return (
            column.cast(pa.timestamp("ns", column.type.tz))
            .cast(pa.int64())
            .to_numpy(zero_copy_only=False)
        )
    return _numbers(column)


def _numbers(column: pa.Array) -> NDArray[np.float64]:
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def _batch(record: pa.RecordBatch, layout: Layout, where: Where) -> RawColumns:
    time, prompt, output = (
        record.column(record.schema.get_field_index(name)) for name in layout.columns
    )
    return RawColumns(_times(time), _numbers(prompt), _numbers(output), where, layout)


def csv_batches(path: Path, **columns: Any) -> Iterator[RawColumns]:
    """Batches of a CSV file with a header line.

    Args:
        path: file, may be compressed (``.gz``, ``.bz2``).
        columns: options of `find_layout`.

    Raises:
        BiscaleError: empty file, wrong header, or a malformed row with its line.
    """
    with _open(path) as file:
        rows = csv.reader(file)
        header, first = [name.strip() for name in next(rows, [])], next(rows, None)
    layout = find_layout(path, header, **columns)
    types = {layout.prompt: pa.float64(), layout.output: pa.float64(), layout.time: pa.float64()}
    sample = dict(zip(header, first or [], strict=False)).get(layout.time, "").strip()
    if first is not None and not sample:
        raise BiscaleError(f"{path}, line 2: {layout.time} is missing or not a finite number")
    if "-" in sample[1:] and ":" in sample:
        types[layout.time] = pa.timestamp("ns", "UTC" if ZONE.search(sample) else None)
    try:
        options = (
            pa.csv.ReadOptions(
                use_threads=False, block_size=BLOCK_BYTES, column_names=header, skip_rows=1
            ),
            pa.csv.ParseOptions(ignore_empty_lines=False),
            pa.csv.ConvertOptions(include_columns=list(layout.columns), column_types=types),
        )
        with (
            pa.input_stream(str(path), compression="detect") as file,
            pa.csv.open_csv(file, *options) as stream,
        ):
            line = 2
            for record in stream:
                yield _batch(record, layout, _LineName(path, line))
                line += record.num_rows
    except pa.ArrowInvalid as error:
        raise BiscaleError(_csv_fault(path, header, str(error))) from None


@dataclass(frozen=True)
class _LineName:
    path: Path
    first_line: int

    def __call__(self, i: int) -> str:
        return f"{self.path}, line {self.first_line + i}"


def _csv_fault(path: Path, header: list[str], message: str) -> str:
    found = ARROW_ROW.search(message)
    if not found:
        return f"{path} is not a readable CSV file: {message.splitlines()[0]}"
    column = found["column"]
    field = (
        f"{header[int(column)]}: "
        if column is not None and int(column) < len(header)
        else "malformed row: "
    )
    what = found["what"].splitlines()[0]
    value = re.search(r"invalid value ('.*')", what)
    fault = f"{value[1]} is not a number or date of the expected form" if value else what
    return f"{path}, line {found['row']}: {field}{fault}"


def jsonl_batches(path: Path, **columns: Any) -> Iterator[RawColumns]:
    """Batches of a file with one JSON object per line.

    Other keys, such as ``hash_ids``, are not kept.

    Args:
        path: file, may be compressed (``.gz``, ``.bz2``).
        columns: options of `find_layout`.

    Raises:
        BiscaleError: empty file, missing keys, or a malformed row with its line.
    """
    first = _json_row(path, 0)[1]
    layout = find_layout(path, list(first), **columns)
    schema = pa.schema([(name, pa.float64()) for name in layout.columns])
    options = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    done = 0
    try:
        with pa.input_stream(str(path), compression="detect") as file:
            for record in pa.json.open_json(
                file, pa.json.ReadOptions(use_threads=False, block_size=BLOCK_BYTES), options
            ):
                yield _batch(record, layout, _JsonLineName(path, done))
                done += record.num_rows
    except pa.ArrowInvalid as error:
        _refuse_first_fault(path, layout)
        raise BiscaleError(
            f"{path} is not a readable JSON-lines file: {str(error).splitlines()[0]}"
        ) from None


def _refuse_first_fault(path: Path, layout: Layout) -> None:
    """Name the first row whose columns are not numbers, if there is one."""
    with contextlib.closing(_json_rows(path)) as rows:
        for line, row in rows:
            for name in layout.columns:
                if not isinstance(row.get(name), int | float) or isinstance(row.get(name), bool):
                    raise BiscaleError(
                        f"{path}, line {line}: {name} is missing or not a number"
                    ) from None


def count_lines(path: Path) -> int:
    """Lines of a text file, which may be compressed."""
    with _open(path) as file:
        return sum(1 for _ in file)


def _json_rows(path: Path) -> Generator[tuple[int, dict[str, Any]], None, None]:
    with _open(path) as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise BiscaleError(f"{path}, line {line}: malformed row: not a JSON object")
            yield line, row


def _json_row(path: Path, k: int) -> tuple[int, dict[str, Any]]:
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


def parquet_batches(path: Path, **columns: Any) -> Iterator[RawColumns]:
    """Batches of a Parquet file; rows are named by their number, counted from 1.

    Args:
        path: file.
        columns: options of `find_layout`.

    Raises:
        BiscaleError: not Parquet, missing columns, or a column that does not hold numbers.
    """
    try:
        with pa.parquet.ParquetFile(path) as file:
            layout = find_layout(path, file.schema_arrow.names, **columns)
            row = 1
            for record in file.iter_batches(BLOCK_ROWS, columns=list(layout.columns)):
                yield _batch(record, layout, _RowNumber(path, row))
                row += record.num_rows
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise BiscaleError(
            f"{path} is not a readable Parquet trace: {str(error).splitlines()[0]}"
        ) from None


def parquet_duration_s(path: Path) -> float:
    """Observed duration that `write_trace` noted in a Parquet file, s; 0 where there is none."""
    meta = pa.parquet.read_schema(path).metadata or {}
    return float(meta.get(META_KEY.encode(), b"0"))


@dataclass(frozen=True)
class _RowNumber:
    path: Path
    first_row: int

    def __call__(self, i: int) -> str:
        return f"{self.path}, row {self.first_row + i}"
