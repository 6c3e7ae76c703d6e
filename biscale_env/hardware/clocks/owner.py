"""Who owns which GPU's clock, and what a crash left behind.

Two things per GPU. An *owner lock*, held by the living owner and freed by the kernel when its
process dies by whatever way. And a *state file*, the crash journal: written before the first clock
is locked and removed after the reset. A state file without a living owner is an orphan: the next
start (or ``biscale hw restore``) resets that GPU.

The owner lock has two parts, because neither covers every case. An abstract Unix socket named after
the GPU's UUID is seen by all users of the machine, but only within a network namespace. A lock file
in the state folder is seen by all processes that share the folder, containers included, but not by
users with another state folder.
"""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import platformdirs

from biscale_env.core import files
from biscale_env.core.errors import BiscaleError
from biscale_env.core.platforms import need_linux
from biscale_env.hardware.clocks.backend import ClockBackend, ClockError, insist
from biscale_env.hardware.clocks.caller import own_folder
from biscale_env.hardware.clocks.means import CAP, LOCK, by_means

VARIABLE = "BISCALE_HW_STATE"


class OwnerBusy(BiscaleError):
    """The clock of a GPU has a living owner."""


class Recovery(NamedTuple):
    """What became of one GPU's clock."""

    uuid: str
    text: str
    failed: bool = False


def state_dir() -> Path:
    """Folder of the state files.

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
        f"no folder for the state files, since this user has no home: set {VARIABLE} to a "
        "writable folder"
    )


def boot_id() -> str:
    """Identity of this boot of the machine; a locked clock does not survive it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


def hold(name: str) -> socket.socket | None:
    """Take a name that one process of this network namespace can have at a time.

    Returns:
        What holds the name until it is closed; None when another process has it.

    Raises:
        BiscaleError: not on Linux, or the system refuses a socket.
    """
    need_linux("names that a dead process frees")
    try:
        handle = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    except OSError as error:
        raise BiscaleError(f"cannot open a socket: {error.strerror}") from None
    try:
        handle.bind(f"\0biscale-env-{name}"[:107])
    except OSError as error:
        handle.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise BiscaleError(f"cannot hold the name '{name}': {error.strerror}") from None
    return handle


class OwnerLock:
    """Exclusive ownership of one GPU's clock on this machine, while this process lives."""

    def __init__(self, uuid: str) -> None:
        """Take it.

        Raises:
            OwnerBusy: another process, or another part of this one, has it.
            BiscaleError: the state folder cannot be used.
        """
        self.uuid = uuid
        with contextlib.ExitStack() as stack:
            name = hold(f"clock-{uuid}")
            if name is None:
                raise self._busy()
            stack.callback(name.close)
            path = own_state_dir() / "locks" / f"{uuid}.lock"
            try:
                stack.enter_context(files.lock(path))
            except BiscaleError:
                raise self._busy() from None
            except OSError as error:
                raise _unusable(path, error) from None
            self._held = stack.pop_all()

    def _busy(self) -> OwnerBusy:
        owner = read_state(self.uuid).get("pid", "unknown")
        return OwnerBusy(
            f"the clock of {self.uuid} has an owner already (process {owner}): "
            "stop that actuator first"
        )

    def release(self) -> None:
        """Give the lock up."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def own_state_dir() -> Path:
    """The state folder, made if missing.

    Raises:
        BiscaleError: it cannot be made, or others could replace what is written there.
    """
    return own_folder(
        state_dir(),
        "the state folder",
        f"no clock is touched without one, set {VARIABLE} to a folder of your own",
        mode=0o755,
    )


def _unusable(path: Path, error: OSError) -> BiscaleError:
    return BiscaleError(
        f"cannot write {path} ({error.strerror}), and no clock is touched without it: "
        f"set {VARIABLE} to a writable folder"
    )


def state_path(uuid: str) -> Path:
    """File that says: this GPU's clock may be locked by us."""
    return state_dir() / f"{uuid}.json"


def write_state(uuid: str, backend: str, means: str = LOCK) -> None:
    """Write the state file whole and safely on disk; must happen before the first clock is locked.

    Raises:
        BiscaleError: the folder cannot be written; then no clock may be locked.
    """
    content = {
        "uuid": uuid,
        "backend": backend,
        "means": means,
        "pid": os.getpid(),
        "boot_id": boot_id(),
        "since_unix_s": time.time(),
    }
    path = own_state_dir() / f"{uuid}.json"
    try:
        with files.open_whole(path, durable=True) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.chmod(0o644)  # others read whose GPU it is, whatever the umask
    except OSError as error:
        raise _unusable(path, error) from None


