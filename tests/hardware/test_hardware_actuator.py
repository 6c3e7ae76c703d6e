"""The actuator in this process, on the fake GPUs.

What it sets, skips, logs, refuses, and that it always gives clocks back.
"""

import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
from hardware_helpers import gpus_of

from biscale_env.cli.hw.hw_options import open_log
from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.clocks import owner
from biscale_env.hardware.clocks.backend import (
    ClockDenied,
    ClockError,
    ClockReading,
    GpuLost,
)
from biscale_env.hardware.clocks.caller import sudo_caller
from biscale_env.hardware.clocks.fake_gpus import FakeBackend, FakeState, create_state
from biscale_env.hardware.clocks.observe_only import ObserveOnly
from biscale_env.hardware.loop import wire
from biscale_env.hardware.loop.actuator import Actuator
from biscale_env.hardware.loop.actuator_process import serve
from biscale_env.hardware.loop.gpu_group import ActuatorConfig
from biscale_env.hardware.loop.wire import ClockChange, Command
from biscale_env.hardware.profile.profiler import write_table

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


def listen(b):
    """A socket that hears all that the actuator publishes from now on, its subscription included.

    Until the publisher has taken in who listens, what it sends goes nowhere.
    """
    socket = wire.subscriber(b.context, wire.status_endpoint(b.folder / "s"))
    end = time.monotonic() + 10.0
    while not socket.poll(10):
        assert time.monotonic() < end, "nobody publishes"
        b.actuator._status.send(b"heard?")
    while socket.poll(50):
        assert socket.recv() == b"heard?"
    return socket


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
        (100.0, 345.0),
        (5000.0, 1980.0),
        (1202.0, 1200.0),
        (math.nan, 0.0),
        (math.inf, 0.0),
        (-5.0, 0.0),
    ],
)
def test_clocks_stay_within_the_bounds_and_nonsense_is_no_clock(bench, asked, sent):
    b = bench()
    assert b.actuator.groups["prefill"].snap(asked) == sent


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


def test_a_command_that_heard_of_its_engine_long_ago_does_not_shorten_the_lease(bench):
    b = bench(lease_s=1.0)
    group, now = b.actuator.groups["prefill"], time.monotonic()
    b.actuator.obey(group, Command(1, 900.0, now, 0.0), now)
    b.actuator.obey(group, Command(2, 1200.0, now, 0.9), now)
    assert group.alive_until_s == now + 1.0
    assert group.applied_mhz == 1200.0


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
    assert list(hw_state.glob("*.json")) == []
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("off_mhz", "shown"), [(0.0, True), (7.0, True), (8.0, False), (15, False)]
)
def test_a_clock_is_shown_to_half_a_step(bench, off_mhz, shown):
    group = bench().actuator.groups["prefill"]
    readings = [ClockReading(900.0, 0, 40.0, 100.0), ClockReading(900.0 - off_mhz, 0, 40.0, 100.0)]
    assert group.shows(900.0, readings) is shown


def test_cap_locks_from_the_lowest_clock_up(bench):
    class Spy(FakeBackend):
        pairs = ()

        def lock_each(self, uuids, low_mhz, high_mhz):
            self.pairs = (*self.pairs, (low_mhz, high_mhz))
            return super().lock_each(uuids, low_mhz, high_mhz)

    for lower_bound, low in (("fixed", 900.0), ("cap", 345.0)):
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
    assert owner.recorded() == [FakeBackend(b.path).devices()[0].uuid]  # for the next start


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"groups": {}}, "at least one group"),
        ({"groups": {"a": ()}}, "at least one group"),
        ({"lease_s": 60.0}, "lease"),
        ({"freq_min_mhz": 2000.0, "freq_max_mhz": 1980.0}, "not a range"),
        ({"lower_bound": "half"}, "fixed or cap"),
    ],
)
def test_settings_that_make_no_sense_are_named(tmp_path, settings, words):
    with pytest.raises(BiscaleError, match=words):
        ActuatorConfig(**{"groups": {"a": ("0",)}, "sockets": tmp_path, **settings})


def test_status_is_published_when_set_and_when_seen(bench):
    b = bench(delay_s=0.03)
    listener = listen(b)
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


CALLER = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as sudo gives it")


