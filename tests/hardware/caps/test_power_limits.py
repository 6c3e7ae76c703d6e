"""Power limits as the second actuator: what the clock lock promises holds for them too.

On a Python stand-in for NVML, on the fake GPUs, and with real processes on the C stand-in.
"""

import json
import math
import signal
import time

import msgspec
import pynvml
import pytest
import zmq
from hardware_helpers import FakeMachine, PythonNvml, gpus_of, read_until, spawn, wait_until

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks import nvml, owner
from biscale_env.hardware.clocks.backend import ClockBackend, ClockDenied, ClockError, GpuLost
from biscale_env.hardware.clocks.fake_gpus import FakeBackend, create_state
from biscale_env.hardware.clocks.means import by_means
from biscale_env.hardware.clocks.nvml import NvmlBackend
from biscale_env.hardware.clocks.observe_only import ObserveOnly
from biscale_env.hardware.loop import wire
from biscale_env.hardware.loop.actuator import NO_LIMIT_SENT, Actuator
from biscale_env.hardware.loop.gpu_group import ActuatorConfig
from biscale_env.hardware.loop.wire import Command

pytest_plugins = ["hardware_fixtures"]
LEASE_S = 0.6


class StubbornNvml(PythonNvml):
    """Some GPUs are lost, slow, or refuse to set a limit so many times."""

    def __init__(self, n_gpus=4):
        super().__init__(n_gpus)
        self.lost, self.refusals, self.slow_s = set(), {}, {}

    def _nvmlDeviceSetPowerManagementLimit(self, handle, limit):
        k = self.gpu(handle)
        if k in self.lost:
            return pynvml.NVML_ERROR_GPU_IS_LOST
        if self.refusals.get(k, 0) > 0:
            self.refusals[k] -= 1
            return pynvml.NVML_ERROR_UNKNOWN
        time.sleep(self.slow_s.get(k, 0.0))
        return super()._nvmlDeviceSetPowerManagementLimit(handle, limit)


@pytest.fixture
def library(monkeypatch):
    return StubbornNvml().install(monkeypatch)


def actuator_on(backend, folder, log=None, groups=("0", "1", "2", "3"), **settings):
    config = ActuatorConfig({"a": groups}, folder / "s", "nvml", means="cap", **settings)
    return Actuator(config, backend, log)


@pytest.fixture
def started(library, tmp_path, hw_state):
    """An actuator of power limits on four GPUs in one group, started."""
    with NvmlBackend() as backend, (tmp_path / "log").open("wb") as log:
        actuator = actuator_on(backend, tmp_path, log)
        actuator.start()
        yield actuator
        actuator.stop()


def obey(actuator, cap_w, freq_mhz=900.0, sequence=1):
    now = time.monotonic()
    command = Command(sequence, freq_mhz, now, cap_w=cap_w)
    actuator.obey(actuator.groups["a"], command, now)


def logged(folder):
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def uuids(*indices):
    return [f"GPU-0000-{k}" for k in indices]


# --- the backends -----------------------------------------------------------------------------


@pytest.mark.parametrize("limit_w", [199.0, 701.0, 0.0, -5.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", ["nvml", "fake"])
def test_what_the_driver_does_not_take_is_refused_before_it_is_asked(
    library, tmp_path, kind, limit_w
):
    backend = NvmlBackend() if kind == "nvml" else FakeBackend(create_state(tmp_path / "gpus", 1))
    uuid = backend.devices()[0].uuid
    with pytest.raises(ClockError, match="takes 200 to 700 W"):
        backend.cap(uuid, limit_w)
    assert backend.power_limit_w(uuid) == 700.0
    assert "nvmlDeviceSetPowerManagementLimit" not in library.calls


def test_a_limit_reaches_the_named_gpu_only_and_goes_back_to_the_default(library):
    backend = NvmlBackend()
    backend.cap("GPU-0000-1", 300.0)
    assert library.limits_w == [700, 300, 700, 700]
    assert backend.power_limit_w("GPU-0000-1") == 300.0
    backend.uncap("GPU-0000-1")
    assert library.limits_w == [700] * 4
    assert library.locks == [None] * 4


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (pynvml.NVML_ERROR_NO_PERMISSION, ClockDenied, "privilege"),
        (pynvml.NVML_ERROR_NOT_SUPPORTED, ClockError, "does not support"),
        (pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, ClockError, "too old"),
        (pynvml.NVML_ERROR_GPU_IS_LOST, GpuLost, "lost"),
    ],
)
@pytest.mark.parametrize(
    "function",
    ["nvmlDeviceSetPowerManagementLimit", "nvmlDeviceGetPowerManagementLimitConstraints"],
)
def test_refusals_in_words(library, function, code, kind, words):
    library.codes[function] = code
    with pytest.raises(kind, match=words):
        NvmlBackend().cap("GPU-0000-0", 300.0)


