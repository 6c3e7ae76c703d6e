"""The paper's own search for the prefill clocks.

Start all projected batches at the highest of 7 clocks and greedily lower them.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from biscale_env.contract.observation import HORIZON
from biscale_env.core.jit import compiled, inlined
from controllers.base import MARGINS, Controller, Floats, PolicyContext, Share
from controllers.prefill.mpc_options import FAR_S, NO_DEADLINE
from controllers.surrogates.scan import Belief

TIME_TOL_S = 1e-12
# relative: two levels above the power cap run alike but for the rounding of the search for the
# effective clock
SAME = 1e-6


@inlined
def room_s(latency: Any, level: Any, deadline: Any, stage: int) -> float:
    """Time by which a batch may be prolonged without missing a deadline that is met now, s.

    0 before a missed one.
    """
    t = 0.0
    room = np.inf
    for k in range(level.size):
        t += latency[k, level[k]]
        if k >= stage:
            room = min(room, max(deadline[k] - t, 0.0))
    return room


@inlined
def greedy_row(latency: Any, energy: Any, deadline: Any, level: Any) -> int:
    """Lower one batch by one level at a time, the one that saves most energy per second added.

    Returns the number of moves.
    """
    top = latency.shape[1] - 1
    for k in range(level.size):
        level[k] = top
    moves = 0
    while True:
        best, best_gain = -1, 0.0
        for k in range(level.size):
            now = level[k]
            if now == 0 or latency[k, now] <= 0.0:
                continue
            longer = latency[k, now - 1] - latency[k, now]
            saved = energy[k, now] - energy[k, now - 1]
            free = (
                abs(saved) <= SAME * energy[k, now] and abs(longer) <= SAME * latency[k, now]
            )  # above the power cap
            if not free and (
                saved <= 0.0 or longer > room_s(latency, level, deadline, k) + TIME_TOL_S
            ):
                continue
            gain = 1e-12 if free else saved / max(longer, 1e-9)
            if gain > best_gain:
                best, best_gain = k, gain
        if best < 0:
            return moves
        level[best] -= 1
        moves += 1


@compiled
def greedy_all(latency: Any, energy: Any, deadline: Any, level: Any) -> int:
    """Levels (n, K) of tables (n, K, N) and deadlines (n, K).

    Returns the number of moves in all.
    """
    moves = 0
    for i in range(level.shape[0]):
        moves += greedy_row(latency[i], energy[i], deadline[i], level[i])
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
