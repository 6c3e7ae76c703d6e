"""The process that decides: newest engine record in, observation, policy, clock command out."""

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from biscale_env.contract import Policy
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant
from biscale_env.envs.power_caps import LOWEST_LIMIT_W, CapTranslator
from biscale_env.hardware.clocks.backend import ClockBackend, ClockError
from biscale_env.hardware.clocks.means import CAP, LOCK
from biscale_env.hardware.engines.hook import engine_record
from biscale_env.hardware.loop import wire
from biscale_env.hardware.loop.builder import ObservationBuilder
from biscale_env.hardware.loop.clockview import ClockView
from biscale_env.hardware.loop.lead import LeadPredictor
from biscale_env.hardware.loop.processes import set_realtime, tuned_for_latency
from biscale_env.hardware.loop.recorded_policy import BaseClockPolicy
from biscale_env.hardware.remote.channels import take
from biscale_env.hardware.remote.controller_links import ControllerAddresses, ControllerLinks

POWER_PERIOD_S = 0.05
FLUSH_S = 0.5
WARM_UP_PREDICTIONS = 20


class Decision(msgspec.Struct, gc=False):
    """One decision, as logged. Times are CLOCK_MONOTONIC seconds.

    Attributes:
        sequence: number of the command.
        counter: number of the engine record.
        time_s: the engine's time of the record.
        received_s: the controller had it.
        decided_s: the policy had answered.
        sent_s: the command was out.
        action: the policy's answer in [-1, 1].
        freq_mhz: the clock it stands for, on the grid.
        observation: what the policy saw.
        lead_s: predicted time from ``time_s`` to the begin of the iteration that it is for.
    """

    sequence: int
    counter: int
    time_s: float
    received_s: float
    decided_s: float
    sent_s: float
    action: float
    freq_mhz: float
    observation: list[float]
    lead_s: float = 0.0


class PowerMeter:
    """Mean power of some GPUs, read between decisions.

    A thread of its own would hold Python's lock when a record comes.
    """

    def __init__(
        self, backend: ClockBackend | None, uuids: Sequence[str], period_s: float = POWER_PERIOD_S
    ) -> None:
        """Prepare.

        Args:
            backend: reads; None measures nothing (NaN).
            uuids: GPUs.
            period_s: shortest time between readings.
        """
        self.power_w = math.nan
        self._backend, self._uuids, self._period_s = backend, list(uuids), period_s
        self._due_s = -math.inf

    def read_if_due(self) -> None:
        """Read, unless that was done just before."""
        now = time.monotonic()
        if self._backend is None or not self._uuids or now < self._due_s:
            return
        self._due_s = now + self._period_s
        try:
            self.power_w = sum(self._backend.read(uuid).power_w for uuid in self._uuids) / len(
                self._uuids
            )
        except ClockError:
            self.power_w = math.nan


@dataclass(frozen=True)
class ControlConfig:
    """Settings of one control loop.

    Attributes:
        sockets: folder that actuator and engine hook use too.
        delay_s: expected actuation delay, s.
        lease_s: the actuator's lease; keep-alives go out five times as often.
        group: the actuator's name for these GPUs; None: the phase.
        realtime: run before other processes, where that is allowed.
        addresses: where records come from and commands go, for instances of a deployment; None:
            those of the folder.
        decisions: address at which every decision is published; None: nowhere.
        look_ahead: decide for the begin of the iteration that a record is about, where the engine
            schedules asynchronously; without it, as if that were now.
        base: address at which tier 1 gives the base clock, MHz; None: there is no tier 1.
        means: ``cap`` also sends the power limit that stands for the clock, as the actuator's means
            want it.
        lowest_limit_w: lowest limit that the GPUs take, W.
    """

    sockets: Path
    delay_s: float
    lease_s: float = 1.5
    group: str | None = None
    realtime: bool = False
    addresses: ControllerAddresses | None = None
    decisions: str | None = None
    look_ahead: bool = True
    base: str | None = None
    means: str = LOCK
    lowest_limit_w: float = LOWEST_LIMIT_W