@pytest.fixture
def callers_home(monkeypatch):
    """A folder of the user who called sudo; pytest's own cannot be entered by others."""
    folder = Path(tempfile.mkdtemp(prefix="biscale-caller-"))
    os.chown(folder, CALLER, CALLER)
    monkeypatch.setenv("SUDO_UID", str(CALLER))
    monkeypatch.setenv("SUDO_GID", str(CALLER))
    yield folder
    shutil.rmtree(folder)


def under_sudo(tmp_path, sockets):
    """An actuator on fake GPUs that root itself has made."""
    path = tmp_path / "gpus"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SUDO_UID")
        create_state(path, 1, delay_s=0.0)
    return Actuator(ActuatorConfig({"a": ("0",)}, sockets, "fake"), FakeBackend(path))


@needs_root
def test_under_sudo_the_sockets_belong_to_the_caller(tmp_path, hw_state, callers_home):
    actuator = under_sudo(tmp_path, callers_home / "s")
    actuator.start()
    made = [callers_home / "s", *(callers_home / "s").iterdir()]
    assert len(made) == 1 + 2 * 2  # a lock file beside each socket
    assert {p.stat().st_uid for p in made} == {CALLER}
    assert (callers_home / "s").stat().st_mode & 0o777 == 0o700
    assert os.geteuid() == 0
    assert actuator.stop() == []
    assert os.geteuid() == 0


@needs_root
@pytest.mark.parametrize(
    "kind", ["root's", "a link to root's", "below root's", "nobody's to enter"]
)
def test_under_sudo_no_folder_of_root_is_given_away(tmp_path, hw_state, callers_home, kind):
    """`--sockets /etc` made /etc the caller's: with a sudo rule for this command, all of it."""
    roots = callers_home / "root"
    roots.mkdir()
    (roots / "secret").write_text("x")
    sockets = roots
    if kind == "a link to root's":
        sockets = callers_home / "link"
        sockets.symlink_to(roots)
    elif kind == "below root's":
        sockets = roots / "new"
    elif kind == "nobody's to enter":
        roots.chmod(0o700)
        sockets = roots / "new"
    before = {p: p.lstat() for p in (roots, roots / "secret", tmp_path)}
    refused(under_sudo(tmp_path, sockets), BiscaleError, "socket folder")
    for path, was in before.items():
        now = path.lstat()
        assert (now.st_uid, now.st_gid, now.st_mode) == (was.st_uid, was.st_gid, was.st_mode)
    assert not (roots / "new").exists()


@needs_root
def test_a_log_under_sudo_is_the_callers_and_reaches_no_file_of_root(tmp_path, callers_home):
    roots = tmp_path / "roots.jsonl"
    roots.write_text("")
    roots.chmod(0o644)
    link = callers_home / "log.jsonl"
    link.symlink_to(roots)
    with pytest.raises(BiscaleError, match="cannot write"):
        open_log(link)
    open_log(callers_home / "mine.jsonl").close()
    assert (callers_home / "mine.jsonl").stat().st_uid == CALLER


@needs_root
def test_a_profile_under_sudo_replaces_no_file_of_root(callers_home):
    (callers_home / "root").mkdir()
    (callers_home / "root" / "profile.csv").write_text("mine")
    with pytest.raises(PermissionError):
        write_table(callers_home / "root" / "profile.csv", [{"tp": 4}], {})
    assert (callers_home / "root" / "profile.csv").read_text() == "mine"
    write_table(callers_home / "profile.csv", [{"tp": 4}], {})
    assert (callers_home / "profile.csv").stat().st_uid == CALLER
    assert os.geteuid() == 0


@needs_root
def test_fake_gpus_made_under_sudo_replace_no_file_of_root(callers_home, tmp_path):
    (callers_home / "root").mkdir()
    (callers_home / "root" / "gpus").write_text("mine")
    with pytest.raises(PermissionError):
        create_state(callers_home / "root" / "gpus", 1)
    assert (callers_home / "root" / "gpus").read_text() == "mine"
    assert create_state(callers_home / "new" / "gpus", 1).stat().st_uid == CALLER


@needs_root
@pytest.mark.parametrize("kind", ["another user's", "everybody's", "a link"])
def test_a_state_folder_that_others_could_change_is_refused(tmp_path, monkeypatch, kind):
    folder = tmp_path / "state"
    folder.mkdir()
    if kind == "another user's":
        os.chown(folder, CALLER, -1)
    elif kind == "everybody's":
        folder.chmod(0o777)
    else:
        folder = tmp_path / "link"
        folder.symlink_to(tmp_path / "state")
    monkeypatch.setenv("BISCALE_HW_STATE", str(folder))
    path = create_state(tmp_path / "gpus", 1)
    actuator = Actuator(ActuatorConfig({"a": ("0",)}, tmp_path / "s", "fake"), FakeBackend(path))
    refused(actuator, BiscaleError, "BISCALE_HW_STATE")
    assert gpus_of(path)[0]["n_sets"] + gpus_of(path)[0]["n_resets"] == 0


