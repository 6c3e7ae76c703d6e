"""What a controller knows about its clock, when the actuator does something else than asked."""

import math
import time

import numpy as np
import pytest
from hardware_helpers import gpus_of
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_env.contract import ClockRange
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.hardware.clocks.fake_gpus import FakeBackend, FakeState, create_state
from biscale_env.hardware.engines.hook.engine_record import Detail, EngineRecord, Scheduled, table
from biscale_env.hardware.engines.hook.sender import Sender
from biscale_env.hardware.loop import wire
from biscale_env.hardware.loop.actuator import Actuator
from biscale_env.hardware.loop.clockview import ClockView
from biscale_env.hardware.loop.control import ControlConfig, ControlLoop
from biscale_env.hardware.loop.gpu_group import ActuatorConfig
from biscale_env.hardware.loop.wire import ClockChange

pytest_plugins = ["hardware_fixtures"]
CLOCKS = ClockRange(510.0, 1980.0, 15.0, (510.0, 1980.0))
DELAY_S = 0.05


def view():
    return ClockView(CLOCKS, DELAY_S)


def told(cause, freq_mhz, sequence=1, requested_mhz=math.nan, set_s=0.0, seen_s=math.nan):
    return ClockChange("g", cause, sequence, requested_mhz, freq_mhz, set_s=set_s, seen_s=seen_s)


def state(v):
    return v.freq_mhz, v.inflight_mhz, v.requested_mhz, v.apply_at_s


def test_a_refused_raise_is_no_clock_in_flight():
    v = view()
    v.request(810.0, 1.0, 1)
    v.settle(1.1)
    v.request(1980.0, 2.0, 2)
    v.hear(told("hold", 810.0, 2, 1980.0))
    assert state(v) == (810.0, 810.0, 810.0, math.inf)


def test_a_refusal_heard_after_the_delay_takes_the_clock_back():
    v = view()
    v.request(810.0, 1.0, 1)
    v.settle(1.1)
    v.request(1980.0, 2.0, 2)
    v.settle(2.5)
    assert v.freq_mhz == 1980.0
    v.hear(told("hold", 810.0, 2, 1980.0))
    assert state(v) == (810.0, 810.0, 810.0, math.inf)


def test_a_clock_in_flight_stays_there_when_what_waits_behind_it_is_refused():
    v = view()
    v.request(810.0, 1.0, 1)
    v.request(1980.0, 1.01, 2)
    v.hear(told("hold", 810.0, 2, 1980.0))
    assert state(v) == (1980.0, 810.0, 810.0, pytest.approx(1.05))


def test_a_newer_command_under_way_survives_the_refusal_of_an_older_one():
    v = view()
    v.request(810.0, 1.0, 1)
    v.settle(1.1)
    v.request(1500.0, 2.0, 2)
    v.request(600.0, 2.01, 3)
    v.hear(told("hold", 810.0, 2, 1500.0))
    assert state(v) == (810.0, 600.0, 600.0, pytest.approx(2.06))


def test_the_guard_alone_says_which_clock_is_applied():
    v = view()
    v.hear(told("guard", 810.0, -1))
    assert state(v) == (810.0, 810.0, 810.0, math.inf)


def test_a_bounded_clock_replaces_the_requested_one():
    v = view()
    v.request(1500.0, 1.0, 1)
    v.hear(told("command", 1200.0, 1, 1500.0, set_s=1.001))
    assert state(v) == (1980.0, 1200.0, 1200.0, pytest.approx(1.05))
    v.hear(told("command", 1200.0, 1, 1500.0, set_s=1.001, seen_s=1.04))
    assert state(v) == (1200.0, 1200.0, 1200.0, math.inf)


def test_an_older_bounded_clock_replaces_only_what_is_in_flight():
    v = view()
    v.request(1500.0, 1.0, 1)
    v.request(600.0, 1.01, 2)
    v.hear(told("command", 1200.0, 1, 1500.0, set_s=1.001))
    assert state(v) == (1980.0, 1200.0, 600.0, pytest.approx(1.05))


def test_a_clock_that_was_set_and_not_known_begins_its_delay():
    v = view()
    v.hear(told("command", 900.0, 7, 900.0, set_s=3.0))
    assert state(v) == (1980.0, 900.0, 900.0, pytest.approx(3.05))


def test_a_clock_seen_is_the_clock_whatever_was_thought():
    v = view()
    v.hear(told("command", 900.0, 7, 900.0, set_s=3.0, seen_s=3.01))
    assert state(v) == (900.0, 900.0, 900.0, math.inf)


def test_an_old_clock_seen_late_changes_nothing():
    v = view()
    v.request(900.0, 1.0, 1)
    v.settle(1.1)
    v.request(600.0, 1.2, 2)
    before = state(v)
    v.hear(told("command", 1200.0, 0, 1200.0, seen_s=1.21))
    assert state(v) == before


@pytest.mark.parametrize("cause", ["lease", "start", "exit", "release", "skip", "hold", "command"])
def test_a_reset_is_driver_control(cause):
    v = view()
    v.request(900.0, 1.0, 1)
    v.settle(2.0)
    v.hear(told(cause, 0.0, 1))
    assert state(v) == (1980.0, 1980.0, 1980.0, math.inf)


def test_a_command_that_failed_is_driver_control():
    v = view()
    v.request(900.0, 1.0, 1)
    v.hear(told("error", 900.0, 1))
    assert state(v) == (1980.0, 1980.0, 1980.0, math.inf)