def test_a_backend_without_limits_says_which_has_them(tmp_path):
    backend = FakeBackend(create_state(tmp_path / "gpus", 1))
    uuid = backend.devices()[0].uuid
    calls = (ClockBackend.power_limits, ClockBackend.power_limit_w, ClockBackend.uncap)
    for call in (*calls, lambda b, u: ClockBackend.cap(b, u, 300.0)):
        with pytest.raises(ClockError, match="use nvml"):
            call(backend, uuid)


def test_watching_sets_no_limit(tmp_path):
    inner = FakeBackend(create_state(tmp_path / "gpus", 1))
    uuid = inner.devices()[0].uuid
    watcher = ObserveOnly(inner)
    watcher.cap(uuid, 300.0)
    watcher.uncap(uuid)
    assert watcher.power_limit_w(uuid) == 700.0 == watcher.power_limits(uuid).default_w
    assert not gpus_of(tmp_path / "gpus")["n_caps"].any()


def test_resetting_by_means_touches_nothing_else(library):
    backend = NvmlBackend()
    backend.lock("GPU-0000-0", 900.0, 900.0)
    backend.cap("GPU-0000-0", 300.0)
    by_means(backend, "cap").reset("GPU-0000-0")
    assert (library.locks[0], library.limits_w[0]) == ((900, 900), 700)
    backend.cap("GPU-0000-0", 300.0)
    by_means(by_means(backend, "cap"), "lock").reset("GPU-0000-0")
    assert (library.locks[0], library.limits_w[0]) == (None, 300)
    with pytest.raises(ClockError, match="not locked"):
        by_means(backend, "cap").lock("GPU-0000-0", 900.0, 900.0)
    with pytest.raises(BiscaleError, match="lock or cap"):
        by_means(backend, "both")


# --- the fake GPUs -----------------------------------------------------------------------------


def test_a_fake_gpu_runs_at_the_clock_whose_power_is_the_limit(tmp_path):
    backend = FakeBackend(create_state(tmp_path / "gpus", 1, delay_s=0.0))
    uuid = backend.devices()[0].uuid
    backend.cap(uuid, 250.0)  # the toy draws 100 W + 50 W (f / GHz)^3
    reading = backend.read(uuid)
    assert reading.freq_mhz == pytest.approx(1e3 * 3.0 ** (1 / 3))
    assert reading.power_w == pytest.approx(250.0)
    backend.lock(uuid, 900.0, 900.0)  # both may hold: the lower clock counts
    assert backend.read(uuid).freq_mhz == 900.0


def test_limits_take_effect_as_late_as_clocks_and_the_newest_waits(tmp_path):
    path = create_state(tmp_path / "gpus", 1, delay_s=0.2)
    backend = FakeBackend(path)
    uuid = backend.devices()[0].uuid
    for limit_w in (400.0, 350.0, 300.0):
        backend.cap(uuid, limit_w)
    assert gpus_of(path)["limit_w"][0] == 700.0
    seen = set()
    wait_until(lambda: seen.add(float(gpus_of(path)["limit_w"][0])) or 300.0 in seen, 2.0)
    assert 350.0 not in seen


def test_the_c_stand_in_agrees_with_the_python_one(c_nvml, tmp_path):
    path = create_state(tmp_path / "gpus", 1, delay_s=0.0)
    library, ours = c_nvml(path), FakeBackend(path)
    uuid = ours.devices()[0].uuid
    assert library.power_limits(uuid) == ours.power_limits(uuid)
    library.cap(uuid, 260.0)
    assert library.power_limit_w(uuid) == ours.power_limit_w(uuid) == 260.0
    assert library.read(uuid).freq_mhz == pytest.approx(ours.read(uuid).freq_mhz, abs=1.0)
    ours.uncap(uuid)
    assert library.power_limit_w(uuid) == 700.0


