"""Ensembles as CSV, read and written: a row per member, a column per coefficient that varies."""

import csv
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.models.coefficient import rounded

DIGITS: Final = 5  # significant ones of a member's figure


def read_table(
    path: Path, content: bytes, known: Collection[str]
) -> dict[str, NDArray[np.float64]]:
    """Parse an ensemble: column name to values, one per member.

    Args:
        path: its file, for messages.
        content: what is in the file; lines that start with ``#`` are comments.
        known: names that columns may have.

    Raises:
        BiscaleError: not a table, an unknown column, or a value that is not a finite number >= 0.
    """
    names, values = _cells(path, content)
    if unknown := sorted(set(names) - set(known)):
        raise BiscaleError(
            f"{path}: column {', '.join(unknown)} is not the name of a coefficient or delay_s"
        )
    if not np.all(np.isfinite(values) & (values >= 0.0)):
        raise BiscaleError(f"{path}: every value must be a finite number, zero or above")
    return {name: column.copy() for name, column in zip(names, values.T, strict=True)}


def table_text(comment: str, columns: Mapping[str, ArrayLike]) -> str:
    """Text of an ensemble.

    Args:
        comment: what the members are, for the first line.
        columns: column name to values, one per member.
    """
    values = [np.asarray(column, dtype=np.float64).tolist() for column in columns.values()]
    rows = [",".join(repr(rounded(v, DIGITS)) for v in row) for row in zip(*values, strict=True)]
    return "\n".join([f"# {comment}", ",".join(columns), *rows]) + "\n"


def _cells(path: Path, content: bytes) -> tuple[list[str], NDArray[np.float64]]:
    """Header and values, shape (rows, columns), of a CSV; NaN where there is no number.

    By hand, since pandas takes longer to import than an environment may take to make.
    """
    try:
        lines = [r for r in content.decode("utf-8").splitlines() if r and not r.startswith("#")]
    except UnicodeDecodeError:
        raise BiscaleError(f"cannot read {path}: not UTF-8 text") from None
    if not lines:
        raise BiscaleError(f"{path}: the table is empty: its first line names the columns")
    header, *rows = csv.reader(lines)
    if any(len(row) != len(header) for row in rows):
        raise BiscaleError(f"{path}: not a table: its rows differ in length")
    values = np.array([[_number(cell) for cell in row] for row in rows], dtype=np.float64)
    return [name.strip() for name in header], values.reshape(len(rows), len(header))


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan
