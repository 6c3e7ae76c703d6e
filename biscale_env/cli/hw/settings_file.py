"""Options of a command from a YAML file: how one process of ours starts another."""

from pathlib import Path
from typing import Annotated

import typer


def _take(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the command.

    Raises:
        BiscaleError: the file cannot be read, or has a key that is no option of the command.
    """
    if path is None:
        return None
    from biscale_env.config.loader import nearest, read_yaml
    from biscale_env.core.errors import BiscaleError

    values = read_yaml(path)
    if not isinstance(values, dict):
        raise BiscaleError(f"{path}: the settings of a command are keys and values")
    known = {str(option.name) for option in context.command.params} - {"settings", "help"}
    for key in values:
        if key not in known:
            near = nearest(str(key), known)
            raise BiscaleError(f"{path}: unknown key '{key}'; the nearest known key is '{near}'")
    context.default_map = {key: value for key, value in values.items() if value is not None}
    return path


SettingsFile = Annotated[
    Path | None,
    typer.Option(
        "--settings",
        is_eager=True,
        callback=_take,
        help="YAML file of this command's options; options given beside it win.",
    ),
]
