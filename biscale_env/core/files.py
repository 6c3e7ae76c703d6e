"""Files that are whole or absent, and locks that a killed process does not keep."""

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import filelock

from biscale_env.core.errors import BiscaleError

_TOKEN_BYTES: Final = 4


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give an ``OSError`` that names no file, such as that of a full disk, the name of ``path``.

    Raises:
        OSError: the error from inside, with its number, its reason and a file name.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise _named(error, Path(path)) from error


def _named(error: OSError, path: Path) -> OSError:
    if error.errno is None:
        return OSError(errno.EIO, str(error), str(path))
    return OSError(error.errno, os.strerror(error.errno), str(path))


@contextlib.contextmanager
def open_whole(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[Path]:
    """Give a temporary file beside ``path`` that replaces it on leaving, in one step.

    On any failure the temporary file is removed and the old file stays as it was. The temporary
    file has the suffix of ``path``; permissions follow the umask. A link is followed; into a device
    or a pipe the content is copied, since replacing one would remove it.

    Args:
        path: the file to write; its folder exists.
        durable: wait until content and name are on the disk, so that they outlive a power cut.

    Raises:
        OSError: it cannot be written; ``filename`` names ``path``, not the temporary file.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    special = target.exists() and not target.is_file()
    if target.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = Path(tempfile.gettempdir()) if special else target.parent
    temporary = folder / f".{secrets.token_hex(_TOKEN_BYTES)}.{target.name}"
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        if durable:
            _flush(temporary)
        if special:
            with temporary.open("rb") as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        else:
            temporary.replace(target)
        if durable:
            _flush(folder)
    except OSError as error:
        if error.filename is not None and os.fspath(error.filename) != str(temporary):
            raise  # about another file, such as one that is read meanwhile
        raise _named(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: str | os.PathLike[str], data: str | bytes, *, durable: bool = False) -> None:
    """Write a file whole or not at all; text is UTF-8 and keeps its line ends.

    Args:
        path: the file; its folder exists.
        data: its content.
        durable: wait until it is on the disk, see :func:`open_whole`.

    Raises:
        OSError: it cannot be written; the old file stays and ``filename`` names ``path``.
    """
    with open_whole(path, durable=durable) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def debris(folder: Path, name: str) -> list[Path]:
    """Temporary files for ``name`` that a killed process left.

    Those of a living writer look the same: ask only where a lock excludes one.
    """
    pattern = "." + "[0-9a-f]" * (2 * _TOKEN_BYTES) + "." + name
    return sorted(folder.glob(pattern))


@contextlib.contextmanager
def lock(
    path: str | os.PathLike[str], timeout_s: float = 0.0, *, what: str | None = None
) -> Iterator[None]:
    """Hold the lock file ``path``, which the system frees if this process dies.

    The file stays: removing it would let two processes hold a lock of one name.

    Args:
        path: the lock file, made with its folder.
        timeout_s: how long to wait for another holder, s.
        what: what the lock protects, for the message; the lock file itself if left out.

    Raises:
        BiscaleError: another process, or another part of this one, holds it.
        OSError: the lock file cannot be made.
    """
    held = filelock.FileLock(path, timeout=timeout_s, thread_local=False)
    try:
        held.acquire()
    except filelock.Timeout:
        raise BiscaleError(
            f"{what or path} is in use by another process: wait until it has ended"
        ) from None
    try:
        yield
    finally:
        held.release()
