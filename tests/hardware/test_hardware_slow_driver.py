"""A driver that is slow on some GPUs and fails on others: nothing stays locked unrecorded."""

import threading
import time

import pynvml
import pytest
from hardware_helpers import PythonNvml, wait_until

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks import doctor, nvml, owner
from biscale_env.hardware.clocks.backend import ClockError, GpuLost, failures_of, insist
from biscale_env.hardware.clocks.driver_calls import DriverCalls
from biscale_env.hardware.clocks.nvml import NvmlBackend
from biscale_env.hardware.loop.actuator import Actuator
from biscale_env.hardware.loop.gpu_group import ActuatorConfig
from biscale_env.hardware.loop.wire import Command

pytest_plugins = ["hardware_fixtures"]


class SlowNvml(PythonNvml):
    """Takes its time per GPU; some GPUs are lost, or refuse a call that many times."""

    def __init__(self, n_gpus=4):
        super().__init__(n_gpus)
        self.lock_s = [0.0] * n_gpus
        self.reset_s = [0.0] * n_gpus
        self.lost = set()
        self.refusals = {}  # (function, GPU): how often it fails yet

    def _failing(self, what, k):
        if k in self.lost:
            return pynvml.NVML_ERROR_GPU_IS_LOST
        left = self.refusals.get((what, k), 0)
        self.refusals[what, k] = left - 1
        return pynvml.NVML_ERROR_UNKNOWN if left > 0 else 0

    def _nvmlDeviceSetGpuLockedClocks(self, handle, low, high):
        k = self.gpu(handle)
        if code := self._failing("lock", k):
            return code
        time.sleep(self.lock_s[k])
        return super()._nvmlDeviceSetGpuLockedClocks(handle, low, high)

    def _nvmlDeviceResetGpuLockedClocks(self, handle):
        k = self.gpu(handle)
        if code := self._failing("reset", k):
            return code
        time.sleep(self.reset_s[k])
        return super()._nvmlDeviceResetGpuLockedClocks(handle)


@pytest.fixture
def library(monkeypatch):
    return SlowNvml().install(monkeypatch)


@pytest.fixture
def started(library, tmp_path, hw_state):
    """An actuator on four GPUs in one group, started."""
    with NvmlBackend() as backend:
        config = ActuatorConfig({"a": ("0", "1", "2", "3")}, tmp_path / "s", "nvml")
        actuator = Actuator(config, backend)
        actuator.start()
        yield actuator
        actuator.stop()


def command(freq_mhz, sequence=1):
    now = time.monotonic()
    return Command(sequence, freq_mhz, now), now


def uuids(*indices):
    return [f"GPU-0000-{k}" for k in indices]


def test_one_lost_gpu_leaves_no_slow_one_locked(started, library):
    """The first failure was raised while the other calls still ran; they landed after the reset."""
    library.lock_s = [0.0, 0.05, 0.1, 0.15]
    library.lost = {0}
    with pytest.raises(GpuLost):
        started.obey(started.groups["a"], *command(810.0))
    failures = started.stop()
    time.sleep(0.3)  # whatever is still running would land now
    assert library.locks == [None] * 4
    assert owner.recorded() == uuids(0)  # nobody can know what a lost GPU does
    assert len(failures) == 1
    assert "GPU-0000-0" in failures[0]
    assert "hw restore" in failures[0]


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_whichever_gpu_is_lost(started, library, lost):
    library.lock_s = [0.1, 0.05, 0.0, 0.15]
    library.lost = {lost}
    with pytest.raises(GpuLost):
        started.obey(started.groups["a"], *command(810.0))
    assert [library.locks[k] for k in range(4) if k != lost] == [(810, 810)] * 3
    assert started.stop()
    assert library.locks == [None] * 4
    assert owner.recorded() == uuids(lost)


def test_a_refused_lock_is_tried_again_before_it_is_an_error(started, library):
    library.refusals = {("lock", 2): 2}
    started.obey(started.groups["a"], *command(810.0))
    assert library.locks == [(810, 810)] * 4
    assert started.stop() == []
    assert owner.recorded() == []


def test_one_reset_that_fails_for_good_does_not_keep_the_others_locked(started, library):
    started.obey(started.groups["a"], *command(810.0))
    library.refusals = {("reset", 1): 100}
    (failure,) = started.stop()
    assert "GPU-0000-1" in failure
    assert library.locks == [None, (810, 810), None, None]
    assert owner.recorded() == uuids(1)


def test_resets_at_the_end_are_made_side_by_side(started, library):
    started.obey(started.groups["a"], *command(810.0))
    library.reset_s = [0.2] * 4
    begin = time.monotonic()
    assert started.stop() == []
    assert time.monotonic() - begin < 0.6
    assert library.locks == [None] * 4


def test_while_a_call_is_running_the_state_file_and_the_owner_lock_stay(
    started, library, monkeypatch
):
    monkeypatch.setattr(nvml, "LOCK_TIMEOUT_S", 0.05)
    monkeypatch.setattr(nvml, "RESET_TIMEOUT_S", 0.05)
    library.lock_s = [0.0, 0.6, 0.0, 0.0]
    with pytest.raises(ClockError, match=r"0\.05 s"):
        started.obey(started.groups["a"], *command(810.0))
    (failure,) = started.stop()
    assert "GPU-0000-1" in failure
    assert owner.recorded() == uuids(1)
    with pytest.raises(owner.OwnerBusy):
        owner.OwnerLock("GPU-0000-1")
    owner.OwnerLock("GPU-0000-0").release()
    wait_until(lambda: library.calls.count("nvmlDeviceResetGpuLockedClocks") >= 4 + 4)
    wait_until(lambda: not started.backend.outstanding())
    assert library.locks == [None] * 4  # the reset waited behind the slow lock


