"""Tier 1 in the loop: what it plans, that surplus drains before counts fall, and base clocks."""

import itertools
import json
import math
import time

import msgspec
import numpy as np
import pytest
import zmq
from test_pool_router import deployment

from biscale_env.config.loader import validate
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.hardware.deploy import tier1_loop
from biscale_env.hardware.deploy.deployed_raw import DeployedRaw
from biscale_env.hardware.deploy.deployment_file import Deployment, Tier1Settings
from biscale_env.hardware.deploy.machine_feed import PlacementEvent, PlannedInstance
from biscale_env.hardware.deploy.pool_router import InstanceLoad
from biscale_env.hardware.deploy.router_http import RouterState, SeenRequest
from biscale_env.hardware.deploy.scaling import Advise, DynamoScale, KubernetesScale, scaler_of
from biscale_env.hardware.deploy.tier1_loop import Tier1Loop, WindowPlanner, window_of
from biscale_env.hardware.loop import wire
from biscale_env.hardware.loop.control import ControlConfig, ControlLoop
from biscale_env.hardware.loop.recorded_policy import load_policy
from controllers.placement.ilp import CapacityEntry, CapacityTable, NoPlacementError, biscale_plan

pytest_plugins = ["hardware_fixtures"]
CLOCKS = (1005.0, 1980.0)
TABLE = CapacityTable(
    tuple(
        CapacityEntry(phase, tp, mhz, rate * tp / 4, joules)
        for phase in ("prefill", "decode")
        for tp in (4, 8)
        for mhz, rate, joules in zip(CLOCKS, (2.0, 3.0), (100.0, 120.0), strict=True)
    )
)


def planned(adapter="router", **changes):
    base = deployment(prefill=2, decode=2).model_dump(mode="json")
    tier1 = {"window_s": 10.0, "alpha": 0.0, "adapter": adapter, **changes}
    return validate({**base, "tier1": tier1}, Deployment, "test")


def planner(**changes):
    made = WindowPlanner(planned(**changes))
    entries = tuple(e for e in TABLE.entries if (e.phase, e.tp) in made.there)
    made.table = CapacityTable(entries)
    return made


@pytest.mark.parametrize(
    ("rate", "clocks"),
    [(1.5, [1005]), (2.5, [1980]), (4.0, [1005, 1005]), (4.9, [1005, 1980]), (6.0, [1980, 1980])],
)
def test_the_least_power_that_serves_the_load(rate, clocks):
    chosen, label = planner().plan(rate)
    for phase in ("prefill", "decode"):
        mine = {name: one for name, one in chosen.items() if name.startswith(phase)}
        assert sorted(one.freq_mhz for one in mine.values()) == clocks
        assert list(mine) == [f"{phase}_{k}" for k in range(len(clocks))]  # in the file's order
    assert "TP4" in label


def test_too_much_load_opens_everything_at_the_highest_clock():
    chosen, label = planner().plan(100.0)
    assert len(chosen) == 4
    assert {one.freq_mhz for one in chosen.values()} == {1980.0}
    assert "100 requests/s" in label


def test_at_most_so_many_instances_of_a_kind_is_the_best_of_all_such():
    """Brute force over every count."""
    most = {("prefill", 4): 1, ("prefill", 8): 1, ("decode", 4): 2, ("decode", 8): 0}
    entries = TABLE.usable()
    best = math.inf
    for counts in itertools.product(range(3), repeat=len(entries)):
        used = sum(n * e.tp for n, e in zip(counts, entries, strict=True))
        kinds = {k: 0 for k in most}
        served = {"prefill": 0.0, "decode": 0.0}
        power = 0.0
        for n, e in zip(counts, entries, strict=True):
            kinds[e.phase, e.tp] += n
            served[e.phase] += n * e.rate_rps
            power += n * e.power_w
        fits = used <= 24 and all(kinds[k] <= most[k] for k in most)
        if fits and min(served.values()) >= 4.5:
            best = min(best, power)
    plan = biscale_plan(TABLE, 4.5, 24, 0.0, at_most=most)
    assert plan.power_w == pytest.approx(best)
    with pytest.raises(NoPlacementError):
        biscale_plan(TABLE, 4.5, 24, 0.0, at_most={**most, ("decode", 4): 1})


