"""Figures as files: SVG, PDF or PNG for print, HTML to point at."""

import os
from pathlib import Path
from typing import Final

import plotly.graph_objects as go

from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole

STATIC: Final = (".svg", ".pdf", ".png")
PNG_SCALE: Final = 3.0
"""Pixels per CSS pixel: 96 dpi become 288, enough for print."""


def save(
    figure: go.Figure,
    path: str | os.PathLike[str],
    width_px: int | None = None,
    height_px: int | None = None,
) -> Path:
    """Write a figure; the suffix says how. Static files have a white ground.

    SVG, PDF and PNG need the extra ``print`` and a Chrome or Chromium on the machine.

    Args:
        figure: any Plotly figure.
        path: ends in ``.html``, ``.svg``, ``.pdf`` or ``.png``.
        width_px: of the page, CSS pixels. Default: the figure's, else 760.
        height_px: likewise. Default: the figure's.

    Returns:
        The path.

    Raises:
        BiscaleError: another suffix, or what writes static files is not installed.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix == ".html":
        write_whole(target, figure.to_html(include_plotlyjs=True, full_html=True))
        return target
    if suffix not in STATIC:
        raise BiscaleError(f"{target}: a figure is written as .html, {', '.join(STATIC)}")
    printed = go.Figure(figure).update_layout(paper_bgcolor="white", plot_bgcolor="white")
    width = width_px or printed.layout.width or 760
    height = height_px or printed.layout.height or 430
    try:
        import kaleido  # noqa: F401

        scale = PNG_SCALE if suffix == ".png" else 1.0
        data = printed.to_image(format=suffix[1:], width=width, height=height, scale=scale)
    except ImportError:
        raise BiscaleError(
            f"{target}: static figures need kaleido: pip install 'biscale-env[print]'"
        ) from None
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it failed"
        raise BiscaleError(
            f"{target}: kaleido cannot draw, it needs a Chrome or Chromium: {reason}"
        ) from error
    write_whole(target, data)
    return target
