"""What a run writes beside its checkpoints.

Held-out evaluations and the multipliers' path, as CSV.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agents.training.heldout import HeldoutMetrics
from biscale_env.core.files import write_whole

Evaluation = tuple[int, HeldoutMetrics, float]
"""Env step, metrics, score."""


def write_evaluations(history: Sequence[Evaluation], names: Sequence[str], path: Path) -> None:
    """Write every evaluation: env step, score, energy ratio and attainment of each group."""
    header = "step,score," + ",".join(f"energy_ratio:{n},attainment:{n}" for n in names)
    rows = [
        f"{s},{score:.5f},"
        + ",".join(f"{e:.5f},{a:.5f}" for e, a in zip(f.energy_ratio, f.attainment, strict=True))
        for s, f, score in history
    ]
    write_whole(path, "\n".join([header, *rows]) + "\n")


def write_path(
    path_so_far: Sequence[tuple[int, NDArray[np.float64]]], names: Sequence[str], path: Path
) -> None:
    """Write the multipliers' path: env step, one column per group."""
    rows = ["step," + ",".join(names)]
    rows += [f"{step}," + ",".join(f"{v:.4g}" for v in values) for step, values in path_so_far]
    write_whole(path, "\n".join(rows) + "\n")
