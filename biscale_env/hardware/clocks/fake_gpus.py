"""GPUs in a file, without any hardware.

Their clocks outlive processes; they have privileges, delays and power.

The file is a memory-mapped record per GPU. It is read and written by three parties: this backend,
the emulated engine (which obeys the clock and reports power), and the C library
``libnvidia-ml.so.1`` of the tests (``tests/fake_nvml/nvml.c`` repeats this layout, and a test
compares the two). Every access holds the file's lock, which the kernel releases when a process
dies.

Clocks change as in the simulator (:mod:`biscale_env.core.clockqueue`): a request takes effect after
``delay_s``, one is in flight at a time, and the newest waits behind it.
"""

import contextlib
import fcntl
import mmap
import os
import secrets
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.clockqueue import ClockQueue, request, snapped, take_effect
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import write_whole
from biscale_env.hardware.clocks.backend import (
    ClockBackend,
    ClockDenied,
    ClockError,
    ClockReading,
    GpuDevice,
    GpuLost,
    PowerLimits,
)
from biscale_env.hardware.clocks.caller import as_caller

MAGIC = 0x32454C4143534942  # "BISCALE2"
HEADER_DTYPE = np.dtype(
    [
        ("magic", np.uint64),
        ("n_gpus", np.int64),
        ("privileged", np.int64),  # 0: locking is refused
        ("set_latency_us", np.int64),  # time a lock or reset call takes
        ("delay_s", np.float64),  # from the call to the clock being in effect
        ("spare", np.float64, (3,)),
    ]
)
GPU_DTYPE = np.dtype(
    [
        ("uuid", "S96"),
        ("name", "S96"),
        ("freq_mhz", np.float64),  # clock in effect
        ("inflight_mhz", np.float64),  # clock in flight
        ("apply_at_s", np.float64),  # CLOCK_MONOTONIC; inf: nothing in flight
        ("wanted_mhz", np.float64),  # newest request
        ("previous_mhz", np.float64),  # clock before the last change
        ("landed_at_s", np.float64),  # when the clock last changed
        ("default_mhz", np.float64),  # clock of an unlocked GPU
        ("min_mhz", np.float64),
        ("max_mhz", np.float64),
        ("step_mhz", np.float64),
        ("memory_mhz", np.float64),
        ("temperature_c", np.float64),
        ("reasons", np.int64),
        ("locked", np.int64),
        ("n_sets", np.int64),
        ("n_resets", np.int64),
        ("lost", np.int64),
        ("external", np.int64),  # 1: an emulated engine writes energy and power, 0: the toy below
        ("effective_mhz", np.float64),  # under the power cap during an emulated iteration; 0: none
        ("energy_j", np.float64),  # up to power_at_s
        ("power_w", np.float64),  # since power_at_s
        ("power_at_s", np.float64),
        # toy: idle + slope (f / GHz)^3, any values (assumed); tests use it as a known answer
        ("toy_idle_w", np.float64),
        ("toy_slope_w", np.float64),
        ("limit_w", np.float64),  # power limit in effect; changes as clocks do
        ("limit_inflight_w", np.float64),
        ("limit_at_s", np.float64),
        ("limit_wanted_w", np.float64),
        ("limit_low_w", np.float64),
        ("limit_high_w", np.float64),
        ("limit_default_w", np.float64),
        ("n_caps", np.int64),
        ("n_uncaps", np.int64),
    ]
)


