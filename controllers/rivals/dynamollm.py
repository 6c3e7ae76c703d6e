"""DynamoLLM's instance level: one clock per window of 5 seconds."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from biscale_env.core.jit import compiled, inlined
from controllers.base import MARGINS, Amount, Controller, Floats, PolicyContext, Positive, Share
from controllers.surrogates.scan import Belief

TAIL = 4.6  # ln(100): the 99th percentile of an exponential tail in means


@inlined
def cheapest_allowed(cost: Any, worst: Any, limit: float) -> int:
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
    latency: Any, energy: Any, load: Any, limit: Any, freq: Any, clocks_mhz: Any
) -> None:
    """Clock per row from the M/D/1 waiting time.

    ``latency`` (n, N) becomes the 99th percentile of TTFT at each clock.
    """
    for i in range(freq.size):
        for k in range(clocks_mhz.size):
            service = latency[i, k]
            use = load[i] * service
            wait = 0.5 * use * service / (1.0 - use) if use < 1.0 else 1e9
            latency[i, k] = service + TAIL * wait
        freq[i] = clocks_mhz[cheapest_allowed(energy[i], latency[i], limit[i])]


@compiled
def decode_windows(latency: Any, energy: Any, limit: Any, freq: Any, clocks_mhz: Any) -> None:
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
        margin: Share = 0.0,
        window_s: Positive = 5.0,
        headroom: Amount = 0.2,
        kv_guard: Amount = 0.9,
    ) -> None:
        """Prepare the profiles.

        Args:
            context: what it may know.
            margin: share of the SLO kept free.
            window_s: length of a window, s.
            headroom: decode batches are planned for this much more than the largest seen (assumed).
            kv_guard: KV use that counts as an emergency (assumed).
        """
        super().__init__(context)
        self.margin, self.window_s, self.headroom, self.kv_guard = (
            float(margin),
            float(window_s),
            float(headroom),
            float(kv_guard),
        )
        self._belief = Belief(context)
        self._prefill = context.phase == "prefill"
        self._at = {f.name: i for i, f in enumerate(context.spec.features)}

    def first_memory(self) -> Floats:
        """A window that is over, without a clock."""
        return np.array([np.inf, 0.0, 0.0])

    def _plan(self, x: Floats, largest: Floats) -> Floats:
        """Clocks of new windows."""
        at, freq = self._at, np.empty(len(x))
        limit = x[:, at["slo"]] * (1.0 - self.margin)
        work = np.zeros((len(x), 4))
        if self._prefill:
            rate = np.maximum(x[:, at["arrival_rate_10s"]], 1e-3)
            mean = np.clip(x[:, at["token_rate_10s"]] / rate, 1.0, self.context.token_budget)
            work[:, 0], work[:, 1], work[:, 3] = mean, 0.5 * mean**2, 1.0
            prefill_windows(*self._belief.levels(work), rate, limit, freq, self._belief.clocks_mhz)
            return freq
        batch = np.minimum(np.ceil(largest * (1.0 + self.headroom)), self.context.max_seqs)
        each = x[:, at["cached_tokens"]] / np.maximum(x[:, at["batch"]], 1.0)
        work[:, 0], work[:, 2], work[:, 3] = batch, batch * each, batch
        decode_windows(*self._belief.levels(work), limit, freq, self._belief.clocks_mhz)
        return freq

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """Keep the window's clock; plan a new one when it is over."""
        assert memory is not None
        at, memory = self._at, memory.copy()
        memory[:, 0] += x[:, at["last_time"]]
        if not self._prefill:
            memory[:, 2] = np.maximum(memory[:, 2], x[:, at["batch"]])
        over = memory[:, 0] >= self.window_s
        if over.any():
            memory[over, 1] = self._plan(x[over], memory[over, 2])
            memory[over, 0] = 0.0
            memory[over, 2] = 0.0
        late = (
            x[:, at["oldest_wait"]] > 1.0 if self._prefill else x[:, at["kv_use"]] > self.kv_guard
        )
        memory[late, 1] = self.context.clocks.freq_max_mhz
        return memory[:, 1].copy(), memory
