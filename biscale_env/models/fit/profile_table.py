"""Profile tables: the CSV that `biscale fit` reads, the shipped one and a user's alike."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from biscale_env.config.hardware import Dtype
from biscale_env.core.errors import BiscaleError
from biscale_env.models.coefficient_files import Phase

KEY_COLUMNS = ("phase", "tp", "dtype")
GROUP_COLUMNS = ("phase", "tp", "ep", "dtype")
WORK_COLUMNS = ("batch", "new_tokens", "prefix", "context")
COMPONENT_COLUMNS = ("gemm_s", "expert_s", "attn_s", "comm_s", "elem_s")
MAY_BE_ZERO = ("prefix", "context", "new_tokens", "comm_s", "expert_s", "estimated_share")
SCOPES = ("iteration", "shard")
OPTIONAL_COLUMNS = (
    *COMPONENT_COLUMNS,
    "latency_s",
    "power_w",
    "freq_mhz",
    "scope",
    "ep",
    "estimated_share",
)
ONE_GPU_LACKS = dict.fromkeys(
    ("comm0_s", "comm_s_per_token", "host0_s", "host_s_per_seq", "link_bytes_per_token"), 0.0
)
"""Coefficients of what a shard on a GPU of its own does not do.

All-reduce between GPUs, and the engine's host work.
"""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class IterationWork:
    """IterationWork of several iterations in the terms of the formula; arrays of equal length."""

    tokens: Floats
    attn_work: Floats
    cached: Floats
    n_seq: Floats

    def as_tuple(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Return the four axes in the order in which the formula takes them."""
        return self.tokens, self.attn_work, self.cached, self.n_seq


@dataclass(frozen=True)
class ProfileTable:
    """Measured or computed iterations of one configuration.

    Attributes:
        phase: ``prefill`` or ``decode``.
        tp: GPUs per instance.
        dtype: ``bf16``, ``fp8`` or ``mxfp4``.
        rows: the rows of the file, sorted by work and clock.
        shard: the rows are of one GPU's part of the work alone, as `biscale profile` measures it,
            not of whole iterations.
        ep: groups that the experts are spread over.
    """

    phase: Phase
    tp: int
    dtype: Dtype
    rows: pd.DataFrame
    shard: bool = False
    ep: int = 1

    @property
    def work(self) -> IterationWork:
        """IterationWork of every row."""
        r = self.rows
        batch, new, prefix, context = (r[c].to_numpy(np.float64) for c in WORK_COLUMNS)
        if self.phase == "decode":
            return IterationWork(batch, np.zeros(len(r)), batch * context, batch)
        return IterationWork(
            batch * new, batch * new * (new / 2.0 + prefix), np.zeros(len(r)), batch
        )

    def column(self, name: str) -> Floats:
        """One column as floats."""
        return self.rows[name].to_numpy(np.float64)

    def held_out(self) -> NDArray[np.bool_]:
        """Rows kept from the fit: three of every ten in the sorted order.

        So they are spread over the whole grid.
        """
        return (np.arange(len(self.rows)) * 7) % 10 < 3


def sha256(path: Path) -> str:
    """Hash of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _first_line(table: pd.DataFrame, bad: pd.Series, header_lines: int) -> int:
    return int(np.flatnonzero(bad.to_numpy())[0]) + header_lines + 1


def _check(path: Path, table: pd.DataFrame, header_lines: int) -> pd.DataFrame:
    needed = {*KEY_COLUMNS, *WORK_COLUMNS}
    unknown = set(table.columns) - needed - set(OPTIONAL_COLUMNS)
    if missing := needed - set(table.columns):
        raise BiscaleError(
            f"{path}: column {', '.join(sorted(missing))} is missing from the header"
        )
    if unknown:
        known = ", ".join([*KEY_COLUMNS, *WORK_COLUMNS, *OPTIONAL_COLUMNS])
        raise BiscaleError(f"{path}: unknown column {', '.join(sorted(unknown))}; known: {known}")
    if table.empty:
        raise BiscaleError(f"{path}: the table has no rows")
    if "scope" not in table.columns:
        table["scope"] = "iteration"
    if "ep" not in table.columns:
        table["ep"] = 1
    for column, allowed in (
        ("phase", ("prefill", "decode")),
        ("dtype", ("bf16", "fp8", "mxfp4")),
        ("scope", SCOPES),
    ):
        if (bad := ~table[column].isin(allowed)).any():
            line = _first_line(table, bad, header_lines)
            raise BiscaleError(f"{path} line {line}: {column} must be {' or '.join(allowed)}")
    for column in table.columns.drop(["phase", "dtype", "scope"]):
        values = pd.to_numeric(table[column], errors="coerce")
        low = 0.0 if column in MAY_BE_ZERO else 1e-12
        if (bad := ~(np.isfinite(values) & (values >= low))).any():
            line = _first_line(table, bad, header_lines)
            found = table[column].iloc[line - header_lines - 1]
            sign = "zero or above" if low == 0.0 else "above zero"
            raise BiscaleError(
                f"{path} line {line}: {column} is {found!r}, but must be a number {sign}"
            )
        table[column] = values
    return table


def read_profile(path: Path) -> list[ProfileTable]:
    """Read a profile table and split it into its configurations.

    Columns: ``phase`` (prefill, decode), ``tp``, ``dtype`` (bf16, fp8, mxfp4), ``batch``
    (requests), ``new_tokens`` (prompt tokens per request; 0 in decode), ``prefix`` (tokens per
    request already cached; 0 in decode), ``context`` (KV tokens per request in decode; 0 in
    prefill); then any of
    ``latency_s`` (iteration), ``power_w`` (mean per GPU), ``freq_mhz`` (mean SM clock while it
    ran), kernel times ``gemm_s``, ``expert_s``, ``attn_s``, ``comm_s``, ``elem_s``, ``ep`` (groups
    that the experts are spread over; 1), ``estimated_share`` (of the time whose kernels were not
    measured) and ``scope``: ``iteration``
    (the default), or ``shard`` where one GPU ran its part of the work alone, without all-reduce and
    host. Lines that start with ``#`` are comments.

    Returns:
        One table per (phase, tp, dtype), in that order.

    Raises:
        BiscaleError: missing file or column, unknown column, or a value that is not a sensible
            number; names the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BiscaleError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}"
        ) from None
    lines = text.splitlines()
    comments = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    try:
        raw = pd.read_csv(path, skiprows=comments, skip_blank_lines=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise BiscaleError(f"{path}: not a table: {str(error).splitlines()[0]}") from None
    table = _check(path, raw, comments + 1)
    tables = []
    for key, rows in table.groupby(list(GROUP_COLUMNS)):
        phase, tp, ep, dtype = cast(tuple[Phase, int, int, Dtype], key)
        order = [c for c in (*WORK_COLUMNS, "freq_mhz") if c in rows]
        if rows["scope"].nunique() > 1:
            raise BiscaleError(
                f"{path}: {phase} {dtype} tp{tp} mixes whole iterations and shards; give each a "
                "table of its own"
            )
        shard = bool(rows["scope"].iloc[0] == "shard")
        kept = (
            rows.drop(columns=[*GROUP_COLUMNS, "scope"])
            .sort_values(order, kind="stable")
            .reset_index(drop=True)
        )
        tables.append(ProfileTable(phase, int(tp), dtype, kept, shard, int(ep)))
    return tables
