"""A trace format: lines ``tick prompt output`` under the word TICKS, a tick is 10 ms."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from biscale_env.traces.reading.formats import TraceFormat
from biscale_env.traces.rows.raw_columns import RawColumns


def batches(path: Path, **columns: str | None) -> Iterator[RawColumns]:
    """All requests at once; a long file would be read in parts."""
    ticks, prompts, outputs = np.loadtxt(path, skiprows=1, unpack=True, ndmin=2)
    yield RawColumns.of(path, ticks * 0.01, prompts, outputs)


FORMAT = TraceFormat(lambda path, head: head.startswith(b"TICKS"), batches)