def create_state(
    path: Path,
    n_gpus: int = 8,
    *,
    delay_s: float = 0.05,
    privileged: bool = True,
    set_latency_us: int = 0,
    limits_mhz: tuple[float, float, float] = (345.0, 1980.0, 15.0),
    limits_w: tuple[float, float, float] = (200.0, 700.0, 700.0),
) -> Path:
    """Write a fresh state file; an existing one is replaced. Under sudo it is the caller's.

    Args:
        path: the file; missing folders are made.
        n_gpus: GPUs of the pretended machine.
        delay_s: actuation delay, s (0.05: the lower end of what was measured with nvidia-smi on
            H100).
        privileged: whether clocks may be locked.
        set_latency_us: time a call takes, microseconds.
        limits_mhz: lowest, highest clock and step.
        limits_w: lowest, highest and default power limit (those of an H100 SXM).

    Returns:
        The path.
    """
    header = np.zeros(1, HEADER_DTYPE)
    header[0] = (MAGIC, n_gpus, int(privileged), set_latency_us, delay_s, 0.0)
    gpus = _fresh_gpus(n_gpus, limits_mhz)
    gpus["limit_low_w"], gpus["limit_high_w"], gpus["limit_default_w"] = limits_w
    gpus["limit_w"] = gpus["limit_inflight_w"] = gpus["limit_wanted_w"] = limits_w[2]
    gpus["limit_at_s"] = np.inf
    with as_caller():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, header.tobytes() + gpus.tobytes())
    return path


def _fresh_gpus(n_gpus: int, limits_mhz: tuple[float, float, float]) -> NDArray[np.void]:
    """Records of unlocked, cool GPUs at their highest clock, ``(n_gpus,)``."""
    gpus = np.zeros(n_gpus, GPU_DTYPE)
    now = time.monotonic()
    machine = secrets.token_hex(4)  # two pretended machines never share a GPU, nor its owner
    low, high, step = limits_mhz
    for k in range(n_gpus):
        gpus[k]["uuid"] = f"GPU-{machine}-0000-0000-0000-{k:012d}".encode()
        gpus[k]["name"] = b"Emulated GPU (no hardware)"
    for name in ("freq", "inflight", "wanted", "previous", "default", "max"):
        gpus[f"{name}_mhz"] = high
    gpus["min_mhz"], gpus["step_mhz"], gpus["memory_mhz"] = low, step, 2619.0
    gpus["apply_at_s"], gpus["landed_at_s"], gpus["power_at_s"] = np.inf, now, now
    gpus["temperature_c"], gpus["toy_idle_w"], gpus["toy_slope_w"] = 45.0, 100.0, 50.0
    return gpus


# a value and its changes, in the order of ClockQueue
CLOCK_FIELDS = ("freq_mhz", "inflight_mhz", "wanted_mhz", "apply_at_s")
LIMIT_FIELDS = ("limit_w", "limit_inflight_w", "limit_wanted_w", "limit_at_s")


def _queue_of(gpu: np.void, fields: tuple[str, ...]) -> ClockQueue:
    return ClockQueue(*(float(gpu[field]) for field in fields))


def limit_of(gpu: np.void) -> ClockQueue:
    """The power limit of a GPU and its changes, W."""
    return _queue_of(gpu, LIMIT_FIELDS)


def _keep(gpu: np.void, fields: tuple[str, ...], queue: ClockQueue, now_s: float) -> None:
    """Write a clock or limit into the record; one that took effect, at ``now_s``, with energy."""
    if queue.applied != gpu[fields[0]]:
        integrate(gpu, now_s)
        if fields is CLOCK_FIELDS:
            gpu["previous_mhz"], gpu["landed_at_s"] = gpu["freq_mhz"], now_s
    for field, value in zip(fields, queue, strict=True):
        gpu[field] = value


def settle(gpu: np.void, now_s: float, delay_s: float) -> None:
    """Let every clock and power limit take effect that is due by ``now_s``, with its energy.

    In the order of their times: the energy up to a change is drawn under what held before it.
    """
    while (due_s := min(float(gpu["limit_at_s"]), float(gpu["apply_at_s"]))) <= now_s:
        fields = LIMIT_FIELDS if gpu["limit_at_s"] == due_s else CLOCK_FIELDS
        _keep(gpu, fields, take_effect(_queue_of(gpu, fields), delay_s), due_s)
    integrate(gpu, now_s)


