"""Raw columns: what every reader yields, and the readers of Parquet; others build on it."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
from numpy.typing import ArrayLike, NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.checks import Where
from biscale_env.traces.prompts.raw_blocks import BlockColumns, RawBlocks, arrow_blocks
from biscale_env.traces.request_classes import RequestClasses
from biscale_env.traces.rows.failed_requests import arrow_failed, failure_columns
from biscale_env.traces.rows.layouts import BLOCK_KEY, META_KEY, Layout, find_layout

BLOCK_BYTES = 1 << 20
MOST_BLOCK_BYTES = 1 << 30  # longest line that can be read
BLOCK_ROWS = 1 << 18
ZONE = re.compile(r"(Z|[+-]\d\d(:?\d\d)?)$")
DATE = re.compile(r"\d+-.*:")
STRADDLES = "straddl"  # in Arrow's message about a row that is longer than a block


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
        blocks: what the rows say about the content of their prompts; None where nothing.
        classes: SLO class of each row; None where the file has none.
    """

    time: NDArray[Any]
    prompt: NDArray[np.float64]
    output: NDArray[np.float64]
    where: Where
    layout: Layout
    failed: NDArray[np.bool_] | None = None
    left_out: int = 0
    blocks: RawBlocks | None = None
    classes: RequestClasses | None = None

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
            blocks=None if self.blocks is None else self.blocks.rows(indices),
            classes=None if self.classes is None else self.classes.take(indices),
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
    """The three columns of an Arrow batch, and what it says about prompts."""
    time, prompt, output = (
        record.column(record.schema.get_field_index(name)) for name in layout.columns
    )
    blocks = arrow_blocks(record, where)
    at = -1 if layout.slo_class is None else record.schema.get_field_index(layout.slo_class)
    return RawColumns(
        _times(time),
        _numbers(prompt),
        _numbers(output),
        where,
        layout,
        arrow_failed(record),
        blocks=blocks,
        classes=None if at < 0 else _classes(record.column(at)),
    )


def _classes(column: Any) -> RequestClasses:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    told = column.cast(pa.string()).dictionary_encode()
    codes = pa.compute.fill_null(told.indices, -1).to_numpy(zero_copy_only=False)
    return RequestClasses.of_codes(told.dictionary.to_pylist(), codes)


def _times(column: Any) -> NDArray[Any]:
    column = _parsed_dates(column)
    if pa.types.is_timestamp(column.type):
        if column.null_count:
            return np.where(column.is_null().to_numpy(zero_copy_only=False), np.nan, 0.0)
        nanoseconds = column.cast(pa.timestamp("ns", column.type.tz)).cast(pa.int64())
        return np.asarray(nanoseconds.to_numpy(zero_copy_only=False))
    return _numbers(column)


def _parsed_dates(column: Any) -> Any:
    """Dates out of a column of text, which pandas leaves in Parquet where nobody parsed them."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column
    first = column.drop_null()
    kind = date_type(first[0].as_py()) if len(first) else None
    return column if kind is None else column.cast(kind)


def _numbers(column: Any) -> NDArray[np.float64]:
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


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
            told = file.schema_arrow.metadata or {}
            names = file.schema_arrow.names
            layout = replace(layout, block_told=int(told.get(BLOCK_KEY.encode(), b"0")) or None)
            wanted = [*layout.columns, *BlockColumns.of(names).all]
            wanted += [layout.slo_class] if layout.slo_class else []
            wanted += [column.name for column in failure_columns(names)]
            for record in file.iter_batches(BLOCK_ROWS, columns=list(dict.fromkeys(wanted))):
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
