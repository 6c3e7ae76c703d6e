"""Everything that is measured while a trace is replayed.

Engine records, clock changes, GPU telemetry, energy counters.
"""

import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import zmq
from numpy.typing import NDArray

from biscale_env.hardware.clocks.backend import ClockBackend, ClockError
from biscale_env.hardware.clocks.gpm import open_gpm
from biscale_env.hardware.engines.hook import engine_record
from biscale_env.hardware.loop import wire
from biscale_env.hardware.replay.live_samples import LiveSamples

TELEMETRY_HZ = 20.0
NO_COUNTER = "{} has no energy counter: its energy is integrated from readings of its power"
TELEMETRY_COLUMNS = (
    "time_s",
    "group",
    "gpu",
    "freq_mhz",
    "power_w",
    "energy_j",
    "reasons",
    "temperature_c",
)


class IterationRow(msgspec.Struct):
    """One engine iteration, as logged; ``ahead`` of 1: the iteration after that of ``time_s``."""

    phase: str
    counter: int
    heard_s: float
    time_s: float
    wall_time_s: float
    prefill_requests: int
    prefill_tokens: int
    prefill_kv_tokens: int
    decode_requests: int
    decode_kv_tokens: int
    queued_requests: int
    kv_use: float = math.nan
    hook_s: float = 0.0
    ahead: int = 0


def row_of(phase: str, record: engine_record.EngineRecord, heard_s: float) -> IterationRow:
    """What is kept of a record."""
    s, q, d = record.scheduled_requests, record.queued_requests, record.detail
    return IterationRow(
        phase=phase,
        counter=record.counter_id,
        heard_s=heard_s,
        time_s=d.time_s if d else heard_s,
        wall_time_s=record.wall_time,
        prefill_requests=s.num_prefill_requests,
        prefill_tokens=s.sum_prefill_tokens,
        prefill_kv_tokens=s.sum_prefill_kv_tokens,
        decode_requests=s.num_decode_requests,
        decode_kv_tokens=s.sum_decode_kv_tokens,
        queued_requests=q.num_prefill_requests + q.num_decode_requests,
        kv_use=d.kv_use if d else float("nan"),
        hook_s=d.hook_s if d else 0.0,
        ahead=d.ahead if d else 0,
    )


class IterationLog(threading.Thread):
    """Listens to all records of all engines and writes them as JSON lines."""

    def __init__(self, endpoints: Mapping[str, str], path: Path) -> None:
        super().__init__(daemon=True, name="iteration-log")
        self.rows: list[IterationRow] = []
        self.problems: list[str] = []
        self._endpoints, self._path = dict(endpoints), path
        self._halt = threading.Event()

    def run(self) -> None:
        """Listen until told to stop."""
        context = zmq.Context()
        sockets = {
            wire.subscriber(context, address): phase for phase, address in self._endpoints.items()
        }
        poller = zmq.Poller()
        for socket in sockets:
            poller.register(socket, zmq.POLLIN)
        with self._path.open("ab") as file:
            while not self._halt.is_set():
                for socket, _ in poller.poll(200):
                    self._take(socket.recv_multipart()[-1], sockets[socket], file)
                file.flush()  # for whoever follows the replay
        context.destroy(0)

    def _take(self, data: bytes, phase: str, file: Any) -> None:
        try:
            record = engine_record.decode(data)
        except ValueError as error:
            self.problems.append(str(error))
            return
        if not record.idle:
            row = row_of(phase, record, time.monotonic())
            self.rows.append(row)
            file.write(msgspec.json.encode(row) + b"\n")

    def stop(self) -> None:
        """Stop listening."""
        self._halt.set()
        self.join(2.0)


