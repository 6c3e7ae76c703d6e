"""Writing traces: CSV, Mooncake JSON lines or Parquet, by the suffix.

A file appears whole or not at all.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import open_whole
from biscale_env.traces.prompts.raw_blocks import HASHES, SESSIONS
from biscale_env.traces.rows.layouts import BLOCK_KEY, KNOWN, META_KEY, SLO_CLASS, UNIT_KEY
from biscale_env.traces.trace import Trace

MS_DECIMALS = 6


def _write_csv(trace: Trace, path: Path) -> None:
    columns = (trace.arrival_s, trace.prompt_tokens, trace.output_tokens)
    frame = pd.DataFrame(dict(zip(KNOWN["biscale"].layout.columns, columns, strict=True)))
    if trace.classes is not None:
        frame[SLO_CLASS] = trace.classes.each()
    frame.to_csv(path, index=False)


def _write_jsonl(trace: Trace, path: Path) -> None:
    names = KNOWN["mooncake"].layout.columns
    columns = (
        np.round(trace.arrival_s * 1e3, MS_DECIMALS),
        trace.prompt_tokens,
        trace.output_tokens,
    )
    frame = pd.DataFrame(dict(zip(names, columns, strict=True)))
    if len(frame) and (frame[names[0]].iloc[0] or (frame[names[0]] % 1).any()):
        # Mooncake has whole milliseconds from 0 on: anything else says what it is
        frame[UNIT_KEY] = "ms"
    if trace.classes is not None:
        frame[SLO_CLASS] = trace.classes.each()
    if (blocks := trace.blocks) is not None:
        pieces = np.split(blocks.ids, blocks.starts[1:-1]) if len(blocks) else []
        frame[HASHES] = pd.Series(pieces, dtype=object)
        frame[SESSIONS[0]] = blocks.session
        frame[BLOCK_KEY] = blocks.block_tokens
    frame.to_json(path, orient="records", lines=True, double_precision=MS_DECIMALS)


def _write_parquet(trace: Trace, path: Path) -> None:
    columns = (trace.arrival_s, trace.prompt_tokens, trace.output_tokens)
    table = pa.table(dict(zip(KNOWN["biscale"].layout.columns, columns, strict=True)))
    meta = {META_KEY: repr(float(trace.duration_s))}
    if trace.classes is not None:
        table = table.append_column(SLO_CLASS, pa.array(trace.classes.each()))
    if (blocks := trace.blocks) is not None:
        table = table.append_column(
            HASHES, pa.ListArray.from_arrays(blocks.starts.astype(np.int32), blocks.ids)
        ).append_column(SESSIONS[0], pa.array(blocks.session))
        meta[BLOCK_KEY] = str(blocks.block_tokens)
    pa.parquet.write_table(table.replace_schema_metadata(meta), path)


WRITERS: dict[str, Callable[[Trace, Path], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}


def write_trace(trace: Trace, path: str | Path) -> Path:
    """Write a trace, replacing an existing file in one step.

    CSV and Parquet keep times exactly, Mooncake JSON lines to the nanosecond (with a further key
    ``time_unit`` where the milliseconds are not whole). Only Parquet also
    keeps the observed duration; from the others it is read back as the last arrival. What prompts
    share is kept in Parquet and JSON lines, not in CSV; SLO classes in all.

    Args:
        trace: what to write.
        path: file ending in ``.csv``, ``.jsonl`` (Mooncake) or ``.parquet``.

    Raises:
        BiscaleError: unknown suffix, or the file cannot be written.
    """
    path = Path(path)
    writer = WRITERS.get(path.suffix.lower())
    if writer is None:
        raise BiscaleError(
            f"cannot write a trace as '{path.name}': the name must end in {', '.join(WRITERS)}"
        )
    try:
        with open_whole(path) as temporary:
            writer(trace, temporary)
    except OSError as error:
        raise BiscaleError(f"cannot write {path}: {error.strerror or error}") from None
    return path