# --- the actuator in this process -------------------------------------------------------------


def test_a_command_sets_the_limit_and_the_end_takes_it_back(started, library, tmp_path):
    assert json.loads(owner.state_path("GPU-0000-0").read_text())["means"] == "cap"
    obey(started, 305.0)
    assert library.limits_w == [305] * 4
    assert library.locks == [None] * 4
    assert "nvmlDeviceSetGpuLockedClocks" not in library.calls
    assert started.stop() == []
    assert library.limits_w == [700] * 4
    assert owner.recorded() == []
    set_, ended = (r for r in logged(tmp_path) if r["cause"] in ("command", "exit"))
    assert (set_["freq_mhz"], set_["cap_w"], ended["cap_w"]) == (900.0, 305.0, 0.0)


@pytest.mark.parametrize("asked_w", [305.0, 305.3])
def test_a_limit_is_seen_when_it_is_read_back(started, library, tmp_path, asked_w):
    """The stand-in keeps whole watts."""
    obey(started, asked_w)
    started.turn(0.01)
    (row,) = (r for r in logged(tmp_path) if r["cause"] == "command")
    assert row["seen_s"] >= row["set_s"]


def test_another_limit_than_the_one_that_was_set_is_not_seen(started, library, tmp_path):
    obey(started, 305.0)
    library.limits_w[3] = 306
    started.turn(0.01)
    assert started.groups["a"].pending is not None
    assert not any(r["cause"] == "command" for r in logged(tmp_path))


@pytest.mark.parametrize(("asked_w", "set_w"), [(50.0, 200), (305.0, 305), (5000.0, 700)])
def test_limits_are_bounded_by_what_the_driver_takes(started, library, asked_w, set_w):
    obey(started, asked_w)
    assert library.limits_w == [set_w] * 4


def test_the_same_limit_is_not_sent_twice(started, library):
    obey(started, 305.0)
    before = library.calls.count("nvmlDeviceSetPowerManagementLimit")
    obey(started, 305.0, sequence=2)
    assert library.calls.count("nvmlDeviceSetPowerManagementLimit") == before
    obey(started, 310.0, sequence=3)  # the work has changed, the clock has not
    assert library.limits_w == [310] * 4


@pytest.mark.parametrize("cap_w", [0.0, -1.0, math.nan])
def test_a_controller_of_clocks_is_told_once(started, library, tmp_path, cap_w):
    for sequence in (1, 2, 3):
        obey(started, cap_w, sequence=sequence)
    assert library.limits_w == [700] * 4
    assert [r["error"] for r in logged(tmp_path) if r["cause"] == "hold"] == [NO_LIMIT_SENT]


def test_clock_zero_gives_the_limit_back(started, library):
    obey(started, 305.0)
    obey(started, 305.0, freq_mhz=0.0, sequence=2)
    assert library.limits_w == [700] * 4


def test_a_hot_gpu_may_be_limited_more_but_not_less(started, library):
    obey(started, 400.0)
    library.heat = [90] * 4
    started.turn(0.01)
    obey(started, 500.0, sequence=2)
    assert library.limits_w == [400] * 4
    obey(started, 500.0, freq_mhz=0.0, sequence=3)
    assert library.limits_w == [400] * 4
    obey(started, 300.0, sequence=4)
    assert library.limits_w == [300] * 4


def test_the_lease_takes_the_limit_back(library, tmp_path, hw_state):
    with NvmlBackend() as backend:
        actuator = actuator_on(backend, tmp_path, lease_s=0.1)
        actuator.start()
        obey(actuator, 305.0)
        time.sleep(0.15)
        actuator.turn(0.001)
        assert library.limits_w == [700] * 4
        assert actuator.stop() == []


def test_ten_failed_readings_release_the_group(started, library, monkeypatch):
    obey(started, 305.0)
    readings = iter(range(100))

    def unreadable(uuid):
        next(readings)
        raise ClockError("not now")

    monkeypatch.setattr(started.backend, "read", unreadable)
    for _ in range(12):
        started._guard(started.groups["a"])
    assert started.groups["a"].released
    assert library.limits_w == [700] * 4