def read_state(uuid: str) -> dict[str, object]:
    """Content of a state file; empty when it is missing or unreadable.

    Its file name alone says which GPU it is about.
    """
    try:
        content = json.loads(state_path(uuid).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def noted_means(uuid: str) -> tuple[str, ...]:
    """How the clock of a GPU may be held, as its state file says; either where it cannot be read.

    A file without the word is of a version that knew locks alone.
    """
    state = read_state(uuid)
    if not state:
        return (LOCK, CAP)
    return (CAP,) if state.get("means") == CAP else (LOCK,)


def remove_state(uuid: str) -> None:
    """Remove the state file; only after the clock was reset."""
    with contextlib.suppress(FileNotFoundError):
        state_path(uuid).unlink()


def reset_and_forget(backend: ClockBackend, uuids: Sequence[str]) -> dict[str, ClockError]:
    """Reset clocks, with several attempts each, and remove the state files of those reset.

    Returns:
        What went wrong, by UUID; the state files of these stay for the next start.
    """
    failures = insist(backend, backend.reset_each, uuids)
    for uuid in uuids:
        if uuid not in failures:
            try:
                remove_state(uuid)
            except OSError as error:
                reason = f"{uuid}: reset, but its state file stays ({error.strerror})"
                failures[uuid] = ClockError(reason)
    return failures


@contextlib.contextmanager
def exclusive(backend: ClockBackend, backend_name: str, uuid: str) -> Iterator[None]:
    """Own the clock of one GPU for the length of a ``with``.

    Locked against other owners, recorded in a state file, known to be resettable; reset however the
    block ends.

    Raises:
        BiscaleError: it has an owner, the state file cannot be written, there is no privilege, or
            it could not be reset at the end.
    """
    with OwnerLock(uuid):
        fresh = not state_path(uuid).exists()
        write_state(uuid, backend_name)
        try:
            backend.reset(uuid)
        except ClockError:
            if fresh:
                remove_state(uuid)
            raise
        try:
            yield
        finally:
            for error in reset_and_forget(backend, [uuid]).values():
                raise ClockError(
                    f"the clock of {uuid} could not be reset, run `biscale hw restore`: {error}"
                ) from None


def recorded() -> list[str]:
    """UUIDs of all GPUs with a state file."""
    return sorted(p.stem for p in state_dir().glob("*.json") if not p.name.startswith("."))


def orphans() -> list[str]:
    """UUIDs with a state file but without a living owner."""
    found = []
    for uuid in recorded():
        with contextlib.suppress(BiscaleError), OwnerLock(uuid):
            found.append(uuid)
    return found


def recover(backend: ClockBackend, backend_name: str) -> list[Recovery]:
    """Reset every orphan that this backend can reach.

    Returns:
        What became of each; the state file stays where the GPU could not be reset.
    """
    found = []
    for uuid in recorded():
        try:
            with OwnerLock(uuid):  # nobody may take the GPU between the look and the reset
                found.append(_recover_one(uuid, backend, backend_name))
        except OwnerBusy:
            continue
        except (BiscaleError, OSError) as error:  # whatever it is, the others are still to be reset
            found.append(Recovery(uuid, f"NOT reset: {error}", failed=True))
    return found


def _recover_one(uuid: str, backend: ClockBackend, backend_name: str) -> Recovery:
    state = read_state(uuid)
    if state and state.get("boot_id") != boot_id():
        remove_state(uuid)
        return Recovery(uuid, "the machine was rebooted since, which ended the lock")
    if backend.reaches(uuid):
        return _reset_one(backend, uuid)
    through = state.get("backend", "an unknown backend")
    if through == backend_name and backend.name == "fake":
        remove_state(uuid)
        return Recovery(uuid, "these fake GPUs are gone: another emulation took their file")
    if through == backend_name:
        unreachable = "; ".join(f"GPU {k}: {why}" for k, why in backend.unreachable().items())
        why = unreachable or f"{backend_name} does not know it any more"
        return Recovery(uuid, f"NOT reset: {why}", failed=True)
    return Recovery(
        uuid, f"left alone: it was locked through {through}, and is not a GPU of {backend_name}"
    )


def _reset_one(backend: ClockBackend, uuid: str) -> Recovery:
    """Take back what the state file says, or what the backend is for where there is none."""
    means = noted_means(uuid) if state_path(uuid).exists() else ()
    if len(means) == 1:
        backend = by_means(backend, means[0])
    elif means and (why := _uncapped(backend, uuid)):
        return Recovery(uuid, f"NOT reset: {why}", failed=True)
    for error in reset_and_forget(backend, [uuid]).values():
        return Recovery(uuid, f"NOT reset: {error}", failed=True)
    return Recovery(uuid, "power limit reset" if means == (CAP,) else "reset")


def _uncapped(backend: ClockBackend, uuid: str) -> str:
    """Set the default limit of a GPU whose state file does not say; why that failed, else empty."""
    capping = by_means(backend, CAP)
    try:
        if capping.power_limit_w(uuid) == capping.power_limits(uuid).default_w:
            return ""
    except ClockError:  # it has no limit that could have been changed
        return ""
    return "; ".join(str(e) for e in insist(capping, capping.reset_each, [uuid]).values())


def restore_all(backend: ClockBackend, backend_name: str) -> list[Recovery]:
    """Reset every GPU of a backend, recorded or not; each is tried, whatever the others do.

    Returns:
        What became of each GPU, and of every orphan of other backends. A GPU with a living owner is
        left to it and counts as failed, as does one that the driver cannot open.
    """
    outcomes = {outcome.uuid: outcome for outcome in recover(backend, backend_name)}
    for device in backend.devices():
        if device.uuid in outcomes:
            continue
        try:
            with OwnerLock(device.uuid):
                outcomes[device.uuid] = _reset_one(backend, device.uuid)
        except (BiscaleError, OSError) as error:
            outcomes[device.uuid] = Recovery(device.uuid, f"NOT reset: {error}", failed=True)
    for index, reason in backend.unreachable().items():
        outcomes[index] = Recovery(f"GPU {index}", f"NOT reset: {reason}", failed=True)
    return list(outcomes.values())
