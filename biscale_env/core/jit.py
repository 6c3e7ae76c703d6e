"""Compiled code is cached on disk.

A change in *any* file of the physics must drop it, not only in the file that holds the kernel.

Numba checks only the file that defines a cached function. Our kernels inline the formula and the
transitions from other files, so a changed coefficient formula would silently go on running as it
was. The cache therefore lives in a folder named after the sources: those of the simulator, and for
kernels of other packages (controllers, hardware) also all files of their package.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import numba
import numpy as np
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
SHARED_PACKAGES = frozenset(source.partition("/")[0] for source in SOURCES)

KERNEL: dict[str, Any] = {"error_model": "numpy", "_nrt": False}
KEPT_FOLDERS = 16
"""Folders of compiled kernels that stay when the sources change; see `user_cache.prune`."""
PART: dict[str, Any] = {"forceinline": True, "_nrt": False}


def python_files(path: Path) -> list[Path]:
    """The file itself, or every Python file below a folder, sorted."""
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def source_digest(package: Path = PACKAGE, other: Path | None = None) -> str:
    """Hash of every source file that kernels are made from.

    Constants of other files are frozen into kernels too.

    Args:
        package: where the sources of the shared parts lie.
        other: the package of a kernel that lies elsewhere; every file below it counts too.
    """
    digest = hashlib.sha256(numba.__version__.encode())
    for root in [package / source for source in SOURCES] + ([other] if other else []):
        for file in python_files(root):
            name = file.relative_to(root.parent).as_posix()
            digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def package_of(folder: Path) -> Path | None:
    """Package whose files a kernel in this folder may inline, beside the shared ones.

    None if it lies in a shared package itself.
    """
    if folder.is_relative_to(PACKAGE):
        first = folder.relative_to(PACKAGE).parts[:1]
        return None if not first or first[0] in SHARED_PACKAGES else PACKAGE / first[0]
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
    digest = source_digest(PACKAGE, package_of(folder) if folder else None)
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


def as_records(value: Any) -> Any:
    """Records with fields as attributes, as kernels write them; the same memory.

    Arrays of records, single records, and groups of them; anything else stays what it is.
    """
    if isinstance(value, np.ndarray) and value.dtype.names:
        return value.view(np.recarray)
    if isinstance(value, np.void) and value.dtype.names:
        return value.view(np.dtype((np.record, value.dtype)))
    if isinstance(value, tuple):
        parts = map(as_records, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def interpreted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that runs as plain Python (NUMBA_DISABLE_JIT=1): to debug, to measure coverage."""

    @wraps(function)
    def call(*args: Any) -> Any:
        with np.errstate(all="ignore"):  # IEEE, as compiled
            return function(*map(as_records, args))

    return call


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a kernel, cached on disk where that is possible.

    Division follows IEEE (no exceptions in the hot loop), arrays are not counted.
    """
    kernel: Any = numba.njit(**KERNEL)(function)
    if kernel is function:
        return interpreted(function)
    folder = cache_dir(Path(function.__code__.co_filename).resolve().parent)
    if folder is None:
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


def native(kernel: Any, *examples: Any) -> Callable[..., Any]:
    """The machine code of a kernel for arguments of these types, without the look-up per call.

    Groups of arrays (NamedTuples) then cost nothing to pass, where Numba's own dispatch spends
    microseconds on them. Nothing checks the types any more: every call must have arguments of
    exactly the types of the examples (dtype, dimensions, contiguity).
    """
    if not hasattr(kernel, "get_overload"):  # plain Python under NUMBA_DISABLE_JIT
        return kernel  # type: ignore[no-any-return]
    signature = tuple(numba.typeof(example) for example in examples)
    if signature not in kernel.overloads:
        kernel.compile(signature)
    return kernel.get_overload(signature)  # type: ignore[no-any-return]
