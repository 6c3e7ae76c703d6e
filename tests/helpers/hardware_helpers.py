"""Helpers of the hardware tests: a Python stand-in for NVML, the compiled C fake, processes."""

import ctypes
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pynvml

from biscale_env.hardware.clocks.fake_gpus import FakeState, create_state

REPOSITORY = Path(__file__).resolve().parents[2]
C_SOURCE = Path(__file__).resolve().parents[1] / "fake_nvml" / "nvml.c"


def by_reference(argument):
    """Target of a by-reference argument of a ctypes call."""
    return argument._obj


class PythonNvml:
    """Stands where nvidia-ml-py keeps the loaded library.

    Same functions, plain Python, state in attributes.
    """

    def __init__(self, n_gpus=2):
        self.clock = [1980] * n_gpus
        self.locks = [None] * n_gpus
        self.calls = []
        self.codes = {}  # function name -> NVML error code to return
        self.reasons = [0] * n_gpus
        self.heat = [40] * n_gpus
        self.instant_power = True
        self.limits_w = [700] * n_gpus

    def install(self, monkeypatch):
        """Take the library's place until the test ends; itself."""
        monkeypatch.setattr(pynvml, "nvmlLib", self)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        return self

    def __getattr__(self, name):
        if not name.startswith("nvml"):
            raise AttributeError(name)
        try:
            function = object.__getattribute__(self, "_" + name)
        except AttributeError:
            raise AttributeError(name) from None

        def call(*args):
            self.calls.append(name)
            return self.codes.get(name) or function(*args) or 0

        return call

    @staticmethod
    def gpu(handle):
        return ctypes.cast(handle, ctypes.c_void_p).value - 1

    def _nvmlInitWithFlags(self, flags):
        return 0

    def _nvmlShutdown(self):
        return 0

    def _nvmlErrorString(self, code):
        return b"stand-in error"

    def _nvmlSystemGetDriverVersion(self, text, size):
        text.value = b"999.1"

    def _nvmlDeviceGetCount_v2(self, count):
        by_reference(count).value = len(self.clock)

    def _nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = index.value + 1

    def _nvmlDeviceGetUUID(self, handle, text, size):
        text.value = f"GPU-0000-{self.gpu(handle)}".encode()

    def _nvmlDeviceGetName(self, handle, text, size):
        text.value = b"Stand-in"

    def _nvmlDeviceGetSupportedMemoryClocks(self, handle, count, clocks):
        if clocks is None:
            by_reference(count).value = 2
            return 7
        clocks[0], clocks[1] = 1000, 2619

    def _nvmlDeviceGetSupportedGraphicsClocks(self, handle, memory, count, clocks):
        values = list(range(1980, 495, -15)) if memory.value == 2619 else [345]
        if clocks is None:
            by_reference(count).value = len(values)
            return 7
        for k, value in enumerate(values):
            clocks[k] = value

    def _nvmlDeviceGetClockInfo(self, handle, kind, clock):
        by_reference(clock).value = self.clock[self.gpu(handle)]

    def _nvmlDeviceGetCurrentClocksEventReasons(self, handle, reasons):
        by_reference(reasons).value = self.reasons[self.gpu(handle)]

    def _nvmlDeviceGetTemperature(self, handle, sensor, degrees):
        by_reference(degrees).value = self.heat[self.gpu(handle)]

    def _nvmlDeviceGetFieldValues(self, handle, count, values):
        field = by_reference(values)[0]
        field.nvmlReturn = 0 if self.instant_power else 3
        field.value.uiVal = 321_500

    def _nvmlDeviceGetPowerUsage(self, handle, power):
        by_reference(power).value = 300_000

    def _nvmlDeviceGetTotalEnergyConsumption(self, handle, energy):
        by_reference(energy).value = 12_345_678

    def _nvmlDeviceGetPersistenceMode(self, handle, mode):
        by_reference(mode).value = 0

    def _nvmlDeviceSetGpuLockedClocks(self, handle, low, high):
        self.locks[self.gpu(handle)] = (low.value, high.value)
        self.clock[self.gpu(handle)] = high.value

    def _nvmlDeviceResetGpuLockedClocks(self, handle):
        self.locks[self.gpu(handle)] = None
        self.clock[self.gpu(handle)] = 1980

    def _nvmlDeviceGetPowerManagementLimitConstraints(self, handle, low, high):
        by_reference(low).value, by_reference(high).value = 200_000, 700_000

    def _nvmlDeviceGetPowerManagementDefaultLimit(self, handle, limit):
        by_reference(limit).value = 700_000

    def _nvmlDeviceGetPowerManagementLimit(self, handle, limit):
        by_reference(limit).value = 1000 * self.limits_w[self.gpu(handle)]

    def _nvmlDeviceSetPowerManagementLimit(self, handle, limit):
        self.limits_w[self.gpu(handle)] = limit.value // 1000


def gpus_of(path: Path) -> np.ndarray:
    """Copy of the fake GPUs' records, brought up to now."""
    with FakeState(path).locked() as gpus:
        return gpus.copy()


def free_port(count: int = 1) -> int:
    """First of ``count`` TCP ports in a row that nobody uses now."""
    for _ in range(100):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = probe.getsockname()[1]
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            continue
        return first
    raise AssertionError("no free ports")


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> float:
    """Seconds until the condition held; fails when it does not in time."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, "waited in vain"
        time.sleep(0.005)
    return time.monotonic() - start


def sentences(stderr: str) -> list[str]:
    """What a command said on stderr beside the lines that tell how far it is."""
    progress = re.compile(r"biscale: \d+ of (\d+|\?) ")
    return [line for line in stderr.strip().splitlines() if not progress.match(line)]


def spawn(
    *arguments: str, env: dict[str, str] | None = None, before: tuple[str, ...] = (), **options
) -> subprocess.Popen:
    """Start ``biscale ...`` as its own process, by way of the command ``before``."""
    command = [
        *before,
        sys.executable,
        "-u",
        "-c",
        "from biscale_env.cli import main; main()",
        *arguments,
    ]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def read_until(process: subprocess.Popen, text: str) -> str:
    """Read the process's output up to a line that contains ``text``."""
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"'{text}' never came; output: {seen}; errors: {process.stderr.read()}")


def end_all(processes: Iterable[subprocess.Popen]) -> None:
    """Kill what still runs, wait for all, and close their pipes."""
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


class FakeMachine:
    """Two fake GPUs under the C library, and the processes that a test started."""

    def __init__(self, folder: Path, library: Path, state: Path) -> None:
        """Make the GPUs.

        Args:
            folder: of everything.
            library: the compiled C stand-in.
            state: folder of the state files of owners.
        """
        self.folder = folder
        self.path = create_state(folder / "gpus", 2, delay_s=0.01)
        self.env = {
            "LD_LIBRARY_PATH": str(library.parent),
            "FAKE_NVML_STATE": str(self.path),
            "BISCALE_HW_STATE": str(state),
        }
        self.processes: list[subprocess.Popen] = []

    def close(self) -> None:
        """End its processes."""
        end_all(self.processes)
