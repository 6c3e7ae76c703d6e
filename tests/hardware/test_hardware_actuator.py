"""The actuator in this process, on the fake GPUs.

What it sets, skips, logs, refuses, and that it always gives clocks back.
"""

import json
import math
import os
import time

import msgspec
import numpy as np
import pytest
import zmq
from hardware_helpers import gpus_of

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks import owner
from biscale_env.hardware.clocks.backend import ClockDenied, GpuLost, ObserveOnly
from biscale_env.hardware.clocks.fake_gpus import FakeBackend, FakeState, create_state
from biscale_env.hardware.loop import wire
from biscale_env.hardware.loop.actuator import Actuator, ActuatorConfig
from biscale_env.hardware.loop.wire import ClockChange, Command

pytest_plugins = ["hardware_fixtures"]


class Bench:
    """An actuator on two groups of two fake GPUs, with a log."""

    def __init__(self, folder, observe=False, delay_s=0.0, **settings):
        self.folder = folder
        self.path = folder / "gpus"
        if not self.path.exists():
            create_state(self.path, 4, delay_s=delay_s)
        backend = FakeBackend(self.path)
        self.log = (folder / "log.jsonl").open("ab")
        groups = {"prefill": ("0", "1"), "decode": ("2", "3")}
        config = ActuatorConfig(groups, folder / "s", f"fake:{self.path}", **settings)
        self.actuator = Actuator(config, ObserveOnly(backend) if observe else backend, self.log)
        self.context = zmq.Context()
        self.sequence = 0

    def start(self):
        self.recovered = self.actuator.start()
        self.senders = {
            g: wire.newest_sender(self.context, wire.command_endpoint(self.folder / "s", g))
            for g in self.actuator.groups
        }
        return self

    def command(self, group, freq_mhz, age_s=0.0):
        self.sequence += 1
        message = Command(self.sequence, freq_mhz, time.monotonic(), age_s)
        self.senders[group].send(msgspec.msgpack.encode(message))

    def turns(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.actuator.turn(0.01)

    def wait(self, condition, timeout_s=3.0):
        """Turn the actuator until the condition holds; fails when it does not in time."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "the actuator never came there"
            self.actuator.turn(0.01)

    def applied(self):
        return {name: group.applied_mhz for name, group in self.actuator.groups.items()}

    def clocks(self):
        return [float(g["freq_mhz"]) for g in gpus_of(self.path)]

    def lines(self, cause=None):
        rows = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        return [r for r in rows if cause in (None, r["cause"])]

    def close(self):
        failures = self.actuator.stop()
        self.context.destroy(0)  # may be called again by the fixture
        self.log.close()
        return failures


def refused(actuator, kind, words=None):
    """It does not start, and what it had taken is free again.

    Sockets that stay open would make a failing test hang.
    """
    try:
        with pytest.raises(kind, match=words):
            actuator.start()
    finally:
        assert actuator.stop() == []


@pytest.fixture
def bench(tmp_path, hw_state):
    made = []

    def make(**settings):
        made.append(Bench(tmp_path, **settings).start())
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_command_moves_its_group_only_and_is_logged_with_all_times(bench):
    b = bench()
    b.command("decode", 1207.0)
    b.wait(lambda: b.lines("command"))
    assert b.clocks() == [1980.0, 1980.0, 1200.0, 1200.0]
    (row,) = b.lines("command")
    assert (row["group"], row["requested_mhz"], row["freq_mhz"], row["seen_mhz"]) == (
        "decode",
        1207.0,
        1200.0,
        1200.0,
    )
    assert row["decided_s"] <= row["received_s"] <= row["set_s"] <= row["seen_s"]


def test_the_newest_command_wins(bench):
    b = bench()
    for freq in (600.0, 900.0, 1500.0):
        b.command("prefill", freq)
    time.sleep(0.1)
    b.turns(0.1)
    assert [r["freq_mhz"] for r in b.lines("command")] == [1500.0]


def test_equal_clocks_are_skipped(bench):
    b = bench(lease_s=5)
    for _ in range(5):
        b.command("prefill", 900.0)
        time.sleep(0.02)
        b.turns(0.03)
    group = b.actuator.groups["prefill"]
    assert (group.commands, group.skipped) == (5, 4)
    assert [int(g["n_sets"]) for g in gpus_of(b.path)][:2] == [1, 1]


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        (100.0, 510.0),
        (5000.0, 1980.0),
        (1202.0, 1200.0),
        (math.nan, 0.0),
        (math.inf, 0.0),
        (-5.0, 0.0),
    ],
)
def test_clocks_stay_within_the_bounds_and_nonsense_is_no_clock(bench, asked, sent):
    b = bench()
    assert b.actuator.snap(b.actuator.groups["prefill"], asked) == sent


def test_bounds_of_the_configuration_hold(bench):
    b = bench(freq_min_mhz=900.0, freq_max_mhz=1200.0)
    b.command("prefill", 1980.0)
    b.wait(lambda: b.applied()["prefill"] == 1200.0)
    b.command("prefill", 510.0)
    b.wait(lambda: b.applied()["prefill"] == 900.0)


def test_the_lease_gives_the_clock_back(bench):
    b = bench(lease_s=0.2)
    b.command("prefill", 900.0)
    b.wait(lambda: b.applied()["prefill"] == 900.0)
    start = time.monotonic()
    b.wait(lambda: b.lines("lease"))
    assert time.monotonic() - start < 0.2 + 0.2
    assert b.clocks() == [1980.0] * 4
    b.command("prefill", 900.0)  # a controller that comes back is obeyed again
    b.wait(lambda: b.clocks()[0] == 900.0)


def test_a_controller_whose_engine_is_silent_cannot_prolong_the_lease(bench):
    b = bench(lease_s=0.3)
    b.command("prefill", 900.0)
    b.wait(lambda: b.applied()["prefill"] == 900.0)
    start = time.monotonic()
    while not b.lines("lease"):
        assert time.monotonic() - start < 1.0
        b.command("prefill", 900.0, age_s=time.monotonic() - start)
        b.turns(0.02)
    assert b.clocks()[0] == 1980.0
    b.command("prefill", 900.0, age_s=5.0)
    b.turns(0.1)
    assert b.clocks()[0] == 1980.0


@pytest.mark.parametrize("age", [math.nan, -1.0, math.inf])
def test_a_senseless_age_counts_as_dead(bench, age):
    b = bench()
    b.command("prefill", 900.0, age_s=age)
    b.turns(0.1)
    assert b.applied()["prefill"] == 0.0


def test_zero_hands_the_clock_back(bench):
    b = bench()
    b.command("prefill", 900.0)
    b.wait(lambda: b.clocks()[0] == 900.0)
    b.command("prefill", 0.0)
    b.wait(lambda: b.clocks()[0] == 1980.0)


def test_garbage_on_the_socket_is_ignored(bench):
    b = bench()
    b.senders["prefill"].send(b"\xff not a command")
    b.turns(0.05)
    b.command("prefill", 900.0)
    b.wait(lambda: b.clocks()[0] == 900.0)


def test_stop_resets_and_forgets(bench, hw_state):
    b = bench()
    assert len(list(hw_state.glob("*.json"))) == 4
    b.command("prefill", 900.0)
    b.command("decode", 600.0)
    b.wait(lambda: b.applied() == {"prefill": 900.0, "decode": 600.0})
    assert b.close() == []
    assert b.clocks() == [1980.0] * 4
    assert list(hw_state.glob("*")) == []
    assert {r["group"] for r in b.lines("exit")} == {"prefill", "decode"}


def test_observe_only_logs_and_touches_nothing(bench, hw_state):
    b = bench(observe=True)
    b.command("prefill", 900.0)
    b.wait(lambda: b.applied()["prefill"] == 900.0)
    b.close()
    assert b.lines("command")[0]["freq_mhz"] == 900.0
    gpus = gpus_of(b.path)
    assert [int(g["n_sets"] + g["n_resets"]) for g in gpus] == [0] * 4
    assert not hw_state.exists()


def test_heat_forbids_raising_but_not_lowering(bench):
    b = bench(lease_s=9)
    b.command("prefill", 1200.0)
    b.wait(lambda: b.applied()["prefill"] == 1200.0)
    with FakeState(b.path).locked() as gpus:
        gpus[1]["temperature_c"] = 90.0
    b.wait(lambda: b.lines("guard"))
    b.command("prefill", 1500.0)
    b.turns(0.1)
    assert b.applied()["prefill"] == 1200.0
    b.command("prefill", 0.0)  # handing back would raise it too
    b.turns(0.1)
    assert b.applied()["prefill"] == 1200.0
    b.command("prefill", 900.0)
    b.wait(lambda: b.applied()["prefill"] == 900.0)
    with FakeState(b.path).locked() as gpus:
        gpus[1]["temperature_c"] = 84.0  # below the limit, not yet by the hysteresis
    b.turns(0.25)
    assert len(b.lines("guard")) == 1
    with FakeState(b.path).locked() as gpus:
        gpus[1]["temperature_c"] = 80.0
    b.wait(lambda: len(b.lines("guard")) == 2)
    b.command("prefill", 1500.0)
    b.wait(lambda: b.applied()["prefill"] == 1500.0)


def test_a_power_brake_counts_as_throttled_and_the_power_cap_does_not(bench):
    b = bench()
    with FakeState(b.path).locked() as gpus:
        gpus[0]["reasons"] = 0x4
    b.turns(0.25)
    assert not b.lines("guard")
    with FakeState(b.path).locked() as gpus:
        gpus[0]["reasons"] = 0x80
    b.wait(lambda: b.lines("guard"))


def test_a_clock_that_never_comes_is_logged_as_such(bench):
    b = bench(delay_s=5.0, readback_s=0.1)
    b.command("prefill", 900.0)
    b.wait(lambda: b.lines("command"))
    (row,) = b.lines("command")
    assert row["seen_s"] is None
    assert row["seen_mhz"] == 1980.0


def test_a_clock_is_seen_only_when_every_gpu_of_the_group_shows_it(bench):
    b = bench(readback_s=0.1)
    with FakeState(b.path).locked() as gpus:
        gpus[1]["effective_mhz"] = 600.0  # something holds it down
    b.command("prefill", 900.0)
    b.wait(lambda: b.lines("command"))
    (row,) = b.lines("command")
    assert row["seen_s"] is None
    assert row["seen_mhz"] == 750.0


def test_cap_locks_from_the_lowest_clock_up(bench):
    class Spy(FakeBackend):
        pairs = ()

        def lock_all(self, uuids, low_mhz, high_mhz):
            self.pairs = (*self.pairs, (low_mhz, high_mhz))
            super().lock_all(uuids, low_mhz, high_mhz)

    for lower_bound, low in (("fixed", 900.0), ("cap", 510.0)):
        b = bench(lower_bound=lower_bound)
        spy = b.actuator.backend = Spy(b.path)
        b.command("prefill", 900.0)
        b.wait(lambda b=b: b.applied()["prefill"] == 900.0)
        assert spy.pairs == ((low, 900.0),)
        b.close()


def test_one_gpu_has_one_owner(bench, tmp_path, hw_state):
    b = bench()
    config = ActuatorConfig({"other": ("3",)}, tmp_path / "s2", f"fake:{b.path}")
    rival = Actuator(config, FakeBackend(b.path))
    refused(rival, BiscaleError, "owner already")
    assert len(list(hw_state.glob("*.json"))) == 4  # the rival left the owner's notes alone


def test_a_gpu_in_two_groups_is_refused(tmp_path, hw_state):
    path = create_state(tmp_path / "gpus", 2)
    config = ActuatorConfig({"a": ("0",), "b": ("1", "0")}, tmp_path / "s", "fake")
    refused(Actuator(config, FakeBackend(path)), BiscaleError, "twice")


def test_without_privilege_it_refuses_and_leaves_no_note(tmp_path, hw_state):
    path = create_state(tmp_path / "gpus", 2, privileged=False)
    actuator = Actuator(ActuatorConfig({"a": ("0",)}, tmp_path / "s", "fake"), FakeBackend(path))
    refused(actuator, ClockDenied)
    assert not list(hw_state.glob("*.json"))


def test_without_a_place_for_the_note_nothing_is_touched(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BISCALE_HW_STATE", str(tmp_path / "file" / "below"))
    path = create_state(tmp_path / "gpus", 1)
    actuator = Actuator(ActuatorConfig({"a": ("0",)}, tmp_path / "s", "fake"), FakeBackend(path))
    refused(actuator, BiscaleError, "BISCALE_HW_STATE")
    assert gpus_of(path)[0]["n_sets"] + gpus_of(path)[0]["n_resets"] == 0


def test_a_lost_gpu_ends_it_and_the_others_are_reset(bench):
    b = bench()
    b.command("prefill", 900.0)
    b.command("decode", 900.0)
    b.wait(lambda: b.applied() == {"prefill": 900.0, "decode": 900.0})
    with FakeState(b.path).locked() as gpus:
        gpus[0]["lost"] = 1
    with pytest.raises(GpuLost):
        b.turns(0.5)
    failures = b.close()
    assert len(failures) == 1
    assert [int(g["locked"]) for g in gpus_of(b.path)] == [1, 0, 0, 0]
    assert owner.noted() == [FakeBackend(b.path).devices()[0].uuid]  # for the next start


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"groups": {}}, "at least one group"),
        ({"groups": {"a": ()}}, "at least one group"),
        ({"lease_s": 60.0}, "lease"),
        ({"freq_min_mhz": 2000.0}, "not a range"),
        ({"lower_bound": "half"}, "fixed or cap"),
    ],
)
def test_settings_that_make_no_sense_are_named(tmp_path, settings, words):
    with pytest.raises(BiscaleError, match=words):
        ActuatorConfig(**{"groups": {"a": ("0",)}, "sockets": tmp_path, **settings})


def test_status_is_published_when_set_and_when_seen(bench):
    b = bench(delay_s=0.03)
    listener = wire.subscriber(b.context, wire.status_endpoint(b.folder / "s"))
    time.sleep(0.1)
    b.command("prefill", 900.0)
    heard = []

    def both():
        while listener.poll(0):
            change = msgspec.msgpack.decode(listener.recv(), type=ClockChange)
            heard.extend([change] if change.cause == "command" else [])
        return len(heard) >= 2

    b.wait(both)
    assert [h.freq_mhz for h in heard[:2]] == [900.0, 900.0]
    assert np.isnan(heard[0].seen_s)
    assert heard[1].seen_s - heard[1].set_s >= 0.028


def test_a_second_listener_does_not_steal_the_socket(tmp_path):
    context = zmq.Context()
    endpoint = wire.command_endpoint(tmp_path, "prefill")
    first = wire.newest_receiver(context, endpoint)
    with pytest.raises(BiscaleError, match="already"):
        wire.newest_receiver(context, endpoint)
    first.close(0)
    wire.unbind(endpoint)
    wire.newest_receiver(context, endpoint).close(0)
    wire.unbind(endpoint)
    context.destroy(0)


def test_a_socket_path_too_long_for_the_system_is_refused(tmp_path):
    with pytest.raises(BiscaleError, match="too long"):
        wire.command_endpoint(tmp_path / ("x" * 120), "prefill")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as sudo gives it")
def test_under_sudo_the_sockets_belong_to_the_caller(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("SUDO_UID", "65534")
    bench()
    owners = {p.name: p.stat().st_uid for p in (tmp_path / "s", *(tmp_path / "s").iterdir())}
    assert owners == {
        "s": 65534,
        "command-prefill.sock": 65534,
        "command-decode.sock": 65534,
        "status.sock": 65534,
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder away")
def test_a_socket_folder_of_somebody_else_is_refused(tmp_path, hw_state):
    path = create_state(tmp_path / "gpus", 1)
    (tmp_path / "s").mkdir()
    os.chown(tmp_path / "s", 12345, -1)
    actuator = Actuator(ActuatorConfig({"a": ("0",)}, tmp_path / "s", "fake"), FakeBackend(path))
    refused(actuator, BiscaleError, "belongs to somebody else")
