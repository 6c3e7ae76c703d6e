"""What a machine tells: the messages of its feed, and who follows it.

One PUB address per machine carries everything that is measured there: clock changes, decisions,
engine iterations, telemetry, and twice a second the state of all that runs.
"""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.deploy.deployment_file import Deployment
from biscale_env.hardware.loop.control import Decision
from biscale_env.hardware.loop.wire import ClockChange
from biscale_env.hardware.remote.channels import Channels, take_frames
from biscale_env.hardware.remote.keyring import Keyring
from biscale_env.hardware.remote.peer_time import PeerTime
from biscale_env.hardware.replay.recorder import IterationRow

STATE, CLOCK, DECISION, ITERATION, TELEMETRY, PLAN = (
    b"state",
    b"clock",
    b"decision",
    b"iteration",
    b"telemetry",
    b"plan",
)
Sample = tuple[float, str, str, float, float, float, int, float]  # recorder's TELEMETRY_COLUMNS


class InstanceState(msgspec.Struct):
    """One instance, as its machine or that of its controller knows it.

    Attributes:
        name: of the instance.
        phase: ``prefill`` or ``decode``.
        policy: of its controller.
        freq_mhz: clock last sent to the driver; 0 under driver control; NaN: not known here.
        seen_mhz: mean clock read.
        power_w: of all its GPUs, W.
        energy_j: since the machine came up, J.
        lease_s: what is left of its lease, s.
        iterations_per_s: over the last state's period.
        batch: requests of the newest iteration.
        queue: requests that waited then.
        kv_use: fraction of the KV cache in use then.
    """

    name: str
    phase: str
    policy: str
    freq_mhz: float = math.nan
    seen_mhz: float = math.nan
    power_w: float = math.nan
    energy_j: float = math.nan
    lease_s: float = math.nan
    iterations_per_s: float = 0.0
    batch: int = 0
    queue: int = 0
    kv_use: float = math.nan


class MachineState(msgspec.Struct):
    """One machine.

    Attributes:
        machine: its name.
        time_s: its CLOCK_MONOTONIC.
        processes: what runs there, and how it is.
        instances: those whose GPUs it has.
        refused: commands and callers that were turned away since it came up.
        problems: sentences, the newest last.
    """

    machine: str
    time_s: float
    processes: dict[str, str]
    instances: list[InstanceState]
    refused: int = 0
    problems: list[str] = []


class NamedDecision(msgspec.Struct):
    """A decision and whose it is."""

    instance: str
    decision: Decision


class PlannedInstance(msgspec.Struct):
    """An open instance: its base clock, and how fast it is to the router (requests/s)."""

    freq_mhz: float
    weight: float


class PlacementEvent(msgspec.Struct):
    """A placement of tier 1, from when on; told again several times a second.

    Attributes:
        time_s: CLOCK_MONOTONIC.
        rate_rps: forecast it was made for; NaN (null): none.
        open: the instances it opens.
        label: in words.
        solve_s: how long the table and the programme took.
    """

    time_s: float
    rate_rps: float
    open: dict[str, PlannedInstance]
    label: str
    solve_s: float = math.nan


KINDS: dict[bytes, Any] = {
    PLAN: PlacementEvent,
    STATE: MachineState,
    CLOCK: ClockChange,
    DECISION: NamedDecision,
    ITERATION: IterationRow,
    TELEMETRY: list[Sample],
}


class FeedReader:
    """Follows the feeds of all machines of a deployment from one of them."""

    def __init__(
        self, deployment: Deployment, at: str | None, topics: Sequence[bytes] = tuple(KINDS)
    ) -> None:
        """Connect.

        Args:
            deployment: whose machines.
            at: machine whose keys are used; None: the first whose keys are here.
            topics: what is wanted.

        Raises:
            BiscaleError: there are no keys here.
        """
        keys = keys_here(deployment, at)
        self._channels = Channels(keys)
        self._poller = zmq.Poller()
        self._machines: dict[zmq.Socket, str] = {}
        self.times = {name: PeerTime() for name in deployment.machines}
        for name in deployment.machines:
            address = deployment.address(name, "feed")
            socket = self._channels.connect(zmq.SUB, address, name, topics=topics)
            self._machines[socket] = name
            self._poller.register(socket, zmq.POLLIN)

    def messages(self, timeout_s: float) -> Iterator[tuple[str, bytes, Any]]:
        """What has come, waiting at most so long for the first: machine, topic, message."""
        for socket, _ in self._poller.poll(max(1, round(timeout_s * 1e3))):
            while (frames := take_frames(socket)) is not None:
                topic, data = frames[0], frames[-1]
                try:
                    message = msgspec.msgpack.decode(data, type=KINDS[topic])
                except (msgspec.DecodeError, KeyError):
                    continue
                machine = self._machines[socket]
                if topic == STATE:
                    self.times[machine].hear(message.time_s, time.monotonic())
                yield machine, topic, message

    def close(self) -> None:
        """Disconnect."""
        self._channels.close()


def keys_here(deployment: Deployment, machine: str | None) -> Keyring | None:
    """Keys of a machine; with None those of the first machine whose keys are here.

    Returns:
        None where the deployment has no keys.

    Raises:
        BiscaleError: there are none here.
    """
    if deployment.keys is None:
        return None
    if machine is not None:
        return Keyring.read(deployment.keys / machine)
    folders: list[Path] = [deployment.keys / name for name in deployment.machines]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        raise BiscaleError(
            f"there are no keys of {deployment.name} in {deployment.keys}: make them with `biscale "
            "hw keys`, or copy the folder of this machine here"
        )
    return Keyring.read(found)
