"""What settings of free parameters do on given workloads: a grid, refined where it matters.

A step of a grid can cost three points of energy for two hundredths of a point of attainment. So
between the two neighbours that have the target between them the main parameter is bisected.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, Final

import numpy as np

from biscale_env.contract import Policy
from biscale_env.envs.loads.capacity import attained_by, run_static
from biscale_env.envs.plant import Plant
from biscale_env.evaluation.rollouts.rollout import Rollout, rollout
from biscale_env.evaluation.rollouts.window_meter import WindowTotals
from biscale_env.evaluation.stats.class_metrics import worst_class
from biscale_env.traces import Trace

Build = Callable[[Mapping[str, Any], Plant, Sequence[Trace]], Policy]
"""Makes a policy from a setting, the plant and the workloads that it will meet."""

STATIC_STEP_MHZ: Final = 15.0  # every clock of the grid is tried
COARSE: Final = 8  # values of the main parameter that are tried whatever comes out
HALVINGS: Final = 5  # of the step of the grid that has the target in it
SAME_ENERGY: Final = 5e-4  # relative: neighbours that differ by less are not told apart further


@dataclass(frozen=True)
class Setting:
    """One setting of free parameters and what it did on some workloads.

    Attributes:
        params: the setting.
        energy_j: energy over all workloads, J.
        attainment: fraction of their requests within the SLO.
        windows: the same per workload and window of time, where it was asked for.
    """

    params: Mapping[str, Any]
    energy_j: float
    attainment: float
    windows: tuple[WindowTotals, ...] = ()

    @property
    def words(self) -> str:
        """The setting as text."""
        return ", ".join(f"{key}={value}" for key, value in self.params.items())


def setting_of(params: Mapping[str, Any], runs: Sequence[Rollout], plant: Plant) -> Setting:
    """A setting with what the rollouts in a plant say of it."""
    return Setting(
        dict(params),
        sum(run.totals["energy_j"] for run in runs),
        attained_over(runs, plant),
        tuple(run.windows for run in runs if run.windows is not None),
    )


def attained_over(runs: Sequence[Rollout], plant: Plant) -> float:
    """Fraction of the requests of all runs that met the SLO; with classes that of the worst off."""
    if plant.slo.classes:
        judged = [(run.requests, run.totals["duration_s"]) for run in runs]
        return worst_class(judged, plant.slo, plant.phase)[0]
    finished = sum(run.totals["n_finished"] for run in runs)
    missed = sum(run.totals["n_violations"] for run in runs)
    return float(1.0 - missed / max(finished, 1.0))


def static_settings(
    plant: Plant, workloads: Sequence[Trace], member: int = -1, clocks: Sequence[float] = ()
) -> list[Setting]:
    """Energy and attainment of constant clocks on the given workloads.

    Args:
        plant: the instance.
        workloads: the workloads.
        member: ensemble member.
        clocks: MHz; none takes the whole range in steps of 15 MHz, the highest first.
    """
    top, low = plant.clocks.freq_max_mhz, plant.clocks.freq_min_mhz
    tried = clocks or np.arange(top, low - 1e-9, -STATIC_STEP_MHZ).tolist()
    return [_static(plant, workloads, member, float(freq)) for freq in tried]


def _static(plant: Plant, workloads: Sequence[Trace], member: int, freq_mhz: float) -> Setting:
    runs = [run_static(plant, w, freq_mhz, member) for w in workloads]
    energy = sum(r.energy_j for r in runs)
    return Setting({"freq_mhz": freq_mhz}, energy, attained_by(plant, runs))


def search(
    build: Build,
    plant: Plant,
    workloads: Sequence[Trace],
    grid: Sequence[Mapping[str, Any]],
    target: float,
    member: int = -1,
    keep_windows: bool = False,
) -> list[Setting]:
    """Try a thinned grid, then bisect the main parameter where the target lies.

    Args:
        build: makes the policy from a setting, the plant and the workloads.
        plant: the instance.
        workloads: what it is tried on.
        grid: settings; the first key of the first one is the main parameter.
        target: attainment that the search refines around.
        member: ensemble member.
        keep_windows: keep totals per window of time with every setting.

    Returns:
        All settings tried, in the order they were.
    """

    def run(params: Mapping[str, Any]) -> Setting:
        policy = build(params, plant, workloads)
        runs = rollout(
            policy,
            plant,
            workloads,
            member,
            time_probe=False,
            keep_steps=False,
            keep_windows=keep_windows,
        )
        return setting_of(params, runs, plant)

    main = next(iter(grid[0]), "") if grid else ""
    tried = [run(params) for params in thinned(grid, main)]
    pair = bracket(tried, main, target)
    for _ in range(HALVINGS):
        if pair is None or _alike(*pair):
            break
        middle = _middle(pair[0].params[main], pair[1].params[main])
        if middle is None:
            break
        tried.append(run({**pair[0].params, main: middle}))
        inner = [(pair[0], tried[-1]), (tried[-1], pair[1])]
        pair = next((p for p in inner if _between(*p, target)), None)
    return tried


def thinned(grid: Sequence[Mapping[str, Any]], main: str) -> list[Mapping[str, Any]]:
    """The grid with at most ``COARSE`` values of the main parameter, the extremes among them.

    Settings without a number for it stay.
    """
    values = sorted({p[main] for p in grid if _is_number(p.get(main))})
    if len(values) <= COARSE:
        return list(grid)
    keep = {values[round(i)] for i in np.linspace(0, len(values) - 1, COARSE)}
    return [p for p in grid if not _is_number(p.get(main)) or p[main] in keep]


def bracket(tried: Sequence[Setting], main: str, target: float) -> tuple[Setting, Setting] | None:
    """Two neighbours in the main parameter, all others equal, with the target between them.

    Of several such pairs the one that promises the least energy at the target; None without any.
    """
    groups: dict[tuple[tuple[str, Any], ...], list[Setting]] = {}
    for one in tried:
        if _is_number(one.params.get(main)):
            rest = tuple((key, value) for key, value in one.params.items() if key != main)
            groups.setdefault(rest, []).append(one)
    pairs = [
        pair
        for group in groups.values()
        for ranked in [sorted(group, key=lambda s: float(s.params[main]))]
        for pair in pairwise(ranked)
        if _between(*pair, target)
    ]
    return min(pairs, key=lambda pair: _energy_at(pair[0], pair[1], target), default=None)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _middle(a: float, b: float) -> float | None:
    """A value between two, whole where both are; None where there is none."""
    if isinstance(a, int) and isinstance(b, int):
        return (a + b) // 2 if abs(a - b) > 1 else None
    return 0.5 * (a + b)


def _between(a: Setting, b: Setting, target: float) -> bool:
    return (a.attainment >= target) != (b.attainment >= target)


def _energy_at(a: Setting, b: Setting, target: float) -> float:
    weight = (target - a.attainment) / (b.attainment - a.attainment)
    return a.energy_j + weight * (b.energy_j - a.energy_j)


def _alike(a: Setting, b: Setting) -> bool:
    return abs(a.energy_j - b.energy_j) <= SAME_ENERGY * a.energy_j