def integrate(gpu: np.void, now_s: float) -> None:
    """Add the energy drawn since the last look; an emulated engine does its own book-keeping."""
    if gpu["external"] == 0:
        power_w = gpu["toy_idle_w"] + gpu["toy_slope_w"] * (toy_mhz(gpu) * 1e-3) ** 3
        gpu["energy_j"] += power_w * max(now_s - gpu["power_at_s"], 0.0)
        gpu["power_w"], gpu["power_at_s"] = power_w, now_s


def toy_mhz(gpu: np.void) -> float:
    """Clock of the toy under its power limit (0: none), MHz."""
    if gpu["limit_w"] <= 0.0:
        return float(gpu["freq_mhz"])
    room_w = max(float(gpu["limit_w"] - gpu["toy_idle_w"]), 0.0)
    return min(float(gpu["freq_mhz"]), 1e3 * (room_w / float(gpu["toy_slope_w"])) ** (1 / 3))


def want(gpu: np.void, freq_mhz: float, now_s: float, delay_s: float) -> None:
    """Request a clock at ``now_s`` (the GPU must be settled)."""
    queue = _queue_of(gpu, CLOCK_FIELDS)
    _keep(gpu, CLOCK_FIELDS, request(queue, freq_mhz, now_s, delay_s), now_s)


class FakeState:
    """The open state file. Use ``with state.locked() as gpus`` for every access."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("r+b")
            weakref.finalize(self, self._file.close)
            self._map = mmap.mmap(self._file.fileno(), 0)
        except (OSError, ValueError) as error:
            raise BiscaleError(
                f"cannot open the fake GPUs in '{path}'"
                f" ({getattr(error, 'strerror', None) or error}): `biscale hw emulate` makes the"
                " file"
            ) from None
        if (
            len(self._map) < HEADER_DTYPE.itemsize
            or int.from_bytes(self._map[:8], "little") != MAGIC
        ):
            raise BiscaleError(f"{path} is not a file of fake GPUs")
        self.header = np.frombuffer(self._map, HEADER_DTYPE, 1)[0]
        self.gpus = np.frombuffer(
            self._map, GPU_DTYPE, int(self.header["n_gpus"]), HEADER_DTYPE.itemsize
        )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the file's lock."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def locked(self) -> Iterator[NDArray[np.void]]:
        """Hold the file's lock, bring all GPUs up to now, and give their records."""
        with self.lock():
            now = time.monotonic()
            for gpu in self.gpus:
                settle(gpu, now, float(self.header["delay_s"]))
            yield self.gpus

    @contextlib.contextmanager
    def one(self, index: int) -> Iterator[np.void]:
        """Hold the file's lock, bring one GPU up to now, and give its record."""
        with self.lock():
            gpu = self.gpus[index]
            settle(gpu, time.monotonic(), float(self.header["delay_s"]))
            yield gpu

    def index(self, uuid: str) -> int:
        """Position of a GPU.

        Raises:
            ClockError: unknown, or lost.
        """
        for k, gpu in enumerate(self.gpus):
            if gpu["uuid"].decode() == uuid:
                if gpu["lost"]:
                    raise GpuLost(f"GPU {uuid} is lost")
                return k
        raise ClockError(f"GPU {uuid} is not on this machine")


