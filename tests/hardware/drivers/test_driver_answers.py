"""Drivers as they answer: GPUs that are lost, readings that are missing, old libraries, MIG, vGPU.

Through the real nvidia-ml-py onto a Python stand-in of the library.
"""

import itertools
import json
import math
import time
import warnings

import numpy as np
import pandas as pd
import pynvml
import pytest
from hardware_helpers import PythonNvml, by_reference

from biscale_env.core.errors import BiscaleWarning
from biscale_env.hardware.clocks import owner
from biscale_env.hardware.clocks.backend import ClockError, GpuLost
from biscale_env.hardware.clocks.doctor import check_clocks, check_gpu
from biscale_env.hardware.clocks.nvml import NvmlBackend
from biscale_env.hardware.clocks.observe_only import ObserveOnly
from biscale_env.hardware.loop.actuator import Actuator
from biscale_env.hardware.loop.gpu_group import ActuatorConfig
from biscale_env.hardware.loop.wire import Command
from biscale_env.hardware.replay.recorder import EnergyCurve, Telemetry

pytest_plugins = ["hardware_fixtures"]
UUID = "GPU-0000-0"
READINGS = {
    "nvmlDeviceGetClockInfo": ("clock", lambda r, e: r.freq_mhz),
    "nvmlDeviceGetCurrentClocksEventReasons": (
        "clock event reasons",
        lambda r, e: r.reasons or NAN,
    ),
    "nvmlDeviceGetTemperature": ("temperature", lambda r, e: r.temperature_c),
    "nvmlDeviceGetPowerUsage": ("power", lambda r, e: r.power_w),
    "nvmlDeviceGetTotalEnergyConsumption": ("energy counter", lambda r, e: e),
}
NAN = math.nan
NEVER = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
)


class Driver(PythonNvml):
    """A stand-in that the test makes odd: lost GPUs, missing symbols, calls that fail per GPU."""

    def __init__(self, n_gpus=2):
        super().__init__(n_gpus)
        self.lost, self.symbols_missing, self.per_gpu = set(), set(), {}
        self.reasons = [0x4] * n_gpus

    def __getattr__(self, name):
        if name.startswith("nvml") and name in object.__getattribute__(self, "symbols_missing"):
            raise AttributeError(name)
        call = super().__getattr__(name)
        per_gpu = object.__getattribute__(self, "per_gpu")
        if name not in per_gpu:
            return call

        def odd(handle, *rest):
            return per_gpu[name].get(self.gpu(handle)) or call(handle, *rest)

        return odd

    def _nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        if index.value in self.lost:
            return pynvml.NVML_ERROR_GPU_IS_LOST
        return super()._nvmlDeviceGetHandleByIndex_v2(index, handle)

    def _nvmlDeviceGetCurrentClocksThrottleReasons(self, handle, reasons):
        by_reference(reasons).value = 0x40

    def _nvmlDeviceGetMigMode(self, handle, now, pending):
        by_reference(now).value = by_reference(pending).value = self.mig

    def _nvmlDeviceGetVirtualizationMode(self, handle, mode):
        by_reference(mode).value = self.virtual

    mig = virtual = 0


@pytest.fixture
def install(monkeypatch):
    return lambda driver: driver.install(monkeypatch)


@pytest.fixture
def driver(install):
    return install(Driver())


@pytest.mark.parametrize("code", NEVER)
@pytest.mark.parametrize("missing", [[name] for name in READINGS] + [list(READINGS)])
def test_what_can_be_read_is_read_and_what_cannot_is_said_once(driver, missing, code):
    driver.instant_power = False
    driver.symbols_missing = {"nvmlDeviceGetCurrentClocksThrottleReasons"}
    driver.codes = dict.fromkeys(missing, code)
    backend = NvmlBackend()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for device in backend.devices() * 3:
            reading, energy_j = backend.read(device.uuid), backend.energy_j(device.uuid)
    said = [str(w.message) for w in told if "tells no" in str(w.message)]
    assert len(said) == len(missing)  # once each, not once per GPU or per reading
    for name, (word, value) in READINGS.items():
        assert math.isnan(value(reading, energy_j)) == (name in missing)
        assert any(f"tells no {word}:" in text for text in said) == (name in missing)
    assert driver.calls.count(missing[0]) <= 2  # and is not asked for again


