"""What a chosen setting does in members of the ensemble: how far the models' doubt carries."""

from collections.abc import Sequence
from typing import NamedTuple

from biscale_env.envs.plant import Plant
from biscale_env.evaluation.rollouts.rollout import rollout
from biscale_env.evaluation.tuning.hindsight import build_policy
from biscale_env.evaluation.tuning.settings_search import Setting, setting_of, static_settings
from biscale_env.policies.policy_source import is_planned_each
from biscale_env.traces import Trace


class MemberRun(NamedTuple):
    """A chosen setting in one member.

    Attributes:
        member: the ensemble member, of the plant and of the controller's model alike.
        energy_j: energy over the workloads, J.
        attainment: fraction of requests within the SLO.
    """

    member: int
    energy_j: float
    attainment: float


def member_runs(
    build: str, plant: Plant, workloads: Sequence[Trace], n_members: int
) -> list[MemberRun]:
    """Run a policy, its parameters fixed, in the first members of the ensemble.

    Nothing is tuned again: parameters were chosen in the nominal plant, as on one's own machines,
    and each member stands for what these machines might really be. Its controller knows the member,
    as after profiling.

    Args:
        build: the policy's name with its parameters.
        plant: the instance.
        workloads: what it is run on.
        n_members: how many members; fewer where the ensemble has fewer.
    """
    if is_planned_each(build):  # a plan of its own in every member would be another question
        return []
    found = []
    for member in range(min(n_members, plant.model.n_members)):
        one = _in_member(build, plant, workloads, member)
        found.append(MemberRun(member, one.energy_j, one.attainment))
    return found


def _in_member(build: str, plant: Plant, workloads: Sequence[Trace], member: int) -> Setting:
    freq_mhz = constant_clock(build, plant)
    if freq_mhz is not None:
        (found,) = static_settings(plant, workloads, member, (freq_mhz,))
        return found
    policy = build_policy(build, plant, workloads, member)
    return setting_of(
        {}, rollout(policy, plant, workloads, member, time_probe=False, keep_steps=False), plant
    )


def constant_clock(build: str, plant: Plant) -> float | None:
    """Clock of ``max`` and ``static:MHZ``, which one compiled call can run; None for all others."""
    name, _, value = build.partition(":")
    if name == "max":
        return plant.clocks.freq_max_mhz
    return float(value) if name == "static" and value.replace(".", "", 1).isdigit() else None
