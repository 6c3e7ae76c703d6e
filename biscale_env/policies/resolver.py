"""From a policy's name to the policy: the only place where names are looked up."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from biscale_env.contract import Policy
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant
from biscale_env.policies.checkpoint_source import CheckpointSource, names_checkpoint, ships
from biscale_env.policies.class_source import (
    ClassSource,
    NoSuchModule,
    entry_points,
    load_class,
    load_entry_point,
)
from biscale_env.policies.onnx_source import SUFFIX, OnnxSource
from biscale_env.policies.policy_source import (
    AGENT,
    PHASES,
    PLANNED,
    PolicySource,
    is_class_name,
    split_name,
)
from controllers import registry
from controllers.base import PolicyContext, context_of


@dataclass(frozen=True)
class BuiltinSource:
    """A controller that comes with the package.

    Attributes:
        name: the whole name.
    """

    name: str

    @property
    def phases(self) -> tuple[str, ...]:
        """Phases of the registry's entry."""
        base, _ = registry.parse_name(self.name)
        return tuple(phase for phase in PHASES if base in registry.policy_names(phase))

    def settings(self, phase: str) -> list[dict[str, Any]]:
        """See :func:`controllers.registry.policy_settings`; clocks given by hand are not tuned."""
        base, _ = registry.parse_name(self.name)
        untuned = base in ("max", "static", "random")
        return [] if untuned else registry.policy_settings(self.name, phase)

    def make(self, context: PolicyContext, **params: Any) -> Policy:
        """See :func:`controllers.registry.make_policy`."""
        return registry.make_policy(self.name, context, **params)


def find_policy(name: str) -> PolicySource:
    """What a name means.

    Controllers of the package come before entry points of the same name, and those before paths.

    Raises:
        BiscaleError: nothing of that name; one sentence with the nearest known one.
    """
    base, rest = split_name(name, {*registry.ENTRIES, *PLANNED, AGENT})
    if base in registry.ENTRIES:
        return BuiltinSource(name)
    if base == AGENT:
        return CheckpointSource.of(name, base, rest)
    if base in PLANNED:
        raise BiscaleError(
            f"policy '{name}' is made from the whole workload: only biscale compare and evaluate "
            "can do that"
        )
    return _from_outside(name, base, rest)


def _from_outside(name: str, base: str, rest: str) -> PolicySource:
    installed = entry_points()
    word, _, behind = name.partition(":")
    if word in installed:
        return ClassSource.of(name, load_entry_point(installed[word]), behind)
    if is_class_name(base):
        try:
            return ClassSource.of(name, load_class(base), rest)
        except NoSuchModule as error:
            raise registry.unknown_policy(name, known_policies(), str(error)) from None
    if base.endswith(SUFFIX):
        return OnnxSource.of(name, base, rest)
    if names_checkpoint(base):
        return CheckpointSource.of(name, base, rest)
    raise registry.unknown_policy(base, known_policies())


def known_policies(phase: str | None = None) -> list[str]:
    """Every name that needs no path or module, of one phase or of both.

    Entry points are among them whatever their phase, since that is known only once imported.
    """
    phases = PHASES if phase is None else (phase,)
    built_in = itertools.chain(*(registry.policy_names(p) for p in phases))
    agent = [AGENT] if any(ships(p) for p in phases) else []
    return list(dict.fromkeys([*built_in, *agent, *PLANNED, *entry_points()]))


def with_parameters(name: str, params: Mapping[str, Any]) -> str:
    """The name with parameters added to those in it."""
    base, rest = split_name(name, known_policies())
    added = [f"{key}={value}" for key, value in params.items()]
    given = ",".join([*([rest] if rest else []), *added])
    return f"{base}:{given}" if given else base


def phases_of(name: str) -> tuple[str, ...]:
    """Phases that a named policy can control.

    Raises:
        BiscaleError: no such policy or checkpoint.
    """
    return find_policy(name).phases


def policy_settings(name: str, phase: str) -> list[dict[str, Any]]:
    """Settings of a policy's free parameters that tuning tries; none when nothing is free.

    Raises:
        BiscaleError: no such policy, or a checkpoint that cannot be read.
    """
    return find_policy(name).settings(phase)


def resolve_policy(
    name: str, plant: Plant | PolicyContext, member: int | None = None, **params: Any
) -> Policy:
    """Make a policy by name.

    Args:
        name: in the syntax of this package, e.g. ``mpc:margin=0.1``, ``agent``, ``mine:Rule``.
        plant: the instance that it is to control (``env.unwrapped.plant`` of an environment), or a
            controller's context.
        member: ensemble member that is its nominal model, -1 the fit itself; None takes that of
            the context, or -1.
        **params: parameters; they win over those in the name.

    Raises:
        BiscaleError: no such policy, a policy of the other phase, an unknown parameter or an
            impossible value.
    """
    context = plant if isinstance(plant, PolicyContext) else context_of(plant)
    if member is not None:
        context = registry.with_member(context, name, member)
    return find_policy(name).make(context, **params)
