"""The last seconds as text: one line per strip, for a terminal or a log."""

import numpy as np
from numpy.typing import NDArray

from biscale_env.render.strips import MISSES, Recent, Strip

BLOCKS = " ▁▂▃▄▅▆▇█"
COLUMNS = 60
CLEAR = "\x1b[2J\x1b[H"
"""What ``human`` writes before each frame: clears a terminal."""


def text_frame(recent: Recent, columns: int = COLUMNS) -> str:
    """The picture as lines of text, without control characters.

    Args:
        recent: what has happened.
        columns: width of the bars.
    """
    width = max((len(s.title) for s in recent.strips), default=0)
    lines = [recent.headline()]
    for strip in recent.strips:
        low, high = recent.axis(strip)
        bars = _bars(recent, strip, columns)
        lines.append(
            f"{strip.title:<{width}} {recent.latest(strip):>9} |{bars}| {low:,.3g} to {high:,.5g}"
        )
    marks = _marks(recent, columns)
    lines.append(f"{'SLO missed':<{width}} {'':>9} |{marks}| last {recent.span_s:g} s")
    return "\n".join(lines)


def _cells(recent: Recent, columns: int) -> NDArray[np.float64]:
    """Middle of each column, s."""
    return recent.now_s - recent.span_s * (1 - (np.arange(columns) + 0.5) / columns)


def _bars(recent: Recent, strip: Strip, columns: int) -> str:
    times, values = recent.series(strip.name)
    low, high = recent.axis(strip)
    line = []
    for at in _cells(recent, columns):
        hit = np.flatnonzero((times[:, 0] <= at) & (at <= times[:, 1]))
        value = values[hit[-1]] if hit.size else np.nan
        level = 0.0 if not np.isfinite(value) else (value - low) / (high - low)
        steps = len(BLOCKS) - 1
        rank = 0 if not np.isfinite(value) else max(1, round(level * steps))
        line.append(BLOCKS[min(rank, steps)])
    return "".join(line)


def _marks(recent: Recent, columns: int) -> str:
    line = [" "] * columns
    begin_s = recent.now_s - recent.span_s
    for step in recent.steps:
        if step.values.get(MISSES, 0.0) > 0:
            at = int((step.end_s - begin_s) / recent.span_s * columns)
            line[min(max(at, 0), columns - 1)] = "x"
    return "".join(line)