def test_a_symbol_that_the_driver_lacks_is_a_missing_reading(driver):
    driver.symbols_missing = {"nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetTemperature"}
    backend = NvmlBackend()
    with pytest.warns(BiscaleWarning, match="tells no energy counter"):
        assert math.isnan(backend.energy_j(UUID))
    with pytest.warns(BiscaleWarning, match="tells no temperature"):
        assert math.isnan(backend.read(UUID).temperature_c)
    driver.symbols_missing = {"nvmlDeviceSetGpuLockedClocks"}
    pynvml._nvmlGetFunctionPointer_cache.clear()
    with pytest.raises(ClockError, match=r"locking .* the driver is too old"):
        backend.lock(UUID, 900.0, 900.0)


def test_drivers_before_535_tell_the_reasons_by_another_name(driver):
    driver.symbols_missing = {"nvmlDeviceGetCurrentClocksEventReasons"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert NvmlBackend().read(UUID).reasons == 0x40


@pytest.mark.parametrize("name", ["nvmlDeviceGetTemperature", "nvmlDeviceGetClockInfo"])
def test_a_reading_that_fails_now_is_an_error_and_tried_again(driver, name):
    backend = NvmlBackend()
    driver.codes[name] = pynvml.NVML_ERROR_UNKNOWN
    with pytest.raises(ClockError, match="999"):
        backend.read(UUID)
    del driver.codes[name]
    assert backend.read(UUID).temperature_c == 40.0
    driver.codes[name] = pynvml.NVML_ERROR_GPU_IS_LOST
    with pytest.raises(GpuLost):
        backend.read(UUID)


def test_one_gpu_that_lacks_a_reading_does_not_take_it_from_the_others(driver):
    code = pynvml.NVML_ERROR_NOT_SUPPORTED
    driver.per_gpu = {"nvmlDeviceGetTemperature": {1: code}}
    backend = NvmlBackend()
    with pytest.warns(BiscaleWarning, match="GPU-0000-1: the driver tells no temperature"):
        heats = [backend.read(device.uuid).temperature_c for device in backend.devices()]
    assert heats[0] == 40.0
    assert math.isnan(heats[1])


@pytest.mark.filterwarnings("ignore::biscale_env.core.errors.BiscaleWarning")
@pytest.mark.parametrize("blind", [0, 1])
def test_a_gpu_without_temperature_does_not_blind_the_guard_to_a_hot_one(
    driver, tmp_path, hw_state, blind
):
    driver.per_gpu = {"nvmlDeviceGetTemperature": {blind: pynvml.NVML_ERROR_NOT_SUPPORTED}}
    config = ActuatorConfig({"x": ("0", "1")}, tmp_path / "s")
    actuator = Actuator(config, NvmlBackend())
    actuator.start()
    try:
        group = actuator.groups["x"]
        driver.heat[1 - blind] = 95
        actuator._guard(group)
        assert group.throttled
        driver.heat[1 - blind] = 40
        actuator._guard(group)
        assert not group.throttled
    finally:
        assert actuator.stop() == []


@pytest.mark.filterwarnings("ignore::biscale_env.core.errors.BiscaleWarning")
def test_clocks_are_set_and_reset_where_nothing_can_be_read(driver, tmp_path, hw_state):
    driver.instant_power = False
    driver.codes = dict.fromkeys(READINGS, pynvml.NVML_ERROR_NOT_SUPPORTED)
    driver.symbols_missing = {"nvmlDeviceGetCurrentClocksThrottleReasons"}
    actuator = Actuator(ActuatorConfig({"x": ("0",)}, tmp_path / "s"), NvmlBackend())
    actuator.start()
    group = actuator.groups["x"]
    now = time.monotonic()
    actuator.obey(group, Command(1, 1200.0, now, 0.0, now, now), now)
    assert driver.locks[0] == (1200, 1200)
    for _ in range(20):
        actuator.turn(0.001)
    assert not group.released
    assert actuator.stop() == []
    assert driver.locks[0] is None


def test_clock_lists_of_lower_memory_clocks_are_taken_where_the_highest_has_none(driver):
    ask = driver._nvmlDeviceGetSupportedGraphicsClocks

    def odd(handle, memory, count, clocks):
        if memory.value == 2619:
            by_reference(count).value = 0
            return 0
        return ask(handle, memory, count, clocks)

    driver._nvmlDeviceGetSupportedGraphicsClocks = odd
    assert NvmlBackend().supported_mhz(UUID) == [345.0]


@pytest.mark.parametrize("kind", ["not supported", "empty", "no memory clocks"])
def test_without_a_clock_list_one_can_observe_and_is_told_so(driver, kind):
    def none(*arguments):
        by_reference(arguments[-2]).value = 0
        return 0

    if kind == "not supported":
        driver.codes["nvmlDeviceGetSupportedMemoryClocks"] = pynvml.NVML_ERROR_NOT_SUPPORTED
    elif kind == "empty":
        driver._nvmlDeviceGetSupportedGraphicsClocks = none
    else:
        driver._nvmlDeviceGetSupportedMemoryClocks = none
    backend = NvmlBackend()
    with pytest.raises(ClockError):
        backend.supported_mhz(UUID)
    watched = ObserveOnly(backend).supported_mhz(UUID)
    assert {1395.0, 1980.0} <= set(watched)
    findings = check_gpu(backend, UUID)
    assert "1980 MHz" in findings[0].text  # what can be read is read
    assert any("cannot be set" in f.text and "--observe-only" in f.text for f in findings)


def test_mig_and_vgpu_are_named(driver):
    backend = NvmlBackend()
    assert backend.peculiarities(UUID) == []
    driver.mig, driver.virtual = 1, pynvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU
    texts = [f.text for f in check_gpu(backend, UUID)]
    assert any("MIG is on" in text for text in texts)
    assert any("a vGPU" in text for text in texts)
    with pytest.raises(ClockError, match="MIG instance, which has no clock of its own"):
        backend.device("MIG-1c2d")
    driver.symbols_missing = {"nvmlDeviceGetMigMode", "nvmlDeviceGetVirtualizationMode"}
    pynvml._nvmlGetFunctionPointer_cache.clear()
    assert backend.peculiarities(UUID) == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "of different versions"),
        (pynvml.NVML_ERROR_UNKNOWN, "start the container anew"),
        (pynvml.NVML_ERROR_RESET_REQUIRED, "must be reset"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "without the privilege"),
    ],
)
def test_a_library_that_does_not_start_says_why(driver, code, words):
    driver.codes["nvmlInitWithFlags"] = code
    (finding,) = check_clocks("nvml")
    assert finding.status == "fail"
    assert words in finding.text