def test_one_gpu_without_the_privilege_and_nothing_is_touched(library, tmp_path, hw_state):
    library.codes["nvmlDeviceSetPowerManagementLimit"] = pynvml.NVML_ERROR_NO_PERMISSION
    with NvmlBackend() as backend:
        actuator = actuator_on(backend, tmp_path)
        with pytest.raises(ClockDenied, match="privilege"):
            actuator.start()
        assert actuator.stop() == []
    assert owner.recorded() == []


@pytest.mark.parametrize("lost", range(4))
def test_whichever_gpu_is_lost_the_others_are_reset(started, library, lost):
    library.slow_s = {0: 0.05, 2: 0.1}
    library.lost = {lost}
    with pytest.raises(GpuLost):
        obey(started, 305.0)
    (failure,) = started.stop()
    assert f"GPU-0000-{lost}" in failure
    assert [library.limits_w[k] for k in range(4) if k != lost] == [700] * 3
    assert owner.recorded() == uuids(lost)


def test_a_refused_limit_is_tried_again_before_it_is_an_error(started, library):
    library.refusals = {2: 2}
    obey(started, 305.0)
    assert library.limits_w == [305] * 4
    library.refusals = {1: 100}
    (failure,) = started.stop()
    assert "GPU-0000-1" in failure
    assert library.limits_w == [700, 305, 700, 700]
    assert owner.recorded() == uuids(1)
    library.refusals = {}
    with NvmlBackend() as backend:
        ((_, text, failed),) = owner.recover(backend, "nvml")
    assert (text, failed, library.limits_w) == ("power limit reset", False, [700] * 4)


def test_a_slow_call_is_waited_for_and_the_default_follows_it(started, library, monkeypatch):
    monkeypatch.setattr(nvml, "LOCK_TIMEOUT_S", 0.05)
    library.slow_s = {1: 0.4}
    with pytest.raises(ClockError, match="has not ended"):
        obey(started, 305.0)
    library.slow_s = {}
    assert started.stop() == []
    assert library.limits_w == [700] * 4


def test_a_full_disk_under_the_log_keeps_no_limit(library, tmp_path, hw_state):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    def obey_and_turn(actuator):
        obey(actuator, 301.0)  # looks for the clock of the start already, if that is pending
        actuator.turn(0.01)

    with NvmlBackend() as backend:
        actuator = actuator_on(backend, tmp_path, Full())
        actuator.start()
        try:
            with pytest.raises(BiscaleError, match="No space left"):
                obey_and_turn(actuator)
        finally:
            actuator.stop()
    assert library.limits_w == [700] * 4
    assert owner.recorded() == []


def test_somebody_elses_limit_is_not_lost(library, tmp_path, hw_state):
    library.limits_w[2] = 500
    with NvmlBackend() as backend:
        actuator = actuator_on(backend, tmp_path)
        with pytest.raises(ClockError, match="somebody has limited the power of GPU-0000-2"):
            actuator.start()
        assert actuator.stop() == []
    assert library.limits_w == [700, 700, 500, 700]
    assert owner.recorded() == []


def test_what_other_means_have_left_is_taken_back_by_its_own(library, tmp_path, hw_state):
    """An actuator of locks finds a limit of a killed one, and the other way round."""
    owner.write_state("GPU-0000-0", "nvml", "cap")
    owner.write_state("GPU-0000-1", "nvml", "lock")
    library.limits_w[0], library.locks[1] = 300, (900, 900)
    with NvmlBackend() as backend:
        actuator = Actuator(ActuatorConfig({"a": ("0", "1")}, tmp_path / "s", "nvml"), backend)
        recovered = actuator.start()
        assert actuator.stop() == []
    assert [r.text for r in recovered] == ["power limit reset", "reset"]
    assert (library.limits_w[0], library.locks[1]) == (700, None)


