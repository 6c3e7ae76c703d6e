"""Compiled code is cached on disk.

A change in *any* file of the physics must drop it, not only in the file that holds the kernel.

Numba checks only the file that defines a cached function. Our kernels inline the formula and the
transitions from other files, so a changed coefficient formula would silently go on running as it
was. The cache therefore lives in a folder named after the sources: those of the simulator, and for
kernels of other rooms (controllers, hardware) also all files of their room.
"""

import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
import platformdirs
from numba.extending import register_jitable

PACKAGE = Path(__file__).resolve().parent.parent
SOURCES = (
    "core",
    "models/physics.py",
    "models/iteration_model.py",
    "contract/observation.py",
    "sim",
    "envs",
)
SHARED_ROOMS = frozenset(source.partition("/")[0] for source in SOURCES)

KERNEL: dict[str, Any] = {"cache": True, "error_model": "numpy", "_nrt": False}
PART: dict[str, Any] = {"forceinline": True, "_nrt": False}


def python_files(path: Path) -> list[Path]:
    """The file itself, or every Python file below a folder, sorted."""
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def source_digest(package: Path = PACKAGE, room: Path | None = None) -> str:
    """Hash of every source file that kernels are made from (constants of other files are frozen
    into them too).

    Args:
        package: where the sources of the shared parts lie.
        room: the room of a kernel that lies elsewhere; every file below it counts too.
    """
    digest = hashlib.sha256(numba.__version__.encode())
    for root in [package / source for source in SOURCES] + ([room] if room else []):
        for file in python_files(root):
            name = file.relative_to(root.parent).as_posix()
            digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def room_of(folder: Path) -> Path | None:
    """Room whose files a kernel in this folder may inline, beside the shared ones.

    None if it lies in a shared room itself.
    """
    if folder.is_relative_to(PACKAGE):
        first = folder.relative_to(PACKAGE).parts[:1]
        return None if not first or first[0] in SHARED_ROOMS else PACKAGE / first[0]
    while (folder / "__init__.py").is_file() and (folder.parent / "__init__.py").is_file():
        folder = folder.parent
    return folder


@lru_cache
def cache_dir(folder: Path | None = None) -> Path:
    """Folder of compiled kernels for exactly these sources, in ``$BISCALE_CACHE``,
    ``$NUMBA_CACHE_DIR`` or the user's cache folder.
    """
    chosen = os.environ.get("BISCALE_CACHE") or os.environ.get("NUMBA_CACHE_DIR")
    root = chosen or platformdirs.user_cache_dir("biscale-env")
    return Path(root) / "kernels" / source_digest(PACKAGE, room_of(folder) if folder else None)


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a kernel, cached on disk.

    Division follows IEEE (no exceptions in the hot loop), arrays are not counted.
    """
    config: Any = numba.config
    before = config.CACHE_DIR
    config.CACHE_DIR = str(cache_dir(Path(function.__code__.co_filename).resolve().parent))
    try:
        return numba.njit(**KERNEL)(function)
    finally:
        config.CACHE_DIR = before


def inlined(function: Callable[..., Any]) -> Any:
    """Mark a part of a transition.

    Plain Python when called from Python, inlined when called from a kernel.

    Reference counting is switched off here and in the kernels: nothing is allocated, and the atomic
    counters cost ten times the work.
    """
    return register_jitable(**PART)(function)
