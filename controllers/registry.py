"""Policies by name: ``max``, ``static:1200``, ``slack``, ``mpc:margin=0.1,forecast=1``."""

import difflib
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Annotated, Any, Final, get_type_hints

from pydantic import Field, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from biscale_env.contract import Policy
from biscale_env.core.errors import BiscaleError
from controllers.base import PolicyContext

LOOKAHEAD: Final = "lookahead"
"""Knows the arrivals of the next seconds (``lookahead:seconds=0.5``): no causal policy."""
Member = Annotated[int, Field(ge=-1)]


@dataclass(frozen=True)
class PolicyEntry:
    """Where a policy lives and how it differs from its class's defaults.

    Attributes:
        paths: per phase ``module:Class``, imported when asked for.
        positional: parameter that a bare value after the colon sets.
        preset: parameters that differ from the class's defaults; the name's own parameters win.
        joint: values of preset parameters that tuning tries together with every value of the free
            ones.
    """

    paths: Mapping[str, str]
    positional: str | None = None
    preset: Mapping[str, Any] = field(default_factory=dict)
    joint: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def load(self, phase: str) -> Any:
        """The class for a phase."""
        module, name = self.paths[phase].split(":")
        return getattr(import_module(f"controllers.{module}"), name)


def both(path: str, positional: str | None = None) -> PolicyEntry:
    """An entry for both phases."""
    return PolicyEntry({"prefill": path, "decode": path}, positional)


# What helped at equal attainment in the ablation (`biscale compare --experiment ablation`, made of
# workloads that no table judges). Credit for idle time and a clock of its own to wait at cost
# energy on the models of 0.2: waiting at a low clock is cheap anyway. Load floor and accumulated
# slack add nothing to fine clocks.
MPC_PLUS: dict[str, Any] = {"delay_aware": True, "forecast": 4.0}
# Room for arrivals pays where prompts are long and bursts matter, and costs where they do not.
MPC_PLUS_JOINT: dict[str, tuple[Any, ...]] = {"forecast": (0.0, 2.0, 4.0)}
SLACK_PLUS: dict[str, Any] = {"fine": True}

ENTRIES: dict[str, PolicyEntry] = {
    "max": both("rivals.constant:StaticClock"),
    "static": both("rivals.constant:StaticClock", "freq_mhz"),
    "random": both("rivals.constant:RandomClock", "seed"),
    "slack": PolicyEntry({"decode": "decode.slack:SlackRule"}, "margin"),
    "slack-plus": PolicyEntry({"decode": "decode.slack:SlackRule"}, "margin", SLACK_PLUS),
    "mpc": PolicyEntry({"prefill": "prefill.mpc_dual:FastMpcController"}, "margin"),
    "mpc-plus": PolicyEntry(
        {"prefill": "prefill.mpc_dual:FastMpcController"}, "margin", MPC_PLUS, MPC_PLUS_JOINT
    ),
    "mpc-dompc": PolicyEntry({"prefill": "prefill.mpc_dompc:DoMpcController"}, "margin"),
    "mpc-greedy": PolicyEntry({"prefill": "prefill.mpc_greedy:GreedyMpc"}, "margin"),
    "ecofreq": both("rivals.ecofreq:EcoFreq", "margin"),
    "throttllem": both("rivals.throttllem:ThrottllEm", "margin"),
    "greenllm": PolicyEntry(
        {"prefill": "rivals.greenllm:GreenPrefill", "decode": "rivals.greenllm:GreenDecode"},
        "margin",
    ),
    "dynamollm": both("rivals.dynamollm:DynamoWindows", "margin"),
    "agft": both("rivals.agft:Agft"),
}


def is_lookahead(name: str) -> bool:
    """Whether a name, with parameters or without, is that of the controller with foresight."""
    return name.partition(":")[0] == LOOKAHEAD


def policy_names(phase: str) -> list[str]:
    """Names of the policies of a phase, in the order of tables."""
    return [name for name, entry in ENTRIES.items() if phase in entry.paths]


def default_policies(phase: str) -> list[str]:
    """Names that a comparison runs when none are given.

    Everything but the plain search of `mpc` in other clothes, and bare ``static``.
    """
    left_out = {"static", "mpc-greedy"} if phase == "prefill" else {"static"}
    return [name for name in policy_names(phase) if name not in left_out]