def test_a_limit_that_could_not_be_taken_back_is_not_forgotten(library, tmp_path, hw_state):
    owner.write_state("GPU-0000-0", "nvml", "cap")
    library.limits_w[0], library.refusals = 300, {0: 100}
    with NvmlBackend() as backend:
        actuator = Actuator(ActuatorConfig({"a": ("0",)}, tmp_path / "s", "nvml"), backend)
        with pytest.raises(ClockError, match="by other means"):
            actuator.start()
        actuator.stop()
    assert owner.noted_means("GPU-0000-0") == ("cap",)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_an_unreadable_note_means_either(library, hw_state, content):
    owner.write_state("GPU-0000-0", "nvml", "cap")
    owner.state_path("GPU-0000-0").write_text(content)
    library.limits_w[0], library.locks[0] = 300, (900, 900)
    with NvmlBackend() as backend:
        ((_, _, failed),) = owner.recover(backend, "nvml")
    assert (failed, library.limits_w[0], library.locks[0]) == (False, 700, None)


def test_restoring_all_takes_limits_back_only_when_asked(library, hw_state):
    library.limits_w[3] = 300
    with NvmlBackend() as backend:
        owner.restore_all(backend, "nvml")
        assert library.limits_w[3] == 300  # nobody has noted it: it may be the operator's
        owner.restore_all(by_means(backend, "cap"), "nvml")
    assert library.limits_w == [700] * 4


def test_unknown_means_are_refused(tmp_path):
    with pytest.raises(BiscaleError, match="lock or cap"):
        ActuatorConfig({"a": ("0",)}, tmp_path, means="both")


# --- real processes, the real nvidia-ml-py on the C stand-in -----------------------------------


class Machine(FakeMachine):
    """With an actuator of power limits."""

    def __init__(self, folder, library, state):
        super().__init__(folder, library, state)
        self.context, self.sequence = zmq.Context(), 0
        self.sender = wire.newest_sender(
            self.context, wire.command_endpoint(folder / "s", "decode")
        )

    def start(self, *extra):
        options = ["--gpus", "decode=0,1", "--lease", str(LEASE_S), "--means", "cap"]
        options += ["--sockets", str(self.folder / "s"), *extra]
        process = spawn("hw", "actuate", *options, env=self.env)
        self.processes.append(process)
        self.said = read_until(process, "actuator ready")
        return process

    def capped(self, cap_w=300.0):
        """Send a command and say whether it is applied."""
        self.sequence += 1
        command = Command(self.sequence, 900.0, time.monotonic(), cap_w=cap_w)
        self.sender.send(msgspec.msgpack.encode(command), zmq.NOBLOCK)
        return self.limits() == [cap_w] * 2

    def limits(self):
        return gpus_of(self.path)["limit_w"].tolist()

    def close(self):
        super().close()
        self.context.destroy(0)


@pytest.fixture
def machine(tmp_path, fake_library_path, hw_state):
    machine = Machine(tmp_path, fake_library_path, hw_state)
    yield machine
    machine.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_take_the_limit_back(machine, hw_state, number):
    actuator = machine.start()
    wait_until(machine.capped)
    actuator.send_signal(number)
    assert actuator.wait(20) == 0
    wait_until(lambda: machine.limits() == [700.0] * 2, 2.0)
    assert not list(hw_state.glob("*.json"))


@pytest.mark.slow
def test_silence_takes_the_limit_back_within_the_lease(machine):
    machine.start()
    wait_until(machine.capped)
    took_s = wait_until(lambda: machine.limits() == [700.0] * 2, LEASE_S + 1.0)
    assert took_s < LEASE_S + 0.6


@pytest.mark.slow
@pytest.mark.parametrize("by", ["restore", "the next start", "a start of locks"])
def test_a_killed_actuator_leaves_a_limit_that_is_taken_back(machine, hw_state, by):
    actuator = machine.start()
    wait_until(machine.capped)
    actuator.kill()
    actuator.wait()
    assert machine.limits() == [300.0] * 2
    if by == "restore":
        done = spawn("hw", "restore", env=machine.env)
        said, _ = done.communicate(timeout=60)
        assert done.returncode == 0
        assert said.count("power limit reset") == 2
    elif by == "the next start":
        machine.start()
    else:
        machine.start("--means", "lock")
    wait_until(lambda: machine.limits() == [700.0] * 2, 2.0)
    assert gpus_of(machine.path)["locked"].tolist() == [0, 0]


@pytest.mark.slow
def test_bounds_of_clocks_and_limits_do_not_go_together(machine):
    done = spawn("hw", "actuate", "--gpus", "d=0", "--means", "cap", "--freq-max", "900")
    _, said = done.communicate(timeout=60)
    assert done.returncode == 2
    assert "cannot be kept by power limits" in said