def test_a_window_is_what_arrived_in_it():
    arrivals = [
        SeenRequest(9.9, 5, 5),
        SeenRequest(12.0, 7, 0),
        SeenRequest(11.0, 6, 3),
        SeenRequest(20.0, 8, 8),
    ]
    window = window_of(arrivals, 10.0, 20.0)
    assert window.arrival_s.tolist() == [1.0, 2.0]
    assert window.output_tokens.tolist() == [3, 1]
    assert window.rate_rps == pytest.approx(0.2)
    assert len(window_of([], 0.0, 1.0)) == 0


class Recording:
    """Keeps what is scaled."""

    def __init__(self):
        self.calls = []

    def scale(self, phase, count):
        self.calls.append((phase, count))
        return f"{phase} {count}"


class Bench:
    """The loop with a router that says what the test wants."""

    def __init__(self, folder, monkeypatch, adapter, **changes):
        self.rate_rps, self.busy, self.open = 0.0, set(), set()
        self.scaler, self.said = Recording(), []
        monkeypatch.setattr(tier1_loop, "ask_arrivals", self.arrivals)
        monkeypatch.setattr(tier1_loop, "ask_router", lambda d: self.state())
        workloads = {"prefill": "deployment/p", "decode": "deployment/d"}
        d = planned(adapter, workloads=workloads, graph="g", **changes)
        d = d.model_copy(update={"folder": folder})
        self.log = (folder / "placements.jsonl").open("ab")
        self.loop = Tier1Loop(d, folder, self.log, self.scaler, self.said.append)
        self.loop.planner.table = planner().table
        self.loop.planner.observe = lambda window: None
        self.names = list(d.instances)
        wire.socket_folder(folder / "router")
        self.context = zmq.Context()
        self.endpoint = tier1_loop.placement_endpoint(d)
        self.router = wire.newest_receiver(self.context, self.endpoint)

    def arrivals(self, deployment, since_s):
        count = round(self.rate_rps * self.loop.settings.window_s)
        times = since_s + np.arange(count) / max(self.rate_rps, 1e-9) + 1e-4
        return [SeenRequest(float(t), 100, 10) for t in times]

    def state(self):
        return RouterState(
            {
                name: InstanceLoad(
                    name.split("_")[0], name in self.open, int(name in self.busy), 0, 0
                )
                for name in self.names
            },
            0,
            0,
            0.0,
        )

    def window(self, rate_rps):
        self.rate_rps = rate_rps
        self.loop._next_s = time.monotonic()
        self.loop._begun_s = 0.0
        while self.router.poll(100):  # what earlier turns said again
            self.router.recv()
        self.loop.turn()
        if self.router.poll(5000 if self.loop.settings.adapter != "advise" else 0):
            self.open = set(json.loads(self.router.recv()))

    def close(self):
        self.loop.close()
        self.context.destroy(0)
        wire.unbind(self.endpoint)
        self.log.close()


@pytest.fixture
def bench(tmp_path, monkeypatch):
    made = []

    def make(adapter="router", **changes):
        made.append(Bench(tmp_path, monkeypatch, adapter, **changes))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_surplus_drains_before_counts_fall_and_growth_comes_at_once(bench, tmp_path):
    b = bench("kubernetes")
    b.window(0.0)
    assert b.open == set(b.names)  # no load is known: everything stays open
    b.busy = {"prefill_1", "decode_1"}
    b.window(2.0)  # one instance of each phase is enough
    assert b.open == {"prefill_0", "decode_0"}
    b.loop.turn()
    assert b.scaler.calls == []  # both still have requests
    b.busy = {"decode_1"}
    b.loop.turn()
    assert b.scaler.calls == [("prefill", 1)]
    b.busy = set()
    b.loop.turn()
    assert b.scaler.calls == [("prefill", 1), ("decode", 1)]
    b.window(30.0)
    assert b.open == set(b.names)
    assert b.scaler.calls[2:] == [("prefill", 2), ("decode", 2)]
    events = [json.loads(x) for x in (tmp_path / "placements.jsonl").read_text().splitlines()]
    assert [len(e["open"]) for e in events] == [4, 2, 4]


def test_an_instance_that_is_needed_again_is_not_scaled_away(bench):
    b = bench("kubernetes")
    b.window(0.0)
    b.busy = {"prefill_1"}
    b.window(2.0)
    b.window(30.0)
    b.busy = set()
    b.loop.turn()
    assert ("prefill", 1) not in b.scaler.calls


