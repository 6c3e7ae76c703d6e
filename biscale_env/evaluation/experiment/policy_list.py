"""Lists of policies: of the options ``--policies`` and ``--policy``, of experiments in YAML.

An entry is ``[label=]name`` with a name in the syntax of :mod:`biscale_env.policies`, or a word of
:data:`GROUPS` for several.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from biscale_env.core.errors import BiscaleError
from biscale_env.policies import known_policies, phases_of
from biscale_env.policies.policy_source import (
    AGENT,
    FILES,
    PHASES,
    STATIC_BEST,
    STATIC_HINDSIGHT,
    is_lookahead,
    is_planned,
    split_name,
)
from controllers.ablations import beliefs, variants
from controllers.registry import default_policies

GROUPS = ("all", "ablations", "beliefs")  # words that stand for many policies


class NamedPolicy(NamedTuple):
    """A policy of a comparison.

    Attributes:
        label: how tables call it.
        build: its name for the resolver, e.g. ``mpc:margin=0.1``.
    """

    label: str
    build: str


REFERENCE = NamedPolicy("max", "max")
HINDSIGHT = NamedPolicy(STATIC_HINDSIGHT, STATIC_HINDSIGHT)
IN_EVERY_TABLE = (REFERENCE, HINDSIGHT)  # what every claim is made against


def split_list(text: str) -> list[str]:
    """Entries of a comma-separated list.

    Parameters contain commas, too: a part ``key=value`` goes on with the policy before it if that
    has parameters, unless the value is itself a policy. Where this is not what is meant, give each
    policy with ``--policy``.
    """
    entries: list[str] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        if entries and _goes_on(entries[-1], part):
            entries[-1] += f",{part}"
        else:
            entries.append(part)
    return entries


def _goes_on(before: str, part: str) -> bool:
    key, equals, value = part.partition("=")
    return ":" in before and bool(equals) and key.isidentifier() and not _starts_policy(value)


def _starts_policy(value: str) -> bool:
    known = value in (*known_policies(), *GROUPS)
    return known or ":" in value or Path(value).suffix in FILES


def default_names(phase: str) -> list[str]:
    """The policies of a plain ``biscale compare``."""
    names = list(default_policies(phase))
    agent = [AGENT] if AGENT in known_policies(phase) else []
    return [*names[:1], STATIC_BEST, *names[1:], *agent]


def group(word: str, phase: str) -> list[NamedPolicy]:
    """The policies that a word of :data:`GROUPS` stands for."""
    if word == "all":
        return [NamedPolicy(name, name) for name in default_names(phase)]
    named = variants(phase) if word == "ablations" else beliefs(phase)
    return [NamedPolicy(label, build) for label, build in named.items()]


def named(entry: str) -> NamedPolicy:
    """Label and name of an entry ``[label=]name``; a path with ``=`` in it needs no label."""
    label, equals, build = entry.partition("=")
    labelled = equals and not set(label) & set(":/\\") and not Path(entry).exists()
    return NamedPolicy(label, build) if labelled else NamedPolicy(entry, entry)


def able_phases(build: str) -> tuple[str, ...]:
    """Phases that a policy of a comparison can run.

    Raises:
        BiscaleError: no such policy.
    """
    if is_lookahead(build):
        return ("prefill",)
    return PHASES if is_planned(build) else phases_of(build)


def choose(entries: Iterable[str] | None, phases: Sequence[str]) -> dict[str, list[NamedPolicy]]:
    """The policies of each phase, ``max`` and the best static clock in hindsight first.

    A policy for the other phase only is passed over, so that one list can serve both.

    Args:
        entries: the list; None or empty takes ``all``.
        phases: phases that are compared.

    Raises:
        BiscaleError: a name that is not known, a checkpoint for a phase that is not compared, two
            policies with one label.
    """
    chosen = {phase: list(IN_EVERY_TABLE) for phase in phases}
    for entry in list(entries or ()) or ["all"]:
        for phase, policies in _of_entry(entry, phases).items():
            chosen[phase] += policies
    return {phase: _distinct(policies) for phase, policies in chosen.items()}


def _of_entry(entry: str, phases: Sequence[str]) -> dict[str, list[NamedPolicy]]:
    if entry in GROUPS:
        return {phase: group(entry, phase) for phase in phases}
    policy = named(entry)
    able = able_phases(policy.build)
    if not set(able) & set(phases) and _is_file(policy.build):
        raise BiscaleError(
            f"policy '{policy.label}': the checkpoint is for {able[0]}, which is not compared here"
        )
    return {phase: [policy] for phase in phases if phase in able}


def _is_file(build: str) -> bool:
    base, _ = split_name(build, known_policies())
    return Path(base).exists()


def _distinct(policies: Sequence[NamedPolicy]) -> list[NamedPolicy]:
    once = list(dict.fromkeys(policies))
    labels = [policy.label for policy in once]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise BiscaleError(
            f"two policies are called '{twice}': give each a name of its own, name=build "
            "('max' is the reference)"
        )
    return once
