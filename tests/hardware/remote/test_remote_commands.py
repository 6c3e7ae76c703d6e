"""Commands between machines: who is heard, what is fresh, and that clocks come back."""

import json
import math
import time

import msgspec
import numpy as np
import pytest
import zmq
from hardware_helpers import free_port, gpus_of

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.hardware.clocks.fake_gpus import FakeBackend, create_state
from biscale_env.hardware.engines.hook.engine_record import Detail, EngineRecord, Scheduled, table
from biscale_env.hardware.engines.hook.sender import Sender
from biscale_env.hardware.loop.actuator import Actuator
from biscale_env.hardware.loop.control import ControlConfig, ControlLoop
from biscale_env.hardware.loop.gpu_group import ActuatorConfig
from biscale_env.hardware.loop.wire import Command
from biscale_env.hardware.remote.channels import Channels, take_frames
from biscale_env.hardware.remote.command_desk import BEACON, Beacon, DeskSettings, RemoteCommand
from biscale_env.hardware.remote.controller_links import ActuatorLink, ControllerAddresses
from biscale_env.hardware.remote.keyring import Keyring, make_keys
from biscale_env.hardware.remote.peer_time import WINDOW_S, PeerTime

pytest_plugins = ["hardware_fixtures"]
LEASE_S = 1.5


class Site:
    """Machine ``a`` with an actuator on two fake GPUs; machine ``b`` that may command it."""

    def __init__(self, folder, keys=True, lease_s=LEASE_S):
        self.folder, self.path = folder, create_state(folder / "gpus", 2, delay_s=0.0)
        self.keys = dict(zip("ab", make_keys(folder / "keys", ["a", "b"]), strict=True))
        ports = free_port(), free_port()
        self.commands, self.status = (f"tcp://127.0.0.1:{port}" for port in ports)
        desk = DeskSettings(self.commands, self.status, self.keys["a"] if keys else None)
        config = ActuatorConfig(
            {"one": ("0",), "two": ("1",)},
            folder / "s",
            f"fake:{self.path}",
            lease_s=lease_s,
            desk=desk,
        )
        self.log = (folder / "log.jsonl").open("ab")
        self.actuator = Actuator(config, FakeBackend(self.path), self.log)
        self.actuator.start()
        self.opened = []
        self.links = []  # a socket that nobody holds is closed with what it had to send

    def channels(self, keys):
        self.opened.append(Channels(keys))
        return self.opened[-1]

    def link(self, group="one", keys="b"):
        """What a controller on machine ``b`` holds, once it has heard a beacon."""
        ring = None if keys is None else Keyring.read(self.keys[keys])
        addresses = ControllerAddresses("ipc:///unused", self.commands, self.status, "a")
        link = ActuatorLink(addresses, group, zmq.Context.instance(), self.channels(ring))
        self.links.append(link)
        self.wait(lambda: has_heard_a_beacon(link))  # a clock change may come before it
        return link

    def wait(self, condition, timeout_s=20.0):
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, "it never came to that"
            self.actuator.turn(0.01)

    def turns(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.actuator.turn(0.01)

    def clocks(self):
        return [float(g["freq_mhz"]) if g["locked"] else 0.0 for g in gpus_of(self.path)]

    def refusals(self):
        lines = (self.folder / "log.jsonl").read_text().splitlines()
        return [r["error"] for r in map(json.loads, lines) if r["cause"] == "refused"]

    def close(self):
        for channels in self.opened:
            channels.close()
        self.actuator.stop()
        self.log.close()


def has_heard_a_beacon(link):
    list(link.heard(time.monotonic()))
    return link._beacon is not None


@pytest.fixture
def site(tmp_path, hw_state):
    made = []

    def make(**settings):
        made.append(Site(tmp_path, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def command(sequence, freq_mhz=900.0, age_s=0.0):
    return Command(sequence, freq_mhz, time.monotonic(), age_s)


def test_a_machine_of_the_deployment_commands_and_hears_of_it(site):
    s = site()
    link = s.link()
    assert link.send(command(1), time.monotonic())
    s.wait(lambda: s.clocks() == [900.0, 0.0])
    heard = []
    s.wait(
        lambda: (
            heard.extend(link.heard(time.monotonic())) or any(c.cause == "command" for c in heard)
        )
    )
    assert heard[-1].freq_mhz == 900.0
    assert not s.refusals()


@pytest.mark.slow
def test_the_lease_ends_when_commands_end(site):
    s = site()
    assert s.link().send(command(1), time.monotonic())
    s.wait(lambda: s.clocks()[0] == 900.0)
    begun = time.monotonic()
    s.wait(lambda: s.clocks()[0] == 0.0)
    assert time.monotonic() - begun < LEASE_S + 1.0


@pytest.mark.slow
@pytest.mark.parametrize("stranger", ["no key", "another deployment's key", "a wrong machine"])
def test_strangers_are_turned_away_and_logged(site, tmp_path, stranger):
    s = site()
    ring = Keyring.read(s.keys["b"])
    if stranger == "another deployment's key":
        (other,) = make_keys(tmp_path / "other", ["b"])
        ring = Keyring(Keyring.read(other).public, Keyring.read(other).secret, ring.peers)
    peer = "b" if stranger == "a wrong machine" else "a"
    channels = s.channels(None if stranger == "no key" else ring)
    push = channels.connect(zmq.PUSH, s.commands, peer)
    message = RemoteCommand("one", 1, s.actuator._desk.token, time.monotonic(), 0.0, command(1))
    push.send(msgspec.msgpack.encode(message))
    s.wait(lambda: s.refusals())
    assert "turned away" in s.refusals()[0]
    s.turns(0.3)
    assert s.clocks() == [0.0, 0.0]


@pytest.mark.slow
def test_what_is_published_is_not_read_by_strangers(site):
    s = site()
    eavesdropper = s.channels(None).connect(zmq.SUB, s.status, None)
    s.turns(0.8)
    assert not eavesdropper.poll(0)


def raw_sender(s):
    """A socket of machine ``b``, the newest beacon, and what sends a message as it is."""
    ring = Keyring.read(s.keys["b"])
    channels = s.channels(ring)
    status = channels.connect(zmq.SUB, s.status, "a")
    heard = {}  # newest by topic: a clock change may come before a beacon
    s.wait(lambda: heard.update([take_frames(status) or ("", "")]) or BEACON in heard)
    data = heard[BEACON]
    push = channels.connect(zmq.PUSH, s.commands, "a")
    return msgspec.msgpack.decode(data, type=Beacon), push


def message_of(beacon, sequence=1, **changes):
    base = RemoteCommand("one", 7, beacon.token, beacon.time_s, 0.0, command(sequence))
    return msgspec.msgpack.encode(msgspec.structs.replace(base, **changes))


@pytest.mark.slow
def test_a_repeated_command_is_refused_and_the_clock_goes_back(site):
    s = site()
    beacon, push = raw_sender(s)
    recorded = message_of(beacon)
    push.send(recorded)
    s.wait(lambda: s.clocks()[0] == 900.0)
    begun = time.monotonic()
    while s.clocks()[0] and time.monotonic() - begun < 2 * LEASE_S:
        push.send(recorded)  # it would prolong the lease for ever
        s.turns(0.05)
    assert s.clocks()[0] == 0.0
    assert time.monotonic() - begun < LEASE_S + 1.0
    assert any("repeated" in why for why in s.refusals())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"token": 1}, "no beacon of this actuator"),
        ({"beacon_s": -1e6}, "more than the lease"),
        ({"beacon_s": 1e12}, "more than the lease"),
        ({"beacon_s": math.nan}, "more than the lease"),
        ({"group": "three"}, "no such group"),
    ],
)
def test_commands_that_are_not_fresh_or_not_for_us_are_refused(site, changes, why):
    s = site()
    beacon, push = raw_sender(s)
    push.send(message_of(beacon, **changes))
    s.wait(lambda: s.refusals())
    assert why in s.refusals()[0]
    assert s.clocks() == [0.0, 0.0]


