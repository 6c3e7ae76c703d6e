"""From names on the command line to policies.

Reference controllers, learned checkpoints, the oracle.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biscale_env.contract import Policy
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant
from biscale_env.evaluation.experiment.agent_jobs import (
    AGENT,
    SUFFIXES,
    is_checkpoint,
    is_file,
    load_agent,
    phase_of,
    setting_grid,
    ships,
    split_build,
)
from biscale_env.evaluation.experiment.compare import ORACLE, STATIC_BEST, ComparisonJob
from biscale_env.evaluation.experiment.scenarios import PHASES, Case, Scenario
from biscale_env.traces import Trace

GROUPS = ("all", "ablations", "beliefs")  # words that stand for many policies
UNTUNED = (ORACLE, STATIC_BEST, "max", "static", "random")  # nothing to choose, or chosen elsewhere


@dataclass
class Hindsight:
    """The oracle's plan with the plant it is valid in (no actuation delay) and its bounds."""

    policy: Policy
    plant: Plant
    report: dict[str, float]

    def predict(self, *arguments: Any, **named: Any) -> Any:
        """The plan's next decision."""
        return self.policy.predict(*arguments, **named)


class Policies:
    """Makes every policy that the command line knows.

    A controller's own model is the plant's member, as after profiling at home.
    """

    def build(self, name: str, plant: Plant, traces: Sequence[Trace], member: int) -> Policy:
        """Make a policy.

        Raises:
            BiscaleError: an unknown name or parameter, or an impossible value.
        """
        from controllers.base import context_of
        from controllers.registry import make_policy

        if name.split(":", 1)[0] == ORACLE:
            return self._oracle(plant, traces, member)
        if is_checkpoint(name):
            return load_agent(name, context_of(plant, member=member))
        return make_policy(name, context_of(plant, member=member))

    def _oracle(self, plant: Plant, traces: Sequence[Trace], member: int) -> Policy:
        from controllers.oracle.make import make_oracle, oracle_plant

        (trace,) = traces
        policy, report = make_oracle(plant, trace, plant.slo.attainment, member)
        return Hindsight(policy, oracle_plant(plant), report)

    def grid(self, name: str, phase: str) -> list[dict[str, Any]]:
        """Settings of a policy's free parameters, as in
        :func:`controllers.registry.policy_settings`.
        """
        from controllers.registry import policy_settings

        if name.split(":", 1)[0] in UNTUNED:
            return []
        return setting_grid(name, phase) if is_checkpoint(name) else policy_settings(name, phase)


def names_for(phase: str) -> list[str]:
    """Every name that ``--policies`` accepts for a phase."""
    from controllers.registry import policy_names

    return sorted({*policy_names(phase), STATIC_BEST, ORACLE, AGENT})


def default_names(phase: str) -> list[str]:
    """The policies of a plain ``biscale compare``."""
    from controllers.registry import default_policies

    names = list(default_policies(phase))
    return [*names[:1], STATIC_BEST, *names[1:], *([AGENT] if ships(phase) else [])]


def group(word: str, phase: str) -> list[tuple[str, str]]:
    """The ``(shown name, build string)`` pairs that a word of :data:`GROUPS` stands for."""
    from controllers.ablations import beliefs, variants

    if word == "all":
        return [(name, name) for name in default_names(phase)]
    return list((variants if word == "ablations" else beliefs)(phase).items())


def _applies(asked: str, phase: str) -> bool:
    return asked.split(":", 1)[0] in names_for(phase)


def split_list(text: str) -> list[str]:
    """Split a ``--policies`` list at commas, keeping ``name:key=value,key=value`` together."""
    parts: list[str] = []
    for part in (p.strip() for p in text.split(",")):
        continues = (
            parts
            and "=" in part
            and ":" not in part
            and ":" in parts[-1]
            and Path(part.partition("=")[2]).suffix not in SUFFIXES
        )
        known = part.partition("=")[2].split(":", 1)[0] in set(
            itertools.chain(*(names_for(p) for p in PHASES), GROUPS)
        )
        if part and continues and not known:
            parts[-1] += f",{part}"
        elif part:
            parts.append(part)
    return parts


def parse(policies: str | None, phases: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Per phase the ``(shown name, build string)`` pairs of a ``--policies`` option.

    ``max`` always leads.

    ``all`` stands for the defaults, ``ablations`` and ``beliefs`` for those of
    `controllers.ablations`; ``name=build`` renames. A name that exists in the other phase only is
    passed over.

    Raises:
        BiscaleError: a name that no phase knows.
    """
    chosen: dict[str, list[tuple[str, str]]] = {phase: [] for phase in phases}
    for entry in split_list(policies or "all"):
        if entry in GROUPS:
            for phase in phases:
                chosen[phase] += group(entry, phase)
            continue
        label, _, build = (
            entry.partition("=") if "=" in entry.split(":", 1)[0] else (entry, "", entry)
        )
        known = [phase for phase in PHASES if _applies(build, phase)]
        if not known and not is_file(build):
            everything = sorted({name for phase in PHASES for name in names_for(phase)})
            raise BiscaleError(f"unknown policy '{entry}'; known: {', '.join(everything)}")
        made_for: list[str] = list(known) or [phase_of(Path(split_build(build)[0]))]
        if is_checkpoint(build) and not set(made_for) & set(phases):
            raise BiscaleError(
                f"policy '{label}': the checkpoint is for {made_for[0]}, which is not compared here"
            )
        for phase in phases:
            if phase in known or (not known and phase_of(Path(split_build(build)[0])) == phase):
                chosen[phase].append((label, build))
    whole = {
        phase: list(dict.fromkeys([("max", "max"), *pairs])) for phase, pairs in chosen.items()
    }
    for pairs in whole.values():
        labels = [label for label, _ in pairs]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise BiscaleError(
                f"two policies are called '{twice}': give each a name of its own, name=build ('max' is the reference)"
            )
    return whole


def plan(
    scenario: Scenario,
    case: Case,
    policies: Sequence[tuple[str, str]],
    tuned: bool = False,
    oracle_seeds: int | None = None,
) -> list[ComparisonJob]:
    """Jobs of one scenario and phase, one per policy and ensemble member.

    A mistake in a policy's parameters shows here.
    """
    factory, jobs = Policies(), []
    seeds = tuple(range(scenario.seeds))
    for label, build in policies:
        if build not in (STATIC_BEST, ORACLE):
            factory.build(build, case.plant, [], scenario.members[0])
        mine = seeds[:oracle_seeds] if build == ORACLE else seeds
        variant = (
            "tuned" if tuned and build != STATIC_BEST and factory.grid(build, case.phase) else ""
        )
        jobs += [
            ComparisonJob(scenario, case.phase, label, build, member, mine, variant=variant)
            for member in scenario.members
            if mine
        ]
    return jobs
