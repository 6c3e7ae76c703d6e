"""Who takes part in a benchmark, and the jobs of its references and entrants."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.experiment.agent_jobs import Candidate, candidates_of
from biscale_env.evaluation.experiment.compare import ComparisonJob
from biscale_env.evaluation.experiment.policy_jobs import plan
from biscale_env.evaluation.experiment.policy_list import REFERENCE, NamedPolicy, named
from biscale_env.evaluation.rollouts.scenarios import Infeasible, resolve
from biscale_env.evaluation.suite.tasks import BenchmarkSuite, FrozenTask
from biscale_env.policies.policy_source import BISCALE_OWN, ORACLE, PHASES, is_planned


@dataclass(frozen=True)
class Entrant:
    """A policy that is scored.

    Attributes:
        label: its name in tables.
        build: its name for the resolver, as it was given.
        candidates: its training seeds; one for policies that are not trained.
    """

    label: str
    build: str
    candidates: tuple[Candidate, ...]


def entrants_of(entries: Iterable[str]) -> list[Entrant]:
    """The policies that are asked for.

    Args:
        entries: ``[label=]name``: a name of :mod:`biscale_env.policies`, or a folder of the run
            directories of several training seeds.

    Raises:
        BiscaleError: an unknown policy, two of one label, or a reference's label on another policy.
    """
    found = []
    for label, build in labelled(entries, {REFERENCE.label, ORACLE, *BISCALE_OWN.values()}).items():
        seeds = [Candidate(build, PHASES)] if is_planned(build) else candidates_of(build)
        found.append(Entrant(label, build, tuple(seeds)))
    return found


def labelled(entries: Iterable[str], references: Collection[str]) -> dict[str, str]:
    """Label and name of everybody who is scored.

    Args:
        entries: ``[label=]name``.
        references: labels that no other policy may have.

    Raises:
        BiscaleError: nobody, two of one label, or a reference's label on another policy.
    """
    found: dict[str, str] = {}
    for label, build in dict.fromkeys(map(named, entries)):
        if label in found or (label in references and label != build):
            raise BiscaleError(
                f"two policies are called '{label}': give each a name of its own, name=build "
                f"({', '.join(sorted(references))} are references)"
            )
        found[label] = build
    if not found:
        raise BiscaleError("biscale benchmark needs a policy, such as agent or mine.py:Rule")
    return found


def benchmark_jobs(
    suite: BenchmarkSuite, tasks: Sequence[FrozenTask], entrants: Sequence[Entrant]
) -> tuple[list[ComparisonJob], list[Infeasible]]:
    """Jobs of all tasks: max clock, BiScale's own controller, the bound, every entrant.

    Every policy with free parameters is tuned by the project's one rule.

    Raises:
        BiscaleError: an entrant that can run none of the tasks, or nothing can be run.
    """
    jobs: list[ComparisonJob] = []
    infeasible: list[Infeasible] = []
    tiers = {task.tier for task in tasks}
    for one in entrants:
        able = {phase for candidate in one.candidates for phase in candidate.phases}
        if not able & tiers:
            raise BiscaleError(
                f"policy '{one.label}' is for {' and '.join(sorted(able))}, "
                f"not for {' and '.join(sorted(tiers))}"
            )
    for task in tasks:
        try:
            jobs += _task_jobs(suite, task, entrants)
        except Infeasible as error:
            infeasible.append(error)
    if not jobs:
        raise infeasible[0]
    return jobs, infeasible


def _task_jobs(
    suite: BenchmarkSuite, task: FrozenTask, entrants: Sequence[Entrant]
) -> list[ComparisonJob]:
    case = resolve(task.scenario, task.tier)
    own = BISCALE_OWN[task.tier]
    references = [REFERENCE, NamedPolicy(own, own), NamedPolicy(ORACLE, ORACLE)]
    oracle_seeds = suite.oracle_seeds[task.tier]  # type: ignore[index]  # a task's tier is one
    planned = plan(task.scenario, case, references, True, oracle_seeds)
    for one in entrants:
        if one.label in {label for label, _ in references}:
            continue
        for seed in one.candidates:
            if task.tier in seed.phases:
                mine = plan(task.scenario, case, [NamedPolicy(one.label, seed.build)], True)
                planned += [replace(job, training_seed=seed.training_seed) for job in mine]
    # curves on the judged workloads are for comparisons at equal attainment: a score needs none
    return [replace(job, curve=False) for job in planned]
