"""The jobs of a comparison: one per policy and ensemble member."""

from collections.abc import Sequence

from biscale_env.evaluation.experiment.compare import ComparisonJob
from biscale_env.evaluation.experiment.policy_list import NamedPolicy
from biscale_env.evaluation.rollouts.scenarios import Case, Scenario
from biscale_env.evaluation.tuning.hindsight import build_policy, settings_of
from biscale_env.policies.policy_source import (
    STATIC_BEST,
    is_lookahead,
    is_planned,
    is_planned_each,
)


def variant_of(build: str, phase: str, tuned: bool) -> str:
    """``tuned`` where free parameters are chosen on tuning workloads, in results."""
    return "tuned" if tuned and build != STATIC_BEST and settings_of(build, phase) else ""


def plan(
    scenario: Scenario,
    case: Case,
    policies: Sequence[NamedPolicy],
    tuned: bool = False,
    oracle_seeds: int | None = None,
    spread: int = 0,
) -> list[ComparisonJob]:
    """Jobs of one scenario and phase.

    Args:
        scenario: operating point.
        case: the same, resolved for the phase.
        policies: what is compared.
        tuned: choose free parameters on tuning workloads, and run every setting on the judged ones
            too, for a comparison at equal attainment.
        oracle_seeds: workloads (of each window) for which the optimum is computed, the first few;
            None for all.
        spread: number of ensemble members that the setting chosen in the nominal plant is run in.

    Raises:
        BiscaleError: a mistake in a policy's parameters.
    """
    jobs: list[ComparisonJob] = []
    seeds = case.workload_seeds()
    for label, build in policies:
        if is_lookahead(build) or not is_planned(build):
            build_policy(build, case.plant, [], scenario.members[0])
        mine = case.workload_seeds(oracle_seeds) if is_planned_each(build) else seeds
        variant = variant_of(build, case.phase, tuned)
        jobs += [
            ComparisonJob(
                scenario,
                case.phase,
                label,
                build,
                member,
                mine,
                variant=variant,
                curve=tuned,
                spread=spread if member == -1 else 0,
            )
            for member in scenario.members
            if mine
        ]
    return jobs
