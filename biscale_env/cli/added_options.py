"""Options that several commands have in common, added to each by a decorator."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def with_options(
    command: Callable[..., None],
    hidden: str,
    options: Mapping[str, tuple[Any, Any]],
    call: Callable[[dict[str, Any], dict[str, Any]], None],
) -> Callable[..., None]:
    """A command with further options, which reach it as one value.

    Args:
        command: its parameter ``hidden`` is not shown to the user.
        hidden: name of that parameter.
        options: annotation and default of each option that is added, by its parameter's name.
        call: runs the command, from the values of the added options and those of its own.
    """

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        call({name: given.pop(name) for name in options}, given)

    own = [p for p in inspect.signature(command).parameters.values() if p.name != hidden]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in options.items()
    ]
    wrapped.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    hints = {name: hint for name, hint in command.__annotations__.items() if name != hidden}
    wrapped.__annotations__ = hints | {name: kind for name, (kind, _) in options.items()}
    return wrapped
