"""Batches of raw columns out of CSV and Parquet files, with little memory."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import ArrayLike, NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.checks import Where
from biscale_env.traces.layouts import META_KEY, Layout, find_layout
from biscale_env.traces.text_files import open_bytes, open_text

BLOCK_BYTES = 1 << 20
MOST_BLOCK_BYTES = 1 << 30  # longest line that can be read
BLOCK_ROWS = 1 << 18
DELIMITERS = ",;\t|"
ZONE = re.compile(r"(Z|[+-]\d\d(:?\d\d)?)$")
DATE = re.compile(r"\d+-.*:")
DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+$")
STRADDLES = "straddl"  # in Arrow's message about a row that is longer than a block
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
        failed: requests that the file says got no answer, bool; None where it does not say.
        left_out: rows that the reader left out, since they are no requests of the workload.
    """

    time: NDArray[Any]
    prompt: NDArray[np.float64]
    output: NDArray[np.float64]
    where: Where
    layout: Layout
    failed: NDArray[np.bool_] | None = None
    left_out: int = 0

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
        layout = Layout("time", "prompt", "output", title="", keeps_zero=True)
        return cls(time, prompts, outputs, RowNumber(path, first_row), layout)

    def rows(self, kept: NDArray[np.intp] | slice) -> "RawColumns":
        """Some of these rows."""
        indices = np.arange(self.time.size)[kept]
        return replace(
            self,
            time=self.time[kept],
            prompt=self.prompt[kept],
            output=self.output[kept],
            where=ChosenRow(self.where, indices),
            failed=None if self.failed is None else self.failed[kept],
        )


@dataclass(frozen=True)
class RowNumber:
    """Names a row by its number, counted from 1."""

    path: Path
    first_row: int
    what: str = "row"

    def __call__(self, i: int) -> str:
        """Words for row ``i`` of the batch."""
        return f"{self.path}, {self.what} {self.first_row + i}"


@dataclass(frozen=True)
class ChosenRow:
    """Names one of the rows that were kept."""

    where: Where
    indices: NDArray[np.intp]

    def __call__(self, i: int) -> str:
        """Words for kept row ``i``."""
        return self.where(int(self.indices[i]))


def date_type(sample: str) -> pa.DataType | None:
    """Type of a column of dates that look like the sample; None where it is no date."""
    text = sample.strip()
    if not DATE.match(text):
        return None
    return pa.timestamp("ns", "UTC" if ZONE.search(text) else None)


def raw_batch(record: Any, layout: Layout, where: Where) -> RawColumns:
    """The three columns of an Arrow batch."""
    time, prompt, output = (
        record.column(record.schema.get_field_index(name)) for name in layout.columns
    )
    return RawColumns(_times(time), _numbers(prompt), _numbers(output), where, layout)


def _times(column: Any) -> NDArray[Any]:
    if pa.types.is_timestamp(column.type):
        if column.null_count:
            return np.where(column.is_null().to_numpy(zero_copy_only=False), np.nan, 0.0)
        nanoseconds = column.cast(pa.timestamp("ns", column.type.tz)).cast(pa.int64())
        return np.asarray(nanoseconds.to_numpy(zero_copy_only=False))
    return _numbers(column)


def _numbers(column: Any) -> NDArray[np.float64]:
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


@dataclass(frozen=True)
class _CsvLook:
    """How a CSV file is written: its header and the line of that, its separators."""

    header: list[str]
    header_line: int
    delimiter: str
    sample: dict[str, str]
    quoted: bool

    @property
    def decimal(self) -> str:
        """The decimal point, a comma in some countries."""
        if self.delimiter == ",":
            return "."
        return "," if any(DECIMAL_COMMA.match(v.strip()) for v in self.sample.values()) else "."


def _look(path: Path) -> _CsvLook:
    """Find the header: behind blank lines, comments and a line ``sep=;`` of spreadsheets."""
    limit = csv.field_size_limit(MOST_BLOCK_BYTES)
    try:
        with open_text(path) as file:
            line, text, delimiter = 0, "", ""
            for text in file:
                line += 1
                told = re.fullmatch(r'"?sep=(.)"?', text.strip(), re.IGNORECASE)
                delimiter = told[1] if told else delimiter
                if text.strip() and not told and not text.startswith("#"):
                    break
            delimiter = delimiter or max(DELIMITERS, key=text.count)
            header = next(csv.reader([text], delimiter=delimiter), [])
            first = next(csv.reader(file, delimiter=delimiter), None)
            text += "".join(first or [])
            quoted = '"' in text or (first is not None and any("\n" in cell for cell in first))
    finally:
        csv.field_size_limit(limit)
    names = [name.strip() for name in header]
    sample = dict(zip(names, first or [], strict=False))
    return _CsvLook(names, line, delimiter, sample, quoted)


