"""Who owns which GPU's clock, and what a crash left behind.

Two things per GPU. A *claim*, held by the living owner: an abstract Unix socket named after the
GPU's UUID, which the kernel frees when the process dies by whatever way, and which works across
users. And a *note* on disk, written before the first lock and removed after the reset. A note
without a claim is an orphan: the next start (or ``biscale hw restore``) resets that GPU.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import open_whole
from biscale_env.hardware.clocks.backend import ClockBackend, ClockError

VARIABLE = "BISCALE_HW_STATE"
RESET_ATTEMPTS = 3


def state_dir() -> Path:
    """Folder of the notes.

    ``$BISCALE_HW_STATE``, else ``/run/biscale-env`` for root and the user's state folder for
    others.
    """
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/run/biscale-env")
    with contextlib.suppress(RuntimeError):  # HOME not set, no entry in the password file
        folder = platformdirs.user_state_path("biscale-env") / "clocks"
        if folder.is_absolute():
            return folder
    raise BiscaleError(
        f"no folder for the owner notes, since this user has no home: set {VARIABLE} to a "
        "writable folder"
    )


def boot_id() -> str:
    """Identity of this boot of the machine; a lock does not survive it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


def hold(name: str) -> socket.socket | None:
    """Take a name that one process of this machine can have at a time.

    None when another one has it. Closing the socket frees it.
    """
    handle = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        handle.bind(f"\0biscale-env-{name}"[:107])
    except OSError:
        handle.close()
        return None
    return handle


class Claim:
    """Exclusive ownership of one GPU on this machine, for as long as this process lives."""

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        held = hold(f"clock-{uuid}")
        if held is None:
            owner = read_note(uuid).get("pid", "unknown")
            raise BiscaleError(
                f"the clock of {uuid} has an owner already (process {owner}): stop that actuator first"
            )
        self._socket = held

    def release(self) -> None:
        """Give the claim up."""
        self._socket.close()


def note_path(uuid: str) -> Path:
    """File that says: this GPU's clock may be locked by us."""
    return state_dir() / f"{uuid}.json"


def write_note(uuid: str, backend: str) -> None:
    """Write the note whole and safely on disk; must happen before the first lock.

    Raises:
        BiscaleError: the folder cannot be written; then nothing may be locked.
    """
    path = note_path(uuid)
    content = {
        "uuid": uuid,
        "backend": backend,
        "pid": os.getpid(),
        "boot_id": boot_id(),
        "since_unix_s": time.time(),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_whole(path, durable=True) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.chmod(0o644)  # others read whose GPU it is, whatever the umask
    except OSError as error:
        raise BiscaleError(
            f"cannot write the owner note {path} ({error.strerror}), and no clock is touched without it: "
            f"set {VARIABLE} to a writable folder"
        ) from None


def read_note(uuid: str) -> dict[str, object]:
    """Content of a note; empty when it is missing or unreadable (its file name alone says which GPU
    it is about).
    """
    try:
        content = json.loads(note_path(uuid).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def remove_note(uuid: str) -> None:
    """Remove the note; only after the clock was reset."""
    with contextlib.suppress(FileNotFoundError):
        note_path(uuid).unlink()


def give_back(backend: ClockBackend, uuid: str) -> None:
    """Reset a clock, with several attempts, and remove its note.

    Raises:
        ClockError: every attempt failed; the note stays for the next start.
    """
    for attempt in range(1, RESET_ATTEMPTS + 1):
        try:
            backend.reset(uuid)
            break
        except ClockError:
            if attempt == RESET_ATTEMPTS:
                raise
    remove_note(uuid)


@contextlib.contextmanager
def alone(backend: ClockBackend, backend_name: str, uuid: str) -> Iterator[None]:
    """Own the clock of one GPU for the length of a ``with``.

    Claimed, noted, known to be resettable; given back however it ends.

    Raises:
        BiscaleError: it has an owner, the note cannot be written, there is no privilege, or it
            could not be reset at the end.
    """
    claim = Claim(uuid)
    try:
        fresh = not note_path(uuid).exists()
        write_note(uuid, backend_name)
        try:
            backend.reset(uuid)
        except ClockError:
            if fresh:
                remove_note(uuid)
            raise
        try:
            yield
        finally:
            try:
                give_back(backend, uuid)
            except ClockError as error:
                raise ClockError(
                    f"the clock of {uuid} could not be reset, run `biscale hw restore`: {error}"
                ) from None
    finally:
        claim.release()


def noted() -> list[str]:
    """UUIDs of all GPUs with a note."""
    return sorted(p.stem for p in state_dir().glob("*.json"))


def orphans() -> list[str]:
    """UUIDs with a note but without a living owner."""
    found = []
    for uuid in noted():
        try:
            Claim(uuid).release()
        except BiscaleError:
            continue
        found.append(uuid)
    return found


def recover(backend: ClockBackend, backend_name: str) -> list[tuple[str, str]]:
    """Reset every orphan that this backend can reach.

    Returns:
        ``(uuid, outcome)`` per orphan; a note stays where its GPU could not be reset.
    """
    here = {device.uuid for device in backend.devices()}
    return [(uuid, _recover_one(uuid, backend, backend_name, here)) for uuid in orphans()]


def _recover_one(uuid: str, backend: ClockBackend, backend_name: str, here: set[str]) -> str:
    note = read_note(uuid)
    if note and note.get("boot_id") != boot_id():
        remove_note(uuid)
        return "the machine was rebooted since, which ended the lock"
    if uuid not in here:
        through = note.get("backend", "an unknown backend")
        if through == backend_name and backend.name == "fake":
            remove_note(uuid)
            return "these fake GPUs are gone: another emulation took their file"
        return f"left alone: it was locked through {through}, and is not a GPU of {backend_name}"
    try:
        backend.reset(uuid)
    except ClockError as error:
        return f"NOT reset: {error}"
    remove_note(uuid)
    return "reset"
