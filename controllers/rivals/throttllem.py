"""throttLL'eM: the lowest clock at which the projected future of the instance meets the SLO."""

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
from controllers.base import MARGINS, Controller, Count, Floats, PolicyContext, Share
from controllers.prefill.mpc_greedy import QueueTables
from controllers.surrogates.scan import Belief, search_grid


@compiled
def queue_clocks(latency: Any, deadline: Any, clocks_mhz: Any, freq: Any) -> None:
    """The law of :func:`biscale_env.laws.throttllem_law.lowest_level_for_queue` for every row."""
    for i in range(freq.size):
        freq[i] = clocks_mhz[lowest_level_for_queue(latency[i], deadline[i])]


@compiled
def project_batches_ahead(
    x: Any, columns: Any, steps: float, capacity: float, max_seqs: float, work: Any, over: Any
) -> None:
    """The law of :func:`biscale_env.laws.throttllem_law.project_decode` for every row.

    Requests on their way are taken to be as long as the running ones. ``work`` is (n, 4), ``over``
    (n,) tells where the KV cache would overflow.
    """
    for i in range(x.shape[0]):
        batch, cached, waiting, waiting_tokens, incoming, recompute = columns
        running, redo = x[i, batch], x[i, recompute]
        tokens_each = x[i, cached] / max(running, 1.0)
        now = DecodeOutlook(
            running,
            x[i, waiting] + x[i, incoming],
            x[i, cached] + x[i, waiting_tokens] + x[i, incoming] * tokens_each,
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
def throttllem_clocks(latency: Any, limit: Any, over: Any, clocks_mhz: Any, freq: Any) -> None:
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
            queue_clocks(latency, deadline, self._grid, freq)
            return freq, None
        work, over = np.empty((len(x), 4)), np.empty(len(x), dtype=np.bool_)
        capacity, seqs = float(self.context.kv_capacity_tokens), float(self.context.max_seqs)
        project_batches_ahead(x, self._columns, self.steps, capacity, seqs, work, over)
        limit = interval_limit_s(x[:, self._slo], self.margin)
        throttllem_clocks(self._belief.levels(work)[0], limit, over, self._grid, freq)
        return freq, None