def test_variables_of_sudo_that_are_no_numbers_are_named(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("SUDO_UID", "root")
    with pytest.raises(BiscaleError, match="SUDO_UID='root'"):
        sudo_caller()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder away")
def test_a_socket_folder_of_somebody_else_is_refused(tmp_path, hw_state):
    path = create_state(tmp_path / "gpus", 1)
    (tmp_path / "s").mkdir()
    os.chown(tmp_path / "s", 12345, -1)
    actuator = Actuator(ActuatorConfig({"a": ("0",)}, tmp_path / "s", "fake"), FakeBackend(path))
    refused(actuator, BiscaleError, "belongs to somebody else")


# --- readings that fail, a log that cannot be written ---------------------------------------------


class Unreadable(FakeBackend):
    """Readings of chosen GPUs fail that many times."""

    def __init__(self, path):
        super().__init__(path)
        self.left = {}

    def read(self, uuid):
        index = self.state.index(uuid)
        if self.left.get(index, 0) > 0:
            self.left[index] -= 1
            raise ClockError(f"clock of {uuid}: NVML error 999")
        return super().read(uuid)


def unreadable(b, **left):
    b.actuator.backend = backend = Unreadable(b.path)
    backend.left = {int(k[1:]): n for k, n in left.items()}
    return backend


@pytest.mark.slow
def test_a_few_failed_readings_of_the_guard_end_nothing(bench):
    b = bench(lease_s=9.0, failed_reads=3)
    b.command("prefill", 900.0)
    b.wait(lambda: b.applied()["prefill"] == 900.0)
    b.wait(lambda: b.lines("command"))
    backend = unreadable(b, _0=3)
    b.wait(lambda: backend.left[0] == 0)
    b.turns(0.25)  # a good one in between: the count begins anew
    backend.left[0] = 3
    b.wait(lambda: backend.left[0] == 0)
    b.turns(0.25)
    assert not b.actuator.groups["prefill"].released
    assert b.applied()["prefill"] == 900.0


def test_too_many_in_a_row_release_that_group_and_no_other(bench):
    b = bench(lease_s=9.0, failed_reads=3)
    for group in ("prefill", "decode"):
        b.command(group, 900.0)
    b.wait(lambda: b.applied() == {"prefill": 900.0, "decode": 900.0})
    b.wait(lambda: len(b.lines("command")) == 2)
    unreadable(b, _1=4)
    b.wait(lambda: b.lines("release"))
    assert b.clocks() == [1980.0, 1980.0, 900.0, 900.0]
    assert "999" in b.actuator.groups["prefill"].released
    b.command("prefill", 900.0)
    b.command("decode", 1200.0)
    b.wait(lambda: b.clocks()[2] == 1200.0)
    assert b.applied()["prefill"] == 0.0
    assert b.close() == []  # its GPUs could be reset


def test_what_the_guard_knew_holds_while_it_cannot_read(bench):
    b = bench(lease_s=9.0, failed_reads=50)
    b.command("prefill", 900.0)
    b.wait(lambda: b.applied()["prefill"] == 900.0)
    with FakeState(b.path).locked() as gpus:
        gpus[0]["temperature_c"] = 90.0
    b.wait(lambda: b.lines("guard"))
    backend = unreadable(b, _0=40)
    b.turns(0.25)
    b.command("prefill", 1200.0)
    b.turns(0.1)
    assert b.applied()["prefill"] == 900.0
    assert backend.left[0] > 0


@pytest.mark.slow
def test_the_process_ends_with_a_sentence_when_no_group_is_left(bench, capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *args: None)
    b = bench()
    b.actuator.stop()
    actuator = Actuator(b.actuator.config, Unreadable(b.path))
    actuator.backend.left = dict.fromkeys(range(4), 10**6)
    with pytest.raises(BiscaleError, match=r"'prefill' was released.*'decode' was released"):
        serve(actuator)
    assert [int(g["locked"]) for g in gpus_of(b.path)] == [0] * 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_the_log_keeps_no_gpu_locked(bench, monkeypatch):
    """Writing the log failed in the middle of stopping: the groups after it stayed locked."""
    monkeypatch.setattr("signal.signal", lambda *args: None)
    b = bench(lease_s=9.0)
    for group in ("prefill", "decode"):
        b.command(group, 900.0)
    b.wait(lambda: b.applied() == {"prefill": 900.0, "decode": 900.0})
    b.wait(lambda: len(b.lines("command")) == 2)
    b.actuator.log = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    b.command("prefill", 1200.0)
    with pytest.raises(BiscaleError, match="cannot write the log of clocks"):
        b.turns(1.0)
    assert any("log of clocks" in text for text in b.actuator.stop())
    assert [int(g["locked"]) for g in gpus_of(b.path)] == [0] * 4
    assert owner.recorded() == []


def test_an_error_that_is_none_of_ours_still_resets_and_says_what_was_not(
    bench, capsys, monkeypatch
):
    monkeypatch.setattr("signal.signal", lambda *args: None)
    b = bench()
    b.actuator.stop()

    class Broken(Actuator):
        def run(self):
            self.backend.lock_all([u for g in self.groups.values() for u in g.uuids], 900, 900)
            with FakeState(b.path).locked() as gpus:
                gpus[0]["lost"] = 1
            raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="mistake"):
        serve(Broken(b.actuator.config, FakeBackend(b.path)))
    assert [int(g["locked"]) for g in gpus_of(b.path)] == [1, 0, 0, 0]
    assert "could not be reset, run `biscale hw restore`" in capsys.readouterr().err


