"""Engine records become the observation, by the simulator's own code.

The builder fills a record of the simulator's state with what the engine told, and lets the
environment's compiled observer read it. So there is one definition of every index, and the builder
is tested by feeding it the simulator's own records.
"""

from typing import Any

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
    PREFILL_DTYPE,
    Requests,
    RunningRequests,
    running_requests,
)

FIRST_ROOM = 1024
BROKEN = (
    "an engine record holds a broken table: engine hook and controller are of different versions"
)


@inlined
def _finite(table: Any) -> bool:
    for i in range(table.shape[0]):
        for j in range(table.shape[1]):
            if not np.isfinite(table[i, j]):
                return False
    return True


@inlined
def _count(
    st: Any,
    recent: Any,
    lost: int,
    lost_tokens: float,
    now_s: float,
    epoch_s: float,
    times: Any,
    tokens: Any,
) -> None:
    """Count arrivals in the rate estimates.

    Those that a lost record would have told are taken to come now.
    """
    n = recent.shape[0]
    last_s = now_s
    for i in range(n):
        times[i] = recent[i, 0] - epoch_s
        tokens[i] = recent[i, 1]
        last_s = max(last_s, times[i])
    for i in range(n, n + lost):
        times[i] = last_s
        tokens[i] = lost_tokens / lost
    st.tail = 0
    st.end = n + lost
    st.time_s = last_s
    admit_arrivals(st, times, tokens)
    st.time_s = now_s


@inlined
def _queue(
    st: Any,
    rows: Any,
    first: int,
    more: int,
    epoch_s: float,
    whole: bool,
    arrival_s: Any,
    prompt: Any,
    cumulative: Any,
) -> int:
    """Append waiting requests to the request arrays from ``first`` on; ``whole``.

    Leave out what is done of all but the first.
    """
    n = rows.shape[0]
    total = 0.0
    for i in range(n):
        arrival_s[first + i] = rows[i, 0] - epoch_s
        prompt[first + i] = rows[i, 1] - (rows[i, 2] if whole and i > 0 else 0.0)
        total += rows[i, 1]
    for i in range(n, n + more):
        arrival_s[first + i] = st.time_s
        prompt[first + i] = max(int(np.rint(total / n)), 1) if n > 0 else 1
    for i in range(first, first + n + more):
        cumulative[i + 1] = cumulative[i] + prompt[i]
    return first + n + more


@compiled
def _prefill(
    st: Any, p: Any, waiting: Any, more: Any, recent: Any, lost: Any, lost_tokens: Any, now_s: Any, epoch_s: Any, times: Any, tokens: Any,
    arrival_s: Any, prompt: Any, cumulative: Any, how: Encoding, obs: Any,
) -> bool:  # fmt: skip
    if not (_finite(waiting) and _finite(recent)):
        return False
    _count(st, recent, lost, lost_tokens, now_s, epoch_s, times, tokens)
    st.head = 0
    st.tail = _queue(st, waiting, 0, more, epoch_s, True, arrival_s, prompt, cumulative)
    st.end = st.tail
    st.head_done = int(waiting[0, 2]) if waiting.shape[0] > 0 else 0
    requests = Requests(arrival_s, prompt, prompt)  # output lengths are not known, nor observed
    observe_prefill(st, p, requests, cumulative, how.physical)
    encode(how, obs)
    return True


@compiled
def _decode(
    st: Any, p: Any, waiting: Any, more: Any, recent: Any, lost: Any, lost_tokens: Any, now_s: Any, epoch_s: Any, times: Any, tokens: Any,
    arrival_s: Any, prompt: Any, cumulative: Any, preempted: Any, start_s: Any, made: Any, run: RunningRequests, how: Encoding, obs: Any,
) -> bool:  # fmt: skip
    if not (
        _finite(waiting)
        and _finite(recent)
        and _finite(preempted)
        and _finite(start_s)
        and _finite(made)
    ):
        return False
    _count(st, recent, lost, lost_tokens, now_s, epoch_s, times, tokens)
    st.head = 0
    st.tail = _queue(st, waiting, 0, more, epoch_s, False, arrival_s, prompt, cumulative)
    st.end = _queue(
        st, preempted, st.tail, 0, epoch_s, False, arrival_s, prompt, cumulative
    )  # behind the queue, reached by the stack
    st.preempted = preempted.shape[0]
    for i in range(st.preempted):
        run.stack[i, 0] = st.tail + i
        run.stack[i, 1] = int(preempted[i, 2])
    st.batch = start_s.shape[0]
    st.iterations = 1
    st.key_sum = 0.0
    run.tree[1] = np.inf
    for i in range(st.batch):
        key = start_s[i, 0] - epoch_s + p.slo_s * (made[i, 0] - 1.0)
        st.key_sum += key
        run.tree[1] = min(run.tree[1], key)
    requests = Requests(arrival_s, prompt, prompt)  # output lengths are not known, nor observed
    observe_decode(st, p, requests, cumulative, run, how.physical)
    encode(how, obs)
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
        self._make_room(FIRST_ROOM)

    def _make_room(self, size: int) -> None:
        self._arrival, self._times, self._tokens = np.zeros(size), np.zeros(size), np.zeros(size)
        self._prompt = np.zeros(size, dtype=np.int32)
        self._cumulative = np.zeros(size + 1, dtype=np.int64)
        self._running = running_requests((), size)

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
        self, record: EngineRecord, clock: ClockView, power_w: float, backpressure: float = 0.0
    ) -> NDArray[np.float32]:
        """Observation at the time of a record.

        Args:
            record: what the engine told.
            clock: what is known about the clock.
            power_w: mean power per GPU over the last iteration, W.
            backpressure: fraction of the decode KV cache that is taken, for prefill.

        Returns:
            Encoded observation, (dim,), a fresh array.
        """
        detail = record.detail or self.estimator.detail(record)
        st = self._state
        if detail.epoch_s != self._epoch_s:  # another engine, or the same one restarted
            self._states[:] = np.zeros(1, self._states.dtype)
            self._epoch_s, self._arrived, self._arrived_tokens = detail.epoch_s, 0, 0
        clock.write(st, detail.time_s, detail.epoch_s)
        st["last_time_s"], st["last_power_w"], st["backpressure"] = (
            record.wall_time,
            power_w,
            backpressure,
        )
        out = np.empty(self._dim, dtype=np.float32)
        if not self._fill(detail, out):
            raise BiscaleError(BROKEN)
        return out

    def _fill(self, detail: Detail, out: NDArray[np.float32]) -> bool:
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
        if need > len(self._arrival):
            self._make_room(2 * need)
        now_s = max(detail.time_s - detail.epoch_s, 0.0)
        common = (
            self._state, self._params[()], waiting, detail.waiting_more, recent, lost, lost_tokens, now_s, detail.epoch_s, self._times,
            self._tokens, self._arrival, self._prompt, self._cumulative,
        )  # fmt: skip
        if self.plant.phase == "prefill":
            return bool(_prefill(*common, self._encoding, out))
        st = self._state
        st["cached"], st["recompute_tokens"], st["incoming"] = (
            detail.cached_tokens,
            detail.recompute_tokens,
            detail.incoming,
        )
        start, made = rows_of(detail.running_start, 1), rows_of(detail.running_tokens, 1)
        if len(start) != len(made):
            raise BiscaleError(BROKEN)
        return bool(_decode(*common, preempted, start, made, self._running, self._encoding, out))
