"""An engine without a GPU: the simulator's dynamics in real time, under the clock of fake GPUs.

It publishes what a real engine's hook publishes.

The instance keeps its own exact time. An iteration's end is computed, the process sleeps until
then, and the next iteration begins at that computed instant, not when the process woke up: late
wake-ups delay answers (by :attr:`Instance.lateness_s`), not the dynamics.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from biscale_env.core.clockqueue import advance_to
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant
from biscale_env.hardware.clocks.fake_gpus import FakeState, limit_of, settle
from biscale_env.hardware.emulation import engine_kernels as kernels
from biscale_env.hardware.emulation.clock_history import ClockHistory
from biscale_env.hardware.emulation.simulated import SimulatedWatcher
from biscale_env.hardware.engines.hook.sender import Sender
from biscale_env.models import COEFFICIENT_DTYPE
from biscale_env.models.physics import idle_power_w
from biscale_env.sim.state import (
    DECODE_DTYPE,
    NO_CLASSES,
    NO_PREFIXES,
    PARAMS_DTYPE,
    PREFILL_DTYPE,
    Requests,
    RequestTimes,
    running_requests,
)

LOOK_S = 0.002  # how often the clock is looked at while an iteration runs
IDLE_LOOK_S = 0.02
ROOM = 4096


@dataclass
class Ticket:
    """A request inside the engine.

    Attributes:
        prompt_tokens: length of the prompt.
        output_tokens: tokens to make.
        on_token: called with the number of new tokens (1), in the engine's turn; must be quick.
        on_end: called when the last token is out.
        cancelled: the client went away; tokens are no longer told.
    """

    prompt_tokens: int
    output_tokens: int
    on_token: Callable[[], None]
    on_end: Callable[[], None]
    cancelled: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


class Instance:
    """One emulated prefill or decode instance."""

    def __init__(
        self,
        plant: Plant,
        state: FakeState,
        gpus: Sequence[int],
        sender: Sender,
        member: int = -1,
        asynchronous: bool = False,
    ) -> None:
        """Set an empty instance up.

        Args:
            plant: phase, model, engine limits.
            state: the fake GPUs.
            gpus: which of them are this instance's; their number is the model's tensor parallel
                degree.
            sender: where records go.
            member: ensemble member of the emulated plant, -1 nominal.
            asynchronous: form a batch when the one before it begins, as vLLM does by default.
        """
        if len(gpus) != plant.settings.tp:
            raise BiscaleError(
                f"a {plant.phase} instance of TP {plant.settings.tp} needs "
                f"{plant.settings.tp} GPUs, got {len(gpus)}"
            )
        if max(gpus) >= len(state.gpus):
            raise BiscaleError(
                f"the machine has {len(state.gpus)} fake GPUs, there is no GPU {max(gpus)}"
            )
        if plant.settings.idle != "last-clock":
            raise BiscaleError(
                f"an emulated engine waits at its last clock, but the instance says idle "
                f"'{plant.settings.idle}': use last-clock"
            )
        self.plant, self.state, self.gpus, self.sender = plant, state, list(gpus), sender
        self.asynchronous = asynchronous
        self.coefficients = plant.model.member(member)
        self.coefs: Any = np.array([tuple(self.coefficients)], dtype=COEFFICIENT_DTYPE)[0]
        self._board_w = float(self.coefficients.p_cap_w)
        self.params: Any = np.asarray(plant.params(member, np.inf), dtype=PARAMS_DTYPE)[()]
        self.tickets: dict[int, Ticket] = {}
        self.count = 0
        self.lateness_s: deque[float] = deque(maxlen=4096)
        self.tokens_out = 0
        self.incoming = 0  # requests whose KV is in transfer
        self._wake = asyncio.Event()
        self._states: np.ndarray = np.zeros(0)
        self.arrival_s, self.start_s, self.finish_s = np.zeros(0), np.zeros(0), np.zeros(0)
        self.prompt, self.output = np.zeros(0, np.int32), np.zeros(0, np.int32)
        self._phase: _Prefill | _Decode
        self._empty()
        self._warm_up()
        self._tell_gpus(idle=True)

    def _empty(self) -> None:
        """No requests, no history; time starts now."""
        self.count, self.tokens_out = 0, 0
        self._arrays(ROOM)
        self.epoch_s = time.monotonic()
        self.clock = ClockHistory(self.state, self.gpus[0], self.epoch_s)
        self.watcher = SimulatedWatcher(f"emulated-{self.plant.phase}", self.epoch_s)
        self._phase = _Prefill(self) if self.plant.phase == "prefill" else _Decode(self)

    def _warm_up(self) -> None:
        """Compile every kernel on one request that nobody sees, then forget it."""
        self.arrival_s[0], self.prompt[0], self.output[0] = 0.0, 8, 2
        self.tickets[0] = Ticket(8, 2, lambda: None, lambda: None)
        self.count = 1
        self.st["end"] = 1
        _, table, n = self.clock.look(0.0)
        self._phase.form()
        self._phase.record()
        self._phase.work(table, n)
        self._phase.end()
        kernels.idle(self.st, self.coefs, float(self.st["time_s"]) + 1.0, table, n)
        self.tickets.clear()
        self._empty()

    @property
    def st(self) -> Any:
        """State record."""
        return self._states[0]

    def _arrays(self, room: int) -> None:
        """Make or enlarge the request arrays; what is there stays."""

        def grown(old: np.ndarray, fill: float) -> np.ndarray:
            new = np.full(room, fill, old.dtype)
            new[: self.count] = old[: self.count]
            return new

        self.arrival_s, self.prompt, self.output = (
            grown(self.arrival_s, np.inf),
            grown(self.prompt, 0),
            grown(self.output, 0),
        )
        self.start_s, self.finish_s = grown(self.start_s, np.nan), grown(self.finish_s, np.nan)

    @property
    def requests(self) -> Requests:
        """The requests, as kernels take them."""
        return Requests(self.arrival_s, self.prompt, self.output, NO_PREFIXES, NO_CLASSES)

    @property
    def times(self) -> RequestTimes:
        """What became of them."""
        return RequestTimes(self.start_s, self.finish_s)

    def now_s(self) -> float:
        """Wall time since the engine's start, s."""
        return time.monotonic() - self.epoch_s

    def submit(self, ticket: Ticket) -> int:
        """Take a request in now.

        Raises:
            BiscaleError: it cannot fit into this instance.
        """
        need = ticket.prompt_tokens + (ticket.output_tokens if self.plant.phase == "decode" else 0)
        if need > self.plant.kv_capacity_tokens:
            raise BiscaleError(
                f"a request of {need} tokens does not fit into the "
                f"{self.plant.kv_capacity_tokens} tokens of KV cache"
            )
        if self.count == len(self.arrival_s):
            self._arrays(2 * self.count)
        row = self.count
        self.arrival_s[row] = max(self.now_s(), self.arrival_s[row - 1] if row else 0.0)
        self.prompt[row], self.output[row] = ticket.prompt_tokens, ticket.output_tokens
        self.tickets[row] = ticket
        self.count += 1
        self._wake.set()
        return row

    async def run(self) -> None:
        """Serve for ever; cancel to stop."""
        known: int | None = None  # how many requests the batch that was formed ahead chose among
        while True:
            await self._until_work()
            self.st["end"] = self.count if known is None else known
            if self.plant.phase == "decode":
                self.st["incoming"] = self.incoming
            self._phase.form()
            if known is None:
                self.sender.send(self._phase.record())
            self._take_limit(float(self.st["time_s"]))
            known = self._form_next() if self.asynchronous else None
            before = self._states.copy()
            while True:
                freq_ghz, table, n = self.clock.look(float(before["time_s"][0]))
                self._work_from(before, freq_ghz, table, n)
                # as in the simulator, a limit that comes in the first half holds for all of it
                middle_s = 0.5 * float(before["time_s"][0] + self.st["time_s"])
                if self.now_s() <= middle_s and self._take_limit(middle_s):
                    self._work_from(before, freq_ghz, table, n)
                self._tell_gpus(
                    idle=False,
                    start_s=float(before["time_s"][0]),
                    before_j=float(before["energy_j"][0]),
                )
                wait_s = float(self.st["time_s"]) - self.now_s()
                if wait_s <= 0:
                    break
                await asyncio.sleep(min(wait_s, LOOK_S) if n or wait_s > LOOK_S else wait_s)
            self.lateness_s.append(-wait_s)
            self._phase.end()

    def _work_from(self, before: np.ndarray, freq_ghz: float, table: np.ndarray, n: int) -> None:
        """Run the batch that is formed from a state, under the clock and its changes."""
        self._states[:] = before
        self.st["freq_ghz"] = freq_ghz
        self._phase.work(table, n)

    def _take_limit(self, until_s: float) -> bool:
        """The power limit under which a batch runs: the one in effect at ``until_s``.

        Returns:
            Whether it is another than before.
        """
        delay_s = float(self.state.header["delay_s"])
        with self.state.lock():
            gpu = self.state.gpus[self.gpus[0]]
            settle(gpu, time.monotonic(), delay_s)
            limit = advance_to(limit_of(gpu), until_s + self.epoch_s, delay_s)
        before_w, now_w = float(self.coefs["p_cap_w"]), min(limit.applied, self._board_w)
        self.coefs["p_cap_w"] = now_w
        return now_w != before_w

    def _form_next(self) -> int | None:
        """Form the batch after the one that begins now, and tell about it, from what is known.

        Requests that come while this one runs have missed it.

        Returns:
            How many requests were known; None where there is nothing to do next as far as known.
        """
        phase, now_s = self._phase, float(self.st["time_s"])
        with phase.as_it_is():
            freq_ghz, table, n = self.clock.look(now_s)
            self.st["freq_ghz"] = freq_ghz
            phase.work(table, n)
            phase.pass_over()
            self.st["end"] = self.count
            if not phase.busy():
                return None
            phase.form()
            record = phase.record()
        assert record.detail is not None
        at_s = now_s + self.epoch_s
        detail = msgspec.structs.replace(record.detail, time_s=at_s, ahead=1, running_since_s=at_s)
        wall_s = float(self.st["last_time_s"])
        self.sender.send(msgspec.structs.replace(record, detail=detail, wall_time=wall_s))
        return self.count

    async def _until_work(self) -> None:
        st = self.st
        while not self._phase.busy():
            row = int(st["head"])
            pending = self.arrival_s[row] if row < self.count else np.inf
            until = min(max(self.now_s(), float(st["time_s"])), max(pending, float(st["time_s"])))
            st["freq_ghz"], table, n = self.clock.look(float(st["time_s"]))
            kernels.idle(st, self.coefs, until, table, n)
            if pending <= until:
                break
            self._tell_gpus(idle=True)
            self._wake.clear()
            if self.count == row:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), IDLE_LOOK_S)
        await asyncio.sleep(0)

    def _tell_gpus(self, idle: bool, start_s: float = 0.0, before_j: float = 0.0) -> None:
        """Write power, energy and effective clock where the NVML fakes read them."""
        st, n = self.st, len(self.gpus)
        if idle:
            freq_ghz = float(st["freq_ghz"]) or self.clock.freq_ghz
            power_w, energy_j, at_s, effective = (
                float(idle_power_w(self.coefficients, freq_ghz)),
                float(st["energy_j"]) / n,
                float(st["time_s"]),
                0.0,
            )
        else:
            power_w, energy_j, at_s = float(st["last_power_w"]), before_j / n, start_s
            effective = float(st["step_freq_mean_ghz"]) * 1e3
        with self.state.lock():
            for k in self.gpus:
                gpu = self.state.gpus[k]
                gpu["external"], gpu["power_w"], gpu["energy_j"], gpu["power_at_s"] = (
                    1,
                    power_w,
                    energy_j,
                    at_s + self.epoch_s,
                )
                gpu["effective_mhz"] = effective
                gpu["reasons"] = 0x4 if 0 < effective < gpu["freq_mhz"] - 1 else int(idle)

    def metrics(self) -> dict[str, float]:
        """Values for ``/metrics``."""
        st = self.st
        late = np.array(self.lateness_s) if self.lateness_s else np.zeros(1)
        return {
            "num_requests_running": float(self._phase.running()),
            "num_requests_waiting": float(
                self.count
                - int(st["head"])
                - (self._phase.running() if self.plant.phase == "prefill" else 0)
            ),
            "kv_cache_usage_perc": self._phase.kv_use(),
            "prompt_tokens_total": float(self.prompt[: self.count].sum()),
            "generation_tokens_total": float(self.tokens_out),
            "request_success_total": float(st["finished"]),
            "iterations_total": float(st["iterations"]),
            "energy_joules_total": float(st["energy_j"]),
            "busy_seconds_total": float(st["busy_s"]),
            "lateness_p99_seconds": float(np.quantile(late, 0.99)),
        }


