"""A day of many cells: clusters of their own behind a front router that spreads requests.

The router looks at no state, so that a cell depends on its own requests alone: groups of cells run
side by side, each on the same stream, and come out the same however they are grouped.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole
from biscale_env.envs.cluster.cluster_settings import ClusterPlant
from biscale_env.envs.cluster.stream import daily_windows
from biscale_env.envs.cluster.whole_run import Window, WindowedRun
from biscale_env.jobs.workers import Workers, run_each
from biscale_env.reproduce.day import (
    Day,
    DayPlan,
    day_bench,
    day_row,
    day_systems,
    peak_memory_mb,
)
from biscale_env.reproduce.day_defaults import DAY_MARGIN
from biscale_env.reproduce.systems import Bench, Plans, System, TunedSystem, planner_of
from biscale_env.traces import Trace
from controllers.placement.ilp import check_request

FRONTS: Final = ("random", "round_robin")
FRONT_SEED: Final = 7_919
GROUPS_ON_RAY: Final = 16
"""Groups of cells on a cluster: each makes the whole stream, which costs it a minute of a day."""
_SUMMED: Final = (
    "rate_rps",
    "requests",
    "tokens",
    "energy_j",
    "prefill_j",
    "decode_j",
    "spare_j",
    "power_w",
    "late_ttft",
    "late_tpot",
    "gpus",
    "changed",
)


@dataclass(frozen=True)
class CellsPlan:
    """A day of cells.

    Attributes:
        day: of one cell; its rate is the mean over cells.
        cells: how many.
        front: ``random``: every request goes to any cell alike; ``round_robin``: to the next.
    """

    day: DayPlan
    cells: int
    front: str = "random"

    def __post_init__(self) -> None:
        if self.cells < 1:
            raise BiscaleError(f"--cells must be at least 1, got {self.cells}")
        if self.front not in FRONTS:
            raise BiscaleError(f"--front must be one of {', '.join(FRONTS)}, got '{self.front}'")
        check_request(self.day.rate_rps, self.day.settings["gpus"], self.day.alpha)

    def windows(self) -> Iterator[Trace]:
        """The stream of all cells, window by window."""
        day = self.day
        return daily_windows(
            rate_rps=day.rate_rps * self.cells, duration_s=day.duration_s, lengths=day.lengths
        )


def cell_of(plan: CellsPlan, window: int, first: int, count: int) -> NDArray[np.int64]:
    """Cell of every request of a window.

    Args:
        plan: cells and router.
        window: its number.
        first: requests before it.
        count: its requests.
    """
    if plan.front == "round_robin":
        return (first + np.arange(count)) % plan.cells
    return np.random.default_rng([FRONT_SEED, window]).integers(plan.cells, size=count)


def parts_of(window: Trace, cells: NDArray[np.int64], wanted: Sequence[int]) -> list[Trace]:
    """Requests of some cells, each as a trace as long as the window."""
    order = np.argsort(cells, kind="stable")
    edges = np.searchsorted(cells[order], [[c, c + 1] for c in wanted])
    return [
        replace(
            window,
            arrival_s=window.arrival_s[mine],
            prompt_tokens=window.prompt_tokens[mine],
            output_tokens=window.output_tokens[mine],
        )
        for begin, end in edges.tolist()
        for mine in [order[begin:end]]
    ]


class CellRun:
    """One cell under one system, a window at a time."""

    def __init__(self, plant: ClusterPlant, system: System, tuned: TunedSystem, bench: Bench,
                 seed: int, plans: Plans | None = None) -> None:  # fmt: skip
        """Bring the cell into service; ``seed`` is of its own router."""
        planner = planner_of(system, tuned, bench, plans)
        self._waiting: deque[Trace] = deque()
        self._windows = WindowedRun(plant, planner(0, None), seed).over(self._fed(), planner)
        self._slo, self._placement = plant.slo, ""

    def _fed(self) -> Iterator[Trace]:
        while self._waiting:
            yield self._waiting.popleft()

    def step(self, piece: Trace) -> dict[str, Any]:
        """Run the next window; its row, and whether the placement changed."""
        self._waiting.append(piece)
        return self._row(next(self._windows))

    def rest(self) -> dict[str, Any]:
        """The time until every request is finished."""
        return self._row(next(self._windows))

    def _row(self, window: Window) -> dict[str, Any]:
        row = day_row(window, self._slo.ttft_s, self._slo.tpot_s)
        before, self._placement = self._placement, row.pop("placement")
        return row | {"changed": int(bool(before) and before != self._placement)}


def added(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of a window from those of its cells, or of groups of them."""
    sums = {name: sum(row[name] for row in rows) for name in _SUMMED}
    longest = max(row["duration_s"] for row in rows)
    return {"index": rows[0]["index"], "duration_s": longest, **sums}


