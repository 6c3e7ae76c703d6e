"""Commands from other machines: only fresh ones, of one controller at a time, and never twice.

The actuator publishes a *beacon* several times per lease: a number that it drew at its start, and
its time. A command holds the newest beacon that its controller has heard. So the actuator knows by
its own clock how old a command can be at most, whatever the clocks of the machines say, and a
command of an earlier life of the actuator has the wrong number. Commands of one controller are
numbered within a session; a new session ends the one before for good.
"""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import zmq

from biscale_env.hardware.loop.wire import ClockChange, Command
from biscale_env.hardware.remote.channels import Channels, take
from biscale_env.hardware.remote.keyring import Keyring

BEACONS_PER_LEASE = 6
BEACON, CHANGE = b"beacon", b"change"  # topics of the status address
TOLD_EVERY_S = 1.0  # equal refusals within this are counted, not told one by one
EVERYBODY = ""  # group of refusals that concern none


class GroupSign(msgspec.Struct, frozen=True, gc=False):
    """What an actuator says about one group.

    Attributes:
        freq_mhz: clock last sent to the driver; 0 under driver control.
        lease_s: what is left of the lease, s; 0 when it has run out.
        power_w: mean power of its GPUs when they were read last, W; NaN: not read.
    """

    freq_mhz: float
    lease_s: float
    power_w: float


class Beacon(msgspec.Struct, frozen=True, gc=False):
    """What an actuator says several times per lease: its number, its time (s), its groups."""

    token: int
    time_s: float
    groups: dict[str, GroupSign] = {}


class RemoteCommand(msgspec.Struct, frozen=True, gc=False):
    """A command with what makes it acceptable from another machine.

    Attributes:
        group: group of GPUs.
        session: number that the controller drew at its start.
        token: of the beacon.
        beacon_s: time of the beacon, by the actuator's clock.
        beacon_age_s: how long ago the controller had heard that beacon when it sent this.
        command: the command.
    """

    group: str
    session: int
    token: int
    beacon_s: float
    beacon_age_s: float
    command: Command


@dataclass(frozen=True)
class DeskSettings:
    """Where an actuator is reached from other machines.

    Attributes:
        commands: address of commands, ``tcp://host:port``.
        status: address where beacons and clock changes are published.
        keys: folder of this machine's keys; None: loopback only.
    """

    commands: str
    status: str
    keys: Path | None = None


@dataclass
class Acceptance:
    """Which commands of one group are acceptable.

    Attributes:
        session: the living one; 0 before any.
        sequence: of its newest command.
        ended: sessions before it.
    """

    session: int = 0
    sequence: int = -1
    ended: set[int] = field(default_factory=set)

    def refusal(self, message: RemoteCommand) -> str:
        """Why a command is refused by its numbers; empty: it is taken, and counts from now on."""
        if message.session in self.ended:
            return "it belongs to a controller that another one has replaced"
        if message.session != self.session:
            self.ended |= {self.session} - {0}
            self.session, self.sequence = message.session, -1
        if message.command.sequence <= self.sequence:
            return "its number was used already: a repeated or overtaken command"
        self.sequence = message.command.sequence
        return ""


class CommandDesk:
    """The actuator's side: sockets, beacons, and which commands are acceptable."""

    def __init__(self, settings: DeskSettings, groups: list[str], lease_s: float) -> None:
        """Open the addresses.

        Raises:
            BiscaleError: keys that cannot be read, beyond loopback without keys, an address taken.
        """
        keys = None if settings.keys is None else Keyring.read(settings.keys)
        self.channels = Channels(keys)
        self.lease_s = lease_s
        self.token = secrets.randbits(63)
        self._groups = {name: Acceptance() for name in groups}
        self._decoder = msgspec.msgpack.Decoder(RemoteCommand)
        self._beacon_due_s = -math.inf
        self._told: dict[tuple[str, str], tuple[float, int]] = {}
        try:
            self.commands = self.channels.bind(zmq.PULL, settings.commands)
            self.status = self.channels.bind(zmq.PUB, settings.status)
        except BaseException:
            self.channels.close()
            raise

    def receive(self, now_s: float) -> tuple[dict[str, Command], list[ClockChange]]:
        """Everything that has come since the last look.

        Args:
            now_s: CLOCK_MONOTONIC.

        Returns:
            The newest acceptable command per group, its engine's age as of now; and what to say
            about those refused.
        """
        taken: dict[str, Command] = {}
        refused: list[ClockChange] = []
        while (data := take(self.commands)) is not None:
            try:
                message = self._decoder.decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError):
                refused += self._refuse(EVERYBODY, -1, "it is no command", now_s)
                continue
            why, age_s = self._examine(message, now_s)
            if why:
                refused += self._refuse(message.group, message.command.sequence, why, now_s)
            else:
                taken[message.group] = msgspec.structs.replace(message.command, engine_age_s=age_s)
        for sentence in self.channels.refusals():
            refused += self._refuse(EVERYBODY, -1, sentence, now_s)
        return taken, refused

    def _examine(self, message: RemoteCommand, now_s: float) -> tuple[str, float]:
        """Why a command is refused, empty where it is not, and how old its engine's life sign is.

        That age counts the whole way there and back: the beacon's transit and the command's.
        """
        if message.group not in self._groups:
            return "this actuator has no such group", 0.0
        if message.token != self.token:
            return "it answers no beacon of this actuator", 0.0
        since_s = now_s - message.beacon_s
        if not 0.0 <= since_s <= self.lease_s:
            return f"its beacon is {since_s:.2f} s old, more than the lease", 0.0
        if why := self._groups[message.group].refusal(message):
            return why, 0.0
        waited_s = message.beacon_age_s
        transit_s = since_s - waited_s if 0.0 <= waited_s <= since_s else since_s
        return "", message.command.engine_age_s + transit_s

    def _refuse(self, group: str, sequence: int, why: str, now_s: float) -> list[ClockChange]:
        """What to say about a refused command; nothing while it was said just before."""
        last_s, count = self._told.get((group, why), (-math.inf, 0))
        if now_s - last_s < TOLD_EVERY_S:
            self._told[group, why] = last_s, count + 1
            return []
        self._told[group, why] = now_s, 0
        more = f" ({count} more like it before)" if count else ""
        change = ClockChange(group, "refused", sequence, received_s=now_s, set_s=now_s)
        change.error = f"refused: {why}{more}"
        return [change]

    def beat(self, now_s: float, groups: Callable[[], dict[str, GroupSign]]) -> None:
        """Publish a beacon when one is due; ``groups`` is asked only then."""
        if now_s >= self._beacon_due_s:
            self._beacon_due_s = now_s + self.lease_s / BEACONS_PER_LEASE
            data = msgspec.msgpack.encode(Beacon(self.token, now_s, groups()))
            self.status.send_multipart([BEACON, data], zmq.NOBLOCK)

    def publish(self, change: ClockChange) -> None:
        """Tell other machines about a clock."""
        self.status.send_multipart([CHANGE, msgspec.msgpack.encode(change)], zmq.NOBLOCK)

    def close(self) -> None:
        """Close the addresses."""
        self.channels.close()