class _Prefill:
    """What a prefill instance does in its turns."""

    def __init__(self, engine: Instance) -> None:
        self.e = engine
        engine._states = np.zeros(1, PREFILL_DTYPE)
        self.batch = np.zeros(5)
        kernels.prefill_start(engine.st, engine.clock.freq_ghz)
        self.form()

    def busy(self) -> bool:
        st = self.e.st
        return bool(
            int(st["head"]) < self.e.count and self.e.arrival_s[int(st["head"])] <= st["time_s"]
        )

    def form(self) -> None:
        kernels.prefill_form(self.e.st, self.e.params, self.e.requests, self.batch)

    def record(self) -> Any:
        e = self.e
        return e.watcher.prefill(
            e.st, e.arrival_s, e.prompt, int(self.batch[0]), int(self.batch[2])
        )

    @contextlib.contextmanager
    def as_it_is(self) -> Iterator[None]:
        """Leave everything as it was: what happens inside is only thought of."""
        e = self.e
        kept = e._states.copy(), self.batch.copy(), e.finish_s[: e.count].copy()
        yield
        e._states[:], self.batch[:], e.finish_s[: e.count] = kept

    def pass_over(self) -> None:
        """The end of the batch, without telling its clients."""
        kernels.prefill_end(self.e.st, self.e.params, self.e.requests, self.e.finish_s, self.batch)

    def work(self, table: np.ndarray, n: int) -> None:
        kernels.prefill_work(self.e.st, self.e.coefs, self.e.params, self.batch, table, n)

    def end(self) -> None:
        e = self.e
        first, last = int(e.st["head"]), int(self.batch[3])
        kernels.prefill_end(e.st, e.params, e.requests, e.finish_s, self.batch)
        for row in range(first, last):
            ticket = e.tickets.pop(row)
            e.tokens_out += 1
            if not ticket.cancelled:
                ticket.on_token()
                ticket.on_end()
        self.batch[:] = 0

    def running(self) -> int:
        return int(self.batch[2])

    def kv_use(self) -> float:
        e = self.e
        return float(e.prompt[int(e.st["head"]) : e.count].sum()) / e.plant.kv_capacity_tokens


