"""Files of a run directory: names, whole-or-nothing writing, tables with one row group per run."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from biscale_env.core.files import open_whole

CONFIG: Final = "config.yaml"
PROVENANCE: Final = "provenance.json"
PARTS: Final = "parts"
RESULTS: Final = "results.parquet"
REQUESTS: Final = "requests.parquet"
TIMELINES: Final = "timelines.parquet"
BLOCKS: Final = "blocks.parquet"
SUMMARY: Final = "summary.csv"
INFEASIBLE: Final = "infeasible.csv"
REPORT: Final = "report.html"
TUNING: Final = "tuning.csv"
TABLES: Final = (REQUESTS, TIMELINES, BLOCKS)

_WIDE: Final = frozenset({"arrival_s", "start_s", "first_token_s", "finish_s", "time_s"})
"""Kept in float64: instants of a long run. Everything else fits float32 (7 digits)."""


def plain(value: Any) -> Any:
    """Configuration as plain YAML data.

    Models, tuples, paths, numpy numbers become mappings, lists, text, numbers.
    """
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        return [plain(v) for v in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    if isinstance(value, Mapping) and value:
        pairs = [flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items()]
        return {k: v for pair in pairs for k, v in pair.items()}
    return {prefix or "configuration": value}


def run_table(run: str, columns: Mapping[str, Any], names: Sequence[str]) -> pa.Table:
    """Arrow table of one run's arrays: its id, instants in float64, all else in float32."""
    size = int(np.size(columns[names[0]]))
    arrays: dict[str, pa.Array] = {
        "run_id": pa.array([run] * size, pa.string()).dictionary_encode()
    }
    for name in names:
        arrays[name] = pa.array(
            np.asarray(columns[name], dtype=np.float64 if name in _WIDE else np.float32)
        )
    return pa.table(arrays)


def row_groups(file: pq.ParquetFile) -> dict[str, int]:
    """Index of the row group of each run, from the file's statistics alone."""
    groups = {}
    for index in range(file.num_row_groups):
        statistics = file.metadata.row_group(index).column(0).statistics
        if statistics is not None and statistics.has_min_max:
            groups[str(statistics.min)] = index
    return groups


def merge_tables(path: Path, parts: Sequence[Path]) -> None:
    """Append tables to a Parquet file, one row group per run.

    Runs that are there already are replaced.

    Args:
        path: the merged file.
        parts: one file per run, in a folder named by the run's id.
    """
    if not parts:
        return
    fresh = {part.parent.name for part in parts}
    with open_whole(path) as temporary:
        writer: pq.ParquetWriter | None = None
        try:
            for table in _tables(path, parts, fresh):
                writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
                writer.write_table(table, row_group_size=max(table.num_rows, 1))
        finally:
            if writer is not None:
                writer.close()


def _tables(path: Path, parts: Sequence[Path], fresh: set[str]) -> Iterator[pa.Table]:
    if path.is_file():
        with pq.ParquetFile(path) as old:
            for run, index in row_groups(old).items():
                if run not in fresh:
                    yield old.read_row_group(index)
    for part in parts:
        with pq.ParquetFile(part) as file:
            table = file.read()
        if table.num_rows:
            yield table
