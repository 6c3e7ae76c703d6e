"""throttLL'eM: the lowest clock at which the projected future of the instance meets the SLO."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from biscale_env.core.jit import compiled, inlined
from controllers.base import MARGINS, Controller, Count, Floats, PolicyContext, Share
from controllers.decode.slack import lowest_meeting
from controllers.prefill.mpc_greedy import QueueTables
from controllers.surrogates.scan import Belief, search_grid


@inlined
def queue_meets(latency: Any, deadline: Any, clock: int) -> bool:
    """Whether every projected batch completes by its deadline at one clock.

    ``latency`` is (K, N).
    """
    t = 0.0
    for k in range(deadline.size):
        t += latency[k, clock]
        if latency[k, clock] > 0.0 and t > deadline[k]:
            return False
    return True


@compiled
def lowest_for_queue(latency: Any, deadline: Any, clocks_mhz: Any, freq: Any) -> None:
    """Per row, binary search for the lowest single clock at which the whole queue meets its
    deadlines; the highest if none does.
    """
    for i in range(freq.size):
        lo, hi = 0, clocks_mhz.size - 1
        while lo < hi:
            middle = (lo + hi) // 2
            if queue_meets(latency[i], deadline[i], middle):
                hi = middle
            else:
                lo = middle + 1
        freq[i] = clocks_mhz[hi]


@compiled
def project_decode(
    x: Any, columns: Any, steps: float, capacity: float, max_seqs: float, work: Any, over: Any
) -> None:
    """Work (n, 4) of the heaviest iteration within ``steps``.

    All that waits or comes is admitted, and every request grows.

    ``over`` (n,) tells where the KV cache would overflow.
    """
    for i in range(x.shape[0]):
        batch, cached, waiting, waiting_tokens, incoming, recompute = columns
        running = x[i, batch]
        ahead = min(running + x[i, waiting] + x[i, incoming], max_seqs)
        tokens_each = x[i, cached] / max(running, 1.0)
        grown = (
            x[i, cached] + x[i, waiting_tokens] + x[i, incoming] * tokens_each + 0.5 * steps * ahead
        )
        work[i, 0] = ahead + x[i, recompute] / max(steps, 1.0)
        work[i, 1] = 0.5 * x[i, recompute] * x[i, recompute] / max(steps, 1.0)
        work[i, 2] = grown
        work[i, 3] = ahead
        over[i] = grown > capacity


class ThrottllEm(Controller):
    """throttLL'eM (HPCA 2025), for both phases.

    Every iteration it projects batch and KV cache ahead and searches, by bisection, the lowest
    clock at which the projection meets the SLO. Decode: the mean time between tokens over the next
    ``steps`` iterations, with all waiting and incoming requests admitted; a projection that
    overflows the KV cache meets it at no clock, so the highest is taken.
    Prefill: every projected batch must complete by its tightest TTFT deadline at one common clock.

    Parameters of the source: mean TBT under 200 ms on A100 (here the SLO of the scenario); a
    gradient-boosted predictor of (TP, batch, KV, clock) - pass one as ``model``. Changed to fit:
    the source projects with predicted output lengths, which the observation does not hold, so a
    fixed number of iterations is projected (assumed); its autoscaling of engines is the business of
    the placement.
    """

    TUNABLE: ClassVar[Mapping[str, tuple[Any, ...]]] = MARGINS

    def __init__(self, context: PolicyContext, margin: Share = 0.0, steps: Count = 32.0) -> None:
        """Prepare the projection.

        Args:
            context: what it may know.
            margin: share of the SLO kept free.
            steps: decode iterations projected.
        """
        super().__init__(context)
        self.margin, self.steps = float(margin), float(steps)
        self._grid = search_grid(context)
        index = context.spec.index
        self._slo = index("slo")
        if context.phase == "prefill":
            self._tables = QueueTables(context, self.margin, clocks_mhz=self._grid)
        else:
            self._belief = Belief(context, self._grid)
            names = (
                "batch",
                "cached_tokens",
                "waiting_requests",
                "waiting_tokens",
                "incoming_requests",
                "recompute_tokens",
            )
            self._columns = tuple(index(name) for name in names)

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """Lowest clock that the projection allows."""
        freq = np.empty(len(x))
        if self.context.phase == "prefill":
            latency, _, deadline = self._tables(x)
            lowest_for_queue(latency, deadline, self._grid, freq)
            return freq, None
        work, over = np.empty((len(x), 4)), np.empty(len(x), dtype=np.bool_)
        capacity, seqs = float(self.context.kv_capacity_tokens), float(self.context.max_seqs)
        project_decode(x, self._columns, self.steps, capacity, seqs, work, over)
        limit = x[:, self._slo] * (1.0 - self.margin)
        lowest_meeting(self._belief.levels(work)[0], limit, self._grid, freq)
        freq[over] = self._grid[-1]
        return freq, None
