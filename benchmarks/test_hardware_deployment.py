"""A deployment on this machine: sixteen controllers on one core, and what watching costs."""

import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
from meter import Meter, Metric
from rich.console import Console

from biscale_env.config.loader import validate
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.hardware.deploy.deployment_file import Deployment
from biscale_env.hardware.deploy.live_status import LOOK_S, StatusBoard
from biscale_env.hardware.deploy.machine_feed import InstanceState, MachineState
from biscale_env.hardware.deploy.router_http import RouterState
from biscale_env.hardware.engines.hook.engine_record import Detail, EngineRecord, Scheduled, encode
from biscale_env.hardware.engines.hook.sender import Sender
from biscale_env.hardware.loop import wire
from biscale_env.hardware.loop.control import ControlConfig, ControlLoop, Decision
from biscale_env.hardware.loop.processes import Child
from biscale_env.hardware.loop.recorded_policy import load_policy

pytestmark = pytest.mark.hardware
INSTANCES, RATE_HZ, DURATION_S = 16, 50.0, 10.0
DECISIONS = 2000
TOLD = 10  # states of a machine between two looks of `hw status`


def record(counter: int) -> EngineRecord:
    """A decode iteration of 64 requests."""
    now, rng = time.monotonic(), np.random.default_rng(counter)
    made = rng.integers(10, 400, 64).astype(float)
    detail = Detail(
        now,
        1.0,
        running_start=(now - 0.03 * made).tobytes(),
        running_tokens=made.tobytes(),
        cached_tokens=60_000 + counter,
        kv_use=0.2,
        arrived=counter,
        arrived_tokens=1000 * counter,
        recent=np.array([now - 0.01, 1000.0]).tobytes(),
    )
    work = Scheduled(num_decode_requests=64, sum_decode_kv_tokens=60_000 + counter)
    return EngineRecord(counter_id=counter, wall_time=0.02, scheduled_requests=work, detail=detail)


