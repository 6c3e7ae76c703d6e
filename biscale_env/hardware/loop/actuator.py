"""The process that owns the clocks.

Clocks are locked, or held by power limits where those are the means (``ActuatorConfig.means``). It
takes the newest command per group of GPUs, bounds it, skips what is applied already, sets it,
reads it back, logs every time stamp, and resets the clock to driver control on exit, on a signal,
on an error, and whenever the lease runs out: no command from a controller that has itself heard of
its engine within ``lease_s``.

A GPU that is lost, or whose clock cannot be set after several attempts, ends the process with every
clock reset. Readings may fail now and then; a group where they fail too often in a row is
*released*: reset and left to the driver until the next start, while the other groups go on.
"""

import contextlib
import math
import time
from collections.abc import Sequence
from typing import IO

import msgspec
import numpy as np
import zmq

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks import owner
from biscale_env.hardware.clocks.backend import (
    ClockBackend,
    ClockError,
    ClockReading,
    GpuLost,
    insist,
)
from biscale_env.hardware.clocks.caller import as_caller, sudo_caller
from biscale_env.hardware.clocks.means import by_means
from biscale_env.hardware.loop import wire
from biscale_env.hardware.loop.gpu_group import ActuatorConfig, GpuGroup
from biscale_env.hardware.loop.processes import set_realtime
from biscale_env.hardware.loop.wire import ClockChange, Command
from biscale_env.hardware.remote.command_desk import CommandDesk, GroupSign

POLL_S = 0.1  # longest wait: signals, leases and the guard are looked at this often
READBACK_POLL_S = 0.002
WHOLE_W = 1.0  # a driver may keep a power limit in whole watts (assumed)
NAN = math.nan
NO_LIMIT_SENT = "the controller sends clocks, not power limits: start it with --means cap too"