class Telemetry(threading.Thread):
    """Samples every GPU at a fixed rate: clock, power, energy, event reasons, temperature."""

    def __init__(
        self,
        backend: ClockBackend,
        groups: Mapping[str, Sequence[str]],
        hz: float = TELEMETRY_HZ,
        live: Path | None = None,
    ) -> None:
        super().__init__(daemon=True, name="telemetry")
        self._live = LiveSamples(live)
        self.backend = backend
        self.groups = {name: list(uuids) for name, uuids in groups.items()}
        self.period_s = 1.0 / hz
        self.samples: list[tuple[Any, ...]] = []
        self.gpm_samples: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self._halt = threading.Event()
        self._gpm = open_gpm(backend, [u for uuids in self.groups.values() for u in uuids])

    def run(self) -> None:
        """Sample until told to stop."""
        due = time.monotonic()
        while not self._halt.is_set():
            self._sample()
            due += self.period_s
            self._halt.wait(max(due - time.monotonic(), 0.0))
        self._sample()

    def _sample(self) -> None:
        known = len(self.samples)
        for group, uuids in self.groups.items():
            for uuid in uuids:
                try:
                    reading, energy_j = self.backend.read(uuid), self.backend.energy_j(uuid)
                except ClockError as error:
                    self._say_once(str(error))
                    continue
                if not math.isfinite(energy_j):
                    self._say_once(NO_COUNTER.format(uuid))
                now = time.monotonic()
                values = (
                    reading.freq_mhz,
                    reading.power_w,
                    energy_j,
                    reading.reasons,
                    reading.temperature_c,
                )
                self.samples.append((now, group, uuid, *values))
        self._live.take(self.samples[known:])
        if self._gpm is not None:
            try:
                self.gpm_samples += self._gpm.sample()
            except Exception as error:  # GPM is optional: the recording goes on without it
                self.problems.append(f"GPM: {error}")
                self._gpm = None

    def _say_once(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def stop(self) -> None:
        """Stop after a last sample."""
        self._halt.set()
        self.join(5.0)
        self._live.close()
        if self._gpm is not None:
            self._gpm.close()

    def frame(self) -> pd.DataFrame:
        """All samples."""
        return pd.DataFrame(self.samples, columns=list(TELEMETRY_COLUMNS))


def energy_of_gpu(samples: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Times in s and energies in J of one GPU: its counter, else its power, integrated.

    A counter that falls was begun anew (the driver was loaded again, the GPU reset): what is drawn
    between the two samples is not known and counts as nothing. NaN at every time where it told
    neither.
    """
    time_s, energy_j = (samples[name].to_numpy(np.float64) for name in ("time_s", "energy_j"))
    if (counted := np.isfinite(energy_j)).any():
        energy_j = energy_j[counted]
        fall_j = np.minimum(np.diff(energy_j, prepend=energy_j[0]), 0.0)
        return time_s[counted], energy_j - np.cumsum(fall_j)
    power_w = samples["power_w"].to_numpy(np.float64)
    known = np.isfinite(power_w)
    if known.sum() < 2:
        return time_s, np.full(time_s.shape, np.nan)
    time_s, power_w = time_s[known], power_w[known]
    steps_j = 0.5 * (power_w[1:] + power_w[:-1]) * np.diff(time_s)
    return time_s, np.concatenate([[0.0], np.cumsum(steps_j)])


class EnergyCurve:
    """Energy of a group of GPUs over time, from its counters; linear between samples.

    NaN where a GPU told neither energy nor power.
    """

    def __init__(self, telemetry: pd.DataFrame, group: str) -> None:
        mine = telemetry[telemetry["group"] == group]
        self.curves = [energy_of_gpu(g) for _, g in mine.groupby("gpu", sort=True)]
        self.n_gpus = len(self.curves)

    def at(self, time_s: np.ndarray | float) -> np.ndarray:
        """Sum of the counters at given instants, J; held beyond the first and last sample."""
        return (
            np.sum([np.interp(time_s, t, e) for t, e in self.curves], axis=0)
            if self.curves
            else np.zeros(np.shape(time_s))
        )

    def between(self, start_s: float, end_s: float) -> float:
        """Energy spent between two instants, J."""
        return float(self.at(end_s) - self.at(start_s))
