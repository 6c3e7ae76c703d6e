"""Child processes, latency settings, and systems where none of this can run."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from hardware_helpers import REPOSITORY, wait_until
from typer.testing import CliRunner

from biscale_env.cli import build
from biscale_env.core.errors import BiscaleError
from biscale_env.core.platforms import need_linux
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.hardware.clocks import owner
from biscale_env.hardware.clocks.fake_gpus import create_state
from biscale_env.hardware.loop.control import ControlConfig, ControlLoop
from biscale_env.hardware.loop.processes import (
    SWITCH_S,
    Child,
    elevated_priority,
    tuned_for_latency,
)

pytest_plugins = ["hardware_fixtures"]


def alive(pid):
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def actuate(tmp_path, hw_state):
    """Arguments of an actuator on fake GPUs, which runs until it is told to end."""
    path = create_state(tmp_path / "gpus", 1)
    sockets = str(tmp_path / "s")
    return ["hw", "actuate", "--gpus", "x=0", "--backend", f"fake:{path}", "--sockets", sockets]


@pytest.mark.slow
def test_a_child_outlives_the_thread_that_made_it(actuate):
    """The kernel ends a child when its parent's *thread* ends; a notebook's cell may be one."""
    made = []
    thread = threading.Thread(target=lambda: made.append(Child("actuator", actuate)))
    thread.start()
    thread.join()
    (child,) = made
    try:
        child.wait_for("actuator ready", 30)
        time.sleep(0.5)
        assert child.running
    finally:
        assert child.stop() == 0


@pytest.mark.slow
def test_a_child_does_not_outlive_a_killed_parent_that_made_it_in_a_thread(actuate):
    code = f"""
        import threading, time
        from biscale_env.hardware.loop.processes import Child
        made = []
        thread = threading.Thread(target=lambda: made.append(Child("actuator", {actuate!r})))
        thread.start()
        thread.join()
        made[0].wait_for("actuator ready", 30)
        print(made[0].process.pid, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.send_signal(signal.SIGKILL)
        wait_until(lambda: not alive(pid), 10)
        assert owner.recorded() == []  # it ended in order
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


@pytest.mark.slow
def test_a_refusal_with_the_word_already_is_not_ready(actuate, tmp_path):
    first = Child("first", actuate)
    try:
        first.wait_for("actuator ready", 30)
        second = Child("second", [*actuate, "--observe-only"])  # the same sockets
        try:
            with pytest.raises(BiscaleError, match="second: another process listens"):
                second.wait_for("ready", 30)
        finally:
            assert second.stop() == 2
    finally:
        first.stop()


@pytest.mark.slow
def test_latency_settings_end_with_their_block():
    gc.unfreeze()  # what a library or another test has frozen in this process
    before, frozen = sys.getswitchinterval(), gc.get_freeze_count()
    with contextlib.suppress(KeyError), tuned_for_latency():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        assert gc.get_freeze_count() > frozen
        raise KeyError
    assert sys.getswitchinterval() == before
    assert gc.get_freeze_count() == frozen


def test_objects_that_somebody_else_has_frozen_stay_so():
    gc.freeze()
    try:
        with tuned_for_latency():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


@pytest.mark.slow
def test_a_control_loop_changes_nothing_in_the_process_of_its_caller(tmp_path):
    class Anything:
        def predict(self, observation, state=None, episode_start=None, deterministic=True):
            return [0.0], state

    before, frozen = sys.getswitchinterval(), gc.get_freeze_count()
    config = ControlConfig(tmp_path / "s", delay_s=0.05)
    loop = ControlLoop(Plant(PlantSettings.of("prefill")), Anything(), config)
    loop.turn(0.01)
    loop.close()
    assert (sys.getswitchinterval(), gc.get_freeze_count()) == (before, frozen)


def test_priority_is_given_back():
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with elevated_priority():
        assert os.getpriority(os.PRIO_PROCESS, 0) <= before
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


# --- other systems --------------------------------------------------------------------------------

COMMANDS = [
    ["hw", "doctor"],
    ["hw", "actuate", "--gpus", "x=0"],
    ["hw", "control", "--phase", "decode", "--policy", "max"],
    ["hw", "restore"],
    ["hw", "clock-latency"],
    ["hw", "emulate"],
    ["hw", "bridge", "--phase", "decode", "--source", "http://x"],
    ["replay", "--trace", "x", "--decode", "http://x"],
    ["profile"],
]


@pytest.mark.parametrize("system", ["darwin", "win32"])
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_other_systems_are_told_in_one_sentence(monkeypatch, system, words):
    monkeypatch.setattr(sys, "platform", system)
    done = CliRunner().invoke(build(), words)
    assert isinstance(done.exception, BiscaleError)
    assert str(done.exception).startswith(f"the hardware commands need Linux (this is {system})")


def test_a_gpu_is_not_said_to_have_an_owner_where_names_cannot_be_held(monkeypatch, hw_state):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BiscaleError, match="need Linux") as caught:
        owner.OwnerLock("GPU-x")
    assert not isinstance(caught.value, owner.OwnerBusy)
    need_linux_said = str(caught.value)
    monkeypatch.setattr(sys, "platform", "linux")
    need_linux("anything")
    assert "owner already" not in need_linux_said


def test_a_name_that_the_system_refuses_for_another_reason_has_no_owner(monkeypatch):
    class Refusing:
        def __init__(self, *args):
            pass

        def bind(self, name):
            raise PermissionError(13, "Permission denied")

        def close(self):
            pass

    monkeypatch.setattr(owner.socket, "socket", Refusing)
    with pytest.raises(BiscaleError, match="Permission denied"):
        owner.hold("x")
