"""AGFT-style online tuner: a contextual bandit over the clocks that knows no model."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from biscale_env.core.jit import compiled, inlined
from controllers.base import Amount, Controller, Floats, PolicyContext, Positive

D = 3  # context: 1, load, backlog
BUSY, ENERGY, TOKENS, LATE, PENDING, ARM, SCALE, CONTEXT = (
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
)  # columns of the memory of one row
ARMS = (
    CONTEXT + D
)  # from here on: per arm the inverse design matrix (D x D), then the response vector (D)
SIZE = D * D + D


@inlined
def learn(m: Any, arm: int, reward: float) -> None:
    """Rank-one update of one arm of a LinUCB learner with the stored context (Sherman-Morrison)."""
    at = ARMS + arm * SIZE
    quad = 1.0
    for i in range(D):
        for j in range(D):
            quad += m[CONTEXT + i] * m[at + i * D + j] * m[CONTEXT + j]
    p0 = m[at] * m[CONTEXT] + m[at + 1] * m[CONTEXT + 1] + m[at + 2] * m[CONTEXT + 2]
    p1 = m[at + 3] * m[CONTEXT] + m[at + 4] * m[CONTEXT + 1] + m[at + 5] * m[CONTEXT + 2]
    p2 = m[at + 6] * m[CONTEXT] + m[at + 7] * m[CONTEXT + 1] + m[at + 8] * m[CONTEXT + 2]
    for i in range(D):
        pi = p0 if i == 0 else (p1 if i == 1 else p2)
        for j in range(D):
            pj = p0 if j == 0 else (p1 if j == 1 else p2)
            m[at + i * D + j] -= pi * pj / quad
        m[at + D * D + i] += reward * m[CONTEXT + i]


@inlined
def choose(m: Any, n_arms: int, explore: float) -> int:
    """Arm of the highest upper confidence bound in the stored context.

    The higher clock where equal.
    """
    best, best_value = n_arms - 1, -np.inf
    for arm in range(n_arms - 1, -1, -1):
        at = ARMS + arm * SIZE
        mean, variance = 0.0, 0.0
        for i in range(D):
            for j in range(D):
                a = m[at + i * D + j]
                mean += m[CONTEXT + i] * a * m[at + D * D + j]
                variance += m[CONTEXT + i] * a * m[CONTEXT + j]
        value = mean + explore * np.sqrt(max(variance, 0.0))
        if value > best_value + 1e-12:
            best, best_value = arm, value
    return best


@compiled
def bandit(
    x: Any, context: Any, tokens: Any, late: Any, last_time: int, last_power: int, clocks_mhz: Any, window_s: float, explore: float,
    penalty: float, memory: Any, freq: Any,
) -> None:  # fmt: skip
    """Account for the last iteration and, at the end of a window, learn from it and choose the next
    clock; ``memory`` is changed.
    """
    for i in range(freq.size):
        m = memory[i]
        if m[PENDING] > 0.0:
            m[BUSY] += x[i, last_time]
            m[ENERGY] += x[i, last_time] * x[i, last_power]
            m[TOKENS] += m[PENDING]
            m[LATE] = max(m[LATE], late[i])
        if m[ARM] < 0.0 or m[BUSY] >= window_s:
            if m[ARM] >= 0.0:
                product = m[ENERGY] * m[BUSY] / (m[TOKENS] * m[TOKENS])
                if m[SCALE] <= 0.0:
                    m[SCALE] = product
                learn(m, int(m[ARM]), -product / m[SCALE] - penalty * m[LATE])
            for j in range(D):
                m[CONTEXT + j] = context[i, j]
            m[ARM] = choose(m, clocks_mhz.size, explore)
            m[BUSY] = m[ENERGY] = m[TOKENS] = m[LATE] = 0.0
        m[PENDING] = tokens[i]
        freq[i] = clocks_mhz[int(m[ARM])]


class Agft(Controller):
    """Online tuner in the manner of AGFT (arXiv 2508.01744), for both phases.

    A contextual bandit (LinUCB) chooses one of the clock levels per window and learns from what it
    measures: the energy-delay product per token of the window, relative to that of its first
    window, and a penalty when the SLO was missed. It has no model of the machine.

    Parameters of the source: the contextual bandit, the energy-delay product. Changed to fit:
    context, window, penalty and exploration were not found and are assumed; the source prunes and
    refines its arms, here the arms are the control levels; learning starts afresh with every
    episode.
    """

    TUNABLE: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "penalty": (2.0, 0.5, 1.0, 4.0, 8.0, 16.0, 32.0, 64.0),
        "explore": (0.3, 0.1, 1.0),
    }

    def __init__(
        self,
        context: PolicyContext,
        window_s: Positive = 0.5,
        explore: Amount = 0.3,
        penalty: Amount = 2.0,
    ) -> None:
        """Prepare the learner.

        Args:
            context: what it may know.
            window_s: busy time per decision, s.
            explore: width of the confidence bound.
            penalty: reward lost in a window that missed the SLO.
        """
        super().__init__(context)
        self.window_s, self.explore, self.penalty = float(window_s), float(explore), float(penalty)
        self._clocks = np.asarray(context.clocks.levels_mhz, dtype=np.float64)
        self.memory_size = ARMS + self._clocks.size * SIZE
        self._at = {f.name: i for i, f in enumerate(context.spec.features)}

    def first_memory(self) -> Floats:
        """Nothing learned: unit design matrices, no arm chosen."""
        memory = np.zeros(self.memory_size)
        memory[ARM] = -1.0
        for arm in range(self._clocks.size):
            at = ARMS + arm * SIZE
            memory[at : at + D * D] = np.eye(D).ravel()
        return memory

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """One step of every row's learner."""
        assert memory is not None
        at, memory = self._at, memory.copy()
        context = np.ones((len(x), D))
        if self.context.phase == "prefill":
            tokens = x[:, at["batch_tokens_0"]]
            context[:, 1] = x[:, at["token_rate_10s"]] * 1e-4
            context[:, 2] = np.minimum(x[:, at["queue_tokens"]] / self.context.token_budget, 4.0)
            late = (x[:, at["oldest_wait"]] > 1.0).astype(np.float64)
        else:
            tokens = x[:, at["batch"]]
            context[:, 1] = tokens / self.context.max_seqs
            context[:, 2] = x[:, at["kv_use"]]
            late = (x[:, at["last_time"]] > x[:, at["slo"]]).astype(np.float64)
        freq = np.empty(len(x))
        bandit(
            x, context, tokens, late, at["last_time"], at["last_power"], self._clocks, self.window_s, self.explore, self.penalty,
            memory, freq,
        )  # fmt: skip
        return freq, memory
