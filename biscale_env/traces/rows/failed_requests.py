"""Which requests a file itself says got no answer: columns of errors, status and success."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from biscale_env.traces.rows.layouts import plain

ERRORS: Final = ("error", "errors", "error_message", "error_code", "exception")
SUCCESSES: Final = ("success", "succeeded", "is_success", "ok")
FAILURES: Final = ("failed", "is_failed", "was_cancelled", "cancelled", "canceled", "timed_out")
STATUSES: Final = ("status", "status_code", "http_status", "http_code", "response_code")
LEAST_HTTP_ERROR: Final = 400
NOTHING: Final = ("", "none", "null", "nan", "0", "false", "no", "[]", "{}")
BAD_WORDS: Final = re.compile(r"fail|err|time.?out|cancel|abort|reject|drop|unavailable|exception")


@dataclass(frozen=True)
class FailureColumn:
    """A column that says which requests failed.

    Attributes:
        name: its name in the file.
        kind: which of the four lists above it is of.
    """

    name: str
    kind: tuple[str, ...]

    def failed(self, value: Any) -> bool:
        """Whether a value says that a request got no answer; what is missing says nothing."""
        if value is None:
            return False
        text = str(value).strip().lower()
        if self.kind is STATUSES:
            number = re.fullmatch(r"(\d+)(\.0*)?", text)
            return int(number[1]) >= LEAST_HTTP_ERROR if number else bool(BAD_WORDS.search(text))
        if self.kind is SUCCESSES:
            return text in NOTHING and text not in ("", "nan", "none", "null")
        return text not in NOTHING


def failure_columns(names: Sequence[str]) -> list[FailureColumn]:
    """Columns that say which requests failed, in any case and with any punctuation."""
    kinds = {plain(name): kind for kind in (ERRORS, SUCCESSES, FAILURES, STATUSES) for name in kind}
    known = [name for name in names if plain(name) in kinds and list(names).count(name) == 1]
    return [FailureColumn(name, kinds[plain(name)]) for name in known]


def arrow_type(value: Any) -> pa.DataType | None:
    """Arrow type of such a column in JSON by one of its values; None where it has none."""
    if value is None:
        return pa.string()
    for python, kind in ((bool, pa.bool_()), (int, pa.int64()), (str, pa.string())):
        if isinstance(value, python):
            return kind
    return None


def arrow_failed(record: Any) -> NDArray[np.bool_] | None:
    """Which rows of an Arrow batch failed; None where it does not say."""
    found: NDArray[np.bool_] | None = None
    for column in failure_columns(record.schema.names):
        values = record.column(record.schema.get_field_index(column.name))
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        told = values.dictionary_encode()
        table = np.array([*(column.failed(v) for v in told.dictionary.to_pylist()), False])
        codes = pa.compute.fill_null(told.indices, -1).to_numpy(zero_copy_only=False)
        found = table[codes] if found is None else found | table[codes]
    return found


def row_failed(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> NDArray[np.bool_] | None:
    """Which parsed JSON rows failed; None where they do not say.

    Args:
        rows: the rows.
        names: every key of them.
    """
    columns = failure_columns(names)
    if not columns:
        return None
    return np.array([any(c.failed(row.get(c.name)) for c in columns) for row in rows], dtype=bool)
