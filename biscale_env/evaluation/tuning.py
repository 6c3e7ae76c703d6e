"""Free parameters are chosen on tuning workloads only; tables are made on others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from biscale_env.contract import Policy
from biscale_env.envs.settings import World
from biscale_env.envs.static import run_static
from biscale_env.errors import BiscaleError
from biscale_env.evaluation.rollout import rollout
from biscale_env.evaluation.scenarios import Case
from biscale_env.traces import Trace

STATIC_STEP_MHZ = 15.0  # every clock of the grid is tried
TUNE_SEEDS = (0, 1, 2, 3, 4)  # of every policy alike, the best static clock included; as many as tables show


@dataclass(frozen=True)
class Setting:
    """One setting of free parameters and what it did on the tuning workloads.

    Attributes:
        params: the setting.
        energy_j: energy over all tuning workloads, J.
        attainment: share of their requests within the SLO.
    """

    params: Mapping[str, Any]
    energy_j: float
    attainment: float


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        chosen: the setting chosen.
        reached: whether it reached the target.
        tried: all settings tried: the energy-attainment curve.
        target: attainment aimed at.
    """

    chosen: Setting
    reached: bool
    tried: tuple[Setting, ...]
    target: float


def choose(settings: Sequence[Setting], target: float) -> Tuned:
    """Least energy among the settings that reach the target; else the one that comes closest.

    Raises:
        BiscaleError: nothing was tried.
    """
    if not settings:
        raise BiscaleError("tuning: no setting to choose from")
    reaching = [s for s in settings if s.attainment >= target]
    if reaching:
        return Tuned(min(reaching, key=lambda s: s.energy_j), True, tuple(settings), target)
    return Tuned(max(settings, key=lambda s: (s.attainment, -s.energy_j)), False, tuple(settings), target)


def static_setting(case: Case, freq_mhz: float, workloads: Sequence[Trace], draw: int) -> Setting:
    """Energy and attainment of one constant clock on the given workloads."""
    runs = [run_static(case.world, w, freq_mhz, draw) for w in workloads]
    latency = np.concatenate([r.latency_s for r in runs])
    energy = sum(r.energy_j for r in runs)
    return Setting({"freq_mhz": freq_mhz}, energy, case.world.slo.attained(latency, case.phase))


def best_static(case: Case, draw: int = -1, target: float | None = None, seeds: Sequence[int] = TUNE_SEEDS) -> Tuned:
    """The best constant clock, found offline on the tuning workloads.

    Args:
        case: scenario and phase.
        draw: model draw.
        target: attainment to reach; None is the SLO's own.
        seeds: tuning workloads.
    """
    workloads = [case.tuning_workload(seed) for seed in seeds]
    top, step = case.world.clocks.freq_max_mhz, STATIC_STEP_MHZ
    clocks = np.arange(top, case.world.clocks.freq_min_mhz - 1e-9, -step)
    tried = [static_setting(case, float(f), workloads, draw) for f in clocks]
    return choose(tried, case.world.slo.attainment if target is None else target)


def tune(
    build: Callable[[Mapping[str, Any], World, Sequence[Trace]], Policy],
    case: Case,
    grid: Sequence[Mapping[str, Any]],
    draw: int = -1,
    target: float | None = None,
    seeds: Sequence[int] = TUNE_SEEDS,
) -> Tuned:
    """Try every setting of a policy on the tuning workloads and choose the cheapest that reaches the target.

    Args:
        build: makes the policy from a setting, the world and the workloads.
        case: scenario and phase.
        grid: settings.
        draw: model draw.
        target: attainment to reach; None is the SLO's own.
        seeds: tuning workloads.
    """
    workloads = [case.tuning_workload(seed) for seed in seeds]
    tried = []
    for params in grid:
        runs = rollout(
            build(params, case.world, workloads), case.world, workloads, draw, time_probe=False, keep_steps=False
        )
        finished = sum(r.totals["n_finished"] for r in runs)
        missed = sum(r.totals["n_violations"] for r in runs)
        tried.append(Setting(dict(params), sum(r.totals["energy_j"] for r in runs), 1.0 - missed / max(finished, 1.0)))
    return choose(tried, case.world.slo.attainment if target is None else target)


def max_clock(case: Case, draw: int = -1, seeds: Sequence[int] = TUNE_SEEDS) -> Setting:
    """What max clock does on the tuning workloads: the reference of every curve, and what bounds the target (`targets.tuning_target`).

    Args:
        case: scenario and phase.
        draw: model draw.
        seeds: tuning workloads.
    """
    return static_setting(case, case.world.clocks.freq_max_mhz, [case.tuning_workload(seed) for seed in seeds], draw)