class _Decode:
    """What a decode instance does in its turns."""

    def __init__(self, engine: Instance) -> None:
        self.e = engine
        engine._states = np.zeros(1, DECODE_DTYPE)
        self.running_now = running_requests(
            (), engine.plant.settings.max_seqs, engine.plant.kv_capacity_tokens
        )
        kernels.decode_start(engine.st, self.running_now, engine.clock.freq_ghz)
        self.form()

    def busy(self) -> bool:
        st = self.e.st
        row = int(st["head"])
        return bool(
            st["batch"] > 0
            or st["preempted"] > 0
            or (row < self.e.count and self.e.arrival_s[row] <= st["time_s"])
        )

    def form(self) -> None:
        e = self.e
        kernels.decode_form(e.st, e.params, e.requests, e.times, self.running_now)

    def record(self) -> Any:
        e, run = self.e, self.running_now
        capacity = e.plant.kv_capacity_tokens
        return e.watcher.decode(
            e.st, e.arrival_s, e.prompt, run.slots, run.tree, run.stack, capacity
        )

    @contextlib.contextmanager
    def as_it_is(self) -> Iterator[None]:
        """Leave everything as it was: what happens inside is only thought of."""
        e, run = self.e, self.running_now
        live: list[np.ndarray] = [e._states, e.start_s[: e.count], e.finish_s[: e.count], *run]
        kept = [array.copy() for array in live]
        yield
        for array, old in zip(live, kept, strict=True):
            array[:] = old

    def pass_over(self) -> None:
        """The end of the iteration, without telling its clients."""
        e = self.e
        kernels.decode_end(e.st, e.params, e.requests, e.times, self.running_now)

    def work(self, table: np.ndarray, n: int) -> None:
        kernels.decode_work(self.e.st, self.e.coefs, self.e.params, table, n)

    def end(self) -> None:
        e, run = self.e, self.running_now
        half = run.tree.size // 2
        active = np.flatnonzero(np.isfinite(run.tree[half : half + len(run.slots)]))
        rows = run.slots["request"][active].tolist()
        kernels.decode_end(e.st, e.params, e.requests, e.times, run)
        e.tokens_out += len(rows)
        finished = np.isfinite(e.finish_s[rows]).tolist()
        for row, over in zip(rows, finished, strict=True):
            ticket = e.tickets[row]
            if not ticket.cancelled:
                ticket.on_token()
                if over:
                    ticket.on_end()
            if over:
                del e.tickets[row]

    def running(self) -> int:
        return int(self.e.st["batch"])

    def kv_use(self) -> float:
        return float(self.e.st["cached"]) / self.e.plant.kv_capacity_tokens