def test_a_window_without_requests_changes_nothing(bench):
    b = bench()
    b.window(0.0)
    b.window(10.0)
    before = b.loop.current
    b.window(0.0)
    assert b.loop.current is before


def test_advice_touches_neither_router_nor_workload(bench):
    b = bench("advise")
    b.window(0.0)
    b.window(2.0)
    assert not b.router.poll(100)
    assert b.scaler.calls


def test_what_an_adapter_refuses_is_said_and_tried_again(bench):
    b = bench("kubernetes")
    b.window(0.0)

    def refuse(phase, count):
        raise BiscaleError("kubectl: forbidden")

    b.scaler.scale = refuse
    b.window(2.0)
    b.loop.turn()
    assert "kubectl: forbidden" in b.said
    assert not b.loop._counts


def test_adapters_say_the_right_words():
    settings = validate(
        {
            "adapter": "dynamo",
            "namespace": "n",
            "workloads": {"prefill": "VllmPrefillWorker", "decode": "statefulset/d"},
            "graph": "g",
        },
        Tier1Settings,
        "test",
    )
    calls = []
    KubernetesScale(settings, calls.append).scale("decode", 3)
    DynamoScale(settings, calls.append).scale("prefill", 2)
    assert calls[0] == ["-n", "n", "scale", "statefulset/d", "--replicas=3"]
    assert calls[1][:6] == ["-n", "n", "patch", "dynamographdeployment", "g", "--type=merge"]
    assert json.loads(calls[1][-1]) == {
        "spec": {"services": {"VllmPrefillWorker": {"replicas": 2}}}
    }
    assert isinstance(scaler_of(settings, calls.append), DynamoScale)
    assert isinstance(scaler_of(Tier1Settings()), Advise)


def test_kubectl_that_is_missing_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = Tier1Settings(
        adapter="kubernetes", workloads={"prefill": "deployment/p", "decode": "deployment/d"}
    )
    with pytest.raises(BiscaleError, match="kubectl"):
        scaler_of(settings).scale("prefill", 1)


def test_tier1_needs_our_router_and_its_section():
    with pytest.raises(BiscaleError, match="no section 'tier1'"):
        WindowPlanner(deployment())
    base = planned().model_dump(mode="json")
    base["router"]["kind"] = "proxy"
    with pytest.raises(BiscaleError, match="our router"):
        WindowPlanner(validate(base, Deployment, "test"))


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "applied"), [("base", [900.0, 1200.0]), ("max", [900.0])])
def test_base_clocks_are_applied_at_once(tmp_path, policy, applied):
    """By a controller of policy ``base``; by others until they decide for the first time."""
    plant = Plant(PlantSettings.of("decode"))
    base = wire.base_endpoint(tmp_path, "decode")
    loop = ControlLoop(plant, load_policy(policy, plant), ControlConfig(tmp_path, 0.0, base=base))
    context = zmq.Context()
    endpoint = wire.command_endpoint(tmp_path, "decode")
    commands = wire.newest_receiver(context, endpoint)
    sender = wire.newest_sender(context, base)
    loop.heard_s = time.monotonic()
    got = []
    for freq_mhz in (900.0, 1200.0):
        sender.send(msgspec.msgpack.encode(freq_mhz))
        end = time.monotonic() + 2.0
        while time.monotonic() < end and freq_mhz not in got:
            loop.heard_s = time.monotonic()
            loop.turn(0.02)
            if commands.poll(0):
                got.append(msgspec.msgpack.decode(commands.recv(), type=wire.Command).freq_mhz)
    loop.close()
    context.destroy(0)
    wire.unbind(endpoint)
    assert list(dict.fromkeys(got)) == applied


def test_energy_counts_while_an_instance_is_in_service():
    one = PlannedInstance(1980.0, 1.0)
    everything = {f"{p}_{k}": one for p in ("prefill", "decode") for k in range(2)}
    fewer = {name: one for name in everything if not name.endswith("_1")}
    events = [
        PlacementEvent(90.0, 1.0, everything, ""),
        PlacementEvent(110.0, 1.0, fewer, ""),
        PlacementEvent(130.0, 1.0, everything, ""),
    ]
    raw = DeployedRaw(
        {"started_s": 100.0}, deployment(2, 2), [], {}, {}, {}, [], None, placements=events
    )
    assert raw.in_service("prefill_0", 50.0) == [(0.0, 50.0)]
    assert raw.in_service("prefill_1", 50.0) == [(0.0, 10.0), (30.0, 50.0)]
