"""What ``biscale evaluate`` evaluates, and its jobs beside the references."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.experiment.compare import ComparisonJob
from biscale_env.evaluation.experiment.policy_jobs import plan, variant_of
from biscale_env.evaluation.experiment.policy_list import choose, named
from biscale_env.evaluation.rollouts.scenarios import Case, Scenario, load_scenario, resolve
from biscale_env.policies import find_policy, known_policies
from biscale_env.policies.checkpoint_source import (
    CheckpointSource,
    best_of,
    checkpoint_in,
    phase_of,
    training_seed,
)
from biscale_env.policies.policy_source import AGENT, BISCALE_OWN, FILES, split_name


@dataclass(frozen=True)
class Candidate:
    """A policy that is evaluated, of one training seed.

    Attributes:
        build: its name for the resolver.
        phases: phases that it can run.
        training_seed: -1 for policies that are not trained.
    """

    build: str
    phases: tuple[str, ...]
    training_seed: int = -1


def candidates_of(target: str) -> list[Candidate]:
    """The policies that a target of ``biscale evaluate`` means.

    Args:
        target: ``[label=]name``: a policy in the syntax of :mod:`biscale_env.policies`, or a folder
            of run directories ``seed-*``, each of which is a candidate.

    Raises:
        BiscaleError: no such policy, or a folder without a checkpoint.
    """
    target = named(target).build
    base, rest = split_name(target, known_policies())
    behind = f":{rest}" if rest else ""
    folder = Path(base)
    if folder.is_dir():
        runs = [run for run in (folder, *sorted(folder.glob("seed-*"))) if best_of(run)]
        paths = [checkpoint_in(str(run)) for run in runs] or [checkpoint_in(base)]
        return [_of_file(path, behind) for path in paths]
    source = find_policy(target)
    if isinstance(source, CheckpointSource):
        return [_of_file(source.path(phase), behind) for phase in source.phases]
    return [Candidate(target, source.phases)]


def label_of(target: str) -> str:
    """How tables call a target of ``biscale evaluate``.

    What stands before its ``=``; ``agent`` for the shipped agent and for training seeds together;
    else the name of the file or run directory, or the whole name of a class or controller.
    """
    label, build = named(target)
    if label != build:
        return label
    base, rest = split_name(build, known_policies())
    path = Path(base)
    if base == AGENT or (path.is_dir() and best_of(path) is None):
        return AGENT
    if build in known_policies():  # a reference of that name may stand beside it
        return f"{build} (evaluated)"
    if path.exists() and path.suffix in (*FILES, ""):
        short = path.parent.resolve().name if path.stem in ("best", "last") else path.stem
        return f"{short}:{rest}" if rest else short
    return build


def _of_file(path: Path, behind: str) -> Candidate:
    return Candidate(f"{path}{behind}", (phase_of(path),), training_seed(path))


def scenario_jobs(
    case: Case,
    found: Sequence[Candidate],
    policies: Sequence[str],
    tuned: bool,
    oracle_seeds: int | None = None,
    label: str = AGENT,
) -> list[ComparisonJob]:
    """Jobs of one scenario and phase: the references, and every candidate under one label.

    Args:
        case: the scenario, resolved for the phase.
        found: candidates; those of the other phase are passed over.
        policies: references; none takes the best static clock and BiScale's own. Max clock
            and the best static clock in hindsight are always there.
        tuned: choose free parameters on tuning workloads.
        oracle_seeds: workloads for which the optimum is computed; None for all.
        label: of the candidates.

    Raises:
        BiscaleError: a reference has the label already.
    """
    scenario, phase = case.scenario, case.phase
    own = policies or ("max", "static-best", BISCALE_OWN[phase])
    references = choose(own, (phase,))[phase]
    if label in {one.label for one in references}:
        raise BiscaleError(
            f"two policies are called '{label}': give the one that is evaluated another name, "
            f"e.g. mine={label}"
        )
    jobs = plan(scenario, case, references, tuned, oracle_seeds)
    seeds = case.workload_seeds()
    return jobs + [
        ComparisonJob(
            scenario,
            phase,
            label,
            one.build,
            member,
            seeds,
            training_seed=one.training_seed,
            variant=variant_of(one.build, phase, tuned),
            curve=tuned,
        )
        for one in found
        if phase in one.phases
        for member in scenario.members
    ]


def changed_scenario(name: str, changes: Mapping[str, Any]) -> Scenario:
    """A named scenario with some keys changed.

    Raises:
        BiscaleError: no such scenario, an unknown key or an impossible value.
    """
    return load_scenario(name).changed(**changes)


def case_of(name: str, changes: Mapping[str, Any], phase: str) -> Case:
    """A named scenario with some keys changed, resolved for a phase.

    Raises:
        Infeasible: max clock itself cannot serve it at any load.
        BiscaleError: as of :func:`changed_scenario`.
    """
    return resolve(changed_scenario(name, changes), phase)
