"""Tier 1: the NVML backend through the real nvidia-ml-py onto a Python stand-in for the library."""

import warnings

import pynvml
import pytest
from hardware_helpers import PythonNvml, by_reference

from biscale_env.core.errors import BiscaleError, BiscaleWarning
from biscale_env.hardware.clocks.backend import (
    ClockDenied,
    ClockError,
    GpuLost,
    reason_text,
)
from biscale_env.hardware.clocks.backend_registry import open_backend
from biscale_env.hardware.clocks.nvml import NvmlBackend
from biscale_env.hardware.clocks.observe_only import ObserveOnly


@pytest.fixture
def library(monkeypatch):
    return PythonNvml().install(monkeypatch)


@pytest.fixture
def backend(library):
    with NvmlBackend() as backend:
        yield backend


def test_devices_are_named_by_uuid(backend):
    assert [(d.index, d.uuid, d.name) for d in backend.devices()] == [
        (0, "GPU-0000-0", "Stand-in"),
        (1, "GPU-0000-1", "Stand-in"),
    ]
    assert backend.device("1").uuid == backend.device("GPU-0000-1").uuid == "GPU-0000-1"


@pytest.mark.parametrize("key", ["2", "GPU-0000", "nonsense"])
def test_unknown_or_ambiguous_device_names_those_there_are(backend, key):
    with pytest.raises(ClockError, match=r"GPU-0000-0.*GPU-0000-1"):
        backend.device(key)


def test_supported_clocks_come_from_the_highest_memory_clock(backend):
    clocks = backend.supported_mhz("GPU-0000-0")
    assert (clocks[0], clocks[-1], clocks[1] - clocks[0]) == (510.0, 1980.0, 15.0)


def test_reading_has_units(backend, library):
    library.reasons[0] = 0x4
    reading = backend.read("GPU-0000-0")
    assert (reading.freq_mhz, reading.temperature_c, reading.power_w) == (1980.0, 40.0, 321.5)
    assert reading.reasons == 0x4
    assert not reading.throttled  # the ordinary power cap is not a fault
    assert backend.energy_j("GPU-0000-0") == 12345.678


def test_power_falls_back_to_the_mean_on_old_drivers(backend, library):
    library.instant_power = False
    with pytest.warns(BiscaleWarning, match="mean over one second"):
        assert backend.read("GPU-0000-0").power_w == 300.0
    library.codes["nvmlDeviceGetPowerUsage"] = pynvml.NVML_ERROR_NOT_SUPPORTED
    assert backend.read("GPU-0000-0").power_w != backend.read("GPU-0000-0").power_w  # NaN


def test_lock_and_reset_reach_the_named_gpu_only(backend, library):
    backend.lock("GPU-0000-1", 1200.0, 1200.0)
    assert library.locks == [None, (1200, 1200)]
    backend.reset("GPU-0000-1")
    assert library.locks == [None, None]


def test_lock_all_locks_every_gpu(backend, library):
    backend.lock_all(["GPU-0000-0", "GPU-0000-1"], 510.0, 900.0)
    assert library.locks == [(510, 900), (510, 900)]


def test_lock_all_reports_the_refusal_of_any_gpu(backend, library):
    library.codes["nvmlDeviceSetGpuLockedClocks"] = pynvml.NVML_ERROR_NO_PERMISSION
    with pytest.raises(ClockDenied):
        backend.lock_all(["GPU-0000-0", "GPU-0000-1"], 900.0, 900.0)


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (pynvml.NVML_ERROR_NO_PERMISSION, ClockDenied, "root.*zeusd.*observe-only"),
        (pynvml.NVML_ERROR_INVALID_ARGUMENT, ClockError, "supported clock"),
        (pynvml.NVML_ERROR_NOT_SUPPORTED, ClockError, "does not support"),
        (pynvml.NVML_ERROR_GPU_IS_LOST, GpuLost, "lost"),
        (pynvml.NVML_ERROR_UNKNOWN, ClockError, "999"),
    ],
)
def test_every_refusal_is_one_sentence(backend, library, code, kind, words):
    library.codes["nvmlDeviceSetGpuLockedClocks"] = code
    with pytest.raises(kind, match=words) as caught:
        backend.lock("GPU-0000-0", 900.0, 900.0)
    assert isinstance(caught.value, BiscaleError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED]
)
def test_no_driver_is_said_plainly(library, code):
    library.codes["nvmlInitWithFlags"] = code
    with pytest.raises(ClockError, match="no NVIDIA driver"):
        NvmlBackend()


def test_observe_only_reads_and_never_writes(backend, library):
    watcher = ObserveOnly(backend)
    watcher.lock_all(["GPU-0000-0", "GPU-0000-1"], 900.0, 900.0)
    watcher.lock("GPU-0000-0", 900.0, 900.0)
    watcher.reset("GPU-0000-0")
    assert watcher.read("GPU-0000-0").freq_mhz == 1980.0
    assert watcher.energy_j("GPU-0000-0") > 0
    assert watcher.supported_mhz("GPU-0000-0") == backend.supported_mhz("GPU-0000-0")
    assert not [c for c in library.calls if "Set" in c or "Reset" in c]


def test_persistence_and_driver(backend):
    assert backend.persistence("GPU-0000-0") is False
    assert backend.driver_version() == "999.1"


def test_unknown_backend_lists_the_known():
    with pytest.raises(BiscaleError, match="nvml, zeusd"):
        open_backend("cuda")


def test_event_reasons_in_words():
    assert reason_text(0) == "none"
    assert reason_text(0x4 | 0x40) == "power cap, hardware thermal slowdown"


class PowerOfSome(PythonNvml):
    """The instantaneous power reading fails on some GPUs, with this code."""

    def __init__(self, n_gpus):
        super().__init__(n_gpus)
        self.failing = {}

    def _nvmlDeviceGetFieldValues(self, handle, count, values):
        super()._nvmlDeviceGetFieldValues(handle, count, values)
        by_reference(values)[0].nvmlReturn = self.failing.get(self.gpu(handle), 0)


@pytest.fixture
def power(monkeypatch):
    library = PowerOfSome(3).install(monkeypatch)
    with NvmlBackend() as backend:
        yield library, backend


def watts(backend):
    return [backend.power_w(device.uuid) for device in backend.devices()]


def test_one_gpu_without_instantaneous_power_is_said_once_and_changes_no_other(power):
    library, backend = power
    library.failing = {1: pynvml.NVML_ERROR_NOT_SUPPORTED}
    with pytest.warns(BiscaleWarning, match="GPU-0000-1.*mean over one second"):
        assert watts(backend) == [321.5, 300.0, 321.5]
    library.failing = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert watts(backend) == [321.5, 300.0, 321.5]  # one kind of reading per GPU and run
    assert backend.energy_j("GPU-0000-1") == backend.energy_j("GPU-0000-0")


def test_one_failed_reading_of_power_is_not_the_end_of_instantaneous_ones(power):
    library, backend = power
    library.failing = {0: pynvml.NVML_ERROR_UNKNOWN}
    assert watts(backend) == [300.0, 321.5, 321.5]
    library.failing = {}
    assert watts(backend) == [321.5] * 3
