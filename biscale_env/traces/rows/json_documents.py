"""Rows inside one JSON object, however programs put them there, and rows that hold objects."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.rows.layouts import N_COLUMNS, find_layout

Row = dict[str, Any]

WRAPPERS: Final = ("requests", "data", "records", "trace", "traces", "items")


def has_layout(path: Path, names: list[str], columns: dict[str, Any]) -> bool:
    """Whether keys are those of a row of requests.

    Args:
        path: the file.
        names: the keys.
        columns: options of `find_layout`.
    """
    with contextlib.suppress(BiscaleError):
        find_layout(path, names, **columns)
        return True
    return False


def lists_of(document: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Keys that hold lists of numbers (or of dates): columns, where three of them are."""
    return {
        key: value
        for key, value in document.items()
        if isinstance(value, list) and (not value or isinstance(value[0], int | float | str))
    }


def holds_rows(path: Path, first: Row, columns: dict[str, Any]) -> bool:
    """Whether an object is no row, but holds rows or columns."""
    plain = [k for k, v in first.items() if not isinstance(v, list | dict)]
    if has_layout(path, plain, columns):
        return False
    if any(isinstance(first.get(name), list) for name in (*WRAPPERS, "experiments")):
        return True
    if inner_rows(path, first, columns) is not None:
        return True
    return len(lists_of(first)) >= N_COLUMNS


def inner_rows(path: Path, document: Row, columns: dict[str, Any]) -> list[Any] | None:
    """The rows that an object holds; None where it has columns of its own, or nothing.

    Under a key (``requests``, ``data``, ...), each under its own number or name, or as pandas
    writes a frame (``columns`` and ``data``, or a number for every value of every column).
    """
    names, data = document.get("columns"), document.get("data")
    if isinstance(names, list) and isinstance(data, list):
        is_row = all(isinstance(row, list) and len(row) == len(names) for row in data)
        return [dict(zip(names, row, strict=True)) for row in data] if is_row else data
    for name in WRAPPERS:
        if isinstance(document.get(name), list):
            return list(document[name])
    values = list(document.values())
    if not values or not all(isinstance(value, dict) for value in values):
        return None
    if has_layout(path, list(values[0]), columns):
        return values
    if not has_layout(path, list(document), columns):
        return None
    keys = list(dict.fromkeys(key for value in values for key in value))
    return [{name: value.get(key) for name, value in document.items()} for key in keys]


def flat_row(row: Row) -> Row:
    """A row whose inner objects are opened: their keys by themselves, and behind a point.

    Of ``{"usage": {"prompt_tokens": 5}}`` that is ``prompt_tokens`` and ``usage.prompt_tokens``;
    what stands outside goes first.
    """
    found = dict(row)
    for outer, value in row.items():
        if isinstance(value, dict):
            for name, inner in value.items():
                found.setdefault(name, inner)
                found[f"{outer}.{name}"] = inner
    return found


def merged_row(rows: list[Row]) -> Row:
    """One row with every key of some rows, each with the first value that is there."""
    found: Row = {}
    for row in rows:
        for name, value in row.items():
            if found.get(name) in (None, [], ""):
                found[name] = value
    return found
