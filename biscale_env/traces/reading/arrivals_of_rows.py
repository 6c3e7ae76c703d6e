"""From raw columns to checked requests: unit, offset, failed rows, the part asked for."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.checks import check_lengths, check_times
from biscale_env.traces.prompts.block_numbers import BlockNumbers
from biscale_env.traces.prompts.prompt_blocks import PromptBlocks
from biscale_env.traces.reading.reading_options import ReadingOptions
from biscale_env.traces.reading.recognised import Recognised
from biscale_env.traces.reading.time_units import UnitChoice, choose_unit, known_unit
from biscale_env.traces.request_classes import RequestClasses
from biscale_env.traces.rows.layouts import NS_PER_UNIT
from biscale_env.traces.rows.raw_columns import RawColumns, RowNumber

ADVICE = " (--drop-failed leaves out requests without an answer)"
WHOLE_S = (0.0, float("inf"))


@dataclass(frozen=True)
class RequestRows:
    """Checked requests, some consecutive ones.

    Attributes:
        arrival_s: times after the trace's start, shape (n,), s.
        prompt_tokens: prompt lengths.
        output_tokens: output lengths, at least 1.
        part_s: first and last time of the part that was asked for, s after the trace's start.
        is_cut: a request behind the part was seen, so that the part was observed to its end.
        keeps_zero: the start is the file's own zero, not the first request.
        first_line: line of the first of these rows; 0 where it is not known.
        blocks: blocks of the prompts, numbered alike in all pieces; None where nobody knows them.
        classes: SLO class of each request; None where nobody says.
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    part_s: tuple[float, float] = WHOLE_S
    is_cut: bool = False
    keeps_zero: bool = False
    first_line: int = 0
    blocks: PromptBlocks | None = None
    classes: RequestClasses | None = None

    def part(self, rows: slice) -> "RequestRows":
        """Some of these rows."""
        return replace(
            self,
            arrival_s=self.arrival_s[rows],
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            first_line=self.first_line + (rows.start or 0) if self.first_line else 0,
            blocks=None if self.blocks is None else self.blocks.take(rows),
            classes=None if self.classes is None else self.classes.take(rows),
        )

    def after(self, start_s: float) -> "RequestRows":
        """The same rows with times counted from ``start_s``."""
        return replace(self, arrival_s=self.arrival_s - start_s) if start_s else self


@dataclass
class _FileTime:
    """How the times of a file become seconds after its start; fixed by its first rows."""

    origin: float
    per_second: float
    is_relative: bool
    keeps_zero: bool


def checked_rows(
    path: Path, batches: Iterable[RawColumns], options: ReadingOptions, about: Recognised
) -> Generator[RequestRows, None, None]:
    """Checked batches of the part that was asked for.

    Reading ends behind the part; unsorted files (``sort``) are read whole, and their part is left
    to the caller.

    Args:
        path: the file, for messages.
        batches: its rows.
        options: how to read them.
        about: what was recognised, filled here.

    Raises:
        BiscaleError: a value breaks a rule; one sentence that names the row.
    """
    if options.time_unit is not None:
        known_unit(options.time_unit)
    clock: _FileTime | None = None
    numbers: BlockNumbers | None = None
    part_s = WHOLE_S
    last_s = -np.inf
    for raw in batches:
        batch = _kept(raw, options, about)
        if not batch.time.size:
            continue
        if clock is None:
            clock = _clock(path, batch, options, about)
            told = options.block_tokens or batch.layout.block_told
            numbers = BlockNumbers(str(path), batch.layout.block_tokens, told)
            if not options.sort:  # else the earliest request is not known yet
                part_s = options.part_s(about.origin_unix_s, str(path))
                tell_part(part_s, about)
        arrival_s = _seconds(batch, clock, last_s, options)
        _check_answers(batch)
        last_s = float(arrival_s[-1])
        rows = _cut(batch, arrival_s, clock, part_s, numbers)
        if numbers is not None and numbers.block_tokens:
            about.block_tokens = numbers.block_tokens
            about.has_sessions = numbers.is_told
        about.zero_outputs += int(np.count_nonzero(rows[1] == 0))
        about.requests += rows[0].arrival_s.size
        if rows[0].classes is not None:
            about.classes = tuple(dict.fromkeys([*about.classes, *rows[0].classes.names]))
        yield rows[0]
        if rows[0].is_cut:
            return


