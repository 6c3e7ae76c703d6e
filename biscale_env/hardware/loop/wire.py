"""Messages between controller, actuator and recorder, and the sockets they travel on.

Commands travel on a PUSH/PULL pair per group of GPUs that keeps the newest message only: a late
actuator never works through old commands. Times are CLOCK_MONOTONIC seconds, one clock for all
processes of a machine.
"""

import contextlib
import os
import socket as socketlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import zmq

from biscale_env.core import files
from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks.caller import as_caller, own_folder

MAX_IPC_PATH = 100  # sun_path holds 107 bytes


class Command(msgspec.Struct, frozen=True, gc=False):
    """What a controller requests for one group of GPUs.

    Attributes:
        sequence: rises by one per command of this controller.
        freq_mhz: SM clock, MHz; 0 resets it to driver control.
        decided_s: when the policy had decided.
        engine_age_s: how long ago the engine last gave a sign of life when this was sent; the lease
            counts from there.
        record_s: when the engine record that led to this arrived at the controller; 0 for a
            keep-alive.
        time_s: the engine's own time of that record.
        cap_w: power limit per GPU that stands for the clock, W; 0 from a controller of clocks.
    """

    sequence: int
    freq_mhz: float
    decided_s: float
    engine_age_s: float = 0.0
    record_s: float = 0.0
    time_s: float = 0.0
    cap_w: float = 0.0


UNCHANGED = frozenset({"guard", "hold", "skip", "refused"})  # causes that leave the clock as it was


class ClockChange(msgspec.Struct, gc=False):
    """One change (or refused change) of the clock of one group.

    Published when set and when seen, logged when seen. Refused ones (:data:`UNCHANGED`) are
    published as they come; of those only the guard's are logged, equal ones in a row once.

    Attributes:
        group: name of the group.
        cause: ``refused``: a command or a caller from another machine that was not accepted;
            ``start``, ``command``, ``lease`` or ``exit``; ``error``: a command that failed on
            some GPU; ``release``: reset for good because its GPUs cannot be controlled any more;
            ``guard``: raising was stopped or is allowed again; ``hold``: a command that the guard
            refused; ``skip``: a command that came too late, or whose bounded clock is applied
            already.
        sequence: of the command, -1 where there was none; with ``guard`` that of the newest one.
        requested_mhz: what was requested; 0 is a reset.
        freq_mhz: clock that is applied from now on, snapped and bounded; 0 is driver control.
        decided_s: policy had decided; NaN without a command.
        received_s: actuator had the command.
        set_s: the driver call had returned.
        seen_s: the clock was read back at its new value on every GPU; NaN: not within the time
            allowed.
        seen_mhz: last reading, mean over the GPUs.
        reasons: clock event reasons at that reading, all GPUs together.
        error: a sentence when something went wrong.
        cap_w: power limit per GPU that is applied for the clock, W; 0: none, or it is locked.
    """

    group: str
    cause: str
    sequence: int = -1
    requested_mhz: float = float("nan")
    freq_mhz: float = float("nan")
    decided_s: float = float("nan")
    received_s: float = float("nan")
    set_s: float = float("nan")
    seen_s: float = float("nan")
    seen_mhz: float = float("nan")
    reasons: int = 0
    error: str = ""
    cap_w: float = 0.0


def command_endpoint(folder: Path, group: str) -> str:
    """Address on which the actuator takes commands for one group."""
    return ipc(folder / f"command-{group}.sock")


def status_endpoint(folder: Path) -> str:
    """Address on which the actuator publishes clock changes."""
    return ipc(folder / "status.sock")


def record_endpoint(folder: Path, phase: str) -> str:
    """Address on which a controller takes the newest engine record of one phase."""
    return ipc(folder / f"record-{phase}.sock")


def base_endpoint(folder: Path, group: str) -> str:
    """Address on which a controller takes the base clock that tier 1 gives its instance."""
    return ipc(folder / f"base-{group}.sock")