def csv_batches(path: Path, **columns: Any) -> Iterator[RawColumns]:
    """Batches of a CSV file with a header line; separators are ``,``, ``;``, tab or ``|``.

    Blank lines at the end are no rows. A row may be as long as a gigabyte.

    Args:
        path: file, may be compressed.
        columns: options of `find_layout`.

    Raises:
        BiscaleError: empty file, wrong header, or a malformed row with its line.
    """
    look = _look(path)
    layout = find_layout(path, look.header, **columns)
    sample = look.sample.get(layout.time)
    line = look.header_line + 1
    if sample is not None and not sample.strip() and any(v.strip() for v in look.sample.values()):
        raise BiscaleError(f"{path}, line {line}: {layout.time} is missing or not a finite number")
    if sample is None and not look.sample:  # a header alone
        return
    types = {layout.prompt: pa.float64(), layout.output: pa.float64(), layout.time: pa.float64()}
    types[layout.time] = date_type(sample or "") or pa.float64()
    try:
        records = _without_blank_end(
            growing(lambda block, again: _csv_records(path, look, types, block, again))
        )
        for record in records:
            yield raw_batch(record, layout, RowNumber(path, line, "line"))
            line += record.num_rows
    except pa.ArrowInvalid as error:
        raise BiscaleError(_csv_fault(path, look.header, str(error))) from None


def _csv_records(
    path: Path, look: _CsvLook, types: dict[str, pa.DataType], block_bytes: int, again: bool
) -> Iterator[pa.RecordBatch]:
    with path.open("rb") as file:
        encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf8"
    options = (
        pa.csv.ReadOptions(
            use_threads=False,
            block_size=block_bytes,
            column_names=look.header,
            skip_rows=look.header_line,
            encoding=encoding,
        ),
        pa.csv.ParseOptions(
            delimiter=look.delimiter,
            ignore_empty_lines=False,
            newlines_in_values=look.quoted or again,
            invalid_row_handler=lambda row: "error" if row.text.strip() else "skip",
        ),
        pa.csv.ConvertOptions(
            include_columns=list(types), column_types=types, decimal_point=look.decimal
        ),
    )
    with open_bytes(path) as file, pa.csv.open_csv(file, *options) as stream:
        yield from stream


def growing(read: Callable[[int, bool], Iterator[pa.RecordBatch]]) -> Iterator[pa.RecordBatch]:
    """Read in blocks that grow where a row does not fit into one.

    Arrow refuses a row that is longer than a block; what was read before it is not given twice.

    Args:
        read: opens the file and reads it in blocks of so many bytes; the second argument asks for
            a second try, after a row that could not be read: a field may hold line ends.

    Raises:
        pyarrow.ArrowInvalid: the file cannot be read, or a row is longer than a gigabyte.
    """
    block_bytes, done = BLOCK_BYTES, 0
    fault: pa.ArrowInvalid | None = None
    while True:
        skip = done
        try:
            for record in read(block_bytes, fault is not None):
                fresh = record.slice(min(skip, record.num_rows))
                skip -= record.num_rows - fresh.num_rows
                done += fresh.num_rows
                if fresh.num_rows:
                    yield fresh
            return
        except pa.ArrowInvalid as error:
            if STRADDLES in str(error) and block_bytes < MOST_BLOCK_BYTES:
                block_bytes = min(16 * block_bytes, MOST_BLOCK_BYTES)
            elif fault is None:
                fault = error
            else:  # no better the second time
                raise fault from None


def _without_blank_end(
    records: Iterable[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    """Records without the blank rows at the end of the file.

    Blank rows inside the file stay: they are faults, and are named with their line.
    """
    held: list[pa.RecordBatch] = []
    for record in records:
        last = record.num_rows
        while last and all(not column[last - 1].is_valid for column in record.columns):
            last -= 1
        if last:
            yield from held
            held = []
            yield record.slice(0, last)
        if last < record.num_rows:
            held.append(record.slice(last))


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
    what = found["what"].splitlines()[0][:160]
    value = re.search(r"invalid value ('.*')", what)
    fault = f"{value[1]} is not a number or date of the expected form" if value else what
    return f"{path}, line {found['row']}: {field}{fault}"


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
                yield raw_batch(record, layout, RowNumber(path, row))
                row += record.num_rows
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise BiscaleError(
            f"{path} is not a readable Parquet trace: {str(error).splitlines()[0]}"
        ) from None


def parquet_duration_s(path: Path) -> float:
    """Observed duration that `write_trace` noted in a Parquet file, s; 0 where there is none."""
    meta = pa.parquet.read_schema(path).metadata or {}
    return float(meta.get(META_KEY.encode(), b"0"))
