"""The process that owns the clocks.

It takes the newest wish per group of GPUs, bounds it, skips what is in force already, sets it,
reads it back, logs every time stamp, and gives the clock back to the driver on exit, on a signal,
on an error, and whenever the lease runs out: no command from a controller that has itself heard of
its engine within ``lease_s``.
"""

import math
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
import zmq

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks import owner
from biscale_env.hardware.clocks.backend import ClockBackend, ClockError
from biscale_env.hardware.loop import wire
from biscale_env.hardware.loop.processes import go_first
from biscale_env.hardware.loop.wire import ClockChange, Command

POLL_S = 0.1  # longest wait: signals, leases and the guard are looked at this often
READBACK_POLL_S = 0.002
NAN = math.nan


@dataclass(frozen=True)
class ActuatorConfig:
    """Settings of one actuator.

    Attributes:
        groups: GPUs (UUID, index or start of a UUID) of each group; a group is one engine instance
            and has one clock.
        sockets: folder of the sockets.
        backend: name for :func:`~biscale_env.hardware.clocks.backend.open_backend`.
        freq_min_mhz: lowest clock ever set.
        freq_max_mhz: highest clock ever set.
        lease_s: the clock goes back to the driver when no live command came for this long.
        hot_c: above this temperature (assumed: under the slowdown threshold of an H100), or while a
            GPU is throttled by heat or a power brake, the clock may be lowered but not raised.
        cool_down_c: the guard ends this far below ``hot_c``.
        readback_s: how long a new clock is looked for.
        lower_bound: ``fixed`` locks (f, f), ``cap`` locks (lowest, f) and lets an idle GPU fall.
    """

    groups: Mapping[str, tuple[str, ...]]
    sockets: Path
    backend: str = "nvml"
    freq_min_mhz: float = 510.0
    freq_max_mhz: float = 1980.0
    lease_s: float = 1.5
    hot_c: float = 85.0
    cool_down_c: float = 3.0
    readback_s: float = 0.5
    lower_bound: str = "fixed"

    def __post_init__(self) -> None:
        if not self.groups or not all(self.groups.values()):
            raise BiscaleError(
                "the actuator needs at least one group with at least one GPU, e.g. --gpus prefill=0,1,2,3"
            )
        if not 0.1 <= self.lease_s <= 10:
            raise BiscaleError(f"lease of {self.lease_s:g} s: choose 0.1 to 10 s")
        if not 0 < self.freq_min_mhz <= self.freq_max_mhz:
            raise BiscaleError(
                f"clock bounds {self.freq_min_mhz:g} to {self.freq_max_mhz:g} MHz are not a range"
            )
        if self.lower_bound not in ("fixed", "cap"):
            raise BiscaleError(f"unknown lower bound '{self.lower_bound}': choose fixed or cap")


@dataclass
class GpuGroup:
    """State of one group while the actuator runs."""

    name: str
    uuids: list[str]
    supported_mhz: np.ndarray
    applied_mhz: float = 0.0  # 0: with the driver
    alive_until_s: float = -math.inf
    throttled: bool = False
    pending: ClockChange | None = None
    commands: int = 0
    skipped: int = 0
    changes: int = 0
    socket: zmq.Socket | None = field(default=None, repr=False)


