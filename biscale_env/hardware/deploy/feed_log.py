"""Everything that the machines of a deployment tell while a trace is replayed, on one clock."""

import contextlib
import math
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.deploy import machine_feed as feed
from biscale_env.hardware.deploy.deployment_file import Deployment
from biscale_env.hardware.deploy.machine_feed import FeedReader, MachineState, NamedDecision
from biscale_env.hardware.loop.control import Decision
from biscale_env.hardware.loop.wire import ClockChange
from biscale_env.hardware.replay import raw_log
from biscale_env.hardware.replay.live_samples import LiveSamples
from biscale_env.hardware.replay.recorder import TELEMETRY_COLUMNS

PLACEMENTS = "placements.jsonl"
CLOCK_TIMES = ("decided_s", "received_s", "set_s", "seen_s")


class FeedLog(threading.Thread):
    """Follows all feeds, writes them as JSON lines, and keeps the telemetry.

    Times of machines that are not this computer are put on its clock: by the fastest message, see
    :class:`~biscale_env.hardware.remote.peer_time.PeerTime`. A decision's own time and the engine's
    are of the engine's machine, a command's of its controller's.

    Attributes:
        states: newest state per machine.
        heard: instances whose engine has sent a record.
        problems: sentences.
    """

    def __init__(
        self, deployment: Deployment, at: str | None, here: list[str], folder: Path
    ) -> None:
        """Connect and open the logs.

        Args:
            deployment: whose machines.
            at: machine whose keys are used.
            here: machines that are this computer: their times are ours.
            folder: of the logs.

        Raises:
            BiscaleError: there are no keys here.
        """
        super().__init__(daemon=True, name="feed-log")
        self.deployment, self.here = deployment, set(here)
        self.states: dict[str, MachineState] = {}
        self.heard: set[str] = set()
        self.problems: list[str] = []
        self._reader = FeedReader(deployment, at)
        self._samples: list[tuple[Any, ...]] = []
        self._files: dict[str, Any] = {}
        self._planned_s = math.nan
        self._folder = folder
        self._live = LiveSamples(folder / raw_log.LIVE)
        self._halt = threading.Event()

    def run(self) -> None:
        """Follow until told to stop."""
        while not self._halt.is_set():
            for machine, topic, message in self._reader.messages(0.2):
                try:
                    self._keep(machine, topic, message)
                except OSError as error:
                    self.problems.append(f"cannot write {self._folder}: {error.strerror}")
                    return
            with contextlib.suppress(OSError):  # told by the next write
                for file in self._files.values():
                    file.flush()  # for whoever follows the replay

    def _offset_s(self, machine: str) -> float:
        offset_s = 0.0 if machine in self.here else self._reader.times[machine].offset_s
        return offset_s if math.isfinite(offset_s) else 0.0

    def _keep(self, machine: str, topic: bytes, message: Any) -> None:
        if topic == feed.STATE:
            self.states[machine] = message
            return
        shift_s = self._offset_s(machine)
        if topic == feed.TELEMETRY:
            fresh = [(row[0] + shift_s, *row[1:]) for row in message]
            self._samples += fresh
            self._live.take(fresh)
        elif topic == feed.PLAN:
            if message.time_s != self._planned_s:
                self._planned_s = message.time_s
                times = {"time_s": message.time_s + shift_s}
                self._write(PLACEMENTS, msgspec.structs.replace(message, **times))
        elif topic == feed.CLOCK:
            self._write(raw_log.CLOCKS, self._change(message, shift_s))
        elif topic == feed.ITERATION:
            self.heard.add(message.phase)
            times = {"heard_s": message.heard_s + shift_s, "time_s": message.time_s + shift_s}
            self._write(raw_log.ITERATIONS, msgspec.structs.replace(message, **times))
        elif topic == feed.DECISION:
            self._write(raw_log.decisions_file(message.instance), self._decision(message, shift_s))

    def _change(self, change: ClockChange, shift_s: float) -> ClockChange:
        """A change with its times on our clock; when it was decided, on the controller's."""
        if change.group not in self.deployment.instances:
            return change
        decided_s = self._offset_s(self.deployment.controller_machine(change.group))
        times = {name: getattr(change, name) + shift_s for name in CLOCK_TIMES[1:]}
        return msgspec.structs.replace(change, decided_s=change.decided_s + decided_s, **times)

    def _decision(self, named: NamedDecision, shift_s: float) -> Decision:
        engine_s = self._offset_s(self.deployment.instances[named.instance].machine)
        d = named.decision
        return msgspec.structs.replace(
            d,
            time_s=d.time_s + engine_s,
            received_s=d.received_s + shift_s,
            decided_s=d.decided_s + shift_s,
            sent_s=d.sent_s + shift_s,
        )

    def _write(self, name: str, row: msgspec.Struct) -> None:
        if name not in self._files:
            self._files[name] = (self._folder / name).open("ab")
        self._files[name].write(msgspec.json.encode(row) + b"\n")

    def wait_for_machines(self, seconds: float) -> None:
        """Wait until every machine has told its state and all its processes are up.

        Raises:
            BiscaleError: one is silent, or a process is down.
        """
        end = time.monotonic() + seconds
        missing = "?"
        while missing and time.monotonic() < end:
            time.sleep(0.1)
            missing = self._missing()
        if missing:
            raise BiscaleError(f"{missing}; nothing was sent")

    def _missing(self) -> str:
        for name in self.deployment.machines:
            if name not in self.states:
                return f"machine {name} is silent: run `biscale hw up` there"
            for process, how in self.states[name].processes.items():
                if not how.startswith("up"):
                    return f"machine {name}: {process} is {how}"
        return ""

    def stop(self) -> None:
        """Stop following and close the logs."""
        self._halt.set()
        self.join(5.0)
        self._reader.close()
        self._live.close()
        for file in self._files.values():
            file.close()

    def telemetry(self) -> pd.DataFrame:
        """All samples of all GPUs; groups are instances."""
        return pd.DataFrame(self._samples, columns=list(TELEMETRY_COLUMNS))