class Actuator:
    """Owns the clocks of its groups from :meth:`start` to :meth:`stop`."""

    def __init__(
        self,
        config: ActuatorConfig,
        backend: ClockBackend,
        log: IO[bytes] | None = None,
        realtime: bool = False,
    ) -> None:
        """Prepare; nothing is touched before :meth:`start`.

        Args:
            config: GPUs, bounds, lease.
            backend: reads and locks.
            log: JSON lines of every change.
            realtime: run before other processes, where that is allowed.

        Raises:
            BiscaleError: the variables of sudo make no sense.
        """
        sudo_caller()
        self.config = config
        self.realtime = realtime
        self.backend = by_means(backend, config.means)
        self.log = log
        self.stopping = False
        self.groups: dict[str, GpuGroup] = {}
        self._locks: dict[str, owner.OwnerLock] = {}
        self._context = zmq.Context()
        self._status: zmq.Socket | None = None
        self._desk: CommandDesk | None = None
        self._poller = zmq.Poller()
        self._decoder = msgspec.msgpack.Decoder(Command)
        self._next_guard_s = 0.0

    # --- start and stop ---------------------------------------------------------------------------

    def start(self) -> list[owner.Recovery]:
        """Own the GPUs, recover orphans, write state files, test the privilege, open the sockets.

        Returns:
            What became of orphans of earlier runs.

        Raises:
            BiscaleError: a GPU is unknown, owned by somebody else or named twice, there is no
                privilege, or the sockets cannot be opened.
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
            for uuid in everyone:
                self._locks[uuid] = owner.OwnerLock(uuid)
        for name, uuids in named.items():
            self._take(name, uuids)
        if self.realtime:
            set_realtime()
        self._listen()
        return recovered

    def _take(self, name: str, uuids: list[str]) -> None:
        """Record the GPUs on disk, then reset them.

        A known state, and the test whether clocks may be locked at all.
        """
        ours = uuids if self.backend.can_lock else []
        for uuid in ours:
            self._refuse_other_means(uuid)
        group = GpuGroup.of(name, uuids, self.backend, self.config)
        fresh = [uuid for uuid in ours if not owner.state_path(uuid).exists()]
        try:
            for uuid in ours:
                owner.write_state(uuid, self.config.backend, self.config.means)
            self.backend.reset_all(group.uuids)
        except BiscaleError:
            for uuid in set(fresh) - self.backend.outstanding():
                owner.remove_state(uuid)
            raise
        self.groups[group.name] = group
        self._changed(group, ClockChange(group.name, "start", -1, 0.0, 0.0))

    def _refuse_other_means(self, uuid: str) -> None:
        """What an earlier run has set by other means and nobody could take back stays known.

        Raises:
            ClockError: its state file says so.
        """
        if owner.state_path(uuid).exists() and owner.noted_means(uuid) != (self.config.means,):
            raise ClockError(
                f"{uuid} may still be held by other means since an earlier run: "
                "run `biscale hw restore` first"
            )

    def _listen(self) -> None:
        folder = wire.socket_folder(self.config.sockets)
        for group in self.groups.values():
            endpoint = wire.command_endpoint(folder, group.name)
            group.socket = wire.newest_receiver(self._context, endpoint)
            self._poller.register(group.socket, zmq.POLLIN)
        self._status = wire.publisher(self._context, wire.status_endpoint(folder))
        if self.config.desk is not None:
            with as_caller():  # its keys are the caller's
                self._desk = CommandDesk(self.config.desk, list(self.groups), self.config.lease_s)
            self._poller.register(self._desk.commands, zmq.POLLIN)

    def stop(self) -> list[str]:
        """Reset every clock and give all locks up; may be called more than once.

        Clocks come first: whatever fails afterwards (a full disk under the log, a socket) is
        reported, and keeps no GPU from being reset.

        Returns:
            Sentences about what failed; GPUs that could not be reset keep their state files for the
            next start.
        """
        uuids = [uuid for group in self.groups.values() for uuid in group.uuids]
        failed: dict[str, ClockError] = {}
        if self.backend.can_lock:
            failed = owner.reset_and_forget(self.backend, uuids)
        problems = []
        if failed:
            texts = "; ".join(str(error) for error in failed.values())
            problems.append(f"clocks could not be reset, run `biscale hw restore`: {texts}")
        for group in self.groups.values():
            mine = "; ".join(str(failed[uuid]) for uuid in group.uuids if uuid in failed)
            try:
                self._changed(group, ClockChange(group.name, "exit", -1, 0.0, 0.0, error=mine))
                self._read_back(group, time.monotonic(), final=True)
            except BiscaleError as error:
                problems.append(str(error))
        self._close()
        return problems

    def _close(self) -> None:
        running = self.backend.outstanding()
        for uuid in [uuid for uuid in self._locks if uuid not in running]:
            self._locks.pop(uuid).release()  # with a call running nobody else may have the GPU
        # the sockets are the caller's; a reset that waits in the driver needs the privilege
        with contextlib.nullcontext() if running else as_caller():
            self._context.destroy(linger=100)
            if self._desk is not None:
                self._desk.close()
                self._desk = None
            for name in self.groups:
                wire.unbind(wire.command_endpoint(self.config.sockets, name))
            wire.unbind(wire.status_endpoint(self.config.sockets))
        self._status = None
        self.groups.clear()

    # --- one turn of the loop ---------------------------------------------------------------------

    def run(self) -> None:
        """Serve until :attr:`stopping` is set or no group is left.

        Raises:
            ClockError: a GPU is lost, or its clock cannot be set.
            BiscaleError: the log cannot be written.
        """
        while not self.stopping and not all(g.released for g in self.groups.values()):
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
        if self._desk is not None:
            self._receive_from_afar(self._desk)
        now = time.monotonic()
        if now >= self._next_guard_s:
            self._next_guard_s = now + POLL_S
            for group in self.groups.values():
                if not group.released:
                    self._guard(group)
        for group in self.groups.values():
            if group.applied_mhz and time.monotonic() > group.alive_until_s:
                self._expire(group)
            if group.pending:
                self._read_back(group, time.monotonic(), final=False)

    def _receive(self, group: GpuGroup) -> None:
        assert group.socket is not None
        try:
            command = self._decoder.decode(group.socket.recv(zmq.NOBLOCK))
        except (zmq.ZMQError, msgspec.DecodeError):
            return
        self.obey(group, command, time.monotonic())

    def _receive_from_afar(self, desk: CommandDesk) -> None:
        """Obey the newest acceptable command of each group, tell and log what was refused."""
        taken, refused = desk.receive(time.monotonic())
        for name, command in taken.items():
            self.obey(self.groups[name], command, time.monotonic())
        for change in refused:
            self._publish(change)
            self._write(change)
        desk.beat(time.monotonic(), self._signs)

    def _signs(self) -> dict[str, GroupSign]:
        """What other machines are told about every group."""
        now = time.monotonic()
        return {
            name: GroupSign(group.applied_mhz, max(group.alive_until_s - now, 0.0), group.power_w)
            for name, group in self.groups.items()
        }

    def obey(self, group: GpuGroup, command: Command, received_s: float) -> None:
        """Apply one command.

        Prolong the lease, bound and snap the clock, skip it when it is applied already, else set
        it. Whatever keeps the clock from being the one requested is published.
        """
        group.commands += 1
        restarted = command.sequence <= group.sequence  # another controller, which knows nothing
        group.sequence = command.sequence
        age = command.engine_age_s
        if not (math.isfinite(age) and age >= 0):
            age = math.inf
        alive_until_s = received_s + self.config.lease_s - age
        group.alive_until_s = max(group.alive_until_s, alive_until_s)
        wanted = group.snap(command.freq_mhz)
        limit_w = group.limit_w(command.cap_w, wanted)
        if limit_w and not command.cap_w > 0:
            self._keep(group, command, received_s, "hold", NO_LIMIT_SENT)
        elif group.released or received_s > group.alive_until_s:
            self._keep(group, command, received_s, "skip")
        elif (wanted, limit_w) == (group.applied_mhz, group.applied_w):
            if restarted or wanted != command.freq_mhz:
                self._keep(group, command, received_s, "skip")
            else:
                group.skipped += 1
            group.held_mhz = NAN
        elif not group.may_set(wanted, limit_w):
            self._keep(group, command, received_s, "hold")
        else:
            self._set(group, (wanted, limit_w), command, received_s)

    def _keep(
        self,
        group: GpuGroup,
        command: Command,
        received_s: float,
        cause: str,
        why: str = "the guard allows no raise",
    ) -> None:
        """Leave the clock as it is and say so; a refusal of the guard is logged once."""
        group.skipped += 1
        change = ClockChange(
            group.name,
            cause,
            command.sequence,
            command.freq_mhz,
            group.applied_mhz,
            command.decided_s,
            received_s,
            time.monotonic(),
            cap_w=group.applied_w,
        )
        self._publish(change)
        if cause == "hold" and command.freq_mhz != group.held_mhz:
            group.held_mhz = command.freq_mhz
            change.error = why
            self._write(change)

    def _set(
        self,
        group: GpuGroup,
        wanted_mhz_w: tuple[float, float],
        command: Command,
        received_s: float,
    ) -> None:
        wanted, limit_w = wanted_mhz_w
        if limit_w:
            failures = insist(
                self.backend, lambda uuids: self.backend.cap_each(uuids, limit_w), group.uuids
            )
        elif wanted:
            low = wanted if self.config.lower_bound == "fixed" else float(group.supported_mhz[0])
            failures = insist(
                self.backend,
                lambda uuids: self.backend.lock_each(uuids, low, wanted),
                group.uuids,
            )
        else:
            failures = insist(self.backend, self.backend.reset_each, group.uuids)
        change = ClockChange(
            group.name,
            "command",
            command.sequence,
            command.freq_mhz,
            wanted,
            command.decided_s,
            received_s,
            cap_w=limit_w,
        )
        if failures:
            change.cause, change.error = "error", "; ".join(str(e) for e in failures.values())
        group.held_mhz = NAN
        self._changed(group, change)
        for error in failures.values():
            raise error

    def _expire(self, group: GpuGroup) -> None:
        """The lease has run out."""
        failures = insist(self.backend, self.backend.reset_each, group.uuids)
        text = "; ".join(str(e) for e in failures.values())
        self._changed(group, ClockChange(group.name, "lease", -1, 0.0, 0.0, error=text))
        for error in failures.values():
            raise error

    def _release(self, group: GpuGroup, why: str) -> None:
        """End the control of one group; its state files stay until :meth:`stop` has reset it."""
        group.released = why
        failures = insist(self.backend, self.backend.reset_each, group.uuids)
        texts = dict.fromkeys([why, *(str(e) for e in failures.values())])
        change = ClockChange(group.name, "release", -1, 0.0, 0.0, error="; ".join(texts))
        self._changed(group, change)

    # --- telling ----------------------------------------------------------------------------------

    def _changed(self, group: GpuGroup, change: ClockChange) -> None:
        """Take note of a clock that was just sent, publish it, and begin to look for it."""
        now = time.monotonic()
        change.set_s = now
        if math.isnan(change.received_s):
            change.received_s = now
        if group.pending:
            self._read_back(group, now, final=True)
        group.applied_mhz, group.applied_w = change.freq_mhz, change.cap_w
        group.changes += 1
        group.pending = change
        self._publish(change)

    def _publish(self, change: ClockChange) -> None:
        if self._status is not None:
            self._status.send(msgspec.msgpack.encode(change), zmq.NOBLOCK)
        if self._desk is not None:
            self._desk.publish(change)

    def _write(self, change: ClockChange) -> None:
        if self.log is None:
            return
        try:
            self.log.write(msgspec.json.encode(change) + b"\n")
            self.log.flush()
        except OSError as error:
            raise BiscaleError(f"cannot write the log of clocks: {error.strerror}") from None

    def _read_back(self, group: GpuGroup, now: float, final: bool) -> None:
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
            if change.freq_mhz and self._shows(group, change, readings):
                change.seen_s, final = now, True
        if final or not change.freq_mhz or now > change.set_s + self.config.readback_s:
            group.pending = None
            self._publish(change)
            self._write(change)

    def _shows(
        self, group: GpuGroup, change: ClockChange, readings: Sequence[ClockReading]
    ) -> bool:
        """Whether every GPU runs at the clock of a change, or has its power limit."""
        if not change.cap_w:
            return group.shows(change.freq_mhz, readings)
        try:
            limits_w = [self.backend.power_limit_w(uuid) for uuid in group.uuids]
        except ClockError:
            return False
        return all(abs(limit_w - change.cap_w) < WHOLE_W for limit_w in limits_w)

    def _guard(self, group: GpuGroup) -> None:
        """Look at temperature and throttling of one group.

        A reading may fail now and then: the last state of the guard holds meanwhile, and the group
        is released when readings fail too often in a row.

        Raises:
            GpuLost: one of its GPUs is.
        """
        try:
            readings = [self.backend.read(uuid) for uuid in group.uuids]
        except GpuLost:
            raise
        except ClockError as error:
            group.failed_reads += 1
            if group.failed_reads > self.config.failed_reads:
                self._release(group, str(error))
            return
        group.failed_reads = 0
        group.power_w = float(np.mean([r.power_w for r in readings]))
        heats = [r.temperature_c for r in readings if not math.isnan(r.temperature_c)]
        hottest = max(heats, default=NAN)
        limit = self.config.hot_c - (self.config.cool_down_c if group.throttled else 0.0)
        throttled = hottest > limit or any(r.throttled for r in readings)
        if throttled == group.throttled:
            return
        group.throttled, group.held_mhz = throttled, NAN
        change = ClockChange(
            group.name, "guard", group.sequence, NAN, group.applied_mhz, set_s=time.monotonic()
        )
        state = "stopped" if throttled else "allowed again"
        change.error = f"{hottest:g} C, raising the clock is {state}"
        self._publish(change)
        self._write(change)
