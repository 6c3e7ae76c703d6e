"""Compiled code is cached on disk; a change in *any* file of the physics must drop it, not only in the file that holds the kernel.

Numba checks only the file that defines a cached function. Our kernels inline the formula and the transitions from other files, so a
changed coefficient formula would silently go on running as it was. The cache therefore lives in a folder named after the sources: those
of the simulator, and for kernels of other rooms (controllers, hardware) also the files beside them.
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

PACKAGE = Path(__file__).resolve().parent
SOURCES = ("jit.py", "models/physics.py", "models/model.py", "contract/observation.py", "sim", "envs")

KERNEL: dict[str, Any] = {"cache": True, "error_model": "numpy", "_nrt": False}
PART: dict[str, Any] = {"forceinline": True, "_nrt": False}


def source_digest(package: Path = PACKAGE, folder: Path | None = None) -> str:
    """Hash of every source file that kernels are made from (constants of other files are frozen into them too).

    Args:
        package: where the sources of the shared parts lie.
        folder: where a kernel lies, if elsewhere; all files beside it count too.
    """
    digest = hashlib.sha256(numba.__version__.encode())
    for path in [package / source for source in SOURCES] + ([folder] if folder else []):
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


@lru_cache
def cache_dir(folder: Path | None = None) -> Path:
    """Folder of compiled kernels for exactly these sources, in ``$BISCALE_CACHE``, ``$NUMBA_CACHE_DIR`` or the user's cache folder."""
    chosen = os.environ.get("BISCALE_CACHE") or os.environ.get("NUMBA_CACHE_DIR")
    root = chosen or platformdirs.user_cache_dir("biscale-env")
    shared = folder is None or any(folder in (PACKAGE / s, (PACKAGE / s).parent) for s in SOURCES)
    return Path(root) / "kernels" / source_digest(PACKAGE, None if shared else folder)


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a kernel, cached on disk; division follows IEEE (no exceptions in the hot loop), arrays are not counted."""
    config: Any = numba.config
    before = config.CACHE_DIR
    config.CACHE_DIR = str(cache_dir(Path(function.__code__.co_filename).resolve().parent))
    try:
        return numba.njit(**KERNEL)(function)
    finally:
        config.CACHE_DIR = before


def inlined(function: Callable[..., Any]) -> Any:
    """Mark a part of a transition: plain Python when called from Python, inlined when called from a kernel.

    Reference counting is switched off here and in the kernels: nothing is allocated, and the atomic counters cost ten times the work.
    """
    return register_jitable(**PART)(function)