def run_group(
    plan: CellsPlan, bench: Bench, wanted: Sequence[int], marks: Path | None = None
) -> dict[str, Any]:
    """Run some of the cells under every system, all on the same stream.

    Args:
        plan: the day.
        bench: capacity table of a cell.
        wanted: numbers of the cells.
        marks: a file that grows by a byte per finished window; None: none.

    Returns:
        ``rows`` by system, ``seconds`` by system (of simulation), ``made_s`` (of making and
        spreading requests), ``memory_mb`` of this process.
    """
    tuned = TunedSystem(alpha=plan.day.alpha, prefill_margin=DAY_MARGIN, decode_margin=DAY_MARGIN)
    runs = {}
    plans: Plans = {}  # tier 1 sees the same load whatever tier 2 does, and cells of equal load
    for title, system in day_systems().items():
        plant = bench.plant(system, tuned)
        runs[title] = [CellRun(plant, system, tuned, bench, seed, plans) for seed in wanted]
    rows: dict[str, list[dict[str, Any]]] = {title: [] for title in runs}
    seconds, made_s, first = dict.fromkeys(runs, 0.0), 0.0, 0
    if marks is not None:
        write_whole(marks, b"")  # a group whose worker was killed begins anew
    start = time.perf_counter()
    for k, window in enumerate(plan.windows()):
        plans.clear()
        parts = parts_of(window, cell_of(plan, k, first, len(window)), wanted)
        first += len(window)
        made_s += time.perf_counter() - start
        for title, cells in runs.items():
            start = time.perf_counter()
            rows[title].append(added([c.step(p) for c, p in zip(cells, parts, strict=True)]))
            seconds[title] += time.perf_counter() - start
        if marks is not None:
            with marks.open("ab") as file:
                file.write(b".")
        start = time.perf_counter()
    for title, cells in runs.items():
        rows[title].append(added([cell.rest() for cell in cells]))
    return {"rows": rows, "seconds": seconds, "made_s": made_s, "memory_mb": peak_memory_mb()}


def groups_of(cells: int, workers: Workers) -> list[list[int]]:
    """Cells dealt to as many groups as can run at once."""
    count = min(cells, workers.jobs if workers.ray is None else GROUPS_ON_RAY)
    return [list(range(k, cells, count)) for k in range(count)]


def run_cells(
    plan: CellsPlan,
    workers: Workers,
    marks: Path | None = None,
    note: Callable[[], None] | None = None,
) -> tuple[dict[str, Day], dict[str, int]]:
    """Run a day of cells; days by system, and how often placements changed.

    The capacity table is made first, here and once.

    Args:
        plan: what the day is made of.
        workers: where groups of cells run.
        marks: folder for files that grow as groups go on; None: none.
        note: called when a group is finished.

    Raises:
        BiscaleError: an impossible load, cluster or headroom.
    """
    bench = day_bench(plan.day.settings, plan.day.rate_rps, plan.day.lengths)
    groups = groups_of(plan.cells, workers)
    calls = [
        (plan, bench, group, None if marks is None else marks / str(k))
        for k, group in enumerate(groups)
    ]
    found: dict[int, dict[str, Any]] = {}
    with closing(run_each(run_group, calls, workers)) as results:
        for number, result in results:
            found[number] = result
            if note is not None:
                note()
    parts = [found[k] for k in range(len(groups))]
    memory_mb = max(part["memory_mb"] for part in parts)
    days, changes = {}, {}
    for title in parts[0]["rows"]:
        windows = [added(rows) for rows in zip(*(p["rows"][title] for p in parts), strict=True)]
        changes[title] = sum(row.pop("changed") for row in windows if row["index"] >= 0)
        seconds = sum(part["seconds"][title] for part in parts)
        days[title] = Day([w | {"placement": ""} for w in windows], seconds, memory_mb)
    return days, changes
