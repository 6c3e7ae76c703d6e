"""Free parameters are chosen on tuning workloads only; tables are made on others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.rollouts.scenarios import Case
from biscale_env.evaluation.tuning.settings_search import (
    Build,
    Setting,
    search,
    static_settings,
)
from biscale_env.traces import Trace

LEAST_TUNE_SEEDS: Final = 3  # fewer workloads choose what suited one of them (assumed)


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


def tune_seeds(case: Case) -> range:
    """Tuning workloads of every policy alike, the best static clock too: as many as are judged.

    Of windows of several days all are tuned on, each with as many choices of requests as that asks.
    """
    least = max(LEAST_TUNE_SEEDS, case.scenario.seeds * case.judged.n_windows)
    n_windows = case.tuning.n_windows
    return range(-(-least // n_windows) * n_windows)


def tuning_workloads(case: Case, seeds: Sequence[int] | None = None) -> list[Trace]:
    """The workloads that free parameters are chosen on.

    Args:
        case: scenario and phase.
        seeds: their seeds; None for :func:`tune_seeds`.
    """
    return [case.tuning_workload(seed) for seed in (tune_seeds(case) if seeds is None else seeds)]


def best_static(
    case: Case,
    member: int = -1,
    target: float | None = None,
    seeds: Sequence[int] | None = None,
) -> TunedPolicy:
    """The best constant clock, found offline on the tuning workloads.

    Args:
        case: scenario and phase.
        member: ensemble member.
        target: attainment to reach; None is the SLO's own.
        seeds: tuning workloads; None for as many as are judged.
    """
    tried = static_settings(case.plant, tuning_workloads(case, seeds), member)
    return choose(tried, case.plant.slo.attainment if target is None else target)


def tune(
    build: Build,
    case: Case,
    grid: Sequence[Mapping[str, Any]],
    member: int = -1,
    target: float | None = None,
    seeds: Sequence[int] | None = None,
) -> TunedPolicy:
    """Search the settings of a policy on the tuning workloads.

    The one of least energy among those that reach the target is chosen.

    Args:
        build: makes the policy from a setting, the plant and the workloads.
        case: scenario and phase.
        grid: settings that are tried whatever comes out; between them the search refines.
        member: ensemble member.
        target: attainment to reach; None is the SLO's own.
        seeds: tuning workloads; None for as many as are judged.
    """
    asked = case.plant.slo.attainment if target is None else target
    workloads = tuning_workloads(case, seeds)
    return choose(search(build, case.plant, workloads, grid, asked, member), asked)


def max_clock(case: Case, member: int = -1, seeds: Sequence[int] | None = None) -> Setting:
    """What max clock does on the tuning workloads.

    The reference of every curve, and what bounds the target (`targets.tuning_target`).

    Args:
        case: scenario and phase.
        member: ensemble member.
        seeds: tuning workloads; None for as many as are judged.
    """
    top = case.plant.clocks.freq_max_mhz
    (found,) = static_settings(case.plant, tuning_workloads(case, seeds), member, (top,))
    return found
