"""`biscale hw up`: one actuator per machine, one controller per instance, and the machine's feed.

A process of ours that ends by itself is started again, after a pause that grows: a new actuator
resets what the old one left locked, and until then the lease has brought clocks back wherever a
controller died.
"""

import contextlib
import math
import socket as socketlib
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import yaml
import zmq

from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole
from biscale_env.hardware.clocks.backend import ClockBackend, ClockError
from biscale_env.hardware.clocks.backend_registry import open_backend
from biscale_env.hardware.deploy import machine_feed as feed
from biscale_env.hardware.deploy.deployment_file import Deployment
from biscale_env.hardware.deploy.machine_feed import (
    InstanceState,
    MachineState,
    NamedDecision,
    PlacementEvent,
)
from biscale_env.hardware.engines.hook import engine_record
from biscale_env.hardware.engines.hook.curve import is_tcp
from biscale_env.hardware.loop import wire
from biscale_env.hardware.loop.control import Decision
from biscale_env.hardware.loop.processes import Child
from biscale_env.hardware.loop.wire import ClockChange
from biscale_env.hardware.remote.channels import Channels, take_frames
from biscale_env.hardware.remote.command_desk import BEACON, Beacon
from biscale_env.hardware.remote.keyring import Keyring
from biscale_env.hardware.replay.recorder import TELEMETRY_HZ, row_of

ACTUATOR, TIER1 = "actuator", "tier1"
STATE_S = 0.5
AGAIN_S = 2.0  # how often controllers are told their base clock again
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
READY_S = 180.0
KEPT_PROBLEMS = 5


def local_machines(deployment: Deployment) -> list[str]:
    """Machines of a deployment whose address is one of this computer."""
    return [name for name, one in deployment.machines.items() if _is_here(one.host)]


def _is_here(host: str) -> bool:
    try:
        for family, kind, protocol, _, address in socketlib.getaddrinfo(
            host, 0, type=socketlib.SOCK_DGRAM
        ):
            with socketlib.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return True
    except OSError:
        pass
    return False


@dataclass
class Watched:
    """A process that is started again when it ends by itself.

    Attributes:
        name: of the process.
        start: starts it.
        ready: what it prints when it is ready.
        child: the process.
        restarts: how often it was started again.
        pause_s: before the next start.
        due_s: when that is; inf: it runs.
    """

    name: str
    start: Callable[[], Child]
    ready: str
    child: Child | None = None
    restarts: int = 0
    pause_s: float = FIRST_PAUSE_S
    due_s: float = math.inf

    def look(self, now_s: float) -> str:
        """Start it again when that is due; a sentence when it has ended."""
        if self.child is not None and self.child.running:
            return ""
        if self.child is not None:
            reason = self.child.reason()
            self.child.stop()
            self.child = None
            self.due_s, self.pause_s = (
                now_s + self.pause_s,
                min(2 * self.pause_s, LONGEST_PAUSE_S),
            )
            return reason
        if now_s >= self.due_s:
            self.child, self.due_s = self.start(), math.inf
            self.restarts += 1
        return ""

    def state(self) -> str:
        """How it is, in a word or two."""
        if self.child is None:
            return "down"
        return "up" if not self.restarts else f"up, started again {self.restarts} times"


@dataclass
class _Seen:
    """What was heard about one instance since the last state."""

    iterations: int = 0
    batch: int = 0
    queue: int = 0
    kv_use: float = math.nan
    freq_mhz: float = math.nan
    lease_until_s: float = -math.inf
    readings: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    begun_j: dict[str, float] = field(default_factory=dict)