@pytest.mark.parametrize("kind", ["refused", "not UTF-8"])
def test_a_gpu_without_a_name_is_used_all_the_same(driver, kind):
    if kind == "refused":
        driver.codes["nvmlDeviceGetName"] = pynvml.NVML_ERROR_UNKNOWN
    else:
        driver._nvmlDeviceGetName = lambda handle, text, size: setattr(text, "value", b"H\xff")
    assert [d.name for d in NvmlBackend().devices()] == ["unnamed GPU"] * 2


LOST = [set(c) for r in (1, 2, 7) for c in itertools.combinations(range(8), r)]


@pytest.mark.parametrize("lost", LOST[::5], ids=str)
def test_restore_reaches_every_gpu_that_can_be_reached(install, hw_state, lost):
    """Whichever are lost, whichever fail: all others are reset, and nobody is forgotten."""
    driver = install(Driver(8))
    for k in range(8):
        driver.locks[k] = (900, 900)
        owner.write_state(f"GPU-0000-{k}", "nvml")
    driver.lost = lost
    stubborn = min(set(range(8)) - lost)
    driver.per_gpu["nvmlDeviceResetGpuLockedClocks"] = {stubborn: pynvml.NVML_ERROR_UNKNOWN}
    with NvmlBackend() as backend:
        outcomes = {r.uuid: r for r in owner.recover(backend, "nvml")}
    reachable = set(range(8)) - lost - {stubborn}
    assert {k for k in range(8) if driver.locks[k] is None} == reachable
    assert len(outcomes) == 8
    for k in range(8):
        outcome = outcomes[f"GPU-0000-{k}"]
        assert outcome.failed == (k not in reachable)
        assert owner.state_path(f"GPU-0000-{k}").exists() == (k not in reachable)
        assert ("lost" in outcome.text) == (k in lost)
    driver.lost = set()
    driver.per_gpu["nvmlDeviceResetGpuLockedClocks"].clear()
    with NvmlBackend() as backend:
        assert not any(r.failed for r in owner.restore_all(backend, "nvml"))
    assert driver.locks == [None] * 8
    assert owner.recorded() == []


