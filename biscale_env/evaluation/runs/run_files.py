"""Files of a run directory: names, reading with one sentence for a damaged one, tables by run."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import ArrayLike

from biscale_env.core.errors import BiscaleError
from biscale_env.core.exact_csv import read_exact
from biscale_env.core.files import open_whole

CONFIG: Final = "config.yaml"
PROVENANCE: Final = "provenance.json"
PARTS: Final = "parts"
RESULTS: Final = "results.parquet"
REQUESTS: Final = "requests.parquet"
TIMELINES: Final = "timelines.parquet"
WINDOWS: Final = "windows.parquet"
SUMMARY: Final = "summary.csv"
DECOMPOSITION: Final = "decomposition.csv"
CLASSES: Final = "classes.csv"
INFEASIBLE: Final = "infeasible.csv"
REPORT: Final = "report.html"
TUNING: Final = "tuning.csv"
LOCK: Final = ".lock"
CURVES: Final = "curves.parquet"
MEMBERS: Final = "members.parquet"
TABLES: Final = (REQUESTS, TIMELINES, WINDOWS)
JOB_TABLES: Final = (CURVES, MEMBERS)
"""Only of policies that were tuned, or run in members of the ensemble."""

_RUN_AGAIN: Final = f"delete it and {RESULTS}, and --resume runs again what they held"
_ADVICE: Final = {
    CONFIG: "restore it or choose another --out",
    PROVENANCE: "restore it, or delete it to resume without a check of traces and models",
    RESULTS: "delete it, and --resume runs again what it held",
    INFEASIBLE: "delete it, and --resume writes it again",
}
_WIDE: Final = frozenset({"arrival_s", "start_s", "first_token_s", "finish_s", "time_s", "begin_s"})
"""Kept in float64: instants of a long run. Everything else fits float32 (7 digits)."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a damaged file of a run directory raises into a sentence with a way on.

    Raises:
        BiscaleError: the file is missing, empty, cut off or of another kind.
    """
    try:
        yield
    except BiscaleError:
        raise
    except (ValueError, KeyError, EOFError, OSError, yaml.YAMLError, pa.ArrowException) as error:
        if isinstance(error, PermissionError | IsADirectoryError):
            raise
        part = path.parent if path.parent.parent.name == PARTS else None
        advice = (
            _ADVICE.get(path.name, _RUN_AGAIN)
            if part is None
            else f"delete the folder {part}, and --resume runs it again"
        )
        raise BiscaleError(f"{path} {_damage(path)}: {advice}") from None


def _damage(path: Path) -> str:
    if not path.exists():
        return "is missing"
    return "is damaged or cut off" if path.stat().st_size else "is empty"


def read_text(path: Path) -> str:
    """Text of a file that ends with a line end, as all that we write do.

    Raises:
        BiscaleError: it is missing, empty or cut off.
    """
    with reading(path):
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            raise ValueError("cut off")
    return text


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of a run directory.

    Raises:
        BiscaleError: the file is missing or damaged.
    """
    with reading(folder / CONFIG):
        found = yaml.safe_load(read_text(folder / CONFIG))
        if not isinstance(found, dict):
            raise ValueError("not a mapping")
    return found


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance of a run directory.

    Raises:
        BiscaleError: the file is missing or damaged.
    """
    with reading(folder / PROVENANCE):
        found = json.loads(read_text(folder / PROVENANCE))
        if not isinstance(found, dict):
            raise ValueError("not a mapping")
    return found


def read_csv(path: Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV file of a run directory; an empty frame with ``columns`` where there is none.

    Raises:
        BiscaleError: the file is damaged.
    """
    if not path.is_file():
        return pd.DataFrame(columns=list(columns))
    read_text(path)
    with reading(path):
        return read_exact(path)


def read_results(path: Path) -> pd.DataFrame:
    """Result rows of a run directory or of one of its parts.

    Raises:
        BiscaleError: the file is missing or damaged.
    """
    with reading(path):
        frame = pd.read_parquet(path)
        frame["run_id"]
    return frame


def check_readable(folder: Path) -> None:
    """Look into every file of a run directory that resuming needs, before hours of work.

    Of Parquet files the footer is read, which is at the end and thus missing where one is cut off.

    Raises:
        BiscaleError: a file is damaged.
    """
    read_config(folder)
    if (folder / PROVENANCE).is_file():
        read_provenance(folder)
    for name in (TUNING, INFEASIBLE):
        read_csv(folder / name)
    parts = [part for part in (folder / PARTS).glob("*") if not part.name.startswith(".")]
    tables = [folder / name for name in (RESULTS, *TABLES, *JOB_TABLES)]
    tables += [part / name for part in parts for name in (RESULTS, *TABLES, *JOB_TABLES)]
    for path in tables:
        if path.is_file() or (path.name == RESULTS and path.parent in parts):
            with reading(path):
                pq.read_schema(path).field("run_id")


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
    """Nested mappings, in lists too, as one mapping with keys like ``a.b`` and ``c[0].d``."""
    inner: dict[str, Any] = {}
    if isinstance(value, Mapping):
        inner = {f"{prefix}.{k}" if prefix else str(k): v for k, v in value.items()}
    elif isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        inner = {f"{prefix}[{k}]": v for k, v in enumerate(value)}
    if inner:
        pairs = [flat(v, name) for name, v in inner.items()]
        return {k: v for pair in pairs for k, v in pair.items()}
    return {prefix or "configuration": value}


def run_table(run: str, columns: Mapping[str, ArrayLike], names: Sequence[str]) -> pa.Table:
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


def frame_table(run: str, frame: pd.DataFrame) -> pa.Table:
    """Arrow table of a frame with the id of the run it goes with in front."""
    ids = pa.array([run] * len(frame), pa.string()).dictionary_encode()
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata()
    return table.add_column(0, "run_id", ids)


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

    Raises:
        BiscaleError: a file that is read is damaged.
        OSError: the merged file cannot be written; the old one stays.
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
    # runs of an SLO with classes have a column more
    schema = pa.unify_schemas([pq.read_schema(part) for part in parts])
    if path.is_file():
        with reading(path):
            old = pq.ParquetFile(path)
        with old:
            for run, index in row_groups(old).items():
                if run not in fresh:
                    with reading(path):
                        table = old.read_row_group(index)
                    yield _completed(table, schema)
    for part in parts:
        with reading(part), pq.ParquetFile(part) as file:
            table = file.read()
        if table.num_rows:
            yield _completed(table, schema)


def _completed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table of an older version, or of another kind of run, with columns it lacks, all zero."""
    for field in schema:
        if field.name not in table.column_names:
            zeros = pa.array(np.zeros(table.num_rows), field.type)
            table = table.append_column(field, zeros)
    return table.select(schema.names) if set(schema.names) >= set(table.column_names) else table