@pytest.mark.parametrize("data", [b"", b"\xff\x00", b"\xc1" * 9, msgspec.msgpack.encode([1, 2])])
def test_what_is_no_command_is_refused(site, data):
    s = site()
    _, push = raw_sender(s)
    push.send(data)
    s.wait(lambda: s.refusals())
    assert s.clocks() == [0.0, 0.0]


def test_a_replaced_controller_is_not_heard_again(site):
    s = site()
    first, second = s.link(), s.link()
    first.send(command(1, 900.0), time.monotonic())
    s.wait(lambda: s.clocks()[0] == 900.0)
    second.send(command(1, 1200.0), time.monotonic())
    s.wait(lambda: s.clocks()[0] == 1200.0)
    first.send(command(2, 600.0), time.monotonic())
    s.wait(lambda: any("replaced" in why for why in s.refusals()))
    assert s.clocks()[0] == 1200.0


def test_commands_of_an_earlier_life_of_the_actuator_are_refused(site, tmp_path):
    s = site()
    beacon, _ = raw_sender(s)
    old = message_of(beacon)
    s.close()
    again = site()
    assert again.actuator._desk.token != beacon.token
    _, push = raw_sender(again)
    push.send(old)
    again.wait(lambda: again.refusals())
    assert again.clocks() == [0.0, 0.0]


def test_refusals_in_a_row_are_told_once_a_second(site):
    s = site()
    beacon, push = raw_sender(s)
    for _ in range(50):
        push.send(message_of(beacon, token=1))
        s.turns(0.01)
    assert len(s.refusals()) <= 2


