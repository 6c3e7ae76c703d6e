"""Totals of a run per block of time: what intervals need, small enough to keep for every run."""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.evaluation.runs.record import RunRecord
from biscale_env.evaluation.stats.bootstrap import BLOCK_S, time_blocks
from biscale_env.evaluation.stats.metrics import judge

BLOCK_COLUMNS: Final = ("block", "energy_j", "n_counted", "n_met")


def block_totals(record: RunRecord, block_s: float = BLOCK_S) -> dict[str, NDArray[np.float64]]:
    """Energy spent, requests judged and requests that met the SLO, per block of time.

    A request belongs to the block it arrives in, energy to the block it is spent in. Energy that
    the timeline does not hold (GPUs outside the placement) is spread evenly over the run, so that
    blocks add up to the run's total.

    Args:
        record: the run.
        block_s: length of a block, s.

    Returns:
        Arrays of one length, by the names of ``BLOCK_COLUMNS``.
    """
    n_blocks = max(1, math.ceil(record.duration_s / block_s))
    verdict = judge(record.requests, record.slo, record.phase, record.duration_s)
    block = np.minimum(time_blocks(record.requests["arrival_s"], block_s), n_blocks - 1)
    counted = verdict["counted"]
    in_timeline = _energy_per_block(record, n_blocks, block_s)
    fraction = np.clip(record.duration_s - block_s * np.arange(n_blocks), 0.0, block_s) / max(
        record.duration_s, 1e-12
    )
    rest_j = float(record.totals["energy_j"]) - float(in_timeline.sum())
    return {
        "block": np.arange(n_blocks, dtype=np.float64),
        "energy_j": in_timeline + rest_j * fraction,
        "n_counted": np.bincount(block[counted], minlength=n_blocks).astype(np.float64),
        "n_met": np.bincount(block[counted & verdict["met"]], minlength=n_blocks).astype(
            np.float64
        ),
    }


def _energy_per_block(record: RunRecord, n_blocks: int, block_s: float) -> NDArray[np.float64]:
    """Energy of the timeline per block.

    An entry that crosses a boundary is divided in proportion to time.
    """
    begin = np.asarray(record.timeline["time_s"], dtype=np.float64)
    length = np.asarray(record.timeline["duration_s"]) + np.asarray(
        record.timeline["idle_s"], dtype=np.float64
    )
    energy = np.asarray(record.timeline["energy_j"], dtype=np.float64)
    edges = block_s * np.arange(1, n_blocks)
    before = [
        float(np.sum(energy * np.clip((t - begin) / np.maximum(length, 1e-12), 0.0, 1.0)))
        for t in edges
    ]
    return np.diff(np.concatenate(([0.0], before, [float(energy.sum())])))
