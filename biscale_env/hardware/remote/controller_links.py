"""The controller's ends: records and heartbeats in, commands out, clock changes in.

On one machine these are the sockets of the folder; between machines authenticated TCP, where the
times of the other side are told by our clock.
"""

import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from biscale_env.hardware.engines.hook.curve import is_tcp
from biscale_env.hardware.engines.hook.engine_record import EngineRecord
from biscale_env.hardware.engines.hook.sender import alive_endpoint
from biscale_env.hardware.loop import wire
from biscale_env.hardware.loop.wire import ClockChange, Command
from biscale_env.hardware.remote.channels import Channels, take, take_frames
from biscale_env.hardware.remote.command_desk import BEACON, Beacon, RemoteCommand
from biscale_env.hardware.remote.keyring import Keyring
from biscale_env.hardware.remote.peer_time import PeerTime

TIMES = ("set_s", "seen_s", "received_s")  # of a change: the actuator's clock


@dataclass(frozen=True)
class ControllerAddresses:
    """Where a controller listens and calls; ``ipc://`` on one machine, ``tcp://`` between two.

    Attributes:
        records: address at which the engine's records are taken.
        commands: address of the actuator's commands.
        status: address of its clock changes.
        actuator: machine of the actuator, for its key.
        keys: folder of this machine's keys; None: no address beyond loopback.
    """

    records: str
    commands: str
    status: str
    actuator: str | None = None
    keys: Path | None = None

    @classmethod
    def in_folder(cls, sockets: Path, records: str, group: str) -> "ControllerAddresses":
        """The addresses of a socket folder; ``records`` and ``group`` are the names there."""
        return cls(
            wire.record_endpoint(sockets, records),
            wire.command_endpoint(sockets, group),
            wire.status_endpoint(sockets),
        )


class RecordInlet:
    """Takes the newest record of one engine, and hears that it lives.

    Attributes:
        records: socket of records, to be polled.
        alive: socket of heartbeats, to be polled.
        offset_s: time here minus time of the engine's machine, s; 0 on one machine.
    """

    def __init__(self, endpoint: str, context: zmq.Context, channels: Channels | None) -> None:
        self._endpoints = (endpoint, alive_endpoint(endpoint))
        self._engine = PeerTime() if is_tcp(endpoint) else None
        if channels is not None and self._engine is not None:
            self.records, self.alive = (
                channels.bind(zmq.PULL, address, newest=True) for address in self._endpoints
            )
        else:
            self.records, self.alive = (
                wire.newest_receiver(context, address) for address in self._endpoints
            )

    @property
    def offset_s(self) -> float:
        """Time here minus time of the engine's machine, s."""
        offset_s = 0.0 if self._engine is None else self._engine.offset_s
        return offset_s if math.isfinite(offset_s) else 0.0

    def lived_s(self, record: EngineRecord, now_s: float) -> float:
        """When the engine gave the life sign that a record is, by our clock."""
        if self._engine is None or record.detail is None:
            return now_s
        return self._engine.hear(record.detail.time_s, now_s)

    def heartbeat_s(self, now_s: float) -> float:
        """When the newest heartbeat was sent, by our clock; long ago: there was none."""
        data = take(self.alive)
        if data is None:
            return -math.inf
        if self._engine is None:
            return now_s
        try:
            return self._engine.hear(float(data), now_s)
        except ValueError:
            return now_s

    def close(self) -> None:
        """Free the addresses; the contexts close the sockets."""
        for endpoint in self._endpoints:
            wire.unbind(endpoint)


class ActuatorLink:
    """Commands to one group of one actuator, and what it tells.

    Attributes:
        status: socket of its clock changes, to be polled.
        power_w: mean power of the group's GPUs, told by an actuator on another machine, W.
    """

    def __init__(
        self,
        addresses: ControllerAddresses,
        group: str,
        context: zmq.Context,
        channels: Channels | None,
    ) -> None:
        self.group = group
        self._remote = is_tcp(addresses.commands)
        self._session = secrets.randbits(62) + 1
        self._beacon: tuple[Beacon, float] | None = None
        self._time = PeerTime()
        self.power_w = math.nan
        if self._remote:
            assert channels is not None
            peer = addresses.actuator
            self.status = channels.connect(zmq.SUB, addresses.status, peer)
            self._commands = channels.connect(zmq.PUSH, addresses.commands, peer, newest=True)
        else:
            self.status = wire.subscriber(context, addresses.status)
            self._commands = wire.newest_sender(context, addresses.commands)

    def send(self, command: Command, now_s: float) -> bool:
        """Send a command if that costs no waiting; whether it went out.

        To another machine nothing is sent before its beacon was heard.
        """
        data: bytes
        if self._remote:
            if self._beacon is None:
                return False
            beacon, heard_s = self._beacon
            data = msgspec.msgpack.encode(
                RemoteCommand(
                    self.group,
                    self._session,
                    beacon.token,
                    beacon.time_s,
                    max(now_s - heard_s, 0.0),
                    command,
                )
            )
        else:
            data = msgspec.msgpack.encode(command)
        try:
            self._commands.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def heard(self, now_s: float) -> Iterator[ClockChange]:
        """Clock changes of our group that have come, their times by our clock."""
        while (frames := take_frames(self.status)) is not None:
            if self._remote and frames[0] == BEACON:
                self._hear_beacon(msgspec.msgpack.decode(frames[-1], type=Beacon), now_s)
                continue
            change = msgspec.msgpack.decode(frames[-1], type=ClockChange)
            if change.group == self.group:
                yield self._by_our_clock(change) if self._remote else change

    def _hear_beacon(self, beacon: Beacon, now_s: float) -> None:
        self._time.hear(beacon.time_s, now_s)
        self._beacon = beacon, now_s
        if sign := beacon.groups.get(self.group):
            self.power_w = sign.power_w

    def _by_our_clock(self, change: ClockChange) -> ClockChange:
        if not math.isfinite(self._time.offset_s):
            return change
        times = {name: self._time.here(getattr(change, name)) for name in TIMES}
        return msgspec.structs.replace(change, **times)


class ControllerLinks:
    """All sockets of one controller."""

    def __init__(self, addresses: ControllerAddresses, group: str) -> None:
        """Open them.

        Raises:
            BiscaleError: an address is taken or makes no sense, or keys are missing.
        """
        self.context = zmq.Context()
        self._channels: Channels | None = None
        if any(map(is_tcp, (addresses.records, addresses.commands))):
            keys = None if addresses.keys is None else Keyring.read(addresses.keys)
            self._channels = Channels(keys)
        try:
            self.inlet = RecordInlet(addresses.records, self.context, self._channels)
            self.actuator = ActuatorLink(addresses, group, self.context, self._channels)
        except BaseException:
            self.close()
            raise

    def refusals(self) -> list[str]:
        """Sentences about callers that were turned away since the last look."""
        return list(self._channels.refusals()) if self._channels is not None else []

    def close(self) -> None:
        """Close them all; the actuator's lease does the rest."""
        self.context.destroy(0)
        if self._channels is not None:
            self._channels.close()
        if inlet := getattr(self, "inlet", None):
            inlet.close()
