"""The paper's own search for the prefill clocks.

Start all projected batches at the highest of 7 clocks and greedily lower them.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from biscale_env.contract.observation import HORIZON
from biscale_env.core.jit import compiled
from biscale_env.laws.greedy_law import lower_greedily
from controllers.base import MARGINS, Controller, Floats, PolicyContext, Share
from controllers.prefill.mpc_options import FAR_S, NO_DEADLINE
from controllers.surrogates.scan import Belief


@compiled
def greedy_all(latency: Any, energy: Any, deadline: Any, level: Any) -> int:
    """Levels (n, K) of tables (n, K, N) and deadlines (n, K).

    Returns the number of moves in all.
    """
    moves = 0
    for i in range(level.shape[0]):
        moves += lower_greedily(latency[i], energy[i], deadline[i], level[i])
    return moves


class QueueTables:
    """Latency, energy and deadlines of the projected batches at each level, from the observation
    alone.
    """

    def __init__(
        self, context: PolicyContext, margin: float, give_up: bool = False, clocks_mhz: Any = None
    ) -> None:
        """Find the columns.

        Args:
            context: gives model and clocks; any model with ``latency_s`` and ``energy_j``.
            margin: share of the SLO kept free before every deadline.
            give_up: leave requests whose deadline has passed out of account.
            clocks_mhz: clocks to scan; None takes the control levels.
        """
        self.belief = Belief(context, clocks_mhz)
        self.margin = float(margin)
        index = context.spec.index
        self._slack = index("batch_slack_alive" if give_up else "batch_slack")
        self._tokens, self._attn, self._requests = (
            index("batch_tokens"),
            index("batch_attn"),
            index("batch_requests"),
        )
        self._slo = index("slo")

    def __call__(self, x: Floats) -> tuple[Floats, Floats, Floats]:
        """Latency (s) and energy (J), both (n, K, N), zero for empty batches, and deadlines (n, K),
        s from now.
        """
        n, k = len(x), HORIZON
        work = np.zeros((n, k, 4))
        work[:, :, 0] = x[:, self._tokens : self._tokens + k]
        work[:, :, 1] = x[:, self._attn : self._attn + k]
        work[:, :, 3] = x[:, self._requests : self._requests + k]
        latency, energy = self.belief.levels(work.reshape(n * k, 4))
        slack = x[:, self._slack : self._slack + k]
        deadline = np.where(
            slack < NO_DEADLINE, (slack - self.margin) * x[:, self._slo, None], FAR_S
        )
        return latency.reshape(n, k, -1), energy.reshape(n, k, -1), deadline


class GreedyMpc(Controller):
    """BiScale's prefill controller with its own search (arXiv 2602.18755).

    One of N = 7 clocks for each of the next K = 8 projected batches: all start at the highest and
    are lowered greedily while every deadline that can be met stays met; the first is applied. The
    order of lowering is not published; assumed: the step that saves most energy per second added.
    Changed to fit: the 7 clocks are those of the GPU configuration.
    """

    phases: ClassVar[tuple[str, ...]] = ("prefill",)
    TUNABLE: ClassVar[Mapping[str, tuple[Any, ...]]] = MARGINS

    def __init__(self, context: PolicyContext, margin: Share = 0.0, give_up: bool = False) -> None:
        """Prepare the tables.

        Args:
            context: what it may know.
            margin: share of the SLO kept free before every deadline.
            give_up: leave requests whose deadline has passed out of account.
        """
        super().__init__(context)
        self._tables = QueueTables(context, margin, give_up)
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
        return self._tables.belief.clocks_mhz[level[:, 0]], None
