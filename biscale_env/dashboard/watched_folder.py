"""What kind of run a folder holds, asked anew whenever a page is opened."""

import os
from pathlib import Path
from typing import Final, Literal

from agents.policy.sb3_policy import SPEC_FILE
from agents.training.progress.curves import EVALUATIONS
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.runs import run_files

Kind = Literal["run", "replay", "training"]
RAW: Final = "raw"
"""Folder of a replay's logs in its run directory."""


def kind_of(folder: str | os.PathLike[str]) -> Kind:
    """``run``: finished, with results; ``replay``: its logs grow; ``training``.

    Args:
        folder: of ``biscale compare``, ``evaluate``, ``replay`` or ``train``.

    Raises:
        BiscaleError: none of them.
    """
    path = Path(folder)
    if not path.is_dir():
        raise BiscaleError(f"{path} is no folder: give the one that a command wrote with --out")
    if (path / run_files.RESULTS).is_file():
        return "run"
    if (path / RAW).is_dir():
        return "replay"
    marks = (EVALUATIONS, SPEC_FILE, f"seed-*/{EVALUATIONS}", f"seed-*/{SPEC_FILE}")
    if any(next(path.glob(mark), None) for mark in marks):
        return "training"
    if (path / run_files.PARTS).is_dir():
        raise BiscaleError(
            f"{path} holds a comparison that has not finished: wait for its {run_files.RESULTS}, "
            "which an interrupted one has too"
        )
    raise BiscaleError(
        f"{path} holds neither results ({run_files.RESULTS}) nor a training run nor a replay: give "
        "the folder that `biscale compare`, `evaluate`, `replay` or `train` wrote"
    )
