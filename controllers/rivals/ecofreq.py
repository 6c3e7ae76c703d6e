"""EcoFreq, the clock controller of VoltanaLLM."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from biscale_env.core.jit import compiled
from controllers.base import MARGINS, Controller, Count, Floats, PolicyContext, Share
from controllers.decode.slack import lowest_meeting
from controllers.surrogates.scan import Belief, NextWork


@compiled
def round_up(work: Any, column: int, size: float) -> None:
    """Round one column of work (n, 4) up to whole bins, in place."""
    for i in range(work.shape[0]):
        work[i, column] = np.ceil(work[i, column] / size - 1e-9) * size


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
            limit = slo * (1.0 - self.margin - x[:, self._wait])  # the wait is given in SLOs
        else:
            waiting = x[:, self._queue] > 0.0
            limit = slo * (1.0 - self.margin)
            round_up(work, 3, self.bin_requests)
            work[:, 0] = np.maximum(work[:, 0], work[:, 3])
        freq = np.empty(len(x))
        lowest_meeting(self._belief.levels(work)[0], limit, clocks, freq)
        freq[waiting] = clocks[-1]
        return freq, None
