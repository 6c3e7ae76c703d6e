"""Tables in CSV files whose numbers come back to the last bit."""

from pathlib import Path

import pandas as pd

BEFORE_3_1 = tuple(int(part) for part in pd.__version__.split(".")[:2]) < (3, 1)
"""From 3.1 on pandas always reads exactly, and the argument for it is deprecated."""


def read_exact(path: Path) -> pd.DataFrame:
    """The table, so that rows which are kept are written again as they were."""
    return pd.read_csv(path, float_precision="round_trip") if BEFORE_3_1 else pd.read_csv(path)
