"""Plots as SVG files with Matplotlib, without a backend or settings of the caller's process."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from biscale_env.core.files import open_whole


def can_plot() -> bool:
    """Whether Matplotlib (an optional extra) is installed."""
    return find_spec("matplotlib") is not None


def svg_axes(rows: int, columns: int, size_in: tuple[float, float], **options: Any) -> Any:
    """A figure of its own, which pyplot knows nothing of, and its axes.

    Args:
        rows: rows of axes.
        columns: columns of axes.
        size_in: width and height, inch.
        options: of ``Figure.subplots``, e.g. ``sharex``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_in)
    return figure, figure.subplots(rows, columns, **options)


def save_svg(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure as SVG, the same bytes for the same figure.

    Args:
        figure: of :func:`svg_axes`.
        path: where to.
        options: of ``Figure.savefig``, e.g. ``bbox_inches``.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "biscale"}), open_whole(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None}, **options)