def _kept(raw: RawColumns, options: ReadingOptions, about: Recognised) -> RawColumns:
    """The rows of a batch that count as requests."""
    about.rows_dropped += raw.left_out
    if not options.drop_failed:
        if raw.failed is not None:
            about.failed_kept += int(np.count_nonzero(raw.failed & (raw.output > 0)))
        return raw
    failed = ~(raw.output > 0) | np.isnan(raw.prompt)  # -1 stands for no answer here and there
    if raw.failed is not None:
        failed |= raw.failed
    about.rows_dropped += int(np.count_nonzero(failed))
    return raw.rows(np.flatnonzero(~failed)) if failed.any() else raw


def _clock(path: Path, batch: RawColumns, options: ReadingOptions, about: Recognised) -> _FileTime:
    layout = batch.layout
    is_date = batch.time.dtype.kind == "i"
    if is_date:
        choice = UnitChoice("ns", "", True)
    else:
        choice = choose_unit(path, layout, batch.time, options.time_unit)
    per_second = 1e9 / NS_PER_UNIT[choice.unit]
    first = batch.time[0]
    about.format = layout.title or "an installed format"
    about.time_unit = "dates" if is_date else choice.unit
    about.unit_because = choice.because
    if choice.is_unix and np.isfinite(float(first)):
        about.origin_unix_s = float(first) / per_second
    starts_at_zero = layout.is_named and float(first) <= float(np.ptp(batch.time))
    keeps_zero = (layout.keeps_zero or starts_at_zero) and not choice.is_unix
    origin = 0 if keeps_zero else first
    if not keeps_zero and not choice.is_unix and np.isfinite(float(first)):
        about.offset_s = float(first) / per_second
    return _FileTime(origin, per_second, choice.is_unix, keeps_zero)


def _seconds(
    batch: RawColumns, clock: _FileTime, last_s: float, options: ReadingOptions
) -> NDArray[np.float64]:
    """Checked times after the trace's start, s."""
    field = batch.layout.time
    if not clock.is_relative:  # a negative time is named as it stands in the file
        written_s = batch.time / clock.per_second
        check_times(written_s, batch.where, field, is_sorted=False)
    arrival_s = (batch.time - clock.origin) / clock.per_second
    check_times(
        arrival_s,
        batch.where,
        field,
        last_s,
        not options.sort,
        is_relative=not clock.keeps_zero,
        advice="; --sort sorts them",
    )
    return np.asarray(arrival_s)


def _check_answers(batch: RawColumns) -> None:
    """Check the lengths.

    Raises:
        BiscaleError: a length breaks the rules, or a request failed and has none.
    """
    if batch.failed is not None:
        missing = batch.failed & (np.isnan(batch.output) | np.isnan(batch.prompt))
        if missing.any():
            raise BiscaleError(
                f"{batch.where(int(np.argmax(missing)))}: the request failed and has no lengths; "
                "leave such requests out with --drop-failed"
            )
    check_lengths(batch.prompt, batch.layout.prompt, batch.where)
    check_lengths(batch.output, batch.layout.output, batch.where, 0, ADVICE)


def _cut(
    batch: RawColumns,
    arrival_s: NDArray[np.float64],
    clock: _FileTime,
    part_s: tuple[float, float],
    numbers: BlockNumbers | None,
) -> tuple[RequestRows, NDArray[np.float64]]:
    """The rows inside the part, and their outputs as they stand in the file."""
    first, stop = 0, arrival_s.size
    if part_s != WHOLE_S:  # and so the times are sorted
        first, stop = (int(i) for i in np.searchsorted(arrival_s, part_s))
    inside = slice(first, stop)
    line = batch.where.first_row if isinstance(batch.where, RowNumber) else 0
    output = batch.output[inside]
    prompts, outputs = batch.prompt.astype(np.int32), np.maximum(batch.output, 1).astype(np.int32)
    blocks = None
    if batch.blocks is not None and numbers is not None:
        blocks = numbers.blocks(batch.blocks, prompts, outputs, batch.where)
    rows = RequestRows(
        arrival_s[inside],
        prompts[inside],
        outputs[inside],
        part_s,
        bool(stop < arrival_s.size),
        clock.keeps_zero,
        line + first if line else 0,
        None if blocks is None else blocks.take(inside),
        None if batch.classes is None else batch.classes.take(inside),
    )
    return rows, output


def tell_part(part_s: tuple[float, float], about: Recognised) -> None:
    """Note the part that is read, unless it is the whole."""
    first_s, last_s = part_s
    if part_s == WHOLE_S:
        return
    end = "its end" if last_s == float("inf") else f"{last_s:g} s"
    about.part = f"part from {first_s:g} s to {end} of the trace, times count from {first_s:g} s"