class MachineAgent:
    """Everything of ours that runs on one machine."""

    def __init__(
        self,
        deployment: Deployment,
        machine: str,
        logs: Path,
        observe_only: bool = False,
        parts: Sequence[str] = (),
    ) -> None:
        """Check keys, backend, GPUs and policies; nothing runs before :meth:`start`.

        Args:
            deployment: what is deployed.
            machine: which machine this is.
            logs: folder of logs and of the children's settings.
            observe_only: set no clock.
            parts: which of its parts run here, ``actuator`` or names of instances (their
                controllers); empty: all. The feed belongs to the actuator.

        Raises:
            BiscaleError: a part is not of this machine; keys, GPUs or the backend are missing.
        """
        self.deployment, self.machine, self.logs = deployment, machine, logs
        self.observe_only = observe_only
        self.sockets = deployment.sockets(machine)
        self.here = deployment.on_machine(machine)
        known = [ACTUATOR, *deployment.controlled_by(machine)]
        if deployment.tier1 is not None and deployment.tier1_machine == machine:
            known.append(TIER1)
        self.parts = set(parts or known)
        for part in self.parts - set(known):
            raise BiscaleError(
                f"'{part}' is no part of machine '{machine}': choose from {', '.join(known)}"
            )
        self.controlled = [n for n in deployment.controlled_by(machine) if n in self.parts]
        self.keys = deployment.key_folder(machine)
        self.channels = Channels(None if self.keys is None else Keyring.read(self.keys))
        self.backend: ClockBackend | None = None
        self.uuids: dict[str, list[str]] = {}
        if self.here:
            self.backend = open_backend(deployment.backend(machine), observe_only=True)
            gpus = {name: map(str, deployment.instances[name].gpus) for name in self.here}
            self.uuids = {n: [self.backend.device(g).uuid for g in gpus[n]] for n in self.here}
        self.watched: list[Watched] = []
        self.problems: deque[str] = deque(maxlen=KEPT_PROBLEMS)
        self.refused = 0
        self._seen = {name: _Seen() for name in self.here}
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._sources: dict[zmq.Socket, tuple[bytes, str]] = {}
        self._feed: zmq.Socket | None = None
        self._bases: dict[str, zmq.Socket] = {}
        self._planned: dict[str, tuple[float, float]] = {}
        self._telemetry_s = self._state_s = 0.0

    # --- processes ---

    def start(self, tell: Callable[[str], None] = lambda text: None) -> None:
        """Start the actuator, then the controllers; returns when all are ready.

        Raises:
            BiscaleError: one of them does not get ready; all are stopped again.
        """
        wire.socket_folder(self.deployment.home(self.machine))
        wire.socket_folder(self.sockets)
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            if ACTUATOR in self.parts:
                self._listen()
            if self.here and ACTUATOR in self.parts:
                self._watch(ACTUATOR, self._actuator, "actuator ready")
            for name in self.controlled:
                self._watch(f"controller of {name}", self._controller(name), "controller ready")
            if TIER1 in self.parts:
                self._watch("tier 1", self._tier1, "tier 1 ready")
            for one in self.watched:
                assert one.child is not None
                one.child.wait_for(one.ready, READY_S)
                tell(f"{self.machine}: {one.name} is ready")
        except BaseException:
            self.stop()
            raise

    def _watch(self, name: str, start: Callable[[], Child], ready: str) -> None:
        watched = Watched(name, start, ready, start())
        self.watched.append(watched)
        if name == ACTUATOR:  # controllers would command nobody before
            assert watched.child is not None
            watched.child.wait_for(ready, READY_S)

    def _actuator(self) -> Child:
        d, bounds = self.deployment, self.deployment.bounds
        spec = self.logs / "actuator-instance.yaml"
        d.spec(self.here[0]).to_yaml(spec)
        options: dict[str, object] = {
            "gpus": [f"{name}={','.join(self.uuids[name])}" for name in self.here],
            "backend": d.backend(self.machine),
            "sockets": str(self.sockets),
            "lease": bounds.lease_s,
            "hot": bounds.hot_c,
            "means": bounds.means,
            "freq_min": bounds.freq_min_mhz,
            "freq_max": bounds.freq_max_mhz,
            "instance": str(spec),
            "observe_only": self.observe_only,
            "log": str(self.logs / "clocks.jsonl"),
            "keys": None if self.keys is None else str(self.keys),
        }
        for what in ("commands", "status"):
            options[what] = d.listens(self.machine, d.address(self.machine, what))
        file = self.logs / "actuator.yaml"
        return Child.with_settings("actuator", ("hw", "actuate"), options, file)

    def _controller(self, name: str) -> Callable[[], Child]:
        d, one = self.deployment, self.deployment.instances[name]
        spec = self.logs / f"{name}-instance.yaml"
        beside = one.machine == self.machine
        records = d.records(name)
        options: dict[str, object] = {
            "phase": one.phase,
            "policy": d.policy(name),
            "sockets": str(self.sockets),
            "instance": str(spec),
            "delay": d.bounds.delay_s,
            "lease": d.bounds.lease_s,
            "means": d.bounds.means,
            "group": name,
            "records": d.listens(self.machine, records) if is_tcp(records) else records,
            "decisions": self._decisions(name),
            "base": None if d.tier1 is None else wire.base_endpoint(self.sockets, name),
            "keys": None if self.keys is None else str(self.keys),
        }
        if beside:
            options |= {
                "commands": wire.command_endpoint(self.sockets, name),
                "status": wire.status_endpoint(self.sockets),
                "backend": d.backend(self.machine),
                "gpus": ",".join(self.uuids[name]),
            }
        else:
            options |= {
                "commands": d.address(one.machine, "commands"),
                "status": d.address(one.machine, "status"),
                "actuator": one.machine,
            }

        def start() -> Child:
            d.spec(name).to_yaml(spec)
            file = self.logs / f"{name}.yaml"
            return Child.with_settings(f"controller of {name}", ("hw", "control"), options, file)

        return start

    def _tier1(self) -> Child:
        file = self.logs / "tier1-deployment.yaml"
        described = self.deployment.model_dump(mode="json", exclude_defaults=False)
        write_whole(file, yaml.safe_dump(described, sort_keys=False))
        log = ["--log", str(self.logs / "placements.jsonl")]
        return Child("tier 1", ["hw", "plan", str(file), *log])

    def _decisions(self, name: str) -> str:
        return wire.ipc(self.sockets / f"decisions-{name}.sock")

    # --- the feed ---

    def _listen(self) -> None:
        d = self.deployment
        address = d.listens(self.machine, d.address(self.machine, "feed"))
        self._feed = self.channels.bind(zmq.PUB, address)
        if d.tier1 is not None:
            self._follow_plans()
        if self.here:
            status = d.address(self.machine, "status")
            self._follow(self.channels.connect(zmq.SUB, status, self.machine), feed.CLOCK, "")
        for name in d.controlled_by(self.machine):  # also of those that run elsewhere on it
            socket = wire.subscriber(self._context, self._decisions(name))
            self._follow(socket, feed.DECISION, name)
        for name in self.here:
            socket = wire.subscriber(self._context, d.all_records(name))
            self._follow(socket, feed.ITERATION, name)

    def _follow_plans(self) -> None:
        """Placements of tier 1: from its own process on its machine, elsewhere from that feed."""
        d = self.deployment
        if d.tier1_machine == self.machine:
            socket = wire.subscriber(self._context, wire.plans_endpoint(self.sockets))
        else:
            address, topics = d.address(d.tier1_machine, "feed"), (feed.PLAN,)
            socket = self.channels.connect(zmq.SUB, address, d.tier1_machine, topics=topics)
        self._follow(socket, feed.PLAN, "tier 1")
        for name in d.controlled_by(self.machine):
            endpoint = wire.base_endpoint(self.sockets, name)
            self._bases[name] = wire.newest_sender(self._context, endpoint)

    def _hear_plan(self, data: bytes) -> None:
        """Pass a placement on, and the base clocks of those controlled here when they change."""
        event, now = msgspec.msgpack.decode(data, type=PlacementEvent), time.monotonic()
        if self.deployment.tier1_machine == self.machine:
            self._tell(feed.PLAN, event)
        for name, socket in self._bases.items():
            time_s, told_s = self._planned.get(name, (math.nan, -math.inf))
            if name in event.open and (time_s != event.time_s or now - told_s > AGAIN_S):
                with contextlib.suppress(zmq.Again):  # again for a controller that is new
                    socket.send(msgspec.msgpack.encode(event.open[name].freq_mhz), zmq.NOBLOCK)
                    self._planned[name] = event.time_s, now

    def _follow(self, socket: zmq.Socket, topic: bytes, name: str) -> None:
        self._sources[socket] = (topic, name)
        self._poller.register(socket, zmq.POLLIN)

    def turn(self) -> None:
        """Pass on what has come, sample the GPUs, look after the processes."""
        now = time.monotonic()
        wait_s = max(min(self._telemetry_s, self._state_s) - now, 0.0)
        for socket, _ in self._poller.poll(min(round(wait_s * 1e3), 100)):
            while (frames := take_frames(socket)) is not None:
                self._pass_on(frames, *self._sources[socket])
        now = time.monotonic()
        if now >= self._telemetry_s:
            self._telemetry_s = max(self._telemetry_s + 1 / TELEMETRY_HZ, now)
            self._sample()
        if now >= self._state_s:
            self._state_s = now + STATE_S
            for one in self.watched:
                if reason := one.look(now):
                    self.problems.append(f"{one.name} ended ({reason}), it is started again")
            for sentence in self.channels.refusals():
                self.refused += 1
                self.problems.append(sentence)
            self._tell(feed.STATE, self.state())

    def _pass_on(self, frames: list[bytes], topic: bytes, name: str) -> None:
        try:
            if topic == feed.CLOCK:
                self._hear_actuator(*frames)
            elif topic == feed.PLAN:
                self._hear_plan(frames[-1])
            elif topic == feed.DECISION:
                decision = msgspec.msgpack.decode(frames[-1], type=Decision)
                self._tell(topic, NamedDecision(name, decision))
            else:
                record = engine_record.decode(frames[-1])
                if not record.idle:
                    self._hear_engine(name, record)
        except (msgspec.DecodeError, ValueError) as error:
            self.problems.append(f"{name or 'actuator'}: {error}")

    def _hear_actuator(self, topic: bytes, data: bytes) -> None:
        if topic == BEACON:
            beacon = msgspec.msgpack.decode(data, type=Beacon)
            for name, sign in beacon.groups.items():
                self._seen[name].freq_mhz = sign.freq_mhz
                self._seen[name].lease_until_s = beacon.time_s + sign.lease_s
            return
        change = msgspec.msgpack.decode(data, type=ClockChange)
        if change.cause == "refused":
            self.refused += 1
            self.problems.append(change.error)
        self._tell(feed.CLOCK, change)

    def _hear_engine(self, name: str, record: engine_record.EngineRecord) -> None:
        row, seen = row_of(name, record, time.monotonic()), self._seen[name]
        seen.iterations += 1
        seen.batch = row.prefill_requests + row.decode_requests
        seen.queue, seen.kv_use = row.queued_requests, row.kv_use
        self._tell(feed.ITERATION, row)

    def _tell(self, topic: bytes, message: object) -> None:
        if self._feed is not None:
            self._feed.send_multipart([topic, msgspec.msgpack.encode(message)], zmq.NOBLOCK)

    def _sample(self) -> None:
        samples: list[feed.Sample] = []
        for name in self.here if self.backend is not None else ():
            assert self.backend is not None
            seen = self._seen[name]
            for uuid in self.uuids[name]:
                try:
                    reading, energy_j = self.backend.read(uuid), self.backend.energy_j(uuid)
                except ClockError as error:
                    if str(error) not in self.problems:
                        self.problems.append(str(error))
                    continue
                now = time.monotonic()
                clock = reading.freq_mhz, reading.power_w, energy_j
                samples.append((now, name, uuid, *clock, reading.reasons, reading.temperature_c))
                seen.readings[uuid] = clock
                seen.begun_j.setdefault(uuid, energy_j)
        if samples:
            self._tell(feed.TELEMETRY, samples)

    def state(self) -> MachineState:
        """Everything as it is now; counts start anew."""
        now = time.monotonic()
        found = [self._instance_state(name, now) for name in self.here]
        processes = {one.name: one.state() for one in self.watched}
        return MachineState(self.machine, now, processes, found, self.refused, list(self.problems))

    def _instance_state(self, name: str, now_s: float) -> InstanceState:
        seen, rows = self._seen[name], list(self._seen[name].readings.values())
        iterations, seen.iterations = seen.iterations, 0
        return InstanceState(
            name=name,
            phase=self.deployment.instances[name].phase,
            policy=self.deployment.policy(name),
            freq_mhz=seen.freq_mhz,
            seen_mhz=sum(r[0] for r in rows) / len(rows) if rows else math.nan,
            power_w=sum(r[1] for r in rows) if rows else math.nan,
            energy_j=sum(r[2] for r in rows) - sum(seen.begun_j.values()),
            lease_s=max(seen.lease_until_s - now_s, 0.0),
            iterations_per_s=iterations / STATE_S,
            batch=seen.batch,
            queue=seen.queue,
            kv_use=seen.kv_use,
        )

    def stop(self) -> list[str]:
        """End everything: controllers first, then the actuator, which resets the clocks.

        Returns:
            Sentences of processes that ended with an error of their own.
        """
        children = [one.child for one in reversed(self.watched) if one.child is not None]
        said = [child.reason() for child in children if child.stop() > 0]
        self.watched.clear()
        self.channels.close()
        self._context.destroy(0)
        if self.backend is not None:
            self.backend.close()
            self.backend = None
        return said


def doctor_lines(deployment: Deployment, machine: str) -> Counter[str]:
    """How many findings of each kind the doctor has on a machine.

    Raises:
        BiscaleError: something will not work there; says what.
    """
    from biscale_env.hardware.clocks.doctor import examine

    urls = [deployment.instances[name].engine for name in deployment.on_machine(machine)]
    findings = examine(deployment.backend(machine), urls)
    for finding in findings:
        if finding.status == "fail":
            raise BiscaleError(f"machine {machine}: {finding.subject}: {finding.text}")
    return Counter(finding.status for finding in findings)