class Actuator:
    """Owns the clocks of its groups from :meth:`start` to :meth:`stop`."""

    def __init__(
        self,
        config: ActuatorConfig,
        backend: ClockBackend,
        log: IO[bytes] | None = None,
        first: bool = False,
    ) -> None:
        """Prepare; nothing is touched before :meth:`start`.

        Args:
            config: GPUs, bounds, lease.
            backend: reads and locks.
            log: JSON lines of every change.
            first: run before other processes, where that is allowed.
        """
        self.config = config
        self.first = first
        self.backend = backend
        self.log = log
        self.stopping = False
        self.groups: dict[str, GpuGroup] = {}
        self._claims: list[owner.Claim] = []
        self._context = zmq.Context()
        self._status: zmq.Socket | None = None
        self._poller = zmq.Poller()
        self._decoder = msgspec.msgpack.Decoder(Command)
        self._next_guard_s = 0.0

    # --- start and stop
    # ---------------------------------------------------------------------------------------------

    def start(self) -> list[tuple[str, str]]:
        """Claim the GPUs, recover orphans, write the notes, test the privilege, open the sockets.

        Returns:
            What became of orphans of earlier runs, as
            :func:`~biscale_env.hardware.clocks.owner.recover` tells it.

        Raises:
            BiscaleError: a GPU is unknown, claimed by somebody else or twice, or there is no
                privilege.
        """
        recovered = (
            owner.recover(self.backend, self.config.backend) if self.backend.can_lock else []
        )
        named = {
            name: [self.backend.device(key).uuid for key in keys]
            for name, keys in self.config.groups.items()
        }
        everyone = [uuid for uuids in named.values() for uuid in uuids]
        if len(set(everyone)) < len(everyone):
            raise BiscaleError("a GPU is named twice in --gpus: every GPU belongs to one group")
        if self.backend.can_lock:
            self._claims = [owner.Claim(uuid) for uuid in everyone]
        for name, uuids in named.items():
            clocks = np.array(self.backend.supported_mhz(uuids[0]))
            clocks = clocks[
                (clocks >= self.config.freq_min_mhz) & (clocks <= self.config.freq_max_mhz)
            ]
            if clocks.size == 0:
                bounds = f"{self.config.freq_min_mhz:g} to {self.config.freq_max_mhz:g} MHz"
                raise BiscaleError(f"the GPUs of group '{name}' support no clock within {bounds}")
            self._take(GpuGroup(name, uuids, clocks))
        if self.first:
            go_first()
        self._listen()
        return recovered

    def _take(self, group: GpuGroup) -> None:
        """Note the GPUs on disk, then reset them.

        A known state, and the test whether clocks may be locked at all.
        """
        fresh = [uuid for uuid in group.uuids if not owner.note_path(uuid).exists()]
        if self.backend.can_lock:
            for uuid in group.uuids:
                owner.write_note(uuid, self.config.backend)
        try:
            self._reset(group, "start")
        except ClockError:
            for uuid in fresh:
                owner.remove_note(uuid)
            raise
        self.groups[group.name] = group

    def _listen(self) -> None:
        folder = self.config.sockets
        folder.mkdir(parents=True, exist_ok=True)
        caller = int(os.environ.get("SUDO_UID", "0")) if os.geteuid() == 0 else os.geteuid()
        if folder.stat().st_uid not in (0, caller):
            raise BiscaleError(
                f"the socket folder {folder} belongs to somebody else (user {folder.stat().st_uid}): choose another --sockets"
            )
        for group in self.groups.values():
            endpoint = wire.command_endpoint(self.config.sockets, group.name)
            group.socket = wire.newest_receiver(self._context, endpoint)
            self._poller.register(group.socket, zmq.POLLIN)
        self._status = wire.publisher(self._context, wire.status_endpoint(folder))
        if (
            caller != os.geteuid()
            # called through sudo: controllers and engines run as the caller and must reach the sockets
        ):
            for path in (
                folder,
                *(folder / wire.command_endpoint(folder, g).rsplit("/", 1)[1] for g in self.groups),
                folder / "status.sock",
            ):
                os.chown(path, caller, -1)

    def stop(self) -> list[str]:
        """Reset every clock and give all claims up; may be called more than once.

        Returns:
            Sentences about GPUs that could not be reset; their notes stay for the next start.
        """
        failures = []
        for group in self.groups.values():
            failures += self._reset_all_of(group, "exit")
            self._write(group, time.monotonic(), final=True)
        for claim in self._claims:
            claim.release()
        self._claims.clear()
        self._context.destroy(linger=100)
        for name in self.groups:
            wire.unbind(wire.command_endpoint(self.config.sockets, name))
        wire.unbind(wire.status_endpoint(self.config.sockets))
        self.groups.clear()
        return failures

    def _reset_all_of(self, group: GpuGroup, cause: str) -> list[str]:
        failures: list[str] = []
        if not self.backend.can_lock:
            return failures
        for uuid in group.uuids:
            try:
                owner.give_back(self.backend, uuid)
            except ClockError as error:
                failures.append(str(error))
        self._changed(group, cause, 0.0, 0.0, -1, NAN, time.monotonic(), " ".join(failures))
        return failures

    # --- one turn of the loop
    # ---------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until :attr:`stopping` is set."""
        while not self.stopping:
            self.turn(POLL_S)

    def turn(self, timeout_s: float) -> None:
        """Take one turn, waiting at most ``timeout_s`` for commands.

        Obeys the newest command of each group, then looks after leases, read-back and the guard.
        """
        if any(g.pending for g in self.groups.values()):
            timeout_s = min(timeout_s, READBACK_POLL_S)
        ready = dict(self._poller.poll(max(1, round(timeout_s * 1e3))))
        for group in self.groups.values():
            if group.socket in ready:
                self._receive(group)
        now = time.monotonic()
        if now >= self._next_guard_s:
            self._next_guard_s = now + POLL_S
            self._guard()
        for group in self.groups.values():
            if group.applied_mhz and time.monotonic() > group.alive_until_s:
                self._reset(group, "lease")
            if group.pending:
                self._write(group, time.monotonic(), final=False)

    def _receive(self, group: GpuGroup) -> None:
        assert group.socket is not None
        try:
            command = self._decoder.decode(group.socket.recv(zmq.NOBLOCK))
        except (zmq.ZMQError, msgspec.DecodeError):
            return
        self.obey(group, command, time.monotonic())

    def obey(self, group: GpuGroup, command: Command, received_s: float) -> None:
        """Apply one command: prolong the lease, bound and snap the clock, skip it when in force,
        else set it.
        """
        group.commands += 1
        age = (
            command.engine_age_s
            if math.isfinite(command.engine_age_s) and command.engine_age_s >= 0
            else math.inf
        )
        group.alive_until_s = max(group.alive_until_s, received_s + self.config.lease_s - age)
        if received_s > group.alive_until_s:
            return
        wanted = self.snap(group, command.freq_mhz)
        if wanted == group.applied_mhz:
            group.skipped += 1
            return
        if group.throttled and (wanted == 0.0 or wanted > (group.applied_mhz or math.inf)):
            group.skipped += 1
            return
        self._set(group, wanted, command, received_s)

    def snap(self, group: GpuGroup, freq_mhz: float) -> float:
        """Nearest supported clock within the bounds, MHz.

        0 (hand back) for 0 or for anything that is not a number.
        """
        if not math.isfinite(freq_mhz) or freq_mhz <= 0:
            return 0.0
        return float(group.supported_mhz[np.argmin(np.abs(group.supported_mhz - freq_mhz))])

    def _set(self, group: GpuGroup, wanted: float, command: Command, received_s: float) -> None:
        try:
            if wanted:
                low = (
                    wanted if self.config.lower_bound == "fixed" else float(group.supported_mhz[0])
                )
                self.backend.lock_all(group.uuids, low, wanted)
            else:
                self.backend.reset_all(group.uuids)
        except ClockError as error:
            self._changed(
                group,
                "error",
                command.freq_mhz,
                wanted,
                command.sequence,
                command.decided_s,
                received_s,
                str(error),
            )
            raise
        args = (command.freq_mhz, wanted, command.sequence, command.decided_s, received_s)
        self._changed(group, "command", *args)

    def _reset(self, group: GpuGroup, cause: str) -> None:
        now = time.monotonic()
        self.backend.reset_all(group.uuids)
        self._changed(group, cause, 0.0, 0.0, -1, NAN, now)

    # --- telling
    # ----------------------------------------------------------------------------------------------------

    def _changed(
        self,
        group: GpuGroup,
        cause: str,
        requested: float,
        sent: float,
        sequence: int,
        decided_s: float,
        received_s: float,
        error: str = "",
    ) -> None:
        now = time.monotonic()
        if group.pending:
            self._write(group, now, final=True)
        group.applied_mhz = sent
        group.changes += 1
        group.pending = ClockChange(
            group.name, cause, sequence, requested, sent, decided_s, received_s, now, error=error
        )
        self._publish(group.pending)

    def _publish(self, change: ClockChange) -> None:
        if self._status is not None:
            self._status.send(msgspec.msgpack.encode(change), zmq.NOBLOCK)

    def _write(self, group: GpuGroup, now: float, final: bool) -> None:
        """Look whether the pending change can be seen on every GPU.

        Log it when it can, when time is up, or when ``final``.
        """
        change = group.pending
        if change is None:
            return
        try:
            readings = [self.backend.read(uuid) for uuid in group.uuids]
        except ClockError as error:
            readings, final = [], True
            change.error = change.error or str(error)
        if readings:
            change.seen_mhz = float(np.mean([r.freq_mhz for r in readings]))
            change.reasons = int(np.bitwise_or.reduce([r.reasons for r in readings]))
            step = (
                float(np.min(np.diff(group.supported_mhz))) if group.supported_mhz.size > 1 else 1.0
            )
            if change.freq_mhz and all(
                abs(r.freq_mhz - change.freq_mhz) < 0.5 * step for r in readings
            ):
                change.seen_s, final = now, True
        if final or not change.freq_mhz or now > change.set_s + self.config.readback_s:
            group.pending = None
            self._publish(change)
            if self.log is not None:
                self.log.write(msgspec.json.encode(change) + b"\n")
                self.log.flush()

    def _guard(self) -> None:
        for group in self.groups.values():
            readings = [self.backend.read(uuid) for uuid in group.uuids]
            hottest = max(r.temperature_c for r in readings)
            limit = self.config.hot_c - (self.config.cool_down_c if group.throttled else 0.0)
            throttled = hottest > limit or any(r.throttled for r in readings)
            if throttled != group.throttled:
                group.throttled = throttled
                text = f"{hottest:g} C, raising the clock is {'stopped' if throttled else 'allowed again'}"
                change = ClockChange(
                    group.name,
                    "guard",
                    -1,
                    NAN,
                    group.applied_mhz,
                    NAN,
                    NAN,
                    time.monotonic(),
                    error=text,
                )
                self._publish(change)
                if self.log is not None:
                    self.log.write(msgspec.json.encode(change) + b"\n")
                    self.log.flush()


def serve(actuator: Actuator) -> None:
    """Run an actuator until a signal.

    Every clock is reset on any way out. Prints ``actuator ready`` when it takes commands.

    Raises:
        BiscaleError: something failed; says so when a clock could not be reset.
    """

    def ask_to_stop(number: int, frame: object) -> None:
        actuator.stopping = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, ask_to_stop)
    trouble = []
    try:
        for uuid, outcome in actuator.start():
            print(f"left behind by an earlier run: {uuid}: {outcome}", flush=True)
        print("actuator ready", flush=True)
        actuator.run()
    except BiscaleError as error:
        trouble.append(str(error))
    finally:
        failures = actuator.stop()
    if failures:
        trouble.append(
            f"clocks could not be reset, run `biscale hw restore`: {'; '.join(failures)}"
        )
    if trouble:
        raise BiscaleError("; ".join(trouble))
