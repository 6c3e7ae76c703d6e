"""A finished run behind the page: read once, asked many times."""

import math
import threading
from pathlib import Path
from typing import Any, Final

from biscale_env.evaluation.runs.run_view import Run, load_run
from biscale_env.plots.window_figure import PointRuns

WIDTHS_S: Final = (5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class RunSession:
    """An opened run directory and the runs of its points, read when first asked for.

    Attributes:
        run: the opened run directory.
        points: its operating points.
    """

    def __init__(self, folder: Path) -> None:
        """Open a run directory.

        Raises:
            BiscaleError: there are no results in it.
        """
        self.run: Run = load_run(folder)
        self.points = self.run.points()
        self._read: dict[int, PointRuns] = {}
        self._guard = threading.Lock()

    def at(self, number: int) -> PointRuns:
        """Runs of a point by its number.

        Raises:
            BiscaleError: no timeline was kept of it.
        """
        with self._guard:
            if number not in self._read:
                self._read[number] = PointRuns.of(self.run, self.points[number])
            return self._read[number]

    def titles(self) -> list[str]:
        """A name for every point, of what differs between points, the phase first."""
        varying = [
            name
            for name in self.points[0]
            if name != "phase" and len({str(p[name]) for p in self.points}) > 1
        ]
        return [
            ", ".join([str(point["phase"]), *(_worded(name, point[name]) for name in varying)])
            for point in self.points
        ]

    def first_points(self) -> list[int]:
        """The first point, and the one of the other phase that is otherwise the same."""
        first = self.points[0]
        same = [
            k for k, point in enumerate(self.points) if k and _but_phase(point) == _but_phase(first)
        ]
        return [0, *same[:1]]


def _worded(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{name} {value:g}" if math.isfinite(value) else f"no {name}"
    return f"{name} {value}"


def _but_phase(point: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in point.items() if name != "phase"}