@contextmanager
def folder() -> Iterator[Path]:
    """A short path, as sockets want it."""
    made = Path(tempfile.mkdtemp(prefix="biscale-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def decision_s(policy: str) -> float:
    """Processor time from a record to its command, all of a controller's turn, mean."""
    plant = Plant(PlantSettings.of("decode", actuation_delay_s=0.05))
    with folder() as home:
        loop = ControlLoop(plant, load_policy(policy, plant), ControlConfig(home, 0.05))
        data = [encode(record(k)) for k in range(DECISIONS + 100)]
        try:
            for k in range(100):
                loop._decide(data[k], time.monotonic())
            spent_s = time.thread_time()
            for k in range(100, len(data)):
                loop._decide(data[k], time.monotonic())
            return (time.thread_time() - spent_s) / DECISIONS
        finally:
            loop.close()


@pytest.mark.parametrize("policy", ["slack", "agent"])
def test_share_of_a_core(meter: Meter, policy: str) -> None:
    """What sixteen controllers take of one core; other programs disturb this little."""
    took_s = meter.once(lambda: decision_s(policy))
    share = INSTANCES * RATE_HZ * took_s
    label = f"16 controllers at 50 iterations/s, {policy}, share of one core"
    meter.keep(Metric(label, 100 * share, "%", 50.0, "lower", took_s * 1e6, "us a decision"))


def record_to_command_s(policy: str) -> np.ndarray:
    """From the hook's record to the command, of all instances, controllers pinned to one core."""
    cores = sorted(os.sched_getaffinity(0))
    with folder() as home, zmq.Context() as context:
        names = [f"i{k}" for k in range(INSTANCES)]
        inlets = [wire.newest_receiver(context, wire.command_endpoint(home, n)) for n in names]
        os.sched_setaffinity(0, {cores[0]})
        children = []
        for name in names:
            options = {
                "phase": "decode",
                "policy": policy,
                "sockets": str(home),
                "group": name,
                "delay": 0.05,
                "records": f"ipc://{home}/r-{name}.sock",
                "log": str(home / f"{name}.jsonl"),
            }
            file = home / f"{name}.yaml"
            children.append(Child.with_settings(name, ("hw", "control"), options, file))
        for child in children:
            child.wait_for("controller ready", 600)
        os.sched_setaffinity(0, {cores[-1]})
        senders = [Sender(f"ipc://{home}/r-{name}.sock") for name in names]
        _send_in_turn(senders)
        for child in children:
            child.stop()
        for sender in senders:
            sender.close()
        for inlet in inlets:
            inlet.close(0)
        os.sched_setaffinity(0, set(cores))
        rows = [line for n in names for line in (home / f"{n}.jsonl").read_bytes().splitlines()]
        told = msgspec.json.decode(b"[" + b",".join(rows) + b"]", type=list[Decision])
    return np.array([d.sent_s - d.time_s for d in told if d.counter > RATE_HZ])


def _send_in_turn(senders: list[Sender]) -> None:
    """Every sender fifty records a second, evenly spread."""
    begin, gap_s = time.monotonic(), 1 / (RATE_HZ * len(senders))
    for k in range(int(DURATION_S / gap_s)):
        time.sleep(max(begin + k * gap_s - time.monotonic(), 0.0))
        senders[k % len(senders)].send(record(k // len(senders) + 1))


@pytest.mark.parametrize("policy", ["slack", "agent"])
def test_sixteen_controllers_on_one_core(meter: Meter, policy: str) -> None:
    """Sixteen processes that share one core; wants a machine that nobody else uses."""
    took_ms = 1e3 * meter.once(lambda: record_to_command_s(policy))
    p50, p99 = np.quantile(took_ms, [0.5, 0.99])
    label = f"16 controllers on one core, {policy}, record to command, P99"
    meter.keep(Metric(label, float(p99), "ms", 1.0, "lower", float(p50)))
    assert len(took_ms) > 0.9 * (DURATION_S - 1) * RATE_HZ * INSTANCES


def watched() -> tuple[Deployment, list[MachineState]]:
    """Sixteen instances on two machines, and what these tell."""
    instances, states = {}, []
    for m, machine in enumerate(("a", "b")):
        mine = []
        for k in range(8):
            name, phase = f"{machine}_{k}", "prefill" if k < 4 else "decode"
            mine.append(InstanceState(name, phase, "slack", 1200.0, 1200.0, 900.0, 1e6, 1.2, 50.0))
            instances[name] = {
                "phase": phase,
                "machine": machine,
                "gpus": [4 * k + g for g in range(4)],
                "engine": f"http://127.0.0.{m + 1}:{8100 + k}",
            }
        states.append(MachineState(machine, 0.0, {"actuator": "up"}, mine))
    machines = {
        name: {"host": f"127.0.0.{k + 1}", "backend": "emulated", "emulated_gpus": 32}
        for k, name in enumerate(("a", "b"))
    }
    data = {"name": "bench", "machines": machines, "instances": instances}
    return validate(data, Deployment, "bench"), states


class _Told:
    """Stands where the feed is read."""

    def __init__(self, states: list[MachineState]) -> None:
        self.encoded = [(s.machine, msgspec.msgpack.encode(s)) for s in states]

    def messages(self, seconds: float) -> Iterator[tuple[str, str, MachineState]]:
        """The states, decoded."""
        for machine, data in self.encoded:
            yield machine, machine, msgspec.msgpack.decode(data, type=MachineState)


def status_share(looks: int = 100) -> float:
    """Processor time of decoding and drawing, per second of watching."""
    deployment, states = watched()
    told = _Told(states)
    board = StatusBoard(deployment, told)  # type: ignore[arg-type]
    board.router = RouterState({}, requests=1000, failed=0, rate_rps=7.0)
    console = Console(file=io.StringIO(), width=160)
    spent_s = 0.0
    for k in range(looks + 5):
        begin_s = time.thread_time()
        for _ in range(TOLD):
            for machine, _, state in told.messages(0.0):
                board.states[machine], board.heard_s[machine] = state, time.monotonic()
        console.print(board.render())
        spent_s += (time.thread_time() - begin_s) if k >= 5 else 0.0
    return spent_s / looks / LOOK_S


def test_watching(meter: Meter) -> None:
    """`biscale hw status` of sixteen instances."""
    share = meter.once(status_share)
    meter.keep(Metric("hw status, 16 instances, share of one core", 100 * share, "%", 1.0))
