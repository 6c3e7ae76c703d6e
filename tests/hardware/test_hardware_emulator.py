"""The emulated engine: the simulator's dynamics to the last digit, in real time, under somebody
else's clock.
"""

import asyncio
import contextlib
import time

import numpy as np
import pytest

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.hardware.clocks.fake_gpus import FakeBackend, FakeState, create_state, settle, want
from biscale_env.hardware.emulation import engine_kernels as kernels
from biscale_env.hardware.emulation.clock_history import ClockHistory
from biscale_env.hardware.emulation.emulator import Instance, Ticket
from biscale_env.hardware.engines.hook.sender import Sender
from biscale_env.sim.clock import run_work
from biscale_env.sim.state import PREFILL_DTYPE
from biscale_env.traces import Trace


@pytest.fixture
def state(tmp_path):
    return FakeState(create_state(tmp_path / "gpus", 4, delay_s=0.03))


def instance(phase, state, **settings):
    plant = Plant(PlantSettings.of(phase, actuation_delay_s=0.03, drain=True, **settings))
    return Instance(plant, state, [0, 1, 2, 3], Sender(None))


async def serve(engine, requests, meanwhile=None):
    """Submit ``(after_s, prompt, output)`` and run until all are answered.

    Tokens told per request.
    """
    told = [0] * len(requests)
    ended = [asyncio.Event() for _ in requests]

    def count(k):
        told[k] += 1

    task = asyncio.create_task(engine.run())
    side = asyncio.create_task(meanwhile()) if meanwhile else None
    try:
        start = time.monotonic()
        for k, (after_s, prompt, output) in enumerate(requests):
            await asyncio.sleep(max(start + after_s - time.monotonic(), 0.0))
            engine.submit(Ticket(prompt, output, lambda k=k: count(k), ended[k].set))
        await asyncio.wait_for(asyncio.gather(*(e.wait() for e in ended)), 20)
    finally:
        task.cancel()
        if side:
            side.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    return told


def simulated(engine, actions_at):
    """The simulator on the arrivals that the engine saw.

    The clock asked for at a decision is a function of time.
    """
    n = engine.count
    trace = Trace(
        "t", engine.arrival_s[:n].copy(), engine.prompt[:n].copy(), engine.output[:n].copy(), "test"
    )
    batch = Batch(engine.plant, 1, RequestTable.of(engine.plant, [trace]), record=True)
    row = np.zeros(1, dtype=np.int64)
    batch.reset(row, row, np.array([-1]))
    batch.params["drain"] = 1
    while not batch.done[0]:
        freq = actions_at(float(batch.states["time_s"][0]))
        batch.step(engine.plant.clocks.to_action(np.array([freq])))
    return batch


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_at_a_constant_clock_it_is_the_simulator(phase, state):
    engine = instance(phase, state)
    rng = np.random.default_rng(0)
    output = 1 if phase == "prefill" else 12
    requests = [
        (float(t), int(p), output + int(k))
        for k, (t, p) in enumerate(
            zip(np.sort(rng.uniform(0, 0.8, 12)), rng.integers(10, 3000, 12), strict=True)
        )
    ]
    if phase == "prefill":
        requests = [(t, p, 2) for t, p, _ in requests]
    told = asyncio.run(serve(engine, requests))
    batch = simulated(engine, lambda now: 1980.0)
    assert np.allclose(engine.finish_s[:12], batch.finish_s, rtol=0, atol=1e-9)
    assert told == ([1] * 12 if phase == "prefill" else [o - 1 for _, _, o in requests])
    busy_j = float(engine.st["energy_j"] - engine.st["energy_idle_j"])
    assert busy_j == pytest.approx(
        float(batch.states["energy_j"][0] - batch.states["energy_idle_j"][0]), rel=1e-9
    )


@pytest.mark.slow
def test_a_clock_that_lands_in_the_middle_of_an_iteration_changes_what_is_left_of_it(state):
    engine = instance("prefill", state)
    backend = FakeBackend(state.path)
    asked = []

    async def meanwhile():
        await asyncio.sleep(
            0.25
        )  # a batch of 2048 tokens takes about 0.13 s: this falls into the second
        backend.lock(backend.devices()[0].uuid, 810, 810)
        asked.append(float(state.gpus[0]["apply_at_s"]) - engine.epoch_s)

    asyncio.run(serve(engine, [(0.1, 8000, 2)], meanwhile))
    (landed,) = asked
    fast = engine.plant.model.latency_s(2048, 2048 * 1024, 0, 1, 1980.0)
    assert engine.arrival_s[0] + fast < landed < engine.finish_s[0]
    reference = np.zeros(1, PREFILL_DTYPE)
    st = reference[0]
    kernels.prefill_start(st, 1.98)
    st["time_s"], st["end"] = engine.arrival_s[0], 1
    table, batch = np.array([[landed, 0.81]]), np.zeros(5)
    while st["head"] < 1:
        kernels.prefill_form(st, engine.params, engine.requests, batch)
        kernels.prefill_work(
            st, engine.coefs, engine.params, batch, table, 1 if st["time_s"] < landed else 0
        )
        kernels.prefill_end(st, engine.params, engine.requests, np.zeros(1), batch)
    assert engine.finish_s[0] == pytest.approx(float(st["time_s"]), abs=1e-6)