class FakeBackend(ClockBackend):
    """Clocks of a state file. Needs neither driver nor compiler.

    What `biscale hw emulate` and unit tests use.
    """

    name = "fake"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not str(path):
            raise BiscaleError("the fake backend needs its state file: fake:STATE_FILE")
        self.state = FakeState(path)

    def devices(self) -> list[GpuDevice]:
        """GPUs of the file."""
        return [
            GpuDevice(k, g["uuid"].decode(), g["name"].decode())
            for k, g in enumerate(self.state.gpus)
        ]

    def supported_mhz(self, uuid: str) -> list[float]:
        """Clocks on the grid, rising, MHz."""
        gpu = self.state.gpus[self.state.index(uuid)]
        return [float(f) for f in np.arange(gpu["min_mhz"], gpu["max_mhz"] + 1.0, gpu["step_mhz"])]

    def read(self, uuid: str) -> ClockReading:
        """Clock (under the cap while an emulated iteration runs), reasons, temperature, power."""
        k = self.state.index(uuid)
        with self.state.one(k) as gpu:
            freq = gpu["freq_mhz"] if gpu["external"] else toy_mhz(gpu)
            if gpu["effective_mhz"] > 0:
                freq = min(freq, gpu["effective_mhz"])
            return ClockReading(
                float(freq), int(gpu["reasons"]), float(gpu["temperature_c"]), float(gpu["power_w"])
            )

    def energy_j(self, uuid: str) -> float:
        """Energy counter, J."""
        k = self.state.index(uuid)
        with self.state.one(k) as gpu:
            return float(
                gpu["energy_j"] + gpu["power_w"] * max(time.monotonic() - gpu["power_at_s"], 0.0)
            )

    @contextlib.contextmanager
    def _writing(self, uuid: str, what: str) -> Iterator[np.void]:
        """The record of a GPU, for a call that needs the privilege and takes its time."""
        k = self.state.index(uuid)
        if not self.state.header["privileged"]:
            raise ClockDenied(f"{what} {uuid}: no privilege on these fake GPUs")
        time.sleep(int(self.state.header["set_latency_us"]) * 1e-6)
        with self.state.one(k) as gpu:
            yield gpu

    def _change(self, uuid: str, freq_mhz: float | None) -> None:
        with self._writing(uuid, "locking") as gpu:
            target = float(gpu["default_mhz"]) if freq_mhz is None else freq_mhz
            gpu["locked"] = int(freq_mhz is not None)
            gpu["n_resets" if freq_mhz is None else "n_sets"] += 1
            want(gpu, target, time.monotonic(), float(self.state.header["delay_s"]))

    def lock(self, uuid: str, low_mhz: float, high_mhz: float) -> None:
        """Request the upper clock, on the grid."""
        gpu = self.state.gpus[self.state.index(uuid)]
        if not 0 < low_mhz <= high_mhz or not gpu["min_mhz"] <= high_mhz <= gpu["max_mhz"]:
            raise ClockError(
                f"locking {uuid} at {low_mhz:g} to {high_mhz:g} MHz: "
                "the driver calls the pair invalid"
            )
        low, high, step = (float(gpu[name]) for name in ("min_mhz", "max_mhz", "step_mhz"))
        self._change(uuid, snapped(high_mhz, low, high, step))

    def reset(self, uuid: str) -> None:
        """Reset to the clock of an unlocked GPU."""
        self._change(uuid, None)

    def power_limits(self, uuid: str) -> PowerLimits:
        """Power limits of the file, W."""
        gpu = self.state.gpus[self.state.index(uuid)]
        return PowerLimits(*(float(gpu[f"limit_{name}_w"]) for name in ("low", "high", "default")))

    def power_limit_w(self, uuid: str) -> float:
        """The limit that was set last, W."""
        return float(self.state.gpus[self.state.index(uuid)]["limit_wanted_w"])

    def _limit(self, uuid: str, limit_w: float, count: str) -> None:
        self.power_limits(uuid).check(uuid, limit_w)
        with self._writing(uuid, "limiting the power of") as gpu:
            gpu[count] += 1
            now, delay_s = time.monotonic(), float(self.state.header["delay_s"])
            _keep(gpu, LIMIT_FIELDS, request(limit_of(gpu), limit_w, now, delay_s), now)

    def cap(self, uuid: str, limit_w: float) -> None:
        """Request a power limit, W."""
        self._limit(uuid, limit_w, "n_caps")

    def uncap(self, uuid: str) -> None:
        """Request the default limit."""
        self._limit(uuid, self.power_limits(uuid).default_w, "n_uncaps")
