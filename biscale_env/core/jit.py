"""Compiled code is cached on disk.

A change in *any* file of the physics must drop it, not only in the file that holds the kernel.

Numba checks only the file that defines a cached function. Our kernels inline the formula and the
transitions from other files, so a changed coefficient formula would silently go on running as it
was. The cache therefore lives in a folder named after the sources: those of the simulator, and for
kernels of other rooms (controllers, hardware) also all files of their room.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.extending import register_jitable

from biscale_env.core import user_cache

PACKAGE = Path(__file__).resolve().parent.parent
SOURCES = (
    "core",
    "models/physics.py",
    "models/iteration_model.py",
    "contract/observation.py",
    "laws",
    "sim",
    "envs",
)
SHARED_ROOMS = frozenset(source.partition("/")[0] for source in SOURCES)

KERNEL: dict[str, Any] = {"error_model": "numpy", "_nrt": False}
KEPT_FOLDERS = 16
"""Folders of compiled kernels that stay when the sources change; see `user_cache.prune`."""
PART: dict[str, Any] = {"forceinline": True, "_nrt": False}


def python_files(path: Path) -> list[Path]:
    """The file itself, or every Python file below a folder, sorted."""
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def source_digest(package: Path = PACKAGE, room: Path | None = None) -> str:
    """Hash of every source file that kernels are made from.

    Constants of other files are frozen into kernels too.

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
def cache_dir(folder: Path | None = None) -> Path | None:
    """Folder of compiled kernels for exactly these sources; None where none can be written.

    It lies in ``$BISCALE_CACHE``, ``$NUMBA_CACHE_DIR``, the user's cache folder or, if that cannot
    be written, a temporary one. Those of sources that have not been used for long are removed.
    """
    root = user_cache.writable_root(os.environ.get("NUMBA_CACHE_DIR"))
    if root is None:
        return None
    digest = source_digest(PACKAGE, room_of(folder) if folder else None)
    made = root / "kernels" / digest
    if not made.is_dir():
        user_cache.prune(made.parent, KEPT_FOLDERS, "[0-9a-f]" * len(digest))
    user_cache.mark_used(made)
    return made


class KernelCache(FunctionCache):
    """Numba's cache of one kernel, which a full disk or a damaged file cannot make fail.

    What cannot be read is compiled again, what cannot be written is not kept.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Compiled code for a signature; None where there is none that can be read."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # unpickling a file that was cut off raises almost anything
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep compiled code if that is possible; a warning says so if not."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            user_cache.warn_once(f"compiled kernels are not kept in {self.cache_path}: {reason}")


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a kernel, cached on disk where that is possible.

    Division follows IEEE (no exceptions in the hot loop), arrays are not counted.
    """
    kernel: Any = numba.njit(**KERNEL)(function)
    folder = cache_dir(Path(function.__code__.co_filename).resolve().parent)
    if folder is None or kernel is function:  # the latter under NUMBA_DISABLE_JIT
        return kernel
    config: Any = numba.config
    before = config.CACHE_DIR
    config.CACHE_DIR = str(folder)
    try:
        kernel._cache = KernelCache(function)
    finally:
        config.CACHE_DIR = before
    return kernel


def inlined(function: Callable[..., Any]) -> Any:
    """Mark a part of a transition.

    Plain Python when called from Python, inlined when called from a kernel.

    Reference counting is switched off here and in the kernels: nothing is allocated, and the atomic
    counters cost ten times the work.
    """
    return register_jitable(**PART)(function)
