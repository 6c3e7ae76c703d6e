"""DynamoLLM's instance level: one clock per window of 5 seconds.

Law (HPCA 2025), every 5 s, or at once to f_max in an emergency::

    f = argmin { E(f) : worst(f) <= SLO (1 - margin) }     (f_max where none meets it)

with ``worst`` in decode the interval of the largest batch of the last window with ``headroom``, in
prefill the 99th percentile of TTFT of an M/D/1 queue at the observed rate, ``use = rate T(f)``::

    worst(f) = T(f) + TAIL T(f) use / (2 (1 - use))
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from biscale_env.core.jit import compiled, inlined
from controllers.base import (
    MARGINS,
    Amount,
    Bools,
    Controller,
    Floats,
    Fraction,
    PolicyContext,
    Positive,
)
from controllers.columns import DECODE, PREFILL
from controllers.surrogates.scan import LevelScan

TAIL = 4.6  # ln(100): the 99th percentile of an exponential tail in means


@inlined
def cheapest_allowed(cost: Floats, worst: Floats, limit: float) -> int:
    """Index of least cost among the clocks whose worst case is within the limit.

    The last (highest) when none is.
    """
    best = cost.size - 1
    for k in range(cost.size):
        if worst[k] <= limit and (cost[k] < cost[best] or worst[best] > limit):
            best = k
    return best


@compiled
def prefill_windows(
    latency: Floats,
    energy: Floats,
    rate_rps: Floats,
    limit: Floats,
    freq: Floats,
    clocks_mhz: Floats,
) -> None:
    """Clock per row from the M/D/1 waiting time.

    ``latency`` (n, N) becomes the 99th percentile of TTFT at each clock.
    """
    for i in range(freq.size):
        for k in range(clocks_mhz.size):
            service = latency[i, k]
            use = rate_rps[i] * service
            wait = 0.5 * use * service / (1.0 - use) if use < 1.0 else 1e9
            latency[i, k] = service + TAIL * wait
        freq[i] = clocks_mhz[cheapest_allowed(energy[i], latency[i], limit[i])]


@compiled
def decode_windows(
    latency: Floats, energy: Floats, limit: Floats, freq: Floats, clocks_mhz: Floats
) -> None:
    """Clock per row: least energy per iteration among those that meet the limit."""
    for i in range(freq.size):
        freq[i] = clocks_mhz[cheapest_allowed(energy[i], latency[i], limit[i])]


class DynamoWindows(Controller):
    """The clock of an instance as in DynamoLLM (HPCA 2025).

    Chosen every 5 s from profiles, for the load of the last window.

    Among the clocks that serve the forecast load within the SLO it takes the one of least energy;
    in an emergency (the SLO is already being missed, or the KV cache fills) it takes the highest
    clock at once, until the next window.

    Parameters of the source: 5 s, profiles at 800 to 1980 MHz (the control levels here), P99 SLOs.
    Changed to fit: pools, TP and instance counts are the business of the placement; the load
    forecast is the observed rate (prefill: 10 s average; decode: the largest batch of the last
    window, ``headroom`` above); prefill waiting is that of M/D/1 with an exponential tail; the
    window counts busy time, because the observation holds no clock on the wall.
    """

    TUNABLE: ClassVar[Mapping[str, tuple[Any, ...]]] = MARGINS
    memory_size = 3  # seconds of the window, its clock (MHz; 0: none yet), largest batch in it

    def __init__(
        self,
        context: PolicyContext,
        *,
        margin: Fraction = 0.0,
        window_s: Positive = 5.0,
        headroom: Amount = 0.2,
        kv_guard: Amount = 0.9,
    ) -> None:
        """Prepare the profiles.

        Args:
            context: what it may know.
            margin: fraction of the SLO kept free.
            window_s: length of a window, s.
            headroom: decode batches are planned for this much more than the largest seen (assumed).
            kv_guard: KV use that counts as an emergency (assumed).
        """
        super().__init__(context)
        self.margin, self.window_s = float(margin), float(window_s)
        self.headroom, self.kv_guard = float(headroom), float(kv_guard)
        self._scan = LevelScan(context)
        self._prefill = context.phase == "prefill"

    def first_memory(self) -> Floats:
        """A window that is over, without a clock."""
        return np.array([np.inf, 0.0, 0.0])

    def _plan(self, x: Floats, largest: Floats) -> Floats:
        """Clocks of new windows."""
        return self._plan_prefill(x) if self._prefill else self._plan_decode(x, largest)

    def _plan_prefill(self, x: Floats) -> Floats:
        freq, clocks = np.empty(len(x)), self._scan.clocks_mhz
        limit = x[:, PREFILL.slo] * (1.0 - self.margin)
        rate = np.maximum(x[:, PREFILL.arrival_rate_10s], 1e-3)
        mean = np.clip(x[:, PREFILL.token_rate_10s] / rate, 1.0, self.context.token_budget)
        work = np.zeros((len(x), 4))
        work[:, 0], work[:, 1], work[:, 3] = mean, 0.5 * mean**2, 1.0
        table = self._scan(work)
        prefill_windows(table.latency_s, table.energy_j, rate, limit, freq, clocks)
        return freq

    def _plan_decode(self, x: Floats, largest: Floats) -> Floats:
        freq, clocks = np.empty(len(x)), self._scan.clocks_mhz
        limit = x[:, DECODE.slo] * (1.0 - self.margin)
        batch = np.minimum(np.ceil(largest * (1.0 + self.headroom)), self.context.max_seqs)
        each = x[:, DECODE.cached_tokens] / np.maximum(x[:, DECODE.batch], 1.0)
        work = np.zeros((len(x), 4))
        work[:, 0], work[:, 2], work[:, 3] = batch, batch * each, batch
        table = self._scan(work)
        decode_windows(table.latency_s, table.energy_j, limit, freq, clocks)
        return freq

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """Keep the window's clock; plan a new one when it is over."""
        assert memory is not None
        memory = memory.copy()
        memory[:, 0] += x[:, PREFILL.last_time if self._prefill else DECODE.last_time]
        if not self._prefill:
            memory[:, 2] = np.maximum(memory[:, 2], x[:, DECODE.batch])
        over = memory[:, 0] >= self.window_s
        if over.any():
            memory[over, 1] = self._plan(x[over], memory[over, 2])
            memory[over, 0] = 0.0
            memory[over, 2] = 0.0
        memory[self._emergency(x), 1] = self.context.clocks.freq_max_mhz
        return memory[:, 1].copy(), memory

    def _emergency(self, x: Floats) -> Bools:
        """Where a prompt has waited for a whole SLO, or the KV cache is nearly full."""
        if self._prefill:
            return np.asarray(x[:, PREFILL.oldest_wait] > 1.0)
        return np.asarray(x[:, DECODE.kv_use] > self.kv_guard)
