"""The control loop in this process.

Records in, commands out, the lease, and policies that misbehave.
"""

import json
import math
import time

import msgspec
import numpy as np
import pandas as pd
import pytest
import zmq

from biscale_env.contract import ClockRange
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.hardware.clocks.fake_gpus import FakeBackend, FakeState, create_state
from biscale_env.hardware.engines.hook.engine_record import Detail, EngineRecord, Scheduled, table
from biscale_env.hardware.engines.hook.sender import Sender
from biscale_env.hardware.loop import wire
from biscale_env.hardware.loop.control import ControlConfig, ControlLoop, PowerMeter
from biscale_env.hardware.loop.recorded_policy import RecordedPolicy, load_policy
from biscale_env.hardware.loop.wire import ClockChange, Command


class Constant:
    """Answers one action, and keeps what it saw."""

    def __init__(self, action=0.0):
        self.action, self.seen = action, []

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        self.seen.append(observation.copy())
        if isinstance(self.action, Exception):
            raise self.action
        return np.array([self.action], dtype=np.float32), (state or 0) + 1


class Bench:
    """A loop with an engine's sender on one side and an actuator's socket on the other."""

    def __init__(self, folder, policy, phase="prefill", **settings):
        self.plant = Plant(PlantSettings.of(phase))
        self.log = (folder / "decisions.jsonl").open("ab")
        config = ControlConfig(folder, delay_s=0.05, **settings)
        self.loop = ControlLoop(self.plant, policy, config, self.log)
        self.context = zmq.Context()
        self.commands = wire.newest_receiver(self.context, wire.command_endpoint(folder, phase))
        self.status = wire.publisher(self.context, wire.status_endpoint(folder))
        self.endpoint = wire.record_endpoint(folder, phase)
        self.sender = Sender(self.endpoint, heartbeat_s=0.05)
        self.folder = folder

    def record(self, tokens=1000):
        now = time.monotonic()
        detail = Detail(
            now,
            now - 10.0,
            table([now - 0.1, tokens, 0]),
            arrived=1,
            arrived_tokens=tokens,
            recent=table([now - 0.1, tokens]),
        )
        self.sender.send(
            EngineRecord(
                counter_id=1, wall_time=0.1, scheduled_requests=Scheduled(1, tokens), detail=detail
            )
        )

    def next_command(self, timeout_s=2.0):
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            self.loop.turn(0.02)
            if self.commands.poll(0):
                return msgspec.msgpack.decode(self.commands.recv(), type=Command)
        return None

    def close(self):
        self.sender.close()
        self.loop.close()
        self.context.destroy(0)
        for endpoint in (
            wire.command_endpoint(self.folder, self.plant.phase),
            wire.status_endpoint(self.folder),
        ):
            wire.unbind(endpoint)
        self.log.close()


