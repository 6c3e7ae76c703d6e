"""Which columns of a file hold the time and the lengths.

The known layouts and their detection from the header.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from biscale_env.core.errors import BiscaleError

TimeUnit = Literal["s", "ms", "us", "ns"]
FileFormat = Literal["csv", "jsonl", "parquet"]

NS_PER_UNIT: dict[str, int] = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1000, "ns": 1}
SUFFIXES: dict[str, FileFormat] = {
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
META_KEY = "biscale_duration_s"  # Parquet metadata that `write_trace` leaves
COMPRESSED = {".gz", ".bz2"}


@dataclass(frozen=True)
class Layout:
    """Names of the three columns, and the unit of the time column where that holds numbers.

    Dates carry their own.
    """

    time: str
    prompt: str
    output: str
    unit: TimeUnit = "s"

    @property
    def columns(self) -> tuple[str, str, str]:
        """The three names in the order time, prompt, output."""
        return self.time, self.prompt, self.output


LAYOUTS: dict[str, Layout] = {
    "azure": Layout("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "mooncake": Layout("timestamp", "input_length", "output_length", "ms"),
    "biscale": Layout("arrival_s", "prompt_tokens", "output_tokens"),
}


def file_format(path: Path, head: bytes) -> FileFormat:
    """Format of a file by its suffix, else by its first bytes.

    ``.gz`` and ``.bz2`` are looked through.
    """
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    if suffixes and suffixes[-1] in SUFFIXES:
        return SUFFIXES[suffixes[-1]]
    if head.startswith(b"PAR1"):
        return "parquet"
    return "jsonl" if head.lstrip().startswith(b"{") else "csv"


def find_layout(
    path: Path,
    header: Sequence[str],
    time_column: str | None = None,
    prompt_column: str | None = None,
    output_column: str | None = None,
    time_unit: TimeUnit | None = None,
) -> Layout:
    """Choose the columns.

    Those that were named, the rest from the first known layout whose columns the file has.

    Args:
        path: file, for errors.
        header: column names of the file.
        time_column: name of the arrival time column.
        prompt_column: name of the prompt length column.
        output_column: name of the output length column.
        time_unit: unit of a numeric time column; default that of the layout, seconds for named
            columns.

    Raises:
        BiscaleError: a column is not there, an unknown unit, or the header fits no known layout.
    """
    if time_unit is not None and time_unit not in NS_PER_UNIT:
        raise BiscaleError(f"unknown time unit '{time_unit}'; known: {', '.join(NS_PER_UNIT)}")
    for known in LAYOUTS.values():
        unit = time_unit or (known.unit if time_column in (None, known.time) else "s")
        time, prompt, output = (
            time_column or known.time,
            prompt_column or known.prompt,
            output_column or known.output,
        )
        layout = Layout(time, prompt, output, unit)
        if set(layout.columns) <= set(header):
            break
    else:
        raise BiscaleError(
            f"{path}, line 1: {_header_fault(header, (time_column, prompt_column, output_column))}"
        )
    if len(set(layout.columns)) < 3 or any(header.count(c) > 1 for c in layout.columns):
        raise BiscaleError(
            f"{path}, line 1: time, prompt and output must be three different columns, each named "
            "once"
        )
    return layout


def _header_fault(header: Sequence[str], named: Sequence[str | None]) -> str:
    for name in named:
        if name and name not in header:
            return f"there is no column '{name}'; the columns are {', '.join(header)}"
    expected = " or ".join(",".join(known.columns) for known in LAYOUTS.values())
    return (
        f"wrong header '{','.join(header)[:120]}'; expected {expected}, or name the time, prompt "
        "and output columns"
    )
