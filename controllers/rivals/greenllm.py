"""GreenLLM: prefill clocks by length class, decode clocks by feedback on the tail of the time
between tokens.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from biscale_env.core.jit import compiled
from controllers.base import MARGINS, Controller, Floats, PolicyContext, Share
from controllers.surrogates.scan import Belief, NextWork

BAND_S, STEP_S = 0.2, 0.02  # periods of the source
STEP_MHZ = 15.0  # step of the source
QUANTILE = 0.95  # of the source
TRACKING = 0.02  # assumed: step of the quantile tracker, in SLOs


@compiled
def track(x: Any, slo: int, last_time: int, target: float, down: float, memory: Any) -> None:
    """Advance the feedback loop of each row; memory columns.

    Clock (MHz), since band (s), since step (s), P95 estimate (s).

    The quantile is tracked by stochastic approximation: up by a share QUANTILE of the step when an
    interval exceeds it, down by the rest.
    """
    for i in range(x.shape[0]):
        interval = x[i, last_time]
        gain = TRACKING * x[i, slo]
        memory[i, 1] += interval
        memory[i, 2] += interval
        if interval > 0.0:
            memory[i, 3] += gain * QUANTILE if interval > memory[i, 3] else -gain * (1.0 - QUANTILE)
        if memory[i, 2] >= STEP_S:
            memory[i, 2] = 0.0
            if memory[i, 3] > target * x[i, slo]:
                memory[i, 0] += STEP_MHZ
            elif memory[i, 3] < down * target * x[i, slo]:
                memory[i, 0] -= STEP_MHZ


@compiled
def to_class(work: Any, largest: float) -> None:
    """Round the tokens of work (n, 4) up to a power of two, at most ``largest``, and its attention
    work with them, in place.
    """
    for i in range(work.shape[0]):
        tokens = max(work[i, 0], 1.0)
        bound = min(2.0 ** np.ceil(np.log2(tokens)), largest)
        work[i, 0] = bound
        work[i, 1] *= (bound / tokens) ** 2


@compiled
def cheapest_in_time(
    latency: Any,
    energy: Any,
    x: Any,
    tokens: int,
    queue: int,
    slo: int,
    share: float,
    clocks_mhz: Any,
    freq: Any,
) -> None:
    """Per row, the level of least energy at which the queue, as batches like the next, is done
    within ``share`` of the SLO.
    """
    for i in range(freq.size):
        batches = max(x[i, queue] / max(x[i, tokens], 1.0), 1.0)
        best = clocks_mhz.size - 1
        for k in range(clocks_mhz.size - 2, -1, -1):
            if latency[i, k] * batches <= share * x[i, slo] and energy[i, k] <= energy[i, best]:
                best = k
        freq[i] = clocks_mhz[best]


class GreenPrefill(Controller):
    """GreenLLM's prefill (arXiv 2508.16449): a clock per class of prompt length.

    Parameters of the source: TTFT 400 ms, latency ``a n^2 + b n + c`` over clock, cubic power.
    Changed to fit: the source routes each class to its own engines; here the class of the next
    batch (its tokens, rounded up to a power of two) decides, at the level of least energy among
    those at which ``1 + queue / batch`` such batches complete within the SLO; nothing looks at
    single deadlines. The published class bounds were not found; powers of two are assumed.
    """

    phases: ClassVar[tuple[str, ...]] = ("prefill",)
    TUNABLE: ClassVar[Mapping[str, tuple[Any, ...]]] = MARGINS

    def __init__(self, context: PolicyContext, margin: Share = 0.0) -> None:
        """Prepare the classes.

        Args:
            context: what it may know.
            margin: share of the SLO kept free.
        """
        super().__init__(context)
        self.margin = float(margin)
        self._belief, self._work = Belief(context), NextWork(context)
        self._columns = tuple(
            context.spec.index(name) for name in ("batch_tokens", "queue_tokens", "slo")
        )

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """Least-energy level of the class that clears the queue in time."""
        work, freq = self._work(x), np.empty(len(x))
        to_class(work, float(self.context.token_budget))
        cheapest_in_time(
            *self._belief.levels(work),
            x,
            *self._columns,
            1.0 - self.margin,
            self._belief.clocks_mhz,
            freq,
        )
        return freq, None


class GreenDecode(Controller):
    """GreenLLM's decode (arXiv 2508.16449).

    A band of clocks every 200 ms, steps of 15 MHz inside it every 20 ms.

    The band follows the throughput asked for; the steps follow the 95th percentile of the time
    between tokens: up above the target, down below ``down`` times the target.

    Parameters of the source: 200 ms, 20 ms, 15 MHz, P95 TBT 100 ms. Changed to fit: the band is
    centred on the lowest level whose predicted interval meets the target and reaches one level to
    each side (the source's table of throughput against clock is not published); the percentile is
    tracked recursively, because a window of samples is no memory of fixed size.
    """

    phases: ClassVar[tuple[str, ...]] = ("decode",)
    TUNABLE: ClassVar[Mapping[str, tuple[Any, ...]]] = MARGINS
    # clock, seconds since band, seconds since step, P95 estimate (s), band low, band high (MHz)
    memory_size = 6

    def __init__(self, context: PolicyContext, margin: Share = 0.0, down: Share = 0.8) -> None:
        """Prepare the loops.

        Args:
            context: what it may know.
            margin: share of the SLO kept free.
            down: share of the target below which the clock is lowered (assumed).
        """
        super().__init__(context)
        self.margin, self.down = float(margin), float(down)
        self._belief, self._work = Belief(context), NextWork(context)
        index = context.spec.index
        self._slo, self._last = index("slo"), index("last_time")

    def first_memory(self) -> Floats:
        """At the highest clock, with a band due."""
        top = self.context.clocks.freq_max_mhz
        return np.array([top, np.inf, 0.0, 0.0, self.context.clocks.freq_min_mhz, top])

    def _new_bands(self, x: Floats, memory: Floats, due: Any) -> None:
        levels = self._belief.clocks_mhz
        limit = x[due, self._slo, None] * (1.0 - self.margin)
        meets = self._belief.levels(self._work(x[due]))[0] <= limit
        meets[:, -1] = True
        centre = meets.argmax(axis=1)
        memory[due, 4] = levels[np.maximum(centre - 1, 0)]
        memory[due, 5] = levels[np.minimum(centre + 1, levels.size - 1)]
        memory[due, 1] = 0.0

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """One step of both loops."""
        assert memory is not None
        memory = memory.copy()
        track(x, self._slo, self._last, 1.0 - self.margin, self.down, memory)
        due = memory[:, 1] >= BAND_S
        if due.any():
            self._new_bands(x, memory, due)
        memory[:, 0] = np.minimum(np.maximum(memory[:, 0], memory[:, 4]), memory[:, 5])
        return memory[:, 0].copy(), memory
