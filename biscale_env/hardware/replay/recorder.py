"""Everything that is measured while a trace is replayed.

Engine records, clock changes, GPU telemetry, energy counters.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import zmq

from biscale_env.hardware.clocks.backend import ClockBackend, ClockError
from biscale_env.hardware.clocks.gpm import open_gpm
from biscale_env.hardware.engines.hook import engine_record
from biscale_env.hardware.loop import wire

TELEMETRY_HZ = 20.0
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
    """One engine iteration, as logged."""

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
    kv_use: float
    hook_s: float = 0.0


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
        self, backend: ClockBackend, groups: Mapping[str, Sequence[str]], hz: float = TELEMETRY_HZ
    ) -> None:
        super().__init__(daemon=True, name="telemetry")
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
        for group, uuids in self.groups.items():
            for uuid in uuids:
                try:
                    reading, energy_j = self.backend.read(uuid), self.backend.energy_j(uuid)
                except ClockError as error:
                    self.problems.append(str(error))
                    continue
                now = time.monotonic()
                values = (
                    reading.freq_mhz,
                    reading.power_w,
                    energy_j,
                    reading.reasons,
                    reading.temperature_c,
                )
                self.samples.append((now, group, uuid, *values))
        if self._gpm is not None:
            try:
                self.gpm_samples += self._gpm.sample()
            except Exception as error:  # GPM is optional: the recording goes on without it
                self.problems.append(f"GPM: {error}")
                self._gpm = None

    def stop(self) -> None:
        """Stop after a last sample."""
        self._halt.set()
        self.join(5.0)
        if self._gpm is not None:
            self._gpm.close()

    def frame(self) -> pd.DataFrame:
        """All samples."""
        return pd.DataFrame(self.samples, columns=list(TELEMETRY_COLUMNS))


class EnergyCurve:
    """Energy of a group of GPUs over time, from its counters; linear between samples."""

    def __init__(self, telemetry: pd.DataFrame, group: str) -> None:
        mine = telemetry[telemetry["group"] == group]
        self.curves = [
            (g["time_s"].to_numpy(), g["energy_j"].to_numpy())
            for _, g in mine.groupby("gpu", sort=True)
        ]
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
