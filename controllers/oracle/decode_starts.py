"""Plans of one rule for the whole run, where the search for a decode plan begins.

Three families: one clock; two clocks, the second from a number of running requests on; iterations
of at most one length, from a lowest clock on. Each is tried on a grid, all single clocks among
them, and the best of the last two is improved by smaller and smaller steps.
"""

from collections.abc import Callable, Iterable
from itertools import combinations, product
from typing import NamedTuple

import numpy as np

from controllers.oracle.decode_plans import DecodeRunner, PlanRun, WindowPlan

Rank = Callable[[PlanRun], tuple[float, float]]
Tried = tuple[PlanRun, WindowPlan]
TARGETS = np.linspace(0.4, 1.2, 17)  # iteration times, in TPOT bounds
LOWEST = 4  # lowest clocks of the iteration times, from the lower half of the grid
CLOCKS = 9  # of the pairs, from the whole grid
CROWDS = (0.25, 0.5, 0.65, 0.8, 0.95)  # of the most requests that run at the best single clock
STEPS = (8, 4, 2, 1)  # of the grid; relative steps of times and crowds shrink with them
MOST_OF_RUNS = 0.5  # that may be spent here


class SearchStarts(NamedTuple):
    """The best single clock, and the best of all."""

    static: Tried
    best: Tried


def best_starts(runner: DecodeRunner, rank: Rank, max_runs: int) -> SearchStarts:
    """Try the families; the best by ``rank`` (least first).

    Args:
        runner: the workload.
        rank: order of preference.
        max_runs: runs of the whole search; all single clocks are tried even so.
    """
    n = len(runner.grid_ghz)
    most = MOST_OF_RUNS * max_runs

    def tried(plans: Iterable[WindowPlan]) -> list[Tried]:
        found = []
        for plan in plans:
            if runner.runs >= most:
                break
            found.append((runner.run(plan)[0], plan))
        return found

    def best(found: list[Tried]) -> Tried:
        return min(found, key=lambda x: rank(x[0]))

    static = best([(runner.run(plan)[0], plan) for plan in map(WindowPlan.single, range(n))])
    lowest = np.unique(np.linspace(0, n // 2, LOWEST).astype(int))
    bound_s = float(runner.params["slo_s"])
    times = tried(
        WindowPlan.single(int(k), target_s=float(bound_s * t)) for t, k in product(TARGETS, lowest)
    )
    crowd = most_running(runner, static[1])
    pairs = tried(
        WindowPlan.single(int(i), int(j), crowd=max(int(share * crowd), 2))
        for share, (i, j) in product(CROWDS, combinations(np.linspace(0, n - 1, CLOCKS), 2))
    )
    finalists = [improved(best(f), tried, best, n) for f in (times, pairs) if f]
    return SearchStarts(static, best([static, *finalists]))


def most_running(runner: DecodeRunner, plan: WindowPlan) -> int:
    """Most requests that can run at a time, near enough: those whose times overlap in a run."""
    runner.run(plan)
    pool, finish_s = runner.batch.pool, runner.batch.finish_s
    ends = np.sort(finish_s[np.isfinite(finish_s)])
    running = np.arange(1, len(pool.arrival_s) + 1) - np.searchsorted(ends, pool.arrival_s)
    return int(min(running.max(), runner.params["max_seqs"]))


def improved(
    start: Tried,
    tried: Callable[[Iterable[WindowPlan]], list[Tried]],
    best: Callable[[list[Tried]], Tried],
    n_clocks: int,
) -> Tried:
    """Go to the best neighbour until none is better, with smaller and smaller steps."""
    for step in STEPS:
        while True:
            found = best([start, *tried(neighbours(start[1], step, n_clocks))])
            if found is start:
                break
            start = found
    return start


def neighbours(plan: WindowPlan, step: int, n_clocks: int) -> list[WindowPlan]:
    """Plans that differ in one number."""
    quiet, busy, target_s = int(plan.quiet[0]), int(plan.busy[0]), float(plan.target_s[0])
    made = []
    for sign in (-1, 1):
        k, j = quiet + sign * step, busy + sign * step
        if np.isfinite(target_s):
            scaled = target_s * (1.0 + 0.01 * step) ** sign
            made += [WindowPlan.single(quiet, target_s=scaled)]
            made += [WindowPlan.single(k, target_s=target_s)] if 0 <= k < n_clocks else []
            continue
        crowd = max(plan.crowd + sign * max(round(0.02 * step * plan.crowd), 1), 2)
        made += [WindowPlan.single(quiet, busy, crowd=crowd)]
        made += [WindowPlan.single(k, busy, crowd=plan.crowd)] if 0 <= k < n_clocks else []
        made += [WindowPlan.single(quiet, j, crowd=plan.crowd)] if 0 <= j < n_clocks else []
    return made
