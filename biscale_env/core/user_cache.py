"""The cache folder, also for a user without a home and on a machine without a free byte.

What lies in the cache can be made again, so nothing here fails because of it: where the folder
cannot be written, a temporary one stands in, with one warning; what cannot be kept is not kept.
"""

import contextlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import platformdirs

from biscale_env.core.files import write_whole

VARIABLE: Final = "BISCALE_CACHE"
APPLICATION: Final = "biscale-env"
_DAY_S: Final = 86_400.0

logger = logging.getLogger("biscale_env")


def chosen_root(default: str | None = None) -> Path | None:
    """``$BISCALE_CACHE``, else ``default``, else the user's cache folder; written to or not.

    None for a user who has no home, such as one without an entry in the password file.
    """
    if chosen := os.environ.get(VARIABLE) or default:
        return Path(chosen)
    try:
        found = platformdirs.user_cache_path(APPLICATION, appauthor=False)
    except RuntimeError:  # no home
        return None
    return found if found.is_absolute() else None


def cache_root() -> Path:
    """Where to look for what was kept: the folder that was named or is there, else a writable one.

    A folder that is there may be read-only (shared by many users).
    """
    root = chosen_root()
    if root is not None and (os.environ.get(VARIABLE) or root.is_dir()):
        return root
    return writable_root() or root or Path(tempfile.gettempdir()) / APPLICATION


def writable_root(default: str | None = None) -> Path | None:
    """Cache folder that can be written: :func:`chosen_root`, else a temporary one of this user.

    The first time that a temporary one is taken, a warning says so, and ``$BISCALE_CACHE`` is set
    to it for child processes. None where not even a temporary folder can be written.

    Args:
        default: folder that goes before the user's.
    """
    root = chosen_root(default)
    if root is not None and _writable(root):
        return root
    where = "the user has no home" if root is None else f"{root} cannot be written"
    temporary = _own_temporary()
    if temporary is None:
        warn_once(f"no cache, since {where}: kernels are compiled in every process again")
        return None
    warn_once(f"cache in {temporary}, since {where}; {VARIABLE} chooses another folder")
    os.environ[VARIABLE] = str(temporary)
    return temporary


@lru_cache
def warn_once(text: str) -> None:
    """Log a warning, once per process and text."""
    logger.warning("biscale: %s", text)


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _own_temporary() -> Path | None:
    """Folder of this user below the system's temporary one, which nobody else can write.

    Compiled kernels are code: a folder that another user may have prepared is not taken.
    """
    user = os.getuid() if hasattr(os, "getuid") else "user"
    try:
        folder = Path(tempfile.gettempdir()) / f"{APPLICATION}-{user}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        others = stat.S_IWGRP | stat.S_IWOTH
        private = stat.S_ISDIR(found.st_mode) and found.st_uid in (user, 0)
        if os.name == "posix" and (not private or found.st_mode & others or not _writable(folder)):
            folder = Path(tempfile.mkdtemp(prefix=f"{APPLICATION}-"))
    except OSError:
        return None
    return folder


def recall(path: Path) -> Any:
    """Content of a JSON file of the cache; None when it is absent, cut off or unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def remember(path: Path, data: str | bytes) -> None:
    """Keep a file in the cache; where that is impossible a warning says so, and nothing is kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        warn_once(f"not kept in the cache: {path} ({(error.strerror or str(error)).lower()})")


def prune(parent: Path, keep: int, pattern: str = "*") -> None:
    """Remove the folders in ``parent`` that were used longest ago.

    One used within a day stays, and so does any that another process removes meanwhile. Use is the
    time of modification of the folder, see :func:`mark_used`.

    Args:
        parent: folder of folders.
        keep: how many stay at least.
        pattern: which folders are meant.
    """
    used = {}
    for folder in parent.glob(pattern):
        with contextlib.suppress(OSError):
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode):
                used[folder] = found.st_mtime
    oldest_first = sorted(used, key=lambda folder: used[folder])
    for folder in oldest_first[: max(len(used) - keep, 0)]:
        if used[folder] < time.time() - _DAY_S:
            shutil.rmtree(folder, ignore_errors=True)


def mark_used(folder: Path) -> None:
    """Make the folder and note that it is in use now."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