# --- what the controller is told ------------------------------------------------------------------


class Listener:
    """Hears all that an actuator publishes."""

    def __init__(self, b):
        self.b = b
        self.socket = listen(b)
        self.heard = []

    def of(self, cause):
        while self.socket.poll(0):
            self.heard.append(msgspec.msgpack.decode(self.socket.recv(), type=ClockChange))
        return [c for c in self.heard if c.cause == cause]


def test_every_refusal_is_published_and_the_guards_logged_once(bench):
    b = bench(lease_s=9)
    listener = Listener(b)
    b.command("prefill", 810.0)
    b.wait(lambda: b.applied()["prefill"] == 810.0)
    with FakeState(b.path).locked() as gpus:
        gpus[0]["temperature_c"] = 90.0
    b.wait(lambda: listener.of("guard"))
    assert listener.of("guard")[0].freq_mhz == 810.0
    for count in (1, 2, 3):
        b.command("prefill", 1500.0)
        b.wait(lambda count=count: len(listener.of("hold")) == count)
    assert {(c.requested_mhz, c.freq_mhz) for c in listener.of("hold")} == {(1500.0, 810.0)}
    assert [c.sequence for c in listener.of("hold")] == [2, 3, 4]
    assert len(b.lines("hold")) == 1
    b.command("prefill", 1980.0)
    b.wait(lambda: len(b.lines("hold")) == 2)


def test_a_clock_that_was_bounded_is_published_also_when_nothing_is_set(bench):
    b = bench(freq_max_mhz=1200.0, lease_s=9)
    listener = Listener(b)
    b.command("prefill", 1980.0)
    b.wait(lambda: listener.of("command"))
    assert (listener.of("command")[0].requested_mhz, listener.of("command")[0].freq_mhz) == (
        1980.0,
        1200.0,
    )
    b.command("prefill", 1500.0)
    b.wait(lambda: listener.of("skip"))
    assert (listener.of("skip")[0].requested_mhz, listener.of("skip")[0].freq_mhz) == (
        1500.0,
        1200.0,
    )
    b.command("prefill", 1200.0)
    b.turns(0.1)
    assert len(listener.of("skip")) == 1  # what is wanted is applied: nothing to tell


def test_commands_that_come_too_late_are_answered(bench):
    b = bench(lease_s=0.2)
    listener = Listener(b)
    b.command("prefill", 900.0, age_s=5.0)
    b.wait(lambda: listener.of("skip"))
    assert listener.of("skip")[0].freq_mhz == 0.0


def test_a_controller_that_starts_anew_learns_the_clock_that_is_applied(bench):
    b = bench(lease_s=9)
    b.command("prefill", 900.0)
    b.wait(lambda: b.applied()["prefill"] == 900.0)
    listener = Listener(b)
    b.sequence = 0
    b.command("prefill", 900.0)
    b.wait(lambda: listener.of("skip"))
    assert listener.of("skip")[0].freq_mhz == 900.0
