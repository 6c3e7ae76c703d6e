"""throttLL'eM: the lowest clock at which the projected future of the instance meets the SLO.

Law (HPCA 2025)::

    decode    f = min { f : T(heaviest iteration within `steps`, f) <= SLO (1 - margin) },
              f_max where the projection overflows the KV cache
    prefill   f = min { f : every projected batch completes by its deadline at f }

:mod:`biscale_env.laws.throttllem_law` holds it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from biscale_env.core.jit import compiled
from biscale_env.laws.level_search import interval_limit_s, table_latency_s
from biscale_env.laws.throttllem_law import (
    DecodeOutlook,
    lowest_level_for_queue,
    project_decode,
    throttllem_level,
)
from controllers.base import MARGINS, Bools, Controller, Count, Floats, Fraction, PolicyContext
from controllers.columns import DECODE
from controllers.prefill.mpc_greedy import QueueTables
from controllers.surrogates.scan import LevelScan, search_grid


@compiled
def queue_clocks(latency: Floats, deadline: Floats, clocks_mhz: Floats, freq: Floats) -> None:
    """The law of :func:`biscale_env.laws.throttllem_law.lowest_level_for_queue` for every row."""
    for i in range(freq.size):
        freq[i] = clocks_mhz[lowest_level_for_queue(latency[i], deadline[i])]


@compiled
def project_batches_ahead(
    x: Floats, steps: float, capacity: float, max_seqs: float, work: Floats, over: Bools
) -> None:
    """The law of :func:`biscale_env.laws.throttllem_law.project_decode` for every row.

    Requests on their way are taken to be as long as the running ones. ``work`` is (n, 4), ``over``
    (n,) tells where the KV cache would overflow.
    """
    for i in range(x.shape[0]):
        running, redo = x[i, DECODE.batch], x[i, DECODE.recompute_tokens]
        cached, incoming = x[i, DECODE.cached_tokens], x[i, DECODE.incoming_requests]
        tokens_each = cached / max(running, 1.0)
        now = DecodeOutlook(
            running,
            x[i, DECODE.waiting_requests] + incoming,
            cached + x[i, DECODE.waiting_tokens] + incoming * tokens_each,
            redo,
            0.5 * redo * redo,
        )
        then = project_decode(now, steps, capacity, max_seqs)
        work[i, 0] = then.rows
        work[i, 1] = then.attn_work
        work[i, 2] = then.cached
        work[i, 3] = then.n_seq
        over[i] = then.overflows


@compiled
def throttllem_clocks(
    latency: Floats, limit: Floats, over: Bools, clocks_mhz: Floats, freq: Floats
) -> None:
    """The law of :func:`biscale_env.laws.throttllem_law.throttllem_level` for every row.

    ``latency`` is (n, clocks), ``limit``, ``over`` and ``freq`` (the result, MHz) are (n,), the
    clocks rise.
    """
    for i in range(freq.size):
        level = throttllem_level(table_latency_s, latency[i], clocks_mhz.size, limit[i], over[i])
        freq[i] = clocks_mhz[level]


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

    def __init__(
        self, context: PolicyContext, *, margin: Fraction = 0.0, steps: Count = 32.0
    ) -> None:
        """Prepare the projection.

        Args:
            context: what it may know.
            margin: fraction of the SLO kept free.
            steps: decode iterations projected.
        """
        super().__init__(context)
        self.margin, self.steps = float(margin), float(steps)
        self._grid = search_grid(context)
        self._scan = LevelScan(context, self._grid)
        self._tables = QueueTables(self._scan, self.margin)

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """Lowest clock that the projection allows."""
        freq = np.empty(len(x))
        if self.context.phase == "prefill":
            queue = self._tables(x)
            queue_clocks(queue.latency_s, queue.deadline_s, self._grid, freq)
            return freq, None
        work, over = np.empty((len(x), 4)), np.empty(len(x), dtype=np.bool_)
        capacity, seqs = float(self.context.kv_capacity_tokens), float(self.context.max_seqs)
        project_batches_ahead(x, self.steps, capacity, seqs, work, over)
        limit = interval_limit_s(x[:, DECODE.slo], self.margin)
        throttllem_clocks(self._scan(work).latency_s, limit, over, self._grid, freq)
        return freq, None