class ControlLoop:
    """Controls the clock of one instance."""

    def __init__(
        self,
        plant: Plant,
        policy: Policy,
        config: ControlConfig,
        log: IO[bytes] | None = None,
        meter: PowerMeter | None = None,
    ) -> None:
        """Open the sockets and warm everything up.

        Args:
            plant: phase, SLO, engine limits and model of the instance.
            policy: any policy for this phase's observation.
            config: sockets, delay and lease.
            log: JSON lines of all decisions.
            meter: source of the mean power per GPU.

        Raises:
            BiscaleError: an address is taken, or the policy does not fit the observation.
        """
        self.plant, self.policy, self.log = plant, policy, log
        self.builder = ObservationBuilder(plant, config.delay_s)
        self.view = ClockView(plant.clocks, config.delay_s)
        self.leads = LeadPredictor(plant)
        self.look_ahead = config.look_ahead
        self.meter = meter or PowerMeter(None, ())
        self.keep_alive_s = config.lease_s / 5
        self.lease_s = config.lease_s
        self.stopping = False
        self.sequence = 0
        self.heard_s = -math.inf
        self.freq_mhz = self.cap_w = 0.0
        self._caps: CapTranslator | None = None
        if config.means == CAP:
            self._caps = CapTranslator(plant, config.lowest_limit_w)
        self._state: Any = None
        self._start = np.ones(1, dtype=bool)
        self._sent_s = -math.inf
        self._flushed_s = 0.0
        self._said: set[str] = set()
        self._warm_up()
        if config.realtime:
            set_realtime()
        self._open(config, config.group or plant.phase)

    def _warm_up(self) -> None:
        """Compile the observer and let the policy answer a few times.

        So that the first iteration does not pay for it.
        """
        self.builder.warm_up()
        blank = np.clip(
            np.zeros(self.plant.spec.dim, dtype=np.float32),
            self.plant.spec.low,
            self.plant.spec.high,
        )
        state, start = None, np.ones(1, dtype=bool)
        for _ in range(WARM_UP_PREDICTIONS):
            _, state = self.policy.predict(blank, state, start, True)
            start = np.zeros(1, dtype=bool)
        if self._caps is not None:
            self._caps.limits(blank[None], np.array([self.plant.clocks.freq_min_mhz]))

    def _open(self, config: ControlConfig, group: str) -> None:
        wire.socket_folder(config.sockets)
        addresses = config.addresses or ControllerAddresses.in_folder(
            config.sockets, self.plant.phase, group
        )
        self._links = ControllerLinks(addresses, group)
        self._inlet, self._actuator = self._links.inlet, self._links.actuator
        self._decisions: zmq.Socket | None = None
        if config.decisions is not None:
            self._decisions = wire.publisher(self._links.context, config.decisions)
        self._base: zmq.Socket | None = None
        self._bound = [address for address in (config.decisions, config.base) if address]
        self._poller = zmq.Poller()
        if config.base is not None:
            self._base = wire.newest_receiver(self._links.context, config.base)
            self._poller.register(self._base, zmq.POLLIN)
        for socket in (self._inlet.records, self._inlet.alive, self._actuator.status):
            self._poller.register(socket, zmq.POLLIN)

    def run(self) -> None:
        """Control until :attr:`stopping` is set.

        Raises:
            BiscaleError: records of an unknown schema, or a policy that fails.
        """
        while not self.stopping:
            self.turn(self.keep_alive_s)

    def turn(self, timeout_s: float) -> None:
        """Wait at most ``timeout_s`` for a record, decide on it, and keep the lease alive."""
        ready = dict(self._poller.poll(max(1, round(timeout_s * 1e3))))
        if self._actuator.status in ready:  # first: the decision below is to know it
            for change in self._actuator.heard(time.monotonic()):
                self.view.hear(change)
        if self._inlet.records in ready:
            data = take(self._inlet.records)
            if data is not None:
                self._decide(data, time.monotonic())
        if self._inlet.alive in ready:
            self.heard_s = max(self.heard_s, self._inlet.heartbeat_s(time.monotonic()))
        if self._base is not None and self._base in ready:
            self._take_base(take(self._base))
        now = time.monotonic()
        if (
            self.freq_mhz
            and now - self._sent_s >= self.keep_alive_s
            and now - self.heard_s < self.lease_s
        ):
            self._send(now, 0.0, 0.0)
        self.meter.read_if_due()
        if now - self._flushed_s > FLUSH_S:
            self._flushed_s = now
            self._keep_books()

    def _keep_books(self) -> None:
        """Write the log out, and say once of each kind who was turned away."""
        if self.log is not None:
            with _naming_the_log():
                self.log.flush()
        for sentence in set(self._links.refusals()) - self._said:
            self._said.add(sentence)
            print(sentence, flush=True)

    def _take_base(self, data: bytes | None) -> None:
        """A base clock of tier 1 is applied at once where it is the policy or none has decided."""
        try:
            freq_mhz = msgspec.msgpack.decode(data or b"", type=float)
        except msgspec.DecodeError:
            return
        base_mhz = float(self.plant.clocks.snap_mhz(freq_mhz))
        due = not self.freq_mhz
        if isinstance(self.policy, BaseClockPolicy):
            self.policy.freq_mhz = base_mhz
            due = self.freq_mhz != base_mhz
        if due:
            now = time.monotonic()
            self.freq_mhz = base_mhz
            if self._caps is not None and not self.cap_w:  # no work to go by yet: no limit
                self.cap_w = self._caps.high_w
            self._send(now, 0.0, 0.0)
            self.view.request(base_mhz, now, self.sequence)

    def _decide(self, data: bytes, received_s: float) -> None:
        try:
            record = engine_record.decode(data)
        except ValueError as error:
            raise BiscaleError(str(error)) from None
        self.heard_s = max(self.heard_s, self._inlet.lived_s(record, received_s))
        if record.idle:
            return
        power_w = self.meter.power_w
        if math.isnan(power_w):  # of GPUs on another machine the actuator tells
            power_w = self._actuator.power_w
        lead_s = self.leads.lead_s(record, self.view.freq_mhz)
        observation = self.builder.observe(
            record,
            self.view,
            power_w if math.isfinite(power_w) else 0.0,
            clock_offset_s=self._inlet.offset_s,
            lead_s=lead_s if self.look_ahead else 0.0,
        )
        action = self._action(observation)
        decided_s = time.monotonic()
        self.freq_mhz = float(self.plant.clocks.snap_mhz(self.plant.clocks.to_freq_mhz(action)))
        self._limit(observation)
        time_s = record.detail.time_s if record.detail else received_s
        self._send(decided_s, received_s, time_s)
        sent_s = time.monotonic()
        self.view.request(self.freq_mhz, sent_s, self.sequence)
        if self.log is not None or self._decisions is not None:
            decision = Decision(
                self.sequence,
                record.counter_id,
                time_s,
                received_s,
                decided_s,
                sent_s,
                action,
                self.freq_mhz,
                observation.tolist(),
                lead_s,
            )
            self._tell(decision)

    def _limit(self, observation: NDArray[np.float32]) -> None:
        """The power limit that stands for the clock, for the work that is observed."""
        if self._caps is not None and self.freq_mhz:
            limits_w, _ = self._caps.limits(observation[None], np.array([self.freq_mhz]))
            self.cap_w = float(limits_w[0])

    def _tell(self, decision: Decision) -> None:
        if self._decisions is not None:
            with contextlib.suppress(zmq.Again):
                self._decisions.send(msgspec.msgpack.encode(decision), zmq.NOBLOCK)
        if self.log is not None:
            with _naming_the_log():
                self.log.write(msgspec.json.encode(decision) + b"\n")

    def _action(self, observation: NDArray[np.float32]) -> float:
        """The policy's answer, a finite number.

        Raises:
            BiscaleError: it fails, or answers something else.
        """
        try:
            answer, self._state = self.policy.predict(observation, self._state, self._start, True)
        except Exception as error:
            raise BiscaleError(
                f"the policy failed on a record ({type(error).__name__}: {error}): "
                "the clock is reset to driver control"
            ) from error
        self._start = np.zeros(1, dtype=bool)
        action = float(np.asarray(answer).reshape(-1)[0])
        if not math.isfinite(action):
            raise BiscaleError(
                f"the policy answered {action}, not an action in [-1, 1]: "
                "the clock is reset to driver control"
            )
        return action

    def _send(self, decided_s: float, record_s: float, time_s: float) -> None:
        self.sequence += 1
        now = time.monotonic()
        age_s = max(now - self.heard_s, 0.0)
        command = wire.Command(
            self.sequence, self.freq_mhz, decided_s, age_s, record_s, time_s, self.cap_w
        )
        if self._actuator.send(command, now):
            self._sent_s = now

    def close(self) -> None:
        """Close the sockets; the actuator's lease does the rest."""
        self._links.close()
        for address in self._bound:
            wire.unbind(address)
        if self.log is not None:
            with contextlib.suppress(OSError):  # has been said, or nothing more can be done
                self.log.flush()


@contextlib.contextmanager
def _naming_the_log() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BiscaleError(f"cannot write the log of decisions: {error.strerror}") from None


def serve(loop: ControlLoop) -> None:
    """Run a loop until a signal, in a process of its own.

    Prints ``controller ready`` when it takes records.
    """

    def ask_to_stop(number: int, frame: object) -> None:
        loop.stopping = True

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, ask_to_stop)
    print("controller ready", flush=True)
    try:
        with tuned_for_latency():
            loop.run()
    finally:
        loop.close()
