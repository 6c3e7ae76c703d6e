"""AIPerf's session files: turns of chats, each sent so long after the one before.

The Mooncake keys with ``session_id``, and in later turns ``delay`` (ms) where a timestamp would
stand. A turn's ``input_length`` counts only what the user adds, since AIPerf sends the chat so far
in front of it (docs/benchmark-modes/trace-replay of ai-dynamo/aiperf).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.prompts.raw_blocks import RawBlocks
from biscale_env.traces.rows.layouts import Layout
from biscale_env.traces.rows.raw_columns import RawColumns

SESSION: Final = "session_id"
DELAY: Final = "delay"
_LENGTHS: Final = ("input_length", "output_length")
LAYOUT: Final = Layout("timestamp", *_LENGTHS, "ms", "AIPerf sessions, turns after their delay")

Row = dict[str, Any]


def is_session_row(row: Row) -> bool:
    """Whether a JSON object may be a turn of an AIPerf session file."""
    return SESSION in row and all(name in row for name in _LENGTHS)


@dataclass
class _Chat:
    """A session so far: when its last turn was sent, ms, and tokens up to its answer."""

    sent_ms: float
    tokens: float


@dataclass(frozen=True)
class _LineNames:
    path: Path
    lines: list[int]

    def __call__(self, i: int) -> str:
        return f"{self.path}, line {self.lines[i]}"


def session_columns(path: Path, rows: Iterable[tuple[int, Row]]) -> RawColumns:
    """Requests of a session file in order of time.

    A turn is sent ``delay`` after the turn before it was: AIPerf waits for the answer first, but
    how long that takes is the engine's. Its prompt is the chat so far and what the user adds.

    Args:
        path: the file, for messages.
        rows: its objects, each with its line.

    Raises:
        BiscaleError: a turn that is the first of its session has no timestamp, or a value is no
            number.
    """
    chats: dict[Any, _Chat] = {}
    turns: list[tuple[float, float, float, int, Any]] = []
    for line, row in rows:
        where = f"{path}, line {line}"
        new, answer = (_number(row, name, where) for name in _LENGTHS)
        chat = chats.get(row.get(SESSION))
        if row.get("timestamp") is not None:
            sent_ms = _number(row, "timestamp", where)
        elif chat is None:
            raise BiscaleError(f"{where}: the first turn of a session needs a timestamp")
        else:
            sent_ms = chat.sent_ms + (_number(row, DELAY, where) if row.get(DELAY) else 0.0)
        prompt = new + (chat.tokens if chat else 0.0)
        chats[row.get(SESSION)] = _Chat(sent_ms, prompt + answer)
        turns.append((sent_ms, prompt, answer, line, row.get(SESSION)))
    turns.sort(key=lambda turn: turn[0])
    times, prompts, answers = (np.array([turn[k] for turn in turns]) for k in range(3))
    sessions = np.array([turn[4] for turn in turns], dtype=object)
    where_of = _LineNames(path, [turn[3] for turn in turns])
    blocks = RawBlocks(None, np.zeros(len(turns) + 1, dtype=np.int64), sessions)
    return RawColumns(times, prompts, answers, where_of, LAYOUT, blocks=blocks)


def _number(row: Row, name: str, where: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BiscaleError(f"{where}: {name} is missing or not a number")
    return float(value)
