"""The last seconds as a picture: a strip per quantity, drawn with Pillow (extra ``render``)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.render.strips import MISSES, Recent, Strip

WIDTH, HEIGHT = 720, 480  # pixels; even, as video codecs want them
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 26
GAP = 24  # between strips, where their titles are
INK, FAINT, PAPER = (30, 30, 30), (215, 215, 215), (255, 255, 255)
COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (86, 180, 233))  # Okabe and Ito 2008
MISS = (213, 94, 0)


def picture(recent: Recent) -> NDArray[np.uint8]:
    """The picture, uint8 (HEIGHT, WIDTH, 3).

    Raises:
        BiscaleError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise BiscaleError(
            "pictures need Pillow: install biscale-env[render], or use render_mode 'ansi'"
        ) from None
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen: Any = ImageDraw.Draw(image)
    pen.font = ImageFont.load_default(size=13)
    pen.text((LEFT, 6), recent.headline(), fill=INK)
    rows = len(recent.strips)
    height = (HEIGHT - TOP - BOTTOM) // rows - GAP
    for k, strip in enumerate(recent.strips):
        top = TOP + k * (height + GAP) + GAP
        _strip(pen, recent, strip, (top, top + height), COLOURS[k % len(COLOURS)])
    _time_axis(pen, recent, TOP + rows * (height + GAP))
    return np.asarray(image, dtype=np.uint8).copy()


def short(value: float) -> str:
    """A number at an axis."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}"


def _x(recent: Recent, time_s: float) -> float:
    share = (time_s - recent.now_s) / recent.span_s + 1.0
    return LEFT + max(share, 0.0) * (WIDTH - LEFT - RIGHT)


def _strip(
    pen: Any, recent: Recent, strip: Strip, rows: tuple[int, int], colour: tuple[int, int, int]
) -> None:
    """Frame, values and title of one strip between two pixel rows."""
    top, bottom = rows
    low, high = recent.axis(strip)

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    pen.text((LEFT, top - 18), f"{strip.title}: {recent.latest(strip)}", fill=colour)
    for value in (low, high):
        pen.line([(LEFT, y(value)), (WIDTH - RIGHT, y(value))], fill=FAINT)
        pen.text((LEFT - 6, y(value)), short(value), fill=INK, anchor="rm")
    if strip.bound is not None and low < strip.bound < high:
        pen.line([(LEFT, y(strip.bound)), (WIDTH - RIGHT, y(strip.bound))], fill=MISS)
        pen.text((LEFT - 6, y(strip.bound)), short(strip.bound), fill=MISS, anchor="rm")
    before: float | None = None
    for (begin_s, end_s), value in zip(*recent.series(strip.name), strict=True):
        if not np.isfinite(value):
            before = None
            continue
        x0, x1, now = _x(recent, begin_s), _x(recent, end_s), y(value)
        points = [(x0, now), (x1, now)] if before is None else [(x0, before), (x0, now), (x1, now)]
        pen.line(points, fill=colour, width=2)
        before = now
    for step in recent.steps:
        if step.values.get(MISSES, 0.0) > 0 and strip.bound is not None:
            x = _x(recent, step.end_s)
            pen.line([(x, top), (x, bottom)], fill=MISS, width=2)


def _time_axis(pen: Any, recent: Recent, row: int) -> None:
    for share in (0.0, 0.5, 1.0):
        x = LEFT + share * (WIDTH - LEFT - RIGHT)
        label = f"{(share - 1) * recent.span_s:g} s" if share < 1 else "now"
        pen.text((x, row + 6), label, fill=INK, anchor=("lt", "mt", "rt")[round(2 * share)])
    pen.text((LEFT + 90, row + 6), "| SLO missed", fill=MISS)
