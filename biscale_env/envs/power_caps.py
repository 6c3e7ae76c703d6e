"""A clock that is asked for, held by a power limit: for GPUs that may be capped but not locked.

The limit that stands for a clock is the power that the next iteration draws at it, by the
instance's model and the work that the observation tells: so every policy keeps its own words, in
the environments and on hardware alike. Under a limit an iteration runs at the highest clock at
which its mean power keeps it (:func:`biscale_env.models.physics.iteration_under_cap`); nothing
holds the clock of a GPU that waits.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biscale_env.core.clockqueue import ClockQueue, advance_to, request, settled_at, wait_s
from biscale_env.core.jit import compiled
from biscale_env.envs.plant import Plant
from biscale_env.models import physics
from biscale_env.models.iteration_model import as_record

LOWEST_LIMIT_W: Final = 200.0
"""Lowest limit that an H100 SXM takes, W; other GPUs are taken to be alike (assumed)."""
STEP_W: Final = 5.0
"""Limits are rounded up to this, W, so that not every token calls the driver (chosen)."""
Floats = NDArray[np.float64]


@compiled
def _iterations(c: Any, work: Floats, freq_ghz: Floats, power_w: Floats, time_s: Floats) -> None:
    """Mean power per GPU and duration of iterations, without any cap.

    ``work`` is (n, 4): tokens, attention work, cached tokens, sequences; the others are (n,).
    """
    for i in range(freq_ghz.size):
        tokens, attn, cached, n_seq = work[i, 0], work[i, 1], work[i, 2], work[i, 3]
        time = physics.latency_s(c, tokens, attn, cached, n_seq, freq_ghz[i])
        joules = physics.iteration_energy_j(c, tokens, attn, cached, n_seq, time, freq_ghz[i])
        power_w[i], time_s[i] = joules / time, time


class CapTranslator:
    """The power limit that stands for a clock, for one instance.

    Attributes:
        low_w: lowest limit per GPU, W.
        high_w: the board's own, W: no limit at all.
    """

    def __init__(self, plant: Plant, low_w: float = LOWEST_LIMIT_W) -> None:
        """Take the nominal model of a plant; members differ from it, as real GPUs do."""
        self._coefs = as_record(plant.model.member(-1))
        self._top_mhz, self._prefill = plant.clocks.freq_max_mhz, plant.phase == "prefill"
        names = ("batch_tokens", "batch_attn", "batch_requests")
        if not self._prefill:
            names = ("batch", "recompute_tokens", "cached_tokens")
        self._columns = [plant.spec.index(name) for name in names]
        self._scale = plant.spec.scale[self._columns]
        self.high_w = float(self._coefs.p_cap_w)
        self.low_w = min(low_w, self.high_w)

    def work(self, observation: NDArray[np.float32]) -> Floats:
        """Work of the next iteration: tokens, attention work, cached tokens, sequences; (n, 4).

        Args:
            observation: encoded, (n, dim).
        """
        told = observation[:, self._columns] * self._scale
        work = np.zeros((len(told), 4))
        if self._prefill:
            work[:, (0, 1, 3)] = told
        else:
            work[:, 0] = told[:, 0] + told[:, 1]
            work[:, 1] = 0.5 * told[:, 1] ** 2  # as of one request: how many there are is not told
            work[:, 2], work[:, 3] = told[:, 2], told[:, 0]
        return work

    def limits(
        self, observation: NDArray[np.float32], freq_mhz: ArrayLike
    ) -> tuple[Floats, Floats]:
        """Limit per GPU under which the next iteration runs at a clock, W, and its duration, s.

        The highest clock, and no work to go by, are no limit.

        Args:
            observation: encoded, (n, dim).
            freq_mhz: clock that is asked for, (n,), MHz.

        Returns:
            Both (n,).
        """
        work, freq = self.work(observation), np.asarray(freq_mhz, dtype=np.float64)
        drawn_w, time_s = np.empty(len(work)), np.empty(len(work))
        _iterations(self._coefs, work, freq / 1e3, drawn_w, time_s)
        free = (freq >= self._top_mhz) | (work[:, 3] <= 0)
        limit_w = np.where(free, self.high_w, STEP_W * np.ceil(drawn_w / STEP_W))
        return np.clip(limit_w, self.low_w, self.high_w), time_s


class PowerCaps:
    """Carries the clocks asked of a batch's rows out by power limits.

    A limit takes effect as late as a clock would (assumed: the same driver sets both). One that is
    due while an iteration runs holds for all of it when it falls into the first half, else from the
    next one on. What policies see as clocks are those that the limits stand for.
    """

    def __init__(self, plant: Plant, rows: int) -> None:
        """No limit anywhere."""
        self.translator = CapTranslator(plant)
        self._clocks, self._spec = plant.clocks, plant.spec
        self._seen = [plant.spec.index(n) for n in ("freq_current", "freq_pending")]
        self._wait = plant.spec.index("time_to_apply")
        self._limits = [settled_at(self.translator.high_w)] * rows
        self._asked = [settled_at(plant.clocks.freq_max_mhz)] * rows

    def reset(self, rows: NDArray[np.int64]) -> None:
        """No limit in these rows."""
        for row in rows.tolist():
            self._limits[row] = settled_at(self.translator.high_w)
            self._asked[row] = settled_at(self._clocks.freq_max_mhz)

    def ask(self, batch: Any, actions: NDArray[np.float32]) -> NDArray[np.float32]:
        """Turn clocks into limits, and put those in effect into the coefficients.

        Args:
            batch: the :class:`~biscale_env.envs.batch.Batch`.
            actions: clocks asked for, (n,), in [-1, 1].

        Returns:
            What the kernels are asked for instead, (n,): the highest clock.
        """
        tops = np.ones(len(actions), dtype=np.float32)
        freq_mhz = self._clocks.snap_mhz(self._clocks.to_freq_mhz(actions))
        limits_w, times_s = self.translator.limits(batch.obs, freq_mhz)
        for row in np.flatnonzero(batch.states["done"] == 0).tolist():
            now_s, delay_s = float(batch.states["time_s"][row]), float(batch.params["delay_s"][row])
            limit = _moved(self._limits[row], float(limits_w[row]), now_s, delay_s)
            self._asked[row] = _moved(self._asked[row], float(freq_mhz[row]), now_s, delay_s)
            self._limits[row] = limit
            ahead = advance_to(limit, now_s + 0.5 * float(times_s[row]), delay_s)
            batch.coefs["p_cap_w"][row] = ahead.applied
        return tops

    def show(self, batch: Any) -> None:
        """Write the clocks that the limits stand for into the observations."""
        for row in np.flatnonzero(batch.states["done"] == 0).tolist():
            now_s, delay_s = float(batch.states["time_s"][row]), float(batch.params["delay_s"][row])
            asked = advance_to(self._asked[row], now_s, delay_s)
            self._asked[row] = asked
            for index, value in zip(
                (*self._seen, self._wait),
                (asked.applied, asked.requested, wait_s(asked, now_s, delay_s)),
                strict=True,
            ):
                batch.obs[row, index] = value / self._spec.scale[index]


def _moved(queue: ClockQueue, value: float, now_s: float, delay_s: float) -> ClockQueue:
    """A queue after a request now."""
    return request(advance_to(queue, now_s, delay_s), value, now_s, delay_s)
