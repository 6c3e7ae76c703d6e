"""Block hashes and sessions as they stand in a file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.checks import Where
from biscale_env.traces.rows.layouts import plain

HASHES: Final = "hash_ids"  # Mooncake, Qwen-Bailian, AIPerf, and ours
SESSIONS: Final = ("session", "session_id", "conversation_id")
TURNS: Final = ("chat_id", "parent_chat_id")  # Qwen-Bailian: a turn, and the turn before it
MOST_SIGNED: Final = 2**63
NO_LIST: Final = f"{HASHES} must be a list of whole numbers or texts"


@dataclass(frozen=True)
class RawBlocks:
    """What some consecutive rows say about their prompts.

    Attributes:
        ids: hashes of all rows, one row behind the other, whole numbers or texts; None where the
            file has none.
        starts: where those of each row begin, (n + 1,).
        session: session of each row, (n,), or with ``before`` the turn itself; None: not said.
        before: the turn before each row, where that is how sessions are told.
    """

    ids: NDArray[Any] | None
    starts: NDArray[np.int64]
    session: NDArray[Any] | None = None
    before: NDArray[Any] | None = None

    def rows(self, kept: NDArray[np.intp]) -> "RawBlocks":
        """Some of these rows."""
        counts = np.diff(self.starts)[kept]
        starts = _starts(counts)
        ids = self.ids
        if ids is not None:
            offsets = np.repeat(self.starts[kept] - starts[:-1], counts)
            ids = ids[np.arange(starts[-1]) + offsets]
        session, before = (None if c is None else c[kept] for c in (self.session, self.before))
        return RawBlocks(ids, starts, session, before)


@dataclass(frozen=True)
class BlockColumns:
    """Which columns of a file say something about prompts, by their names there.

    Attributes:
        hashes: column of hashes; None where there is none.
        keys: that of sessions, or those of a turn and of the turn before it; empty: not said.
    """

    hashes: str | None
    keys: tuple[str, ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> "BlockColumns":
        """Find them in any case and with any punctuation."""
        own = {plain(name): name for name in reversed(names)}
        hashes = own.get(plain(HASHES))
        turns = [own.get(plain(name)) for name in TURNS]
        if None not in turns:
            return cls(hashes, tuple(str(name) for name in turns))
        sessions = [own[plain(name)] for name in SESSIONS if plain(name) in own]
        return cls(hashes, tuple(sessions[:1]))

    @property
    def all(self) -> tuple[str, ...]:
        """Their names."""
        return ((self.hashes,) if self.hashes else ()) + self.keys


def json_types(sample: Mapping[str, Any]) -> dict[str, pa.DataType] | None:
    """Arrow types of these columns in JSON lines; None where only Python can read them.

    Args:
        sample: a row in which nothing is missing.
    """
    columns = BlockColumns.of(list(sample))
    found: dict[str, pa.DataType] = {}
    for name in columns.all:
        value = sample[name]
        if name == columns.hashes:
            if not isinstance(value, list):
                return None
            value = value[0] if value else 0
        if (kind := _type_of(value)) is None:
            return None
        found[name] = pa.list_(kind) if name == columns.hashes else kind
    return found


def _type_of(value: Any) -> pa.DataType | None:
    if isinstance(value, str):
        return pa.string()
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return pa.int64() if value < MOST_SIGNED else pa.uint64()


def arrow_blocks(record: Any, where: Where) -> RawBlocks | None:
    """What an Arrow batch says about prompts; None where it says nothing.

    Raises:
        BiscaleError: hashes that are no list of whole numbers or texts; names the row.
    """
    columns = BlockColumns.of(record.schema.names)
    if not columns.all:
        return None
    each = [record.column(record.schema.get_field_index(name)) for name in columns.keys]
    session, before = (*[_keys(column) for column in each], None, None)[:2]
    if columns.hashes is None:
        return RawBlocks(None, np.zeros(record.num_rows + 1, dtype=np.int64), session, before)
    hashes = record.column(record.schema.get_field_index(columns.hashes))
    if pa.types.is_dictionary(hashes.type):
        hashes = hashes.dictionary_decode()
    if not _is_list_of_keys(hashes.type):
        return _parsed_rows(hashes.to_pylist(), session, before, where, loose=True)
    counts = np.asarray(pa.compute.fill_null(pa.compute.list_value_length(hashes), 0))
    ids = hashes.flatten()
    starts = _starts(counts.astype(np.int64))
    if ids.null_count:
        at = int(np.argmax(np.asarray(ids.is_null())))
        raise BiscaleError(f"{where(int(np.searchsorted(starts, at, 'right')) - 1)}: {NO_LIST}")
    return RawBlocks(ids.to_numpy(zero_copy_only=False), starts, session, before)


def _is_list_of_keys(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    is_list = is_list or pa.types.is_fixed_size_list(kind)
    return bool(is_list) and any(
        is_kind(kind.value_type)
        for is_kind in (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
    )


def _keys(column: Any) -> NDArray[Any]:
    if column.null_count:
        return np.array(column.to_pylist(), dtype=object)
    return np.asarray(column.to_numpy(zero_copy_only=False))


def row_blocks(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], where: Where
) -> RawBlocks | None:
    """What parsed JSON rows say about prompts; None where they say nothing.

    Args:
        rows: the rows.
        names: every key of them.
        where: names a row.

    Raises:
        BiscaleError: hashes that are no list of whole numbers or texts; names the row.
    """
    columns = BlockColumns.of(names)
    if not columns.all:
        return None
    keys = [np.array([row.get(n) for row in rows], dtype=object) for n in columns.keys]
    session, before = (*keys, None, None)[:2]
    if columns.hashes is None:
        return RawBlocks(None, np.zeros(len(rows) + 1, dtype=np.int64), session, before)
    return _parsed_rows([row.get(columns.hashes) for row in rows], session, before, where)


def _parsed_rows(
    cells: Sequence[Any],
    session: NDArray[Any] | None,
    before: NDArray[Any] | None,
    where: Where,
    loose: bool = False,
) -> RawBlocks:
    lists = [_hashes(cell, where, i, loose) for i, cell in enumerate(cells)]
    flat = np.empty(sum(len(ids) for ids in lists), dtype=object)
    flat[:] = [value for ids in lists for value in ids]
    starts = _starts(np.array([len(ids) for ids in lists], dtype=np.int64))
    return RawBlocks(flat, starts, session, before)


def _hashes(cell: Any, where: Where, i: int, loose: bool) -> list[Any]:
    """Hashes of one row: a list, or a list as text (``"[1, 2]"``, as pandas writes it).

    Whole numbers with a point are numbers: a column in which some are missing becomes one of
    floats in many a program.
    """
    if cell is None:
        return []
    if isinstance(cell, str):
        cell = _list_of_text(cell, loose)
    if isinstance(cell, list) and all(_is_key(value) for value in cell):
        return [int(value) if isinstance(value, float) else value for value in cell]
    raise BiscaleError(f"{where(i)}: {NO_LIST}")


def _is_key(value: Any) -> bool:
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int | str) and not isinstance(value, bool)


def _list_of_text(text: str, loose: bool) -> list[Any] | None:
    """A list that stands as text in one field; in a table also without its brackets."""
    told = re.fullmatch(r"\s*[\[(](.*)[\])]\s*", text, re.DOTALL)
    if told is None and not loose:
        return None
    inner = told[1] if told else text
    parts = [part.strip("'\"") for part in re.split(r"[\s,;|]+", inner.strip()) if part]
    return [int(part) if re.fullmatch(r"-?\d+", part) else part for part in parts]


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
