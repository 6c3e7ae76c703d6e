"""Two hosts in network namespaces: engine and GPUs on ``b``, the controller on ``a``.

The clocks of the hosts differ by an hour and a half. Whatever is lost, late, cut or killed: no
clock stays locked, and the engine never waits.
"""

import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from hardware_helpers import REPOSITORY, end_all, gpus_of, read_until, spawn, wait_until
from lossy_network import HOSTS, LossyNetwork, why_not

from biscale_env.hardware.clocks.fake_gpus import create_state
from biscale_env.hardware.remote.keyring import make_keys

LEASE_S = 1.5
AHEAD_S = 5000  # of the controller's CLOCK_MONOTONIC
COMMANDS, STATUS, RECORDS = (
    f"tcp://{HOSTS[1]}:20510",
    f"tcp://{HOSTS[1]}:20511",
    f"tcp://{HOSTS[0]}:20600",
)
ENGINE = f"""
    import sys, time
    from biscale_env.hardware.engines.hook.engine_record import Detail, EngineRecord, Scheduled
    from biscale_env.hardware.engines.hook.engine_record import table
    from biscale_env.hardware.engines.hook.sender import Sender
    sender = Sender({RECORDS!r})
    assert not sender.dead
    begun, n = time.monotonic(), 0
    print("engine ready", flush=True)
    while True:
        now, n = time.monotonic(), n + 1
        detail = Detail(now, begun, running_start=table([now - 1.0]), running_tokens=table([50.0]),
                        cached_tokens=500, kv_use=0.01)
        sender.send(EngineRecord(counter_id=n, wall_time=0.02, detail=detail,
                                 scheduled_requests=Scheduled(num_decode_requests=1)))
        took_s = time.monotonic() - now
        if took_s > 1.0:  # the sender may be scheduled away, but it never waits for the network
            print(f"harmed: an iteration waited {{took_s:.2f}} s", flush=True)
        time.sleep(0.02)
"""


class Hosts:
    """The processes of both hosts."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="bh-"))
        self.network = LossyNetwork(self.folder)
        self.path = create_state(self.folder / "gpus", 1, delay_s=0.01)
        self.keys = dict(zip("ab", make_keys(self.folder / "k", ["a", "b"]), strict=True))
        self.log = self.folder / "clocks.jsonl"
        self.processes = []

    def keep(self, process, text):
        self.processes.append(process)
        read_until(process, text)
        return process

    def spawn(self, host, *arguments, before=()):
        env = {"BISCALE_HW_STATE": str(self.folder / "owned")}
        return spawn(*arguments, env=env, before=(*self.network.within(host), *before))

    def actuator(self):
        options = ["--gpus", "one=0", "--backend", f"fake:{self.path}", "--lease", str(LEASE_S)]
        options += ["--commands", COMMANDS, "--status", STATUS, "--keys", str(self.keys["b"])]
        options += ["--sockets", str(self.folder / "sb"), "--log", str(self.log)]
        return self.keep(self.spawn("b", "hw", "actuate", *options), "actuator ready")

    def controller(self):
        options = ["--phase", "decode", "--policy", "static:1200", "--group", "one"]
        options += ["--records", RECORDS, "--commands", COMMANDS, "--status", STATUS]
        options += ["--actuator", "b", "--keys", str(self.keys["a"]), "--lease", str(LEASE_S)]
        options += ["--sockets", str(self.folder / "sa")]
        skew = ("unshare", "--time", "--monotonic", str(AHEAD_S))
        return self.keep(
            self.spawn("a", "hw", "control", *options, before=skew), "controller ready"
        )

    def engine(self):
        env = {"PYTHONPATH": str(REPOSITORY), "BISCALE_KEYS": str(self.keys["b"])}
        process = subprocess.Popen(
            [*self.network.within("b"), sys.executable, "-u", "-c", textwrap.dedent(ENGINE)],
            env={**env, "BISCALE_KEYS_PEER": "a"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.keep(process, "engine ready")

    def clock(self):
        gpu = gpus_of(self.path)[0]
        return float(gpu["freq_mhz"]) if gpu["locked"] else 0.0

    def until(self, freq_mhz, timeout_s=40.0):
        return wait_until(lambda: self.clock() == freq_mhz, timeout_s)

    def kill(self, process):
        process.send_signal(signal.SIGKILL)  # `ip netns exec` and `unshare` have become it
        process.wait()

    def close(self):
        end_all(self.processes)
        self.network.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def hosts():
    if reason := why_not():
        pytest.skip(reason)
    made = Hosts()
    try:
        made.started = made.actuator(), made.controller(), made.engine()
        made.until(1200.0)
        yield made
        engine = made.processes[2]
        engine.kill()
        assert "harmed" not in engine.stdout.read()
    finally:
        made.close()


@pytest.mark.slow
def test_loss_and_delay_are_survived(hosts):
    """Under 10 % loss and 50 ms each way, what the lease takes comes back."""
    hosts.network.shape(loss=0.1, delay_s=0.05)
    locked = 0
    for _ in range(100):
        time.sleep(0.1)
        locked += hosts.clock() == 1200.0
    assert locked > 50
    hosts.network.shape()
    hosts.until(1200.0)


@pytest.mark.slow
def test_a_cut_wire_means_default_clocks_within_the_lease(hosts):
    for _ in range(3):
        hosts.network.shape(cut=True)
        took_s = hosts.until(0.0)
        assert took_s < LEASE_S + 1.0
        time.sleep(2.0)  # longer than TCP's first pauses
        assert hosts.clock() == 0.0
        hosts.network.shape()
        hosts.until(1200.0)


@pytest.mark.slow
def test_a_delay_beyond_the_lease_means_default_clocks(hosts):
    """Commands arrive, but each is older than the lease allows."""
    hosts.network.shape(delay_s=2 * LEASE_S)
    hosts.until(0.0)
    time.sleep(3 * LEASE_S)
    assert hosts.clock() == 0.0
    hosts.network.shape()
    hosts.until(1200.0)


@pytest.mark.slow
def test_each_process_is_killed_and_no_clock_stays_locked(hosts):
    actuator, controller, engine = hosts.started
    hosts.kill(controller)
    assert hosts.until(0.0) < LEASE_S + 1.0
    hosts.controller()
    hosts.until(1200.0)
    hosts.kill(actuator)
    assert hosts.clock() == 1200.0  # a lock outlives its process: the state file is for this
    hosts.actuator()
    hosts.until(1200.0)  # reset at its start, then commanded again
    assert '"cause":"start"' in hosts.log.read_text()
    hosts.kill(engine)
    hosts.processes[2] = hosts.engine()
    hosts.until(1200.0)
    hosts.kill(hosts.processes[2])
    assert hosts.until(0.0) < LEASE_S + 1.0