def test_a_gpu_that_its_index_does_not_lead_to_is_reached_by_its_uuid(install, hw_state):
    driver = install(Driver(3))
    driver.lost = {1}

    def by_uuid(uuid, handle):
        number = int(uuid.value.decode().rpartition("-")[2])
        return PythonNvml._nvmlDeviceGetHandleByIndex_v2(driver, Number(number), handle)

    driver._nvmlDeviceGetHandleByUUID = by_uuid
    driver.locks[1] = (900, 900)
    owner.write_state("GPU-0000-1", "nvml")
    with NvmlBackend() as backend:
        (outcome,) = owner.recover(backend, "nvml")
    assert (outcome.text, outcome.failed) == ("reset", False)
    assert driver.locks[1] is None


class Number:
    def __init__(self, value):
        self.value = value


def test_a_state_file_that_cannot_be_removed_keeps_no_other_gpu_from_being_reset(
    driver, hw_state, monkeypatch
):
    for k in range(2):
        driver.locks[k] = (900, 900)
        owner.write_state(f"GPU-0000-{k}", "nvml")
    first = json.loads(owner.state_path(UUID).read_text())
    owner.state_path(UUID).write_text(json.dumps({**first, "boot_id": "before"}))
    remove = owner.remove_state

    def refuses(uuid):
        if uuid == UUID:
            raise PermissionError(13, "Permission denied")
        remove(uuid)

    monkeypatch.setattr(owner, "remove_state", refuses)
    with NvmlBackend() as backend:
        outcomes = {r.uuid: r.failed for r in owner.recover(backend, "nvml")}
    assert outcomes == {UUID: True, "GPU-0000-1": False}
    assert driver.locks[1] is None


@pytest.mark.filterwarnings("ignore::biscale_env.core.errors.BiscaleWarning")
def test_without_an_energy_counter_power_is_integrated_and_that_is_said(driver):
    driver.codes["nvmlDeviceGetTotalEnergyConsumption"] = pynvml.NVML_ERROR_NOT_SUPPORTED
    telemetry = Telemetry(NvmlBackend(), {"g": [UUID, "GPU-0000-1"]}, hz=100.0)
    telemetry.start()
    time.sleep(0.3)
    telemetry.stop()
    frame = telemetry.frame()
    assert sorted(telemetry.problems) == [
        f"{u} has no energy counter: its energy is integrated from readings of its power"
        for u in (UUID, "GPU-0000-1")
    ]
    start, end = frame["time_s"].iloc[0], frame["time_s"].iloc[-1]
    energy_j = EnergyCurve(frame, "g").between(start, end)
    assert energy_j == pytest.approx(2 * 321.5 * (end - start), rel=0.02)


def test_energy_of_samples_with_gaps():
    time_s = np.arange(5.0)
    counter = pd.DataFrame(
        {"time_s": time_s, "group": "g", "gpu": "a", "power_w": 7.0, "energy_j": 10.0 * time_s}
    )
    counter.loc[2, "energy_j"] = NAN  # a reading that failed once
    assert EnergyCurve(counter, "g").between(1.0, 3.0) == pytest.approx(20.0)
    anew = counter.assign(energy_j=[1000.0, 1010.0, 4.0, NAN, 24.0])  # the driver, loaded again
    assert EnergyCurve(anew, "g").between(0.0, 4.0) == pytest.approx(10.0 + 20.0)
    ramp = counter.assign(energy_j=NAN, power_w=[0.0, 1.0, NAN, 3.0, 4.0])
    assert EnergyCurve(ramp, "g").between(0.0, 4.0) == pytest.approx(8.0)
    dark = counter.assign(gpu="b", energy_j=NAN, power_w=NAN)
    both = pd.concat([counter, dark])
    assert math.isnan(EnergyCurve(both, "g").between(0.0, 4.0))  # not half the energy