def test_a_change_without_a_clock_says_nothing():
    v = view()
    v.request(900.0, 1.0, 1)
    before = state(v)
    v.hear(told("guard", math.nan))
    assert state(v) == before


GRID = st.sampled_from([510.0, 810.0, 1200.0, 1500.0, 1980.0])


@settings(max_examples=150, deadline=None)
@given(
    commands=st.lists(
        st.tuples(st.floats(0.001, 0.2), GRID, st.sampled_from(["set", "hold", "bound"])),
        min_size=1,
        max_size=12,
    ),
    lag=st.integers(0, 3),
)
def test_once_everything_is_heard_the_view_is_what_the_actuator_did(commands, lag):
    """Whatever the actuator refuses or bounds, and up to three commands late."""
    v, now, applied, messages = view(), 0.0, 1980.0, []
    for sequence, (gap, freq, fate) in enumerate(commands, start=1):
        now += gap
        v.request(freq, now, sequence)
        wanted = min(freq, 1200.0) if fate == "bound" else freq
        if fate == "hold" or wanted == applied:
            messages.append(told("hold", applied, sequence, freq))
        else:
            applied = wanted
            messages.append(told("command", applied, sequence, freq, set_s=now))
        while len(messages) > lag:
            v.hear(messages.pop(0))
    for message in messages:
        v.hear(message)
    v.settle(now + 1.0)
    assert state(v) == (applied, applied, applied, math.inf)


# --- with a real actuator -------------------------------------------------------------------------


class Fixed:
    """Asks for one clock and keeps what it saw."""

    def __init__(self, clocks, freq_mhz):
        self.clocks, self.freq_mhz, self.seen = clocks, freq_mhz, []

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        self.seen.append(observation.copy())
        return self.clocks.to_action(np.full((1,), self.freq_mhz)), state


class Pair:
    """A controller and an actuator in this process, on fake GPUs, with an engine's sender."""

    def __init__(self, folder, **bounds):
        self.path = create_state(folder / "gpus", 2, delay_s=0.0)
        sockets = folder / "s"
        config = ActuatorConfig({"prefill": ("0", "1")}, sockets, "fake", lease_s=9.0, **bounds)
        self.actuator = Actuator(config, FakeBackend(self.path))
        self.actuator.start()
        self.plant = Plant(PlantSettings.of("prefill"))
        self.policy = Fixed(self.plant.clocks, 810.0)
        self.loop = ControlLoop(self.plant, self.policy, ControlConfig(sockets, delay_s=0.01))
        self.sender = Sender(wire.record_endpoint(sockets, "prefill"))
        time.sleep(0.2)  # subscriptions travel

    def step(self):
        """One engine record, and all that follows from it."""
        now = time.monotonic()
        detail = Detail(
            now, now - 10.0, table([now, 8, 0]), arrived=1, arrived_tokens=8, recent=table([now, 8])
        )
        seen = len(self.policy.seen)
        record = EngineRecord(
            counter_id=1, wall_time=0.1, scheduled_requests=Scheduled(1, 8), detail=detail
        )
        self.sender.send(record)
        end = now + 5.0
        while len(self.policy.seen) == seen:
            assert time.monotonic() < end, "no decision"
            self.loop.turn(0.01)
        for _ in range(5):
            self.actuator.turn(0.005)
            self.loop.turn(0.005)

    def shown(self, feature):
        """The newest observation's value of a feature."""
        return self.plant.spec.value(self.policy.seen[-1], feature)

    def close(self):
        self.sender.close()
        self.loop.close()
        assert self.actuator.stop() == []


@pytest.fixture
def pair(tmp_path, hw_state):
    made = []

    def make(**bounds):
        made.append(Pair(tmp_path, **bounds))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.slow
def test_during_a_thermal_hold_the_policy_sees_the_clock_that_is_held(pair):
    """It saw the clock that it had asked for, 1980 MHz, while the GPUs ran at 810."""
    p = pair()
    for _ in range(3):
        p.step()
    with FakeState(p.path).locked() as gpus:
        gpus[0]["temperature_c"] = 95.0
    for _ in range(30):
        p.actuator.turn(0.01)
    p.policy.freq_mhz = 1980.0
    for _ in range(4):
        p.step()
    assert [float(g["freq_mhz"]) for g in gpus_of(p.path)] == [810.0, 810.0]
    assert p.shown("freq_current") == pytest.approx(810.0)
    assert p.shown("freq_pending") == pytest.approx(810.0)


def test_bounds_of_the_actuator_are_seen_by_the_policy(pair):
    p = pair(freq_max_mhz=1200.0)
    p.policy.freq_mhz = 1980.0
    for _ in range(5):
        p.step()
    assert p.shown("freq_current") == pytest.approx(1200.0)
    p.policy.freq_mhz = 1500.0
    for _ in range(4):
        p.step()
    assert p.shown("freq_current") == pytest.approx(1200.0)


def test_a_released_group_is_seen_as_driver_control(pair):
    p = pair()
    for _ in range(3):
        p.step()
    p.actuator._release(p.actuator.groups["prefill"], "test")
    for _ in range(3):
        p.step()
    assert p.shown("freq_current") == pytest.approx(1980.0)
    assert [float(g["freq_mhz"]) for g in gpus_of(p.path)] == [1980.0, 1980.0]
