"""Objects of a JSON file, one after the other: on lines of their own, or in an array."""

import contextlib
import itertools
import json
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.rows.json_documents import Row
from biscale_env.traces.rows.text_files import open_bytes, open_text

READ_CHARS: Final = 1 << 20


def json_object(text: str) -> Row | None:
    """The object that a text is; None where it is none."""
    with contextlib.suppress(ValueError):
        row = json.loads(text)
        return row if isinstance(row, dict) else None
    return None


def count_lines(path: Path) -> int:
    """Lines of a text file, which may be compressed; one without an end counts too."""
    count, last = 0, b"\n"
    with open_bytes(path) as file:
        while piece := file.read(READ_CHARS):
            count, last = count + piece.count(b"\n"), piece[-1:]
    return count + (last != b"\n")


def line_rows(path: Path) -> Generator[tuple[int, Row], None, None]:
    """Objects that stand on a line each, with the line; blank lines are allowed.

    Raises:
        BiscaleError: a line is none.
    """
    with open_text(path) as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            row = json_object(text)
            if row is None:
                raise BiscaleError(f"{path}, line {line}: malformed row: not a JSON object")
            yield line, row


def line_row(path: Path, k: int) -> tuple[int, Row]:
    """Line and content of JSON row ``k``, counted from 0; (0, {}) behind the last."""
    with contextlib.closing(line_rows(path)) as rows:
        return next(itertools.islice(rows, k, None), (0, {}))


@dataclass(frozen=True)
class JsonLineName:
    """Name of a row; blank lines are allowed, so its line is counted when an error needs it."""

    path: Path
    done: int

    def __call__(self, i: int) -> str:
        """Words for row ``i`` of the batch."""
        return f"{self.path}, line {line_row(self.path, self.done + i)[0]}"


def array_rows(path: Path) -> Iterator[Any]:
    """Items of a JSON array, parsed one after the other as the file is read.

    Raises:
        BiscaleError: an item cannot be parsed.
    """
    decoder = json.JSONDecoder()
    between = re.compile(r"[\s,]*")
    with open_text(path) as file:
        text, at, count, wanted = file.read(READ_CHARS), 0, 0, READ_CHARS
        at = text.index("[") + 1
        while True:
            at = between.match(text, at).end()  # type: ignore[union-attr]
            if text.startswith("]", at):
                return
            try:
                item, end = decoder.raw_decode(text, at)
                if end == len(text):  # a number may go on in the next part
                    raise ValueError
            except ValueError:
                more = file.read(wanted)
                if not more:
                    raise BiscaleError(
                        f"{path}, item {count + 1}: malformed row: not a JSON object"
                    ) from None
                # an item that is longer than what was read: read twice as much the next time
                text, at, wanted = text[at:] + more, 0, 2 * wanted
                continue
            yield item
            at, count, wanted = end, count + 1, READ_CHARS
