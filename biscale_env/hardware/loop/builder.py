"""Engine records become the observation, by the simulator's own code.

The builder fills a record of the simulator's state with what the engine told, and lets the
environment's compiled observer read it. So there is one definition of every index, and the builder
is tested by feeding it the simulator's own records.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.core.jit import compiled, inlined
from biscale_env.envs.observe import Encoding, encode, observe_decode, observe_prefill
from biscale_env.envs.plant import Plant
from biscale_env.hardware.engines.estimate import Estimator
from biscale_env.hardware.engines.hook.engine_record import Detail, EngineRecord
from biscale_env.hardware.loop.clockview import ClockView
from biscale_env.sim.arrivals import admit_arrivals
from biscale_env.sim.state import (
    DECODE_DTYPE,
    NO_CLASSES,
    NO_PREFIXES,
    PREFILL_DTYPE,
    Floats,
    Requests,
    RunningRequests,
    running_requests,
)

FIRST_ROOM = 1024
BROKEN = (
    "an engine record holds a broken table: engine hook and controller are of different versions"
)


class Told(NamedTuple):
    """What one engine record tells, as tables of times in s and token counts.

    Attributes:
        waiting: requests of the queue, (n, 3): arrival, prompt, prompt tokens done.
        waiting_more: further requests of the queue, of which only the number is known.
        recent: arrivals since the last record, (n, 2): time, prompt.
        lost: arrivals that lost records would have told.
        lost_tokens: their prompt tokens.
        now_s: time of the record since the epoch.
        epoch_s: the engine's own time at which the state's time starts.
    """

    waiting: Floats
    waiting_more: int
    recent: Floats
    lost: int
    lost_tokens: float
    now_s: float
    epoch_s: float


class ToldRunning(NamedTuple):
    """What a record of decode tells besides.

    Attributes:
        preempted: (n, 3): arrival, prompt, tokens made.
        start_s: first tokens of running requests, (n, 1).
        made: tokens that each has made, (n, 1).
    """

    preempted: Floats
    start_s: Floats
    made: Floats


class Rows(NamedTuple):
    """Room for requests, as the simulator keeps them; grows with the longest record.

    Attributes:
        arrival_s: (size,).
        prompt: (size,).
        times: of arrivals to count, (size,).
        tokens: of these, (size,).
        running: preempted requests on its stack, least deadline key of the running ones at index 1
            of its tree.
    """

    arrival_s: Floats
    prompt: NDArray[np.int32]
    times: Floats
    tokens: Floats
    running: RunningRequests

    @classmethod
    def of(cls, size: int) -> "Rows":
        """Room for ``size`` requests."""
        return cls(
            np.zeros(size),
            np.zeros(size, dtype=np.int32),
            np.zeros(size),
            np.zeros(size),
            running_requests((), size),
        )


@inlined
def _finite(table: Floats) -> bool:
    for i in range(table.shape[0]):
        for j in range(table.shape[1]):
            if not np.isfinite(table[i, j]):
                return False
    return True


@inlined
def _count(st: Any, told: Told, rows: Rows) -> None:
    """Count arrivals in the rate estimates.

    Those that a lost record would have told are taken to come now.
    """
    n = told.recent.shape[0]
    last_s = told.now_s
    for i in range(n):
        rows.times[i] = told.recent[i, 0] - told.epoch_s
        rows.tokens[i] = told.recent[i, 1]
        last_s = max(last_s, rows.times[i])
    for i in range(n, n + told.lost):
        rows.times[i] = last_s
        rows.tokens[i] = told.lost_tokens / told.lost
    st.tail = 0
    st.end = n + told.lost
    st.time_s = last_s
    admit_arrivals(st, rows.times, rows.tokens)
    st.time_s = told.now_s


@inlined
def _queue(
    st: Any, table: Floats, first: int, more: int, epoch_s: float, whole: bool, rows: Rows
) -> int:
    """Append waiting requests to the request arrays from ``first`` on.

    With ``whole`` the prompt tokens done are left out of all but the first.
    """
    n = table.shape[0]
    total = 0.0
    for i in range(n):
        rows.arrival_s[first + i] = table[i, 0] - epoch_s
        rows.prompt[first + i] = table[i, 1] - (table[i, 2] if whole and i > 0 else 0.0)
        total += table[i, 1]
    for i in range(n, n + more):
        rows.arrival_s[first + i] = st.time_s
        rows.prompt[first + i] = max(int(np.rint(total / n)), 1) if n > 0 else 1
    return first + n + more


@inlined
def _requests(st: Any, told: Told, whole: bool, rows: Rows) -> Requests:
    """The waiting requests as the queue of the instance.

    Engines tell what is still to be computed, so nothing is cached; output lengths are not known,
    nor observed.
    """
    st.head = 0
    st.tail = _queue(st, told.waiting, 0, told.waiting_more, told.epoch_s, whole, rows)
    st.queue_tokens = 0.0
    for i in range(st.tail):
        st.queue_tokens += rows.prompt[i]
    return Requests(rows.arrival_s, rows.prompt, rows.prompt, NO_PREFIXES, NO_CLASSES)


@compiled
def _prefill(
    st: Any, p: Any, told: Told, rows: Rows, encoding: Encoding, obs: NDArray[np.float32]
) -> bool:
    if not (_finite(told.waiting) and _finite(told.recent)):
        return False
    _count(st, told, rows)
    requests = _requests(st, told, True, rows)
    st.end = st.tail
    st.head_done = int(told.waiting[0, 2]) if told.waiting.shape[0] > 0 else 0
    observe_prefill(st, p, requests, encoding.physical)
    encode(encoding, obs)
    return True


@compiled
def _decode(
    st: Any,
    p: Any,
    told: Told,
    running: ToldRunning,
    rows: Rows,
    encoding: Encoding,
    obs: NDArray[np.float32],
) -> bool:
    if not (
        _finite(told.waiting)
        and _finite(told.recent)
        and _finite(running.preempted)
        and _finite(running.start_s)
        and _finite(running.made)
    ):
        return False
    _count(st, told, rows)
    requests = _requests(st, told, False, rows)
    # preempted ones stand behind the queue and are reached by the stack
    st.end = _queue(st, running.preempted, st.tail, 0, told.epoch_s, False, rows)
    st.preempted = running.preempted.shape[0]
    for i in range(st.preempted):
        rows.running.stack[i, 0] = st.tail + i
        rows.running.stack[i, 1] = int(running.preempted[i, 2])
    st.batch = running.start_s.shape[0]
    st.iterations = 1
    st.key_sum = 0.0
    rows.running.tree[1] = np.inf
    for i in range(st.batch):
        key = running.start_s[i, 0] - told.epoch_s + p.slo_s * (running.made[i, 0] - 1.0)
        st.key_sum += key
        rows.running.tree[1] = min(rows.running.tree[1], key)
    observe_decode(st, p, requests, rows.running, encoding.physical)
    encode(encoding, obs)
    return True


def rows_of(data: bytes, columns: int) -> NDArray[np.float64]:
    """Table of a record, (n, columns), read-only.

    Raises:
        BiscaleError: not a whole number of rows.
    """
    values = np.frombuffer(data, dtype=np.float64)
    if values.size % columns:
        raise BiscaleError(BROKEN)
    return values.reshape(-1, columns)


class ObservationBuilder:
    """Builds the observation of one instance from its records."""

    def __init__(self, plant: Plant, delay_s: float) -> None:
        """Prepare.

        Args:
            plant: phase, engine limits, SLO, KV capacity, observation spec.
            delay_s: expected actuation delay, s.
        """
        self.plant = plant
        self.delay_s = delay_s
        self.estimator = Estimator(plant.phase, plant.settings.token_budget)
        self._params = plant.params(-1, np.inf)
        self._params["delay_s"] = delay_s
        self._states = np.zeros(1, PREFILL_DTYPE if plant.phase == "prefill" else DECODE_DTYPE)
        self._state = self._states[0]  # a view
        self._arrived = self._arrived_tokens = 0
        self._epoch_s = np.nan
        self._encoding = Encoding.of(plant.spec)
        self._dim = plant.spec.dim
        self._rows = Rows.of(FIRST_ROOM)

    def warm_up(self) -> None:
        """Compile now instead of at the first record."""
        other = ObservationBuilder(self.plant, self.delay_s)
        view = ClockView(self.plant.clocks, self.delay_s)
        other.observe(
            EngineRecord(
                detail=Detail(
                    1.0, 0.0, recent=np.array([0.5, 8.0]).tobytes(), arrived=1, arrived_tokens=8
                )
            ),
            view,
            0.0,
        )

    def observe(
        self,
        record: EngineRecord,
        clock: ClockView,
        power_w: float,
        backpressure: float = 0.0,
        clock_offset_s: float = 0.0,
        lead_s: float = 0.0,
    ) -> NDArray[np.float32]:
        """Observation at the time of a record.

        Args:
            record: what the engine told.
            clock: what is known about the clock.
            power_w: mean power per GPU over the last iteration, W.
            backpressure: fraction of the decode KV cache that is taken, for prefill.
            clock_offset_s: time of ``clock`` minus time of the record, where they are of two
                machines, s.
            lead_s: from the time of the record to the begin of its iteration, s. The observation is
                that at the begin; a clock asked for now takes so much less time from there.

        Returns:
            Encoded observation, (dim,), a fresh array.
        """
        detail = record.detail or self.estimator.detail(record)
        st = self._state
        if detail.epoch_s != self._epoch_s:  # another engine, or the same one restarted
            self._states[:] = np.zeros(1, self._states.dtype)
            self._epoch_s, self._arrived, self._arrived_tokens = detail.epoch_s, 0, 0
        clock.write(st, detail.time_s + clock_offset_s, detail.epoch_s + clock_offset_s, lead_s)
        self._params["delay_s"] = max(self.delay_s - lead_s, 0.0)
        st["last_time_s"], st["last_power_w"], st["backpressure"] = (
            record.wall_time,
            power_w,
            backpressure,
        )
        out = np.empty(self._dim, dtype=np.float32)
        if not self._fill(detail, out, lead_s):
            raise BiscaleError(BROKEN)
        return out

    def _fill(self, detail: Detail, out: NDArray[np.float32], lead_s: float) -> bool:
        """Fill the state and observe; False when a table holds something that is not a number."""
        waiting, recent = rows_of(detail.waiting, 3), rows_of(detail.recent, 2)
        preempted = rows_of(detail.preempted, 3)
        lost = max(detail.arrived - self._arrived - len(recent), 0)
        lost_tokens = 0.0
        if lost:
            lost_tokens = max(
                float(detail.arrived_tokens - self._arrived_tokens - recent[:, 1].sum()), 0.0
            )
        self._arrived, self._arrived_tokens = detail.arrived, detail.arrived_tokens
        need = max(len(waiting) + detail.waiting_more + len(preempted), len(recent) + lost)
        if need > len(self._rows.times):
            self._rows = Rows.of(2 * need)
        now_s = max(detail.time_s - detail.epoch_s, 0.0) + lead_s
        told = Told(waiting, detail.waiting_more, recent, lost, lost_tokens, now_s, detail.epoch_s)
        st, params, rows = self._state, self._params[()], self._rows
        if self.plant.phase == "prefill":
            return bool(_prefill(st, params, told, rows, self._encoding, out))
        st["cached"], st["recompute_tokens"], st["incoming"] = (
            detail.cached_tokens,
            detail.recompute_tokens,
            detail.incoming,
        )
        start, made = rows_of(detail.running_start, 1), rows_of(detail.running_tokens, 1)
        if len(start) != len(made):
            raise BiscaleError(BROKEN)
        running = ToldRunning(preempted, start, made)
        return bool(_decode(st, params, told, running, rows, self._encoding, out))
