"""Files and folders under sudo: whoever called gets them, with their own rights.

A command that runs as root for the sake of the driver writes logs and sockets to paths that its
caller chose. Nothing there is made as root and given away afterwards: it is made with the caller's
identity, so that no path leads to more than the caller could reach without sudo.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from biscale_env.core.errors import BiscaleError


def sudo_caller() -> tuple[int, int] | None:
    """User and group who called sudo; None without sudo, or where root itself called it.

    Raises:
        BiscaleError: the variables of sudo hold something else than numbers.
    """
    if os.geteuid() != 0 or "SUDO_UID" not in os.environ:
        return None
    user, group = os.environ["SUDO_UID"], os.environ.get("SUDO_GID", os.environ["SUDO_UID"])
    if not (user.isdecimal() and group.isdecimal()):
        raise BiscaleError(
            f"SUDO_UID='{user}' and SUDO_GID='{group}' are not numbers: call through sudo, or "
            "unset both"
        )
    return (int(user), int(group)) if int(user) else None


@contextlib.contextmanager
def as_caller() -> Iterator[None]:
    """Act with the identity of the caller of sudo inside the block; no change without sudo."""
    caller = sudo_caller()
    if caller is None:
        yield
        return
    user, group = caller
    before = os.getgroups(), os.getegid()
    try:
        os.setgroups([group])
        os.setegid(group)
        os.seteuid(user)
        yield
    finally:
        os.seteuid(0)
        os.setegid(before[1])
        os.setgroups(before[0])


def own_folder(folder: Path, what: str, advice: str, mode: int = 0o700) -> Path:
    """Make a folder that only its owner can write to, or accept such a one that exists.

    Args:
        folder: the folder; missing parents are made.
        what: what it is for, in the messages.
        advice: what the user can do, in the messages.
        mode: permissions of a new one.

    Raises:
        BiscaleError: it belongs to another user, others can write to it, it is a symbolic link, or
            it cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=mode)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        reason = "it is a symbolic link" if os.path.islink(folder) else error.strerror
        raise BiscaleError(f"cannot use {what} {folder} ({reason}): {advice}") from None
    try:
        found = os.fstat(handle)
    finally:
        os.close(handle)
    if found.st_uid != os.geteuid():
        raise BiscaleError(
            f"{what} {folder} belongs to somebody else (user {found.st_uid}): {advice}"
        )
    if found.st_mode & stat.S_IWOTH:
        raise BiscaleError(f"{what} {folder} can be written to by everybody: {advice}")
    return folder
