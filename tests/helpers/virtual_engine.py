"""An emulated engine and its controller in virtual time: exact, and as fast as the processor.

The event loop jumps to its next timer instead of waiting for it, and the clock of the whole process
shows the loop's time meanwhile.
"""

import asyncio
import contextlib
import itertools
import selectors
import time
from dataclasses import dataclass, field
from unittest import mock

import numpy as np

from biscale_env.hardware.clocks.fake_gpus import FakeBackend, FakeState, create_state
from biscale_env.hardware.emulation.emulator import Instance, Ticket
from biscale_env.hardware.loop.builder import ObservationBuilder
from biscale_env.hardware.loop.clockview import ClockView
from biscale_env.hardware.loop.lead import LeadPredictor

COMMAND_S = 3e-4  # from a record to its command, as measured on two quiet cores


class _Jumping(selectors.DefaultSelector):
    """Waits by moving the clock."""

    now_s = 1000.0

    def time(self):
        return self.now_s

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready and timeout is not None:
            self.now_s += max(timeout, 1e-6)
        return ready


@contextlib.contextmanager
def virtual_time():
    """An event loop whose time is that of the process."""
    selector = _Jumping()
    with mock.patch.object(time, "monotonic", selector.time):
        loop = asyncio.SelectorEventLoop(selector)
        try:
            yield loop
        finally:
            loop.close()


@dataclass
class VirtualRun:
    """What one run showed.

    Attributes:
        energy_j: of the instance, until its last answer.
        latency_s: TTFT of every request in prefill, TPOT in decode.
        lead_error_s: of every early record, predicted minus real begin of its iteration.
        naive_error_s: the same, had its begin been taken to be the time of the record.
        iterations: how many ran.
    """

    energy_j: float = 0.0
    latency_s: np.ndarray = field(default_factory=lambda: np.zeros(0))
    lead_error_s: np.ndarray = field(default_factory=lambda: np.zeros(0))
    naive_error_s: np.ndarray = field(default_factory=lambda: np.zeros(0))
    iterations: int = 0


class VirtualController:
    """Takes the records of an engine as its hook's sender, and sets the clock of its GPUs."""

    active = True

    def __init__(self, plant, policy, backend, look_ahead):
        self.plant, self.policy, self.backend, self.look_ahead = plant, policy, backend, look_ahead
        delay_s = plant.delay_s(-1)
        self.builder = ObservationBuilder(plant, delay_s)
        self.view, self.leads = ClockView(plant.clocks, delay_s), LeadPredictor(plant)
        self.state, self.start = None, np.ones(1, dtype=bool)
        self.told = []  # (time of the record, predicted lead, ahead)
        self.listening = False

    def send(self, record):
        if not self.listening or record.detail is None:
            return False
        lead_s = self.leads.lead_s(record, self.view.freq_mhz)
        self.told.append((record.detail.time_s, lead_s, record.detail.ahead))
        used_s = lead_s if self.look_ahead else 0.0
        seen = self.builder.observe(record, self.view, 300.0, lead_s=used_s)
        action, self.state = self.policy.predict(seen, self.state, self.start, True)
        self.start = np.zeros(1, dtype=bool)
        freq_mhz = float(self.plant.clocks.snap_mhz(self.plant.clocks.to_freq_mhz(action))[0])
        self.view.request(freq_mhz, time.monotonic() + COMMAND_S)
        loop = asyncio.get_running_loop()
        loop.call_later(COMMAND_S, self.backend.lock_all, self.uuids, freq_mhz, freq_mhz)
        return True

    @property
    def uuids(self):
        return [device.uuid for device in self.backend.devices()]


async def _served(engine, trace):
    ended = [asyncio.Event() for _ in range(len(trace))]
    times = [[] for _ in range(len(trace))]
    begin = time.monotonic()
    task = asyncio.create_task(engine.run())
    for k in range(len(trace)):
        await asyncio.sleep(max(begin + float(trace.arrival_s[k]) - time.monotonic(), 0.0))
        prompt, output = int(trace.prompt_tokens[k]), int(trace.output_tokens[k])
        arrived = time.monotonic()
        note = lambda k=k: times[k].append(time.monotonic())  # noqa: E731
        times[k].append(arrived)
        engine.submit(Ticket(prompt, output, note, ended[k].set))
    await asyncio.gather(*(e.wait() for e in ended))
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return times


def run_virtually(folder, plant, policy, trace, asynchronous, look_ahead):
    """Serve a trace by one emulated instance under a policy.

    Args:
        folder: for the file of its fake GPUs.
        plant: of the instance; its delay is that of the fake GPUs.
        policy: controls.
        trace: the load.
        asynchronous: whether the engine schedules asynchronously.
        look_ahead: whether the controller looks ahead.
    """
    with virtual_time() as loop:
        path = create_state(folder / "gpus", plant.settings.tp, delay_s=plant.delay_s(-1))
        state = FakeState(path)
        controller = VirtualController(plant, policy, FakeBackend(path), look_ahead)
        gpus = list(range(plant.settings.tp))
        engine = Instance(plant, state, gpus, controller, asynchronous=asynchronous)
        controller.listening = True
        times = loop.run_until_complete(_served(engine, trace))
        run = VirtualRun(float(engine.st["energy_j"]), iterations=int(engine.st["iterations"]))
    spans = np.array([t[-1] - t[0] for t in times])
    decode = plant.phase == "decode"
    run.latency_s = spans / np.maximum(trace.output_tokens - 1, 1) if decode else spans
    told = controller.told
    early = [
        (t + lead - after, t - after)
        for (t, lead, ahead), (after, _, ahead_too) in itertools.pairwise(told)
        if ahead and ahead_too
    ]
    if early:
        run.lead_error_s, run.naive_error_s = np.array(early).T
    return run
