"""Policies from outside: ``module:Class``, ``file.py:Class`` and installed entry points.

A class needs ``predict`` as Stable-Baselines3 has it, nothing else. It may say which ``phases`` it
controls, and in ``TUNABLE`` which values of which parameters tuning may try. A subclass of
`controllers.Controller`, and whatever takes ``context`` first, is given the context. A function
that makes such an object does as well.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from biscale_env.contract import Policy
from biscale_env.core.errors import BiscaleError
from biscale_env.policies.policy_source import PHASES
from controllers.base import Controller, PolicyContext
from controllers.registry import (
    check_parameters,
    named_model,
    one_at_a_time,
    parse_parameters,
    with_member,
)

ENTRY_POINTS: Final = "biscale.policies"


class NoSuchModule(BiscaleError):
    """A name reads ``module:Class``, but there is no such module."""


@dataclass(frozen=True)
class ClassSource:
    """A class, or function, that makes a policy.

    Attributes:
        name: the whole name.
        maker: the class or function.
        params: its parameters, as far as they are given.
    """

    name: str
    maker: Callable[..., Any]
    params: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, maker: Callable[..., Any], rest: str) -> "ClassSource":
        """The source of a name that was cut in parts.

        Raises:
            BiscaleError: a parameter without a key where the class names none as ``positional``.
        """
        positional = getattr(maker, "positional", None)
        return cls(name, maker, parse_parameters(name, rest, positional))

    @property
    def phases(self) -> tuple[str, ...]:
        """What the class says in ``phases``; both when it says nothing.

        Raises:
            BiscaleError: something else than phases.
        """
        said = getattr(self.maker, "phases", PHASES)
        chosen = (said,) if isinstance(said, str) else tuple(said)
        if not chosen or set(chosen) - set(PHASES):
            raise BiscaleError(
                f"policy '{self.name}': phases is {said!r}, but must name 'prefill', 'decode' or "
                "both"
            )
        return chosen

    def settings(self, phase: str) -> list[dict[str, Any]]:
        """One parameter of ``TUNABLE`` at a time, without those that are given."""
        tunables = getattr(self.maker, "TUNABLE", {})
        free = {key: tuple(tunables[key]) for key in tunables if key not in self.params}
        return one_at_a_time(free)

    def files(self) -> list[Path]:
        """The file that the class is written in; none where it has none."""
        try:
            return [Path(inspect.getfile(self.maker))]
        except (TypeError, OSError):
            return []

    def make(self, context: PolicyContext, **params: Any) -> Policy:
        """The policy in a context.

        Raises:
            BiscaleError: the other phase, an unknown or impossible parameter, or an object without
                ``predict``.
        """
        if context.phase not in self.phases:
            raise BiscaleError(
                f"policy '{self.name}' is for {' and '.join(self.phases)}, not for {context.phase}"
            )
        known, takes_context = _parameters(self.maker)
        merged = {**self.params, **params}
        if "member" in merged and "member" not in known:
            context = with_member(context, self.name, merged.pop("member"))
        if "model" in merged and "model" not in known:
            context = _with_model(context, merged.pop("model"))
        free = [*known, *merged] if _takes_anything(self.maker) else known
        checked = check_parameters(self.maker, self.name, merged, free)
        policy = construct(self.maker, self.name, [context] if takes_context else [], checked)
        if not callable(getattr(policy, "predict", None)):
            raise BiscaleError(
                f"policy '{self.name}' has no predict(observation, state, episode_start, "
                "deterministic)"
            )
        return policy  # type: ignore[no-any-return]


def _with_model(context: PolicyContext, model: Any) -> PolicyContext:
    return replace(context, model=named_model(model, context))


def construct(
    maker: Callable[..., Any], name: str, first: Sequence[Any], params: Mapping[str, Any]
) -> Any:
    """What a class or function from outside makes.

    Raises:
        BiscaleError: it refuses what it is given.
    """
    try:
        return maker(*first, **params)
    except BiscaleError:
        raise
    except (TypeError, ValueError) as error:
        raise BiscaleError(f"policy '{name}': {error}") from error


def named_parameters(maker: Callable[..., Any]) -> list[inspect.Parameter]:
    """Parameters that have a name; none of a built-in without a signature."""
    try:
        parameters = list(inspect.signature(maker).parameters.values())
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in parameters if p.kind not in kinds]


def _parameters(maker: Callable[..., Any]) -> tuple[list[str], bool]:
    """Names of the parameters, and whether the first one is the context (then left out)."""
    named = named_parameters(maker)
    controller = isinstance(maker, type) and issubclass(maker, Controller)
    first = named[0] if named else None
    asks = first is not None and (
        first.name == "context" or first.annotation in (PolicyContext, "PolicyContext")
    )
    if controller or asks:
        return [p.name for p in named[1:]], True
    return [p.name for p in named], False


def _takes_anything(maker: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(maker).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def load_class(base: str) -> Callable[..., Any]:
    """What ``module:Class`` or ``file.py:Class`` names; modules in the working folder are found.

    Raises:
        BiscaleError: no such module, file or name in it, or importing it fails.
    """
    place, _, attribute = base.rpartition(":")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else _from_import(place)
    except BiscaleError:
        raise
    except Exception as error:  # whatever a user's module does when it is imported
        what = str(error).splitlines()[0] if str(error) else ""
        raise BiscaleError(
            f"policy '{base}': importing {place} fails with {type(error).__name__}: {what}"
        ) from error
    if not hasattr(module, attribute):
        near = get_close_matches(attribute, vars(module), n=1)
        hint = f": did you mean '{near[0]}'?" if near else ""
        raise BiscaleError(f"policy '{base}': {place} has no '{attribute}'{hint}")
    return _callable(base, getattr(module, attribute))


def _callable(name: str, found: Any) -> Callable[..., Any]:
    if not callable(found):
        raise BiscaleError(
            f"policy '{name}' is {type(found).__name__}, but must be a class or a function that "
            "makes a policy"
        )
    return found  # type: ignore[no-any-return]


def _from_import(place: str) -> ModuleType:
    with _working_folder_on_path():
        importlib.invalidate_caches()  # the file may just have been written
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise  # the module is there, and needs another one that is not
            raise NoSuchModule(f"there is no module '{error.name}'") from None


@contextmanager
def _working_folder_on_path() -> Iterator[None]:
    """Installed commands do not look for modules where they are started; ``python -m`` does."""
    folder = os.getcwd()
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _from_file(path: Path) -> ModuleType:
    """The module of a file, read again when the file has changed."""
    if not path.is_file():
        raise BiscaleError(f"there is no file {path} to take a policy from")
    digest = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()
    name = f"{path.stem}_{digest[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise BiscaleError(f"{path} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    """Installed policies of others by name."""
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def load_entry_point(point: importlib.metadata.EntryPoint) -> Callable[..., Any]:
    """The class or function of an entry point.

    Raises:
        BiscaleError: it cannot be imported.
    """
    try:
        found = point.load()
    except Exception as error:  # whatever a user's module does when it is imported
        what = str(error).splitlines()[0] if str(error) else ""
        raise BiscaleError(
            f"policy '{point.name}': its entry point {point.value} fails with "
            f"{type(error).__name__}: {what}"
        ) from error
    return _callable(point.name, found)