def test_without_keys_loopback_works_and_nothing_else_is_opened(site, tmp_path):
    s = site(keys=False)
    assert s.link(keys=None).send(command(1), time.monotonic())
    s.wait(lambda: s.clocks()[0] == 900.0)
    channels = s.channels(None)
    for call in (channels.bind, lambda k, e: channels.connect(k, e, None)):
        with pytest.raises(BiscaleError, match="without keys"):
            call(zmq.PULL, "tcp://0.0.0.0:1")
    with pytest.raises(BiscaleError, match="tcp://HOST:PORT"):
        channels.bind(zmq.PULL, "127.0.0.1:1")


def test_keys_are_kept_private_and_not_replaced(tmp_path):
    first, _ = make_keys(tmp_path, ["a", "b"])
    before = (first / "own.key_secret").read_bytes()
    assert (first / "own.key_secret").stat().st_mode & 0o077 == 0
    make_keys(tmp_path, ["a", "b", "c"])
    assert (first / "own.key_secret").read_bytes() == before
    assert set(Keyring.read(first).peers) == {"a", "b", "c"}
    assert "secret" not in repr(Keyring.read(first))
    (first / "own.key_secret").chmod(0o644)
    with pytest.raises(BiscaleError, match="chmod 600"):
        Keyring.read(first)
    with pytest.raises(BiscaleError, match="biscale hw keys"):
        Keyring.read(tmp_path / "nothing")
    with pytest.raises(BiscaleError, match="'d'"):
        Keyring.read(tmp_path / "b").public_of("d")


def test_the_clock_of_another_machine_is_known_to_the_fastest_message():
    rng, ahead_s = np.random.default_rng(0), 5000.0
    peer, worst = PeerTime(), 0.0
    for k in range(400):
        now_s = 0.05 * k
        delay_s = 0.001 + (0.5 if k % 50 == 0 and k else rng.exponential(0.01))
        believed = peer.hear(now_s + ahead_s - delay_s, now_s)
        assert believed <= now_s + 1e-9
        if k > 20:
            worst = max(worst, abs(believed - (now_s - delay_s)))
    assert worst < 0.002  # all but the fastest transit itself
    assert peer.here(ahead_s) == pytest.approx(0.001, abs=1e-3)


def test_a_drifting_clock_is_followed():
    peer = PeerTime()
    for k in range(4000):
        now_s = 0.05 * k
        peer.hear(now_s * (1 - 5e-5), now_s)  # 50 ppm slow: the difference grows
    assert now_s - peer.here(now_s * (1 - 5e-5)) < 2.5 * WINDOW_S * 5e-5


class Constant:
    """Answers the lowest clock."""

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        return np.array([-1.0], dtype=np.float32), None


@pytest.mark.slow
def test_records_over_tcp_lead_to_commands_over_tcp(site, monkeypatch):
    """Engine on ``a``, controller on ``b``, actuator on ``a``: all of it authenticated."""
    s = site()
    port = free_port(2)
    records = f"tcp://127.0.0.1:{port}"
    plant = Plant(PlantSettings.of("prefill"))
    addresses = ControllerAddresses(records, s.commands, s.status, "a", s.keys["b"])
    config = ControlConfig(s.folder / "s", 0.0, lease_s=LEASE_S, group="one", addresses=addresses)
    loop = ControlLoop(plant, Constant(), config)
    monkeypatch.setenv("BISCALE_KEYS", str(s.keys["a"]))
    monkeypatch.setenv("BISCALE_KEYS_PEER", "b")
    sender = Sender(records, heartbeat_s=0.05)
    assert not sender.dead

    def step():
        now = time.monotonic()
        detail = Detail(now, now - 1, table([now - 0.1, 100, 0]), arrived=1, arrived_tokens=100)
        sender.send(EngineRecord(counter_id=1, scheduled_requests=Scheduled(1, 100), detail=detail))
        loop.turn(0.01)

    s.wait(lambda: step() or s.clocks()[0] == plant.clocks.freq_min_mhz)
    end = time.monotonic() + 2 * LEASE_S  # heartbeats alone keep the lease of an idle engine
    while time.monotonic() < end:
        loop.turn(0.01)
        s.actuator.turn(0.01)
    assert s.clocks()[0] == plant.clocks.freq_min_mhz
    sender.close()
    s.wait(lambda: loop.turn(0.01) or s.clocks()[0] == 0.0)
    loop.close()


def test_the_hook_calls_nobody_beyond_loopback_without_keys(monkeypatch):
    monkeypatch.delenv("BISCALE_KEYS", raising=False)
    assert Sender("tcp://192.0.2.1:5000").dead
    assert Sender("tcp://no-address").dead
    ours = Sender("tcp://127.0.0.1:5000")
    assert not ours.dead
    ours.close()
