"""Tier 2: real processes, the real nvidia-ml-py on the C stand-in, and kill -9 on any of them.

Every clock comes back.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hardware_helpers import REPOSITORY, FakeMachine, gpus_of, read_until, spawn, wait_until

from biscale_env.hardware.clocks.fake_gpus import FakeState

pytest_plugins = ["hardware_fixtures"]
LEASE_S = 0.6


class Machine(FakeMachine):
    """With an actuator of both phases, controllers and engines."""

    def actuator(self, *extra, env=None):
        options = ["--gpus", "prefill=0", "--gpus", "decode=1", "--lease", str(LEASE_S)]
        options += ["--sockets", str(self.folder / "s"), "--log", str(self.folder / "log.jsonl")]
        process = spawn("hw", "actuate", *options, *extra, env={**self.env, **(env or {})})
        self.processes.append(process)
        return process

    def ready(self, *extra):
        process = self.actuator(*extra)
        self.said = read_until(process, "actuator ready")
        return process

    def script(self, code):
        """A Python process of its own, e.g. a controller or an engine hook."""
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", textwrap.dedent(code)],
            cwd=REPOSITORY,
            env={**os.environ, **self.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def controller(self, freq_mhz=900.0, group="prefill", age="0.0"):
        """Repeats its command every 50 ms, as a living controller does."""
        return self.script(f"""
            import time, msgspec, zmq
            from pathlib import Path
            from biscale_env.hardware.loop import wire
            endpoint = wire.command_endpoint(Path({str(self.folder / "s")!r}), {group!r})
            sender = wire.newest_sender(zmq.Context(), endpoint)
            start, n = time.monotonic(), 0
            while True:
                n += 1
                command = wire.Command(n, {freq_mhz}, time.monotonic(), {age})
                sender.send(msgspec.msgpack.encode(command), zmq.NOBLOCK)
                time.sleep(0.05)
        """)

    def clocks(self):
        return [float(g["freq_mhz"]) for g in gpus_of(self.path)]

    def locked(self):
        return [int(g["locked"]) for g in gpus_of(self.path)]

    def log(self):
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def machine(tmp_path, fake_library_path, hw_state):
    machine = Machine(tmp_path, fake_library_path, hw_state)
    yield machine
    machine.close()


@pytest.mark.slow
def test_kill_the_controller_and_the_clock_is_back_within_the_lease(machine):
    machine.ready()
    controller = machine.controller()
    wait_until(lambda: machine.clocks()[0] == 900.0)
    controller.kill()
    took_s = wait_until(lambda: machine.locked() == [0, 0], LEASE_S + 1.0)
    assert took_s < LEASE_S + 0.6
    wait_until(lambda: machine.log()[-1]["cause"] == "lease", 2.0)  # logged after it is reset


@pytest.mark.slow
def test_the_controller_may_come_back(machine):
    machine.ready()
    machine.controller().kill()
    machine.controller(1200.0)
    wait_until(lambda: machine.clocks()[0] == 1200.0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reset_before_the_end(machine, number, hw_state):
    actuator = machine.ready()
    machine.controller()
    wait_until(lambda: machine.clocks()[0] == 900.0)
    actuator.send_signal(number)
    assert actuator.wait(20) == 0
    assert machine.locked() == [0, 0]
    assert not list(hw_state.glob("*.json"))


@pytest.mark.slow
def test_kill_the_actuator_and_the_next_start_recovers(machine, hw_state):
    actuator = machine.ready()
    machine.controller()
    wait_until(lambda: machine.clocks()[0] == 900.0)
    actuator.kill()
    actuator.wait()
    assert machine.locked() == [1, 0]  # a lock outlives its process: this is what the note is for
    assert len(list(hw_state.glob("*.json"))) == 2
    machine.close()
    machine.processes.clear()
    machine.ready()
    assert machine.said.count("reset") == 2
    assert machine.locked() == [0, 0]


@pytest.mark.slow
def test_kill_both_and_restore_brings_the_clock_back(machine, hw_state):
    actuator = machine.ready()
    controller = machine.controller()
    wait_until(lambda: machine.clocks()[0] == 900.0)
    actuator.kill()
    controller.kill()
    actuator.wait()
    assert machine.locked() == [1, 0]
    restore = spawn("hw", "restore", env=machine.env)
    out, _ = restore.communicate(timeout=30)
    assert restore.returncode == 0
    assert out.count("reset") == 2
    assert machine.locked() == [0, 0]
    assert not list(hw_state.glob("*.json"))


@pytest.mark.slow
def test_restore_leaves_a_living_owner_alone(machine):
    machine.ready()
    machine.controller()
    wait_until(lambda: machine.clocks()[0] == 900.0)
    restore = spawn("hw", "restore", env=machine.env)
    out, _ = restore.communicate(timeout=30)
    assert "nothing to restore" in out
    assert machine.clocks()[0] == 900.0


@pytest.mark.slow
def test_without_privilege_one_sentence_and_exit_code_2(machine, hw_state):
    actuator = machine.actuator(env={"FAKE_NVML_PRIV": "0"})
    out, err = actuator.communicate(timeout=30)
    assert actuator.returncode == 2
    assert "ready" not in out
    assert err.startswith("biscale: ")
    assert err.count("\n") == 1
    assert "root" in err
    assert "--observe-only" in err
    assert not list(hw_state.glob("*.json"))


@pytest.mark.slow
def test_observe_only_needs_no_privilege(machine):
    actuator = machine.actuator("--observe-only", env={"FAKE_NVML_PRIV": "0"})
    read_until(actuator, "actuator ready")
    machine.controller()
    wait_until(lambda: any(r["cause"] == "command" for r in machine.log()))
    assert [int(g["n_sets"]) for g in gpus_of(machine.path)] == [0, 0]


@pytest.mark.slow
def test_no_driver_one_sentence_and_exit_code_2(machine):
    actuator = machine.actuator(env={"FAKE_NVML_STATE": "/nowhere"})
    _, err = actuator.communicate(timeout=30)
    assert actuator.returncode == 2
    assert err.count("\n") == 1
    assert "no NVIDIA driver" in err


@pytest.mark.slow
def test_a_second_actuator_is_refused_and_the_first_goes_on(machine):
    machine.ready()
    machine.controller()
    second = machine.actuator("--sockets", str(machine.folder / "s2"))
    _, err = second.communicate(timeout=30)
    assert second.returncode == 2
    assert "owner already" in err
    wait_until(lambda: machine.clocks()[0] == 900.0)


@pytest.mark.slow
def test_of_actuators_started_at_once_exactly_one_becomes_the_owner(machine, hw_state):
    rivals = [machine.actuator("--sockets", str(machine.folder / f"s{k}")) for k in range(4)]

    def settled():
        return (
            sum(p.poll() is not None for p in rivals) == 3
            and len(list(hw_state.glob("*.json"))) == 2
        )

    wait_until(settled, 60)
    (winner,) = [p for p in rivals if p.poll() is None]
    read_until(winner, "actuator ready")
    for loser in rivals:
        if loser is not winner:
            assert loser.returncode == 2
            assert "owner already" in loser.stderr.read()
    winner.terminate()
    assert winner.wait(10) == 0
    assert not list(hw_state.glob("*.json"))


@pytest.mark.slow
def test_a_gpu_that_falls_off_the_bus_ends_it_with_the_rest_reset(machine):
    actuator = machine.ready()
    machine.controller()
    machine.controller(group="decode")
    wait_until(lambda: machine.clocks() == [900.0, 900.0])
    with FakeState(machine.path).locked() as gpus:
        gpus[0]["lost"] = 1
    _, err = actuator.communicate(timeout=30)
    assert actuator.returncode == 2
    assert "lost" in err
    assert "biscale hw restore" in err
    assert machine.locked() == [1, 0]


@pytest.mark.slow
def test_the_actuator_waits_without_using_the_processor(machine):
    actuator = machine.ready()
    machine.controller()
    wait_until(lambda: machine.clocks()[0] == 900.0)

    def cpu_s():
        fields = Path(f"/proc/{actuator.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = cpu_s()
    time.sleep(1.0)
    assert cpu_s() - before < 0.2
