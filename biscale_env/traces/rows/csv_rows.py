"""Batches of raw columns out of CSV files, however their rows are written, with little memory."""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.csv

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.prompts.raw_blocks import BlockColumns
from biscale_env.traces.rows.failed_requests import failure_columns
from biscale_env.traces.rows.layouts import find_layout
from biscale_env.traces.rows.raw_columns import (
    MOST_BLOCK_BYTES,
    RawColumns,
    RowNumber,
    date_type,
    growing,
    raw_batch,
)
from biscale_env.traces.rows.text_files import UTF8, encoding_of, first_bytes, open_bytes, open_text

FORMS: Final = " (1234.5, or 2024-05-10 08:00:00.25 with or without a zone)"
DELIMITERS: Final = ",;\t|"
LOOK_ROWS: Final = 100  # rows that tell how a file is written
BLANK: Final = " \t\r\n\x1a"  # the last: an end of file of old
DECIMAL_COMMA: Final = re.compile(r"[-+]?\d+,\d+$")
ARROW_ROW: Final = re.compile(
    r"(?:In CSV column #(?P<column>\d+): )?Row #(?P<row>\d+): (?P<what>.*)", re.DOTALL
)


@dataclass(frozen=True)
class _CsvLook:
    """How a CSV file is written: its header and the line of that, its separators, some rows."""

    header: list[str]
    header_line: int
    delimiter: str
    rows: list[list[str]]
    quoted: bool

    @property
    def sample(self) -> dict[str, str]:
        """The first row."""
        return dict(zip(self.header, self.rows[0], strict=False)) if self.rows else {}

    def decimal(self, names: Sequence[str]) -> str:
        """The decimal point of some columns, a comma in some countries."""
        if self.delimiter == ",":
            return "."
        at = [self.header.index(name) for name in names]
        cells = [row[k].strip() for row in self.rows for k in at if k < len(row)]
        return "," if any(DECIMAL_COMMA.match(cell) for cell in cells) else "."


def _look(path: Path) -> _CsvLook:
    """Find the header: behind blank lines, comments and a line ``sep=;`` of spreadsheets."""
    limit = csv.field_size_limit(MOST_BLOCK_BYTES)
    try:
        # what is no text plays no role in columns that nobody reads
        with open_text(path, "surrogateescape") as file:
            line, text, delimiter = 0, "", ""
            for text in file:
                line += 1
                told = re.fullmatch(r'"?sep=(.)"?', text.strip(), re.IGNORECASE)
                delimiter = told[1] if told else delimiter
                if text.strip() and not told and not text.startswith("#"):
                    break
            text.encode()  # names of columns are text
            delimiter = delimiter or max(DELIMITERS, key=text.count)
            header = next(csv.reader([text], delimiter=delimiter), [])
            rows = list(itertools.islice(csv.reader(file, delimiter=delimiter), LOOK_ROWS))
            text += "".join(cell for row in rows for cell in row)
            quoted = '"' in text or any("\n" in cell for row in rows for cell in row)
    finally:
        csv.field_size_limit(limit)
    return _CsvLook([name.strip() for name in header], line, delimiter, rows, quoted)


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
    if layout.slo_class:
        types[layout.slo_class] = pa.string()
    types |= {column.name: pa.string() for column in failure_columns(look.header)}
    if (blocks := BlockColumns.of(look.header)).hashes:
        types |= {name: pa.string() for name in blocks.all}
    decimal = look.decimal(layout.columns)
    try:
        records = _without_blank_end(
            growing(lambda block, again: _csv_records(path, look, types, decimal, block, again))
        )
        for record in records:
            yield raw_batch(record, layout, RowNumber(path, line, "line"))
            line += record.num_rows
    except pa.ArrowInvalid as error:
        raise BiscaleError(_csv_fault(path, look.header, str(error))) from None


def _csv_records(
    path: Path,
    look: _CsvLook,
    types: dict[str, pa.DataType],
    decimal: str,
    block_bytes: int,
    again: bool,
) -> Iterator[pa.RecordBatch]:
    encoding = encoding_of(first_bytes(path))
    options = (
        pa.csv.ReadOptions(
            use_threads=False,
            block_size=block_bytes,
            column_names=look.header,
            skip_rows=look.header_line,
            encoding="utf8" if encoding == UTF8 else encoding,
        ),
        pa.csv.ParseOptions(
            delimiter=look.delimiter,
            ignore_empty_lines=False,
            newlines_in_values=look.quoted or again,
            invalid_row_handler=lambda row: "error" if row.text.strip(BLANK) else "skip",
        ),
        pa.csv.ConvertOptions(
            include_columns=list(types), column_types=types, decimal_point=decimal
        ),
    )
    with open_bytes(path) as file, pa.csv.open_csv(file, *options) as stream:
        yield from stream


def _without_blank_end(
    records: Iterable[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    """Records without the blank rows at the end of the file.

    Blank rows inside the file stay: they are faults, and are named with their line.
    """
    held: list[pa.RecordBatch] = []
    for record in records:
        last = record.num_rows
        told = [column for column in record.columns if not pa.types.is_string(column.type)]
        while last and all(not column[last - 1].is_valid for column in told):
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
    if value := re.search(r"invalid value ('.*')", what):
        fault = f"{value[1]} is not a number or date of the expected form{FORMS}"
    elif zone := re.search(r"expected (no|a) zone offset in ('.*?')", what):
        fault = f"{zone[2]} has {'a' if zone[1] == 'no' else 'no'} zone offset, unlike others"
    else:
        fault = what
    return f"{path}, line {found['row']}: {field}{fault}"
