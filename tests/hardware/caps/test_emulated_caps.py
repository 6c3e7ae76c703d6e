"""An emulated engine under power limits, in virtual time."""

import asyncio
import contextlib

import pytest
from virtual_engine import virtual_time

from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.hardware.clocks.fake_gpus import FakeBackend, FakeState, create_state
from biscale_env.hardware.emulation.emulator import Instance, Ticket


class Deaf:
    """Takes no record."""

    active = False

    def send(self, record):
        return False


async def served(engine, requests, backend, later_w):
    """Mean power of every iteration that ended, W; the limit changes midway."""
    ended = [asyncio.Event() for _ in range(requests)]
    powers = []
    task = asyncio.create_task(engine.run())
    for event in ended:
        engine.submit(
            Ticket(800, 40, lambda: powers.append(float(engine.st["last_power_w"])), event.set)
        )
    await asyncio.sleep(0.3)
    for device in backend.devices():
        backend.cap(device.uuid, later_w)
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in ended)), 60)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return powers


def run(folder, first_w, later_w):
    plant = Plant(PlantSettings.of("decode", actuation_delay_s=0.02, drain=True))
    folder.mkdir()
    with virtual_time() as loop:
        path = create_state(folder / "gpus", 4, delay_s=0.02)
        backend = FakeBackend(path)
        for device in backend.devices():
            backend.cap(device.uuid, first_w)
        loop.run_until_complete(asyncio.sleep(0.1))
        engine = Instance(plant, FakeState(path), [0, 1, 2, 3], Deaf())
        powers = loop.run_until_complete(served(engine, 12, backend, later_w))
        return powers, float(engine.st["busy_s"])


def test_every_iteration_keeps_the_limit_in_effect(tmp_path):
    free, free_s = run(tmp_path / "free", 700.0, 700.0)
    highest_w = max(free)
    limit_w = 5 * (0.9 * highest_w // 5)
    capped, capped_s = run(tmp_path / "capped", limit_w, limit_w)
    assert max(capped) <= limit_w + 1e-6 < highest_w
    assert max(capped) == pytest.approx(limit_w, abs=1e-3)  # it is used in full
    assert capped_s > free_s
    midway, midway_s = run(tmp_path / "midway", 700.0, limit_w)
    assert max(midway) == pytest.approx(highest_w, rel=0.01)
    assert midway[-1] <= limit_w + 1e-6
    assert free_s < midway_s < capped_s


class Commanding:
    """Limits the power just after it has heard of the first batch, as a controller does."""

    active = True

    def __init__(self, backend, limit_w):
        self.backend, self.limit_w, self.on = backend, limit_w, False

    def send(self, record):
        if self.on:
            for device in self.backend.devices():
                asyncio.get_running_loop().call_later(
                    5e-4, self.backend.cap, device.uuid, self.limit_w
                )
        self.on = False
        return True


@pytest.mark.parametrize(("delay_s", "holds"), [(0.02, True), (2.0, False)])
def test_a_limit_that_comes_in_the_first_half_holds_for_the_batch(tmp_path, delay_s, holds):
    """The command for a batch comes after the batch has begun."""
    plant = Plant(PlantSettings.of("prefill", actuation_delay_s=delay_s, drain=True))
    with virtual_time() as loop:
        path = create_state(tmp_path / "gpus", 4, delay_s=delay_s)
        controller = Commanding(FakeBackend(path), 350.0)
        engine = Instance(plant, FakeState(path), [0, 1, 2, 3], controller)

        async def one_batch():
            ended = asyncio.Event()
            task = asyncio.create_task(engine.run())
            controller.on = True
            engine.submit(Ticket(2000, 1, lambda: None, ended.set))
            await asyncio.wait_for(ended.wait(), 60)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

        loop.run_until_complete(one_batch())
        assert float(engine.st["last_time_s"]) > 0.1
        assert (float(engine.st["last_power_w"]) <= 350.0 + 1e-6) == holds