def test_a_single_call_waits_for_the_one_before_it(library, monkeypatch):
    monkeypatch.setattr(nvml, "LOCK_TIMEOUT_S", 0.05)
    library.lock_s = [0.0, 0.4, 0.0, 0.0]
    with NvmlBackend() as backend:
        assert list(backend.lock_each(uuids(0, 1), 810.0, 810.0)) == uuids(1)
        with pytest.raises(ClockError, match="within"):
            backend.lock("GPU-0000-1", 900.0, 900.0)
        backend.reset("GPU-0000-1")  # waits longer
        assert library.locks == [(810, 810), None, None, None]
        backend.reset("GPU-0000-0")


def test_lock_all_ends_with_its_last_call(library):
    library.lock_s = [0.0, 0.1, 0.1, 0.1]
    library.lost = {0}
    with NvmlBackend() as backend:
        with pytest.raises(GpuLost):
            backend.lock_all(uuids(0, 1, 2, 3), 900.0, 900.0)
        assert library.locks == [None] + [(900, 900)] * 3
        with pytest.raises(GpuLost):
            backend.reset_all(uuids(0, 1, 2, 3))
        assert library.locks == [None] * 4


def test_an_actuator_that_cannot_start_leaves_nothing(library, tmp_path, hw_state):
    library.lost = {2}
    with NvmlBackend() as backend:
        actuator = Actuator(
            ActuatorConfig({"a": ("0", "1"), "b": ("2", "3")}, tmp_path / "s", "nvml"), backend
        )
        with pytest.raises(GpuLost):
            actuator.start()
        assert actuator.stop() == []
    assert owner.recorded() == []
    assert library.locks == [None] * 4


def test_an_actuator_that_cannot_start_keeps_what_an_earlier_run_recorded(
    library, tmp_path, hw_state
):
    owner.write_state("GPU-0000-2", "nvml")
    library.lost = {2}
    with NvmlBackend() as backend:
        config = ActuatorConfig({"b": ("2", "3")}, tmp_path / "s", "nvml")
        actuator = Actuator(config, backend)
        with pytest.raises(GpuLost):
            actuator.start()
        assert actuator.stop() == []
    assert owner.recorded() == ["GPU-0000-2"]  # nobody has reset it yet


def test_calls_of_one_gpu_keep_their_order_and_of_several_run_together():
    calls, seen, gate = DriverCalls(), [], threading.Event()
    slow = calls.each({"a": gate.wait, "b": lambda: seen.append("b")}, 0.05)
    assert list(slow) == ["a"]
    assert calls.outstanding() == {"a"}
    assert list(calls.each({"a": lambda: seen.append("late")}, 0.05)) == ["a"]
    assert seen == ["b"]
    gate.set()
    calls.wait("a", 1.0)
    assert seen == ["b", "late"]
    assert calls.outstanding() == set()
    calls.close()


def test_an_error_that_is_none_of_ours_is_a_failure_of_its_gpu():
    def broken():
        raise RuntimeError("no such symbol")

    failures = failures_of({"a": broken, "b": lambda: None})
    assert list(failures) == ["a"]
    assert "RuntimeError: no such symbol" in str(failures["a"])


def test_insisting_leaves_alone_what_cannot_help(library):
    library.lost = {0}
    library.refusals = {("lock", 1): 1}
    tried = []
    with NvmlBackend() as backend:

        def lock(which):
            tried.append(list(which))
            return backend.lock_each(which, 900.0, 900.0)

        assert list(insist(backend, lock, uuids(0, 1, 2))) == uuids(0)
    assert tried == [uuids(0, 1, 2), uuids(1)]


# --- a GPU that the driver cannot even open -------------------------------------------------------


class OneUnopened(PythonNvml):
    """GPU 1 of several cannot be opened."""

    def _nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        if index.value == 1:
            return pynvml.NVML_ERROR_GPU_IS_LOST
        return super()._nvmlDeviceGetHandleByIndex_v2(index, handle)


@pytest.fixture
def unopened(monkeypatch):
    return OneUnopened(8).install(monkeypatch)


def test_the_others_can_be_used(unopened):
    with NvmlBackend() as backend:
        assert [d.index for d in backend.devices()] == [0, 2, 3, 4, 5, 6, 7]
        backend.lock_all([d.uuid for d in backend.devices()], 900.0, 900.0)
        assert unopened.locks == [(900, 900), None] + [(900, 900)] * 6
        with pytest.raises(ClockError, match=r"GPU 1 cannot be used: .*lost"):
            backend.device("1")
        assert backend.device("2").uuid == "GPU-0000-2"


def test_doctor_names_it_and_shows_the_others(unopened):
    found = doctor.check_clocks("nvml")
    assert [f.subject for f in found if f.status == "fail"] == ["GPU 1"]
    assert len([f for f in found if f.subject.startswith("GPU-0000") and "MHz" in f.text]) == 7


def test_restoring_all_reports_it_and_resets_the_others(unopened, hw_state):
    with NvmlBackend() as backend:
        backend.lock_all([d.uuid for d in backend.devices()], 900.0, 900.0)
        outcomes = owner.restore_all(backend, "nvml")
    assert unopened.locks == [None] * 8
    assert [r.uuid for r in outcomes if r.failed] == ["GPU 1"]
    assert len(outcomes) == 8


def test_where_none_can_be_opened_the_reason_is_said(monkeypatch):
    library = PythonNvml(2).install(monkeypatch)
    library.codes["nvmlDeviceGetUUID"] = pynvml.NVML_ERROR_GPU_IS_LOST
    with pytest.raises(BiscaleError, match="lost"):
        NvmlBackend()