def parse_value(text: str) -> Any:
    """A parameter value: bool, int, float, None or text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def unknown_policy(name: str, known: Iterable[str], why: str = "") -> BiscaleError:
    """The error of a name that no policy has, with the nearest known one.

    Args:
        name: what was asked for.
        known: names that there are.
        why: a reason to put before them.
    """
    names = list(known)
    near = difflib.get_close_matches(name.partition(":")[0], names, n=1, cutoff=0.0)
    hint = f"did you mean '{near[0]}'? " if near else ""
    reason = f"{why}; " if why else ""
    return BiscaleError(f"unknown policy '{name}': {reason}{hint}known: {', '.join(names)}")


def parse_name(name: str) -> tuple[str, dict[str, Any]]:
    """Split ``base:value,key=value`` into the entry's name and parameters.

    Raises:
        BiscaleError: an unknown policy, or a bare value where none is meant.
    """
    base, _, rest = name.partition(":")
    if base not in ENTRIES:
        raise unknown_policy(base, ENTRIES)
    return base, parse_parameters(name, rest, ENTRIES[base].positional)


def parse_parameters(name: str, rest: str, positional: str | None = None) -> dict[str, Any]:
    """Parameters ``value,key=value`` of a policy.

    Args:
        name: the whole name, for errors.
        rest: what stands behind the base and its colon.
        positional: parameter that a bare value sets; None: there must be no bare value.

    Raises:
        BiscaleError: a bare value where none is meant.
    """
    params: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            if positional is None or positional in params:
                raise BiscaleError(
                    f"policy '{name}': write parameters as key=value, '{part}' has no key"
                )
            key, value = positional, part
        params[key.strip()] = parse_value(value.strip())
    return params


def _entry(name: str, phase: str) -> tuple[PolicyEntry, dict[str, Any]]:
    base, named = parse_name(name)
    entry = ENTRIES[base]
    if phase not in entry.paths:
        names = ", ".join(policy_names(phase))
        raise BiscaleError(f"policy '{base}' is not for {phase}; for {phase} there are: {names}")
    return entry, named


def check_parameters(
    maker: Callable[..., Any], name: str, params: Mapping[str, Any], known: Sequence[str]
) -> dict[str, Any]:
    """Parameters in the types and ranges that a constructor declares beside each.

    Args:
        maker: class, or function that makes the policy.
        name: the policy's name, for errors.
        params: what was given.
        known: parameters that may be given.

    Raises:
        BiscaleError: an unknown parameter, or a value that is not of its type or out of its range.
    """
    for key in params:
        if key not in known:
            raise BiscaleError(
                f"policy '{name}' has no parameter '{key}'; "
                f"it has: {', '.join([*known, 'member', 'model'])}"
            )
    source = getattr(maker, "__init__") if inspect.isclass(maker) else maker  # noqa: B009 - mypy
    try:
        hints = get_type_hints(source, include_extras=True)
    except (NameError, TypeError):  # a class from outside may name types that are not there
        hints = {}
    return {key: _in_range(name, key, value, hints.get(key, Any)) for key, value in params.items()}


def _in_range(name: str, key: str, value: Any, kind: Any) -> Any:
    try:
        adapter = TypeAdapter(kind)
    except PydanticSchemaGenerationError:  # a type that cannot be checked
        return value
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        wanted = error.errors()[0]["msg"].removeprefix("Input ").split(",")[0]
        raise BiscaleError(f"policy '{name}': {key} {wanted}, got {value}") from None


def named_model(model: Any, context: PolicyContext) -> Any:
    """A model given as an object or by name.

    Raises:
        BiscaleError: an unknown name.
    """
    if not isinstance(model, str):
        return model
    if model != "boosted":
        raise BiscaleError(
            f"unknown model '{model}' for a policy: give 'boosted' or a model object"
        )
    from controllers.surrogates.gbt import boosted

    return boosted(context)


def with_member(context: PolicyContext, name: str, member: Any) -> PolicyContext:
    """The context with another ensemble member as the nominal model of policy ``name``.

    Raises:
        BiscaleError: no whole number, or below -1.
    """
    return replace(context, member=_in_range(name, "member", member, Member))


def make_policy(name: str, context: PolicyContext, model: Any = None, **params: Any) -> Policy:
    """Make a policy.

    Args:
        name: a name of :func:`policy_names`, optionally with parameters: ``static:1200``,
            ``slack:margin=0.1,energy_floor=true``. The parameter ``member`` (which coefficients it
            takes for true) is taken by every policy.
        context: what the policy may know.
        model: its nominal model of latency and energy instead of ``context.model``: an object, or
            ``boosted`` for the paper's predictors fitted on noisy measurements (also as
            ``slack:model=boosted``).
        **params: parameters of the policy; they win over those in the name.

    Raises:
        BiscaleError: unknown policy or parameter, an impossible value, or a policy of the other
            phase.
    """
    entry, named = _entry(name, context.phase)
    merged = {**entry.preset, **named, **params}
    if "member" in merged:
        context = with_member(context, name, merged.pop("member"))
    nominal = merged.pop("model", None) if model is None else model
    if nominal is not None:
        context = replace(context, model=named_model(nominal, context))
    policy = entry.load(context.phase)
    known = [] if name.startswith("max") else list(inspect.signature(policy).parameters)[1:]
    checked = check_parameters(policy, name, merged, known)
    try:
        return policy(context, **checked)  # type: ignore[no-any-return]
    except BiscaleError:
        raise
    except (TypeError, ValueError) as error:
        raise BiscaleError(f"policy '{name}': {error}") from None


def policy_tunables(name: str, phase: str) -> dict[str, tuple[Any, ...]]:
    """Free parameters of a policy and the values that tuning may try, the default first.

    Those that its name already fixes are left out.
    """
    entry, named = _entry(name, phase)
    if name == "max":
        return {}
    free = {
        k: tuple(v)
        for k, v in getattr(entry.load(phase), "TUNABLE", {}).items()
        if k not in entry.preset
    }
    return {k: v for k, v in {**free, **entry.joint}.items() if k not in named}


def policy_settings(name: str, phase: str) -> list[dict[str, Any]]:
    """Settings that tuning tries.

    One free parameter varied at a time from the defaults, each with every value of the joint ones.
    """
    entry, _ = _entry(name, phase)
    return one_at_a_time(policy_tunables(name, phase), tuple(entry.joint))


def one_at_a_time(
    tunables: Mapping[str, Sequence[Any]], together: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Settings that vary one free parameter at a time, each with every value of the joint ones.

    Args:
        tunables: values per free parameter.
        together: names of the joint ones among them.
    """
    joint = {k: v for k, v in tunables.items() if k in together}
    varied = [
        {key: value} for key, values in tunables.items() if key not in joint for value in values
    ] or [{}]
    combined = [
        dict(zip(joint, values, strict=True)) for values in itertools.product(*joint.values())
    ]
    return [{**one, **rest} for one in varied for rest in combined if one or rest]
