"""A policy's energy-attainment curve on the workloads that are judged.

Parameters of a curve are hindsight, the same kind for every policy: it says what a policy needs at
the SLO's attainment, whatever its tuning happened to choose.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from biscale_env.contract import Policy
from biscale_env.envs.plant import Plant
from biscale_env.evaluation.rollouts.rollout import rollout
from biscale_env.evaluation.rollouts.scenarios import Case
from biscale_env.evaluation.stats import targets
from biscale_env.evaluation.tuning.hindsight import build_policy
from biscale_env.evaluation.tuning.settings_search import (
    STATIC_STEP_MHZ,
    Build,
    Setting,
    search,
    setting_of,
    static_settings,
)
from biscale_env.evaluation.tuning.tuning import TunedPolicy, choose
from biscale_env.policies import with_parameters
from biscale_env.traces import Trace

AROUND: Final = (-24, -12, -6, -3, -2, -1, 0, 1, 2, 3, 6, 12, 24)
"""Steps of 15 MHz around the best static clock that its curve is made of."""


def builder(build: str, member: int) -> Build:
    """Makes a named policy from a setting.

    Args:
        build: its name.
        member: ensemble member that is its nominal model.
    """

    def made(params: Mapping[str, Any], plant: Plant, traces: Sequence[Trace]) -> Policy:
        return build_policy(with_parameters(build, params), plant, traces, member)

    return made


def judged_target(case: Case, workloads: Sequence[Trace], member: int) -> float:
    """Attainment that policies are compared at: the SLO's, less where max clock misses it."""
    (top,) = static_settings(case.plant, workloads, member, (case.plant.clocks.freq_max_mhz,))
    return targets.judged_target(case.plant.slo.attainment, top.attainment)


def hindsight_static(case: Case, workloads: Sequence[Trace], member: int) -> TunedPolicy:
    """The best constant clock of the judged workloads themselves: what no rule may lose to."""
    target = judged_target(case, workloads, member)
    return choose(static_settings(case.plant, workloads, member), target)


def policy_curve(
    build: str,
    grid: Sequence[Mapping[str, Any]],
    case: Case,
    workloads: Sequence[Trace],
    member: int,
) -> list[Setting]:
    """Settings of a policy on the judged workloads, with their totals per window.

    Args:
        build: its name.
        grid: settings.
        case: scenario and phase.
        workloads: judged workloads.
        member: ensemble member.
    """
    target = judged_target(case, workloads, member)
    made = builder(build, member)
    return search(made, case.plant, workloads, grid, target, member, keep_windows=True)


def static_curve(
    case: Case, workloads: Sequence[Trace], member: int, freq_mhz: float
) -> list[Setting]:
    """Constant clocks around the best one, with their totals per window."""
    clocks = case.plant.clocks
    tried = [freq_mhz + STATIC_STEP_MHZ * step for step in AROUND]
    grid = [f for f in tried if clocks.freq_min_mhz <= f <= clocks.freq_max_mhz]
    return [
        setting_of(
            {"freq_mhz": freq},
            rollout(
                build_policy(f"static:{freq:g}", case.plant, workloads, member),
                case.plant,
                workloads,
                member,
                time_probe=False,
                keep_steps=False,
                keep_windows=True,
            ),
            case.plant,
        )
        for freq in grid
    ]
