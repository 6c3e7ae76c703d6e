"""EcoFreq, the clock controller of VoltanaLLM.

Law (arXiv 2509.04827), for the predicted latency ``T(f)`` of the next iteration at clock f::

    f = f_max                                                       if requests wait behind it
    f = min { f in levels : T(f) <= SLO (1 - margin) - waited }     otherwise (else the highest)

:mod:`biscale_env.laws.ecofreq_law` holds it.
"""

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
from controllers.base import MARGINS, Bools, Controller, Count, Floats, Fraction, PolicyContext
from controllers.columns import DECODE, PREFILL
from controllers.surrogates.scan import LevelScan, next_work


@compiled
def ecofreq_clocks(
    latency: Floats, limit: Floats, waiting: Bools, clocks_mhz: Floats, freq: Floats
) -> None:
    """The law of :func:`biscale_env.laws.ecofreq_law.ecofreq_level` for every row.

    ``latency`` is (n, clocks), ``limit``, ``waiting`` and ``freq`` (the result, MHz) are (n,), the
    clocks rise.
    """
    for i in range(freq.size):
        level = ecofreq_level(table_latency_s, latency[i], clocks_mhz.size, limit[i], waiting[i])
        freq[i] = clocks_mhz[level]


@compiled
def bin_batches(work: Floats, bin_requests: float) -> None:
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
        self, context: PolicyContext, *, margin: Fraction = 0.0, bin_requests: Count = 8.0
    ) -> None:
        """Prepare the scan.

        Args:
            context: what it may know.
            margin: fraction of the SLO kept free.
            bin_requests: decode batches are rounded up to multiples of this.
        """
        super().__init__(context)
        self.margin, self.bin_requests = float(margin), float(bin_requests)
        self._scan = LevelScan(context)

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """First clock that meets the limit; the highest when anything waits."""
        clocks, work = self._scan.clocks_mhz, next_work(x, self.context.phase)
        if self.context.phase == "prefill":
            waiting = x[:, PREFILL.queue_requests] > work[:, 3]
            waited = x[:, PREFILL.oldest_wait]
            limit = first_token_limit_s(x[:, PREFILL.slo], self.margin, waited)
        else:
            waiting = x[:, DECODE.waiting_requests] > 0.0
            limit = interval_limit_s(x[:, DECODE.slo], self.margin)
            bin_batches(work, self.bin_requests)
        freq = np.empty(len(x))
        ecofreq_clocks(self._scan(work).latency_s, limit, waiting, clocks, freq)
        return freq, None