def test_work_under_landings_equals_the_simulators_own_work(state):
    """The one transition that exists twice, here and in sim.clock, agrees where both apply.

    One clock on its way.
    """
    engine = instance("prefill", state)
    for apply_at in (0.0, 0.02, 0.09, 5.0):
        mine, theirs = np.zeros(1, PREFILL_DTYPE), np.zeros(1, PREFILL_DTYPE).view(np.recarray)
        batch = np.array([2048.0, 2048.0 * 1024, 1.0, 1.0, 0.0])
        mine["freq_ghz"] = theirs["freq_ghz"] = 1.98
        kernels.prefill_work(
            mine[0], engine.coefs, engine.params, batch, np.array([[apply_at, 0.9]]), 1
        )
        record = theirs[0]
        record.inflight_ghz = record.requested_ghz = 0.9
        record.apply_at_s = apply_at
        run_work(
            record,
            engine.plant.model.member(-1),
            params_of(engine),
            2048.0,
            2048.0 * 1024,
            0.0,
            1.0,
        )
        for name in ("time_s", "energy_j", "last_power_w", "last_time_s"):
            assert float(mine[name][0]) == pytest.approx(float(record[name]), rel=1e-12), (
                apply_at,
                name,
            )


def params_of(engine):
    return np.array([tuple(engine.params)], dtype=engine.params.dtype).view(np.recarray)[0]


def test_idle_energy_is_idle_power_times_time(state):
    engine = instance("decode", state)

    async def wait():
        task = asyncio.create_task(engine.run())
        end = time.monotonic() + 10
        while engine.st["time_s"] < 0.2 and time.monotonic() < end:
            await asyncio.sleep(0.02)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(wait())
    spent, took = float(engine.st["energy_idle_j"]), float(engine.st["time_s"])
    assert took >= 0.2
    from biscale_env.models.physics import idle_power_w

    assert spent == pytest.approx(4 * idle_power_w(engine.coefficients, 1.98) * took, rel=1e-6)
    assert float(state.gpus[3]["energy_j"]) == pytest.approx(spent / 4, rel=0.2)


def test_the_nvml_counter_shows_the_engines_energy(state):
    engine = instance("prefill", state)
    backend = FakeBackend(state.path)
    uuid = backend.devices()[0].uuid
    before, watts = backend.energy_j(uuid), []

    async def meanwhile():
        while True:
            watts.append(backend.read(uuid).power_w)
            await asyncio.sleep(0.01)

    asyncio.run(serve(engine, [(0.1, 2000, 2), (0.1, 2000, 2)], meanwhile))
    assert backend.energy_j(uuid) - before == pytest.approx(
        float(engine.st["energy_j"]) / 4, rel=0.1
    )
    busy_w = float(engine.plant.model.power_w(2048, 2000 * 1000 + 48 * 24, 0, 2, 1980.0))
    assert max(watts) == pytest.approx(busy_w, rel=0.01)
    assert min(watts) < 0.5 * busy_w


@pytest.mark.slow
def test_preemption_is_survived_and_every_token_comes(state):
    class Small(Plant):
        @property
        def kv_capacity_tokens(self):
            return 900

    plant = Small(PlantSettings.of("decode", actuation_delay_s=0.03, drain=True))
    engine = Instance(plant, state, [0, 1, 2, 3], Sender(None))
    told = asyncio.run(serve(engine, [(0.0, 200, 40)] * 6))
    assert told == [39] * 6
    assert int(engine.st["preemptions"]) > 0


def test_what_cannot_fit_is_refused(state):
    engine = instance("decode", state)
    with pytest.raises(BiscaleError, match="KV cache"):
        engine.submit(Ticket(10_000_000, 2, lambda: None, lambda: None))
    with pytest.raises(BiscaleError, match="needs 4 GPUs"):
        Instance(engine.plant, state, [0, 1], Sender(None))
    with pytest.raises(BiscaleError, match="there is no GPU 9"):
        Instance(engine.plant, state, [6, 7, 8, 9], Sender(None))


def test_the_history_keeps_every_landing_in_order(tmp_path):
    state = FakeState(create_state(tmp_path / "gpus", 1, delay_s=0.01))
    history = ClockHistory(state, 0, 0.0)
    begun = time.monotonic()
    for freq in (900.0, 1200.0, 600.0):
        with state.locked() as gpus:
            want(gpus[0], freq, time.monotonic(), 0.01)
        time.sleep(0.015)
        freq_ghz, table, n = history.look(begun)
    assert (freq_ghz, n) == (1.98, 3)
    assert table[:3, 1].tolist() == [0.9, 1.2, 0.6]
    assert (np.diff(table[:3, 0]) > 0).all()
    freq_ghz, _, n = history.look(float(table[1, 0]))  # time has passed the second landing
    assert (freq_ghz, n) == (1.2, 1)


def test_the_history_knows_the_clock_on_its_way(tmp_path):
    state = FakeState(create_state(tmp_path / "gpus", 1, delay_s=5.0))
    history = ClockHistory(state, 0, 0.0)
    now = time.monotonic()
    settle(state.gpus[0], now, 5.0)
    want(state.gpus[0], 900.0, now, 5.0)
    freq_ghz, table, n = history.look(now)
    assert (freq_ghz, n, table[0, 1]) == (1.98, 1, 0.9)
    assert table[0, 0] == pytest.approx(now + 5.0)


def test_an_emulated_engine_cannot_be_parked(state):
    with pytest.raises(BiscaleError, match="last-clock"):
        instance("prefill", state, idle="parked")
