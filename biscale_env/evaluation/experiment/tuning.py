"""Free parameters are chosen on tuning workloads only; tables are made on others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from biscale_env.contract import Policy
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.capacity import run_static
from biscale_env.envs.plant import Plant
from biscale_env.evaluation.experiment.rollout import rollout
from biscale_env.evaluation.experiment.scenarios import Case
from biscale_env.traces import Trace

STATIC_STEP_MHZ = 15.0  # every clock of the grid is tried
# of every policy alike, the best static clock included; as many as tables show
TUNE_SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Setting:
    """One setting of free parameters and what it did on the tuning workloads.

    Attributes:
        params: the setting.
        energy_j: energy over all tuning workloads, J.
        attainment: fraction of their requests within the SLO.
    """

    params: Mapping[str, Any]
    energy_j: float
    attainment: float


@dataclass(frozen=True)
class TunedPolicy:
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


def choose(settings: Sequence[Setting], target: float) -> TunedPolicy:
    """Least energy among the settings that reach the target; else the one that comes closest.

    Raises:
        BiscaleError: nothing was tried.
    """
    if not settings:
        raise BiscaleError("tuning: no setting to choose from")
    reaching = [s for s in settings if s.attainment >= target]
    if reaching:
        return TunedPolicy(min(reaching, key=lambda s: s.energy_j), True, tuple(settings), target)
    return TunedPolicy(
        max(settings, key=lambda s: (s.attainment, -s.energy_j)), False, tuple(settings), target
    )


def static_setting(case: Case, freq_mhz: float, workloads: Sequence[Trace], member: int) -> Setting:
    """Energy and attainment of one constant clock on the given workloads."""
    runs = [run_static(case.plant, w, freq_mhz, member) for w in workloads]
    latency = np.concatenate([r.latency_s for r in runs])
    energy = sum(r.energy_j for r in runs)
    return Setting({"freq_mhz": freq_mhz}, energy, case.plant.slo.attained(latency, case.phase))


def best_static(
    case: Case, member: int = -1, target: float | None = None, seeds: Sequence[int] = TUNE_SEEDS
) -> TunedPolicy:
    """The best constant clock, found offline on the tuning workloads.

    Args:
        case: scenario and phase.
        member: ensemble member.
        target: attainment to reach; None is the SLO's own.
        seeds: tuning workloads.
    """
    workloads = [case.tuning_workload(seed) for seed in seeds]
    top, step = case.plant.clocks.freq_max_mhz, STATIC_STEP_MHZ
    clocks = np.arange(top, case.plant.clocks.freq_min_mhz - 1e-9, -step)
    tried = [static_setting(case, float(f), workloads, member) for f in clocks]
    return choose(tried, case.plant.slo.attainment if target is None else target)


def tune(
    build: Callable[[Mapping[str, Any], Plant, Sequence[Trace]], Policy],
    case: Case,
    grid: Sequence[Mapping[str, Any]],
    member: int = -1,
    target: float | None = None,
    seeds: Sequence[int] = TUNE_SEEDS,
) -> TunedPolicy:
    """Try every setting of a policy on the tuning workloads.

    The one of least energy among those that reach the target is chosen.

    Args:
        build: makes the policy from a setting, the plant and the workloads.
        case: scenario and phase.
        grid: settings.
        member: ensemble member.
        target: attainment to reach; None is the SLO's own.
        seeds: tuning workloads.
    """
    workloads = [case.tuning_workload(seed) for seed in seeds]
    tried = []
    for params in grid:
        runs = rollout(
            build(params, case.plant, workloads),
            case.plant,
            workloads,
            member,
            time_probe=False,
            keep_steps=False,
        )
        finished = sum(r.totals["n_finished"] for r in runs)
        missed = sum(r.totals["n_violations"] for r in runs)
        tried.append(
            Setting(
                dict(params),
                sum(r.totals["energy_j"] for r in runs),
                1.0 - missed / max(finished, 1.0),
            )
        )
    return choose(tried, case.plant.slo.attainment if target is None else target)


def max_clock(case: Case, member: int = -1, seeds: Sequence[int] = TUNE_SEEDS) -> Setting:
    """What max clock does on the tuning workloads.

    The reference of every curve, and what bounds the target (`targets.tuning_target`).

    Args:
        case: scenario and phase.
        member: ensemble member.
        seeds: tuning workloads.
    """
    return static_setting(
        case, case.plant.clocks.freq_max_mhz, [case.tuning_workload(seed) for seed in seeds], member
    )