@pytest.fixture
def bench(tmp_path):
    made = []

    def make(policy, **settings):
        made.append(Bench(tmp_path, policy, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_record_becomes_a_command_and_a_line_in_the_log(bench, tmp_path):
    policy = Constant(-1.0)
    b = bench(policy)
    b.record(1234)
    command = b.next_command()
    assert command.freq_mhz == b.plant.clocks.freq_min_mhz
    assert b.plant.spec.value(policy.seen[-1], "queue_tokens") == pytest.approx(1234)
    b.log.flush()
    (line,) = [json.loads(text) for text in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert line["time_s"] < line["received_s"] <= line["decided_s"] <= line["sent_s"]
    assert (line["counter"], line["freq_mhz"], line["action"]) == (1, command.freq_mhz, -1.0)
    assert np.allclose(line["observation"], policy.seen[-1])


def test_clocks_are_snapped_to_the_grid(bench):
    b = bench(Constant(0.0))
    b.record()
    assert b.next_command().freq_mhz % 15 == 0


@pytest.mark.slow
def test_heartbeats_keep_the_lease_of_an_idle_engine_alive(bench):
    b = bench(Constant(0.5), lease_s=0.5)
    b.record()
    first = b.next_command()
    ages = []
    end = time.monotonic() + 1.2
    while time.monotonic() < end:
        command = b.next_command(0.3)
        if command:
            assert command.freq_mhz == first.freq_mhz
            ages.append(command.engine_age_s)
    assert len(ages) >= 6
    assert max(ages) < 0.3


@pytest.mark.slow
def test_a_dead_engine_is_not_kept_alive(bench):
    b = bench(Constant(0.5), lease_s=0.4)
    b.record()
    assert b.next_command()
    b.sender.close()  # heartbeats end with the engine
    last_age, heard = 0.0, time.monotonic()
    while command := b.next_command(0.6):
        last_age = command.engine_age_s
        assert time.monotonic() - heard < 2.0
    assert last_age < 0.4


@pytest.mark.slow
def test_keep_alives_say_how_long_ago_the_engine_was_heard(bench):
    b = bench(Constant(0.5), lease_s=1.0)
    b.record()
    assert b.next_command().engine_age_s < 0.15
    b.sender.close()
    ages = []
    while command := b.next_command(0.6):
        ages.append(command.engine_age_s)
    assert ages == sorted(ages)
    assert ages[-1] > 0.5


def test_what_happens_to_other_groups_is_not_the_clock_of_this_one(bench):
    b = bench(Constant(-1.0))
    seen = ClockChange("prefill", "command", 1, 900.0, 900.0, 0.0, 0.0, 0.0, 0.0)
    end = time.monotonic() + 2
    while b.loop.view.freq_mhz != 900.0:
        assert time.monotonic() < end
        b.status.send(msgspec.msgpack.encode(seen))
        b.loop.turn(0.02)
    b.status.send(msgspec.msgpack.encode(ClockChange("decode", "lease", -1, 0.0, 0.0)))
    for _ in range(10):
        b.loop.turn(0.02)
    assert b.loop.view.freq_mhz == 900.0


def test_before_the_first_record_nothing_is_sent(bench):
    b = bench(Constant(0.5), lease_s=0.5)
    assert b.next_command(0.5) is None


def test_the_controller_hears_what_the_actuator_does(bench):
    policy = Constant(-1.0)
    b = bench(policy)
    b.record()
    b.next_command()
    change = ClockChange("prefill", "lease", -1, 0.0, 0.0, math.nan, 0.0, time.monotonic())
    end = time.monotonic() + 2
    while b.loop.view.requested_mhz != 1980.0 and time.monotonic() < end:
        b.status.send(msgspec.msgpack.encode(change))
        b.loop.turn(0.02)
    assert b.loop.view.freq_mhz == b.loop.view.requested_mhz == 1980.0


@pytest.mark.parametrize(
    ("answer", "words"), [(RuntimeError("boom"), "RuntimeError: boom"), (math.nan, "answered nan")]
)
def test_a_policy_that_fails_ends_the_loop_with_a_sentence(bench, answer, words):
    policy = Constant(0.0)
    b = bench(policy)
    policy.action = answer
    b.record()
    with pytest.raises(BiscaleError, match=words):
        b.next_command()


def test_records_of_another_schema_end_the_loop_with_a_sentence(bench):
    b = bench(Constant())
    b.sender.send(EngineRecord(version=3))
    with pytest.raises(BiscaleError, match="version 3"):
        b.next_command()


def test_an_idle_heartbeat_is_a_sign_of_life_and_no_decision(bench):
    b = bench(Constant())
    b.sender.send(EngineRecord())
    assert b.next_command(0.5) is None
    assert b.loop.heard_s > 0


def test_one_controller_per_phase(bench, tmp_path):
    b = bench(Constant())
    with pytest.raises(BiscaleError, match="another process listens"):
        ControlLoop(b.plant, Constant(), ControlConfig(tmp_path, delay_s=0.05))


def test_the_power_meter_reads_when_it_is_due_and_not_before(tmp_path):
    path = create_state(tmp_path / "gpus", 2, delay_s=0.0)
    backend = FakeBackend(path)
    meter = PowerMeter(backend, [d.uuid for d in backend.devices()], 0.2)
    assert np.isnan(meter.power_w)
    meter.read_if_due()
    full_w = 100.0 + 50.0 * 1.98**3
    assert meter.power_w == pytest.approx(full_w)
    with FakeState(path).locked() as gpus:
        gpus["toy_idle_w"] = 200.0
    meter.read_if_due()
    assert meter.power_w == pytest.approx(full_w)  # too early for another look
    time.sleep(0.2)
    meter.read_if_due()
    assert meter.power_w == pytest.approx(full_w + 100.0)
    PowerMeter(None, ()).read_if_due()  # nothing to read from is no error


@pytest.mark.parametrize(
    ("name", "phase"),
    [("mpc", "prefill"), ("slack", "decode"), ("static:1200", "prefill"), ("max", "decode")],
)
def test_registry_policies_load_and_answer(name, phase):
    plant = Plant(PlantSettings.of(phase))
    action, _ = load_policy(name, plant).predict(np.zeros(plant.spec.dim, dtype=np.float32))
    assert action.shape == (1,)
    assert -1 <= action[0] <= 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("slack", "not for prefill"),
        ("nonsense", "unknown policy"),
        ("./none.zip", "no checkpoint"),
        ("none.parquet", "cannot read"),
    ],
)
def test_policies_that_cannot_be_are_named(name, words):
    with pytest.raises(BiscaleError, match=words):
        load_policy(name, Plant(PlantSettings.of("prefill")))


CLOCKS = ClockRange(510.0, 1980.0, 15.0, (510.0, 1980.0))


def test_a_recording_is_played_back_by_time():
    policy = RecordedPolicy(np.array([0.0, 1.0, 2.0]), np.array([600.0, 900.0, 1200.0]), CLOCKS)
    assert [policy.at(t) for t in (-1.0, 0.0, 0.99, 1.0, 5.0)] == [
        600.0,
        600.0,
        600.0,
        900.0,
        1200.0,
    ]
    action, _ = policy.predict(np.zeros(3, dtype=np.float32))
    assert CLOCKS.to_freq_mhz(action)[0] == pytest.approx(600.0)
    assert policy.predict(np.zeros((2, 3), dtype=np.float32))[0].shape == (2, 1)


def test_a_recording_from_a_file(tmp_path):
    frame = pd.DataFrame({"time_s": [1.0, 0.0], "freq_requested_mhz": [900.0, 600.0]})
    frame.to_parquet(tmp_path / "r.parquet")
    plant = Plant(PlantSettings.of("decode"))
    assert load_policy(str(tmp_path / "r.parquet"), plant).at(0.5) == 600.0
    frame.drop(columns="freq_requested_mhz").to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(BiscaleError, match="freq_requested_mhz"):
        load_policy(str(tmp_path / "bad.parquet"), plant)
    frame.assign(run_id=["a", "b"]).to_parquet(tmp_path / "timelines.parquet")
    with pytest.raises(BiscaleError, match="several runs"):
        load_policy(str(tmp_path / "timelines.parquet"), plant)


def test_an_empty_recording_is_refused():
    with pytest.raises(BiscaleError, match="at least one"):
        RecordedPolicy(np.zeros(0), np.zeros(0), CLOCKS)
