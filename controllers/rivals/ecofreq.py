"""EcoFreq, the clock controller of VoltanaLLM."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from biscale_env.core.jit import compiled
from biscale_env.laws.ecofreq_law import binned_requests, ecofreq_level
from biscale_env.laws.level_search import (
    first_token_limit_s,
    interval_limit_s,
    table_latency_s,
)
from controllers.base import MARGINS, Controller, Count, Floats, PolicyContext, Share
from controllers.surrogates.scan import Belief, NextWork


@compiled
def ecofreq_clocks(latency: Any, limit: Any, waiting: Any, clocks_mhz: Any, freq: Any) -> None:
    """The law of :func:`biscale_env.laws.ecofreq_law.ecofreq_level` for every row.

    ``latency`` is (n, clocks), ``limit``, ``waiting`` and ``freq`` (the result, MHz) are (n,), the
    clocks rise.
    """
    for i in range(freq.size):
        level = ecofreq_level(table_latency_s, latency[i], clocks_mhz.size, limit[i], waiting[i])
        freq[i] = clocks_mhz[level]


@compiled
def bin_batches(work: Any, bin_requests: float) -> None:
    """Round the requests of decode work (n, 4) up to whole bins, in place."""
    for i in range(work.shape[0]):
        work[i, 3] = binned_requests(work[i, 3], bin_requests)
        work[i, 0] = max(work[i, 0], work[i, 3])


class EcoFreq(Controller):
    """EcoFreq of VoltanaLLM (arXiv 2509.04827), for both phases.

    Every iteration: requests waiting behind the batch -> the highest clock; otherwise scan the
    clocks upward and take the first whose predicted latency is at most ``SLO (1 - margin) - wait``,
    where ``wait`` is the time the oldest request of a prefill batch has waited.

    Parameters of the source: its m is ``-margin``; its decode predictor is binned by batches of 8
    (``bin_requests``), its SLOs were 800 and 50 ms on A100. Changed to fit: the clocks are the 7
    control levels, and the predictor is this project's model of the iteration instead of per-clock
    linear fits.
    """

    TUNABLE: ClassVar[Mapping[str, tuple[Any, ...]]] = MARGINS

    def __init__(
        self, context: PolicyContext, margin: Share = 0.0, bin_requests: Count = 8.0
    ) -> None:
        """Prepare the scan.

        Args:
            context: what it may know.
            margin: share of the SLO kept free.
            bin_requests: decode batches are rounded up to multiples of this.
        """
        super().__init__(context)
        self.margin, self.bin_requests = float(margin), float(bin_requests)
        self._belief, self._work = Belief(context), NextWork(context)
        index = context.spec.index
        self._prefill = context.phase == "prefill"
        self._slo, self._wait = index("slo"), index("oldest_wait")
        self._queue = index("queue_requests" if self._prefill else "waiting_requests")

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """First clock that meets the limit; the highest when anything waits."""
        clocks = self._belief.clocks_mhz
        work = self._work(x)
        slo = x[:, self._slo]
        if self._prefill:
            waiting = x[:, self._queue] > work[:, 3]
            limit = first_token_limit_s(slo, self.margin, x[:, self._wait])
        else:
            waiting = x[:, self._queue] > 0.0
            limit = interval_limit_s(slo, self.margin)
            bin_batches(work, self.bin_requests)
        freq = np.empty(len(x))
        ecofreq_clocks(self._belief.levels(work)[0], limit, waiting, clocks, freq)
        return freq, None
