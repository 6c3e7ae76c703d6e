"""The paper's own search for the prefill clocks.

Law (arXiv 2602.18755): of the next K = 8 projected batches with clocks ``f_1 .. f_K``, all at the
highest level at first, lower the one by a level that saves most energy per second added, as long as
every deadline that can be met stays met::

    sum_{j <= k} T_j(f_j) <= deadline_k

and apply ``f_1``. :mod:`biscale_env.laws.greedy_law` holds it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biscale_env.contract.observation import HORIZON
from biscale_env.core.jit import compiled
from biscale_env.laws.greedy_law import lower_greedily
from controllers.base import MARGINS, Controller, Floats, Fraction, PolicyContext
from controllers.columns import PREFILL
from controllers.prefill.mpc_options import FAR_S, NO_DEADLINE
from controllers.surrogates.scan import LevelScan


@compiled
def greedy_all(latency: Floats, energy: Floats, deadline: Floats, level: NDArray[np.int64]) -> int:
    """Levels (n, K) of tables (n, K, N) and deadlines (n, K).

    Returns the number of moves in all.
    """
    moves = 0
    for i in range(level.shape[0]):
        moves += lower_greedily(latency[i], energy[i], deadline[i], level[i])
    return moves


@compiled
def read_queue_work(
    x: Floats, slack_column: int, margin: float, work: Floats, deadline: Floats
) -> None:
    """Work (n, K, 4) and deadlines (n, K) of the projected batches.

    Args:
        x: physical observations (n, dim).
        slack_column: of the slack of the first batch.
        margin: fraction of the SLO kept free.
        work: tokens, attention token-pairs, cached tokens, requests; written.
        deadline: s from now, FAR_S where none completes; written.
    """
    for i in range(x.shape[0]):
        slo = x[i, PREFILL.slo]
        for k in range(HORIZON):
            work[i, k, 0] = x[i, PREFILL.batch_tokens + k]
            work[i, k, 1] = x[i, PREFILL.batch_attn + k]
            work[i, k, 2] = 0.0
            work[i, k, 3] = x[i, PREFILL.batch_requests + k]
            slack = x[i, slack_column + k]
            deadline[i, k] = (slack - margin) * slo if slack < NO_DEADLINE else FAR_S


class QueueTable(NamedTuple):
    """Predictions for the projected batches of n observations.

    Attributes:
        latency_s: (n, K, clocks), zero for empty batches, s.
        energy_j: (n, K, clocks), zero for empty batches, J.
        deadline_s: (n, K), from now, s.
    """

    latency_s: Floats
    energy_j: Floats
    deadline_s: Floats


class QueueTables:
    """Reads the projected batches out of the observation and predicts them at each clock."""

    def __init__(self, scan: LevelScan, margin: float, give_up: bool = False) -> None:
        """Keep what is needed.

        Args:
            scan: predicts latency and energy, by any model.
            margin: fraction of the SLO kept free before every deadline.
            give_up: drop expired deadlines: requests that cannot meet theirs any more have none.
        """
        self._scan, self._margin = scan, float(margin)
        self._slack = PREFILL.batch_slack_alive if give_up else PREFILL.batch_slack

    def __call__(self, x: Floats) -> QueueTable:
        """Tables of physical observations (n, dim)."""
        n, k = len(x), HORIZON
        work, deadline = np.empty((n, k, 4)), np.empty((n, k))
        read_queue_work(x, self._slack, self._margin, work, deadline)
        latency, energy = self._scan(work.reshape(n * k, 4))
        shape = (n, k, self._scan.clocks_mhz.size)
        return QueueTable(latency.reshape(shape), energy.reshape(shape), deadline)


class GreedyMpc(Controller):
    """BiScale's prefill controller with its own search (arXiv 2602.18755).

    One of N = 7 clocks for each of the next K = 8 projected batches: all start at the highest and
    are lowered greedily while every deadline that can be met stays met; the first is applied. The
    order of lowering is not published; assumed: the step that saves most energy per second added.
    Changed to fit: the 7 clocks are those of the GPU configuration.
    """

    phases: ClassVar[tuple[str, ...]] = ("prefill",)
    TUNABLE: ClassVar[Mapping[str, tuple[Any, ...]]] = MARGINS

    def __init__(
        self, context: PolicyContext, *, margin: Fraction = 0.0, give_up: bool = False
    ) -> None:
        """Prepare the tables.

        Args:
            context: what it may know.
            margin: fraction of the SLO kept free before every deadline.
            give_up: drop expired deadlines: requests that cannot meet theirs any more have none.
        """
        super().__init__(context)
        self._scan = LevelScan(context)
        self._tables = QueueTables(self._scan, margin, give_up)
        self._counts = {"decisions": 0, "iterations": 0}

    def stats(self) -> dict[str, float]:
        """Decisions and moves of the search."""
        return dict(self._counts)

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """Search every row."""
        level = np.empty((len(x), HORIZON), dtype=np.int64)
        self._counts["iterations"] += greedy_all(*self._tables(x), level)
        self._counts["decisions"] += len(x)
        return self._scan.clocks_mhz[level[:, 0]], None