def plans_endpoint(folder: Path) -> str:
    """Address where tier 1 publishes its placement, on its machine."""
    return ipc(folder / "plans.sock")


def ipc(path: Path) -> str:
    """ZeroMQ address of a socket file.

    Raises:
        BiscaleError: the path is longer than the system allows.
    """
    absolute = path.absolute()
    if len(os.fsencode(absolute)) > MAX_IPC_PATH:
        raise BiscaleError(
            f"the path of the socket {absolute} is too long for the system: "
            "choose a shorter --sockets folder"
        )
    return f"ipc://{absolute}"


def newest_sender(context: zmq.Context, endpoint: str) -> zmq.Socket:
    """PUSH socket that connects, keeps one message, never waits, not even when closed."""
    socket = context.socket(zmq.PUSH)
    for option, value in ((zmq.SNDHWM, 1), (zmq.CONFLATE, 1), (zmq.LINGER, 0)):
        socket.setsockopt(option, value)
    socket.connect(endpoint)
    return socket


def newest_receiver(context: zmq.Context, endpoint: str) -> zmq.Socket:
    """PULL socket that binds and keeps the newest message only.

    Raises:
        BiscaleError: the address cannot be bound, e.g. because somebody else listens there.
    """
    socket = context.socket(zmq.PULL)
    for option, value in ((zmq.RCVHWM, 1), (zmq.CONFLATE, 1), (zmq.LINGER, 0)):
        socket.setsockopt(option, value)
    return _bound(socket, endpoint)


def publisher(context: zmq.Context, endpoint: str) -> zmq.Socket:
    """PUB socket that binds; never blocks, drops for slow listeners."""
    socket = context.socket(zmq.PUB)
    socket.setsockopt(zmq.LINGER, 100)
    return _bound(socket, endpoint)


def subscriber(context: zmq.Context, endpoint: str) -> zmq.Socket:
    """SUB socket on everything that is published at ``endpoint``."""
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(endpoint)
    return socket


def socket_folder(folder: Path) -> Path:
    """The folder of the sockets, made if missing; under sudo it is the caller's.

    Raises:
        BiscaleError: it belongs to another user, or everybody can write to it.
    """
    with as_caller():
        return own_folder(folder, "the socket folder", "choose another --sockets")


_held: dict[str, contextlib.ExitStack] = {}


def _bound(socket: zmq.Socket, endpoint: str) -> zmq.Socket:
    """Bind, but never steal the address of a living process.

    ZeroMQ would unlink its socket file without asking; a lock file beside it prevents that. Under
    sudo both are the caller's, whose controllers and engines must reach them.
    """
    try:
        with as_caller(), contextlib.ExitStack() as stack:
            if endpoint.startswith("ipc://"):
                stack.enter_context(_address_lock(endpoint))
            socket.bind(endpoint)
            _held[endpoint] = stack.pop_all()
    except zmq.ZMQError as error:
        socket.close(0)
        raise BiscaleError(f"cannot listen at {endpoint}: {error.strerror}") from None
    except BiscaleError:
        socket.close(0)
        raise
    return socket


@contextlib.contextmanager
def _address_lock(endpoint: str) -> Iterator[None]:
    path = endpoint.removeprefix("ipc://")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.lock(f"{path}.lock"))
        except BiscaleError:
            raise BiscaleError(
                f"another process listens at {endpoint} already: "
                "stop it or choose another --sockets folder"
            ) from None
        except OSError as error:
            raise BiscaleError(f"cannot listen at {endpoint}: {error.strerror}") from None
        yield


def somebody_listens(endpoint: str) -> bool:
    """Whether a living process listens at an address of :func:`ipc`."""
    with socketlib.socket(socketlib.AF_UNIX) as probe:
        try:
            probe.connect(endpoint.removeprefix("ipc://"))
        except OSError:
            return False
    return True


def unbind(endpoint: str) -> None:
    """Free the address of a socket that this process has closed."""
    if held := _held.pop(endpoint, None):
        held.close()
