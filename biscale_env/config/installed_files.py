"""Configuration that installed packages bring: GPUs, LLMs, models, SLOs and others, by name.

A package declares an entry point of the group ``biscale.<kind>``, where kind is a folder of
``configs``, that names the path of a file (of a folder for ``models``)::

    [project.entry-points."biscale.gpus"]
    my-gpu = "my_package:MY_GPU"
"""

import importlib.metadata
import os
from pathlib import Path

from biscale_env.core.errors import BiscaleError


def installed_names(kind: str) -> dict[str, importlib.metadata.EntryPoint]:
    """Entry points of a kind, e.g. ``gpus``, by the name that users give."""
    points = importlib.metadata.entry_points(group=f"biscale.{kind}")
    return {point.name: point for point in sorted(points, key=lambda point: point.name)}


def installed_path(kind: str, name: str) -> Path | None:
    """Path that an installed package gives a name; None where none does.

    Raises:
        BiscaleError: the entry point cannot be imported, or names nothing that is there.
    """
    point = installed_names(kind).get(name)
    if point is None:
        return None
    what = f"{kind.rstrip('s')} '{name}' of an installed package"
    try:
        found = point.load()
    except Exception as error:  # whatever an import of foreign code raises
        said = str(error).splitlines()[0] if str(error) else ""
        raise BiscaleError(
            f"{what}: its entry point {point.value} fails with {type(error).__name__}: {said}"
        ) from error
    if not isinstance(found, str | os.PathLike):
        raise BiscaleError(
            f"{what}: its entry point {point.value} is a {type(found).__name__}, but must be the "
            "path of a file"
        )
    path = Path(found)
    if not path.exists():
        raise BiscaleError(f"{what}: there is no {path}")
    return path
