"""GreenLLM: prefill clocks by length class, decode clocks by feedback on the tail of the TBT.

Law (arXiv 2508.16449)::

    prefill   f = argmin { E(class, f) : (1 + queue / batch) T(class, f) <= SLO (1 - margin) }
    decode    every 20 ms: f += 15 MHz if P95(interval) > SLO (1 - margin),
                           f -= 15 MHz if P95(interval) < down SLO (1 - margin),
              within a band of one level around the lowest level that meets the SLO, every 200 ms
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from biscale_env.core.jit import compiled
from controllers.base import MARGINS, Bools, Controller, Floats, Fraction, PolicyContext
from controllers.columns import DECODE, PREFILL
from controllers.surrogates.scan import LevelScan, next_work

BAND_S, STEP_S = 0.2, 0.02  # periods of the source
STEP_MHZ = 15.0  # step of the source
QUANTILE = 0.95  # of the source
TRACKING = 0.02  # assumed: step of the quantile tracker, in SLOs


@compiled
def track(x: Floats, target: float, down: float, memory: Floats) -> None:
    """Advance the feedback loop of each row of the memory (see `GreenDecode`), in place.

    The quantile is tracked by stochastic approximation: up by a fraction QUANTILE of the step when
    an interval exceeds it, down by the rest.

    Args:
        x: physical observations (n, dim).
        target: fraction of the SLO aimed at.
        down: fraction of the target below which the clock is lowered.
        memory: (n, 6).
    """
    for i in range(x.shape[0]):
        interval = x[i, DECODE.last_time]
        gain = TRACKING * x[i, DECODE.slo]
        memory[i, 1] += interval
        memory[i, 2] += interval
        if interval > 0.0:
            memory[i, 3] += gain * QUANTILE if interval > memory[i, 3] else -gain * (1.0 - QUANTILE)
        if memory[i, 2] >= STEP_S:
            memory[i, 2] = 0.0
            if memory[i, 3] > target * x[i, DECODE.slo]:
                memory[i, 0] += STEP_MHZ
            elif memory[i, 3] < down * target * x[i, DECODE.slo]:
                memory[i, 0] -= STEP_MHZ


@compiled
def to_class(work: Floats, largest: float) -> None:
    """Round the tokens of work (n, 4) up to a power of two, at most ``largest``, in place.

    Its attention work grows with them.
    """
    for i in range(work.shape[0]):
        tokens = max(work[i, 0], 1.0)
        bound = min(2.0 ** np.ceil(np.log2(tokens)), largest)
        work[i, 0] = bound
        work[i, 1] *= (bound / tokens) ** 2


@compiled
def cheapest_in_time(
    latency: Floats,
    energy: Floats,
    x: Floats,
    target: float,
    clocks_mhz: Floats,
    freq: Floats,
) -> None:
    """Per row, the level of least energy at which the queue is done in time.

    The queue counts as batches like the next; in time is within a fraction ``target`` of the SLO.
    """
    for i in range(freq.size):
        batches = max(x[i, PREFILL.queue_tokens] / max(x[i, PREFILL.batch_tokens], 1.0), 1.0)
        best = clocks_mhz.size - 1
        for k in range(clocks_mhz.size - 2, -1, -1):
            in_time = latency[i, k] * batches <= target * x[i, PREFILL.slo]
            if in_time and energy[i, k] <= energy[i, best]:
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

    def __init__(self, context: PolicyContext, *, margin: Fraction = 0.0) -> None:
        """Prepare the classes.

        Args:
            context: what it may know.
            margin: fraction of the SLO kept free.
        """
        super().__init__(context)
        self.margin = float(margin)
        self._scan = LevelScan(context)

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """Least-energy level of the class that clears the queue in time."""
        work, freq = next_work(x, "prefill"), np.empty(len(x))
        to_class(work, float(self.context.token_budget))
        table, clocks = self._scan(work), self._scan.clocks_mhz
        cheapest_in_time(table.latency_s, table.energy_j, x, 1.0 - self.margin, clocks, freq)
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

    def __init__(
        self, context: PolicyContext, *, margin: Fraction = 0.0, down: Fraction = 0.8
    ) -> None:
        """Prepare the loops.

        Args:
            context: what it may know.
            margin: fraction of the SLO kept free.
            down: fraction of the target below which the clock is lowered (assumed).
        """
        super().__init__(context)
        self.margin, self.down = float(margin), float(down)
        self._scan = LevelScan(context)

    def first_memory(self) -> Floats:
        """At the highest clock, with a band due."""
        top = self.context.clocks.freq_max_mhz
        return np.array([top, np.inf, 0.0, 0.0, self.context.clocks.freq_min_mhz, top])

    def _new_bands(self, x: Floats, memory: Floats, due: Bools) -> None:
        levels = self._scan.clocks_mhz
        limit = x[due, DECODE.slo, None] * (1.0 - self.margin)
        meets = self._scan(next_work(x[due], "decode")).latency_s <= limit
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
        track(x, 1.0 - self.margin, self.down, memory)
        due = memory[:, 1] >= BAND_S
        if due.any():
            self._new_bands(x, memory, due)
        memory[:, 0] = np.minimum(np.maximum(memory[:, 0], memory[:, 4]), memory[:, 5])
        return memory[:, 0].copy(), memory
