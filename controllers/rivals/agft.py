"""AGFT-style online tuner: a contextual bandit over the clocks that knows no model.

Law (LinUCB, as in arXiv 2508.01744): per window, of the levels k with design matrix ``A_k`` and
response ``b_k``, in the context z = (1, load, backlog)::

    k = argmax  z' A_k^-1 b_k + explore sqrt(z' A_k^-1 z)

then ``A_k += z z'`` and ``b_k += reward z`` with::

    reward = -(energy x busy time / tokens^2) / (that of the first window) - penalty [SLO missed]
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from biscale_env.core.jit import compiled, inlined
from controllers.base import Amount, Controller, Floats, PolicyContext, Positive
from controllers.columns import DECODE, PREFILL
from controllers.records import Records, record_dtype

D = 3  # context: 1, load, backlog
# columns of the memory of one row
BUSY, ENERGY, TOKENS, LATE, PENDING, ARM, SCALE, CONTEXT = range(8)
ARMS = CONTEXT + D  # from here on: per arm the inverse design matrix (D x D), then its response (D)
SIZE = D * D + D


class BanditWindow:
    """How a window is judged, as a record.

    Attributes:
        length_s: busy time per decision, s.
        explore: width of the confidence bound.
        penalty: reward lost in a window that missed the SLO.
    """

    length_s: float
    explore: float
    penalty: float


class Measured(NamedTuple):
    """Columns of what a row measured: the context, then the last iteration."""

    context: int
    tokens: int
    late: int
    time_s: int
    power_w: int


SEEN = Measured(0, D, D + 1, D + 2, D + 3)
WINDOW_DTYPE = record_dtype(BanditWindow)


@compiled
def measure_prefill(x: Floats, token_budget: float, seen: Floats) -> None:
    """Context and last iteration of physical observations (n, dim), into ``seen`` (n, 7)."""
    for i in range(x.shape[0]):
        seen[i, SEEN.context] = 1.0
        seen[i, SEEN.context + 1] = x[i, PREFILL.token_rate_10s] * 1e-4
        seen[i, SEEN.context + 2] = min(x[i, PREFILL.queue_tokens] / token_budget, 4.0)
        seen[i, SEEN.tokens] = x[i, PREFILL.batch_tokens]
        seen[i, SEEN.late] = 1.0 if x[i, PREFILL.oldest_wait] > 1.0 else 0.0
        seen[i, SEEN.time_s] = x[i, PREFILL.last_time]
        seen[i, SEEN.power_w] = x[i, PREFILL.last_power]


@compiled
def measure_decode(x: Floats, max_seqs: float, seen: Floats) -> None:
    """Context and last iteration of physical observations (n, dim), into ``seen`` (n, 7)."""
    for i in range(x.shape[0]):
        seen[i, SEEN.context] = 1.0
        seen[i, SEEN.context + 1] = x[i, DECODE.batch] / max_seqs
        seen[i, SEEN.context + 2] = x[i, DECODE.kv_use]
        seen[i, SEEN.tokens] = x[i, DECODE.batch]
        seen[i, SEEN.late] = 1.0 if x[i, DECODE.last_time] > x[i, DECODE.slo] else 0.0
        seen[i, SEEN.time_s] = x[i, DECODE.last_time]
        seen[i, SEEN.power_w] = x[i, DECODE.last_power]


@inlined
def learn(m: Floats, arm: int, reward: float) -> None:
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
def choose(m: Floats, n_arms: int, explore: float) -> int:
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
    seen: Floats, clocks_mhz: Floats, windows: Records, memory: Floats, freq: Floats
) -> None:
    """Account for the last iteration; at the end of a window, learn and choose the next clock.

    Args:
        seen: what each row measured, (n, 7), columns `SEEN`.
        clocks_mhz: the arms.
        windows: how a window is judged, one record.
        memory: changed in place.
        freq: clocks (n,), MHz, written.
    """
    window = windows[0]
    for i in range(freq.size):
        m = memory[i]
        if m[PENDING] > 0.0:
            m[BUSY] += seen[i, SEEN.time_s]
            m[ENERGY] += seen[i, SEEN.time_s] * seen[i, SEEN.power_w]
            m[TOKENS] += m[PENDING]
            m[LATE] = max(m[LATE], seen[i, SEEN.late])
        if m[ARM] < 0.0 or m[BUSY] >= window.length_s:
            if m[ARM] >= 0.0:
                product = m[ENERGY] * m[BUSY] / (m[TOKENS] * m[TOKENS])
                if m[SCALE] <= 0.0:
                    m[SCALE] = product
                learn(m, int(m[ARM]), -product / m[SCALE] - window.penalty * m[LATE])
            for j in range(D):
                m[CONTEXT + j] = seen[i, SEEN.context + j]
            m[ARM] = choose(m, clocks_mhz.size, window.explore)
            m[BUSY] = m[ENERGY] = m[TOKENS] = m[LATE] = 0.0
        m[PENDING] = seen[i, SEEN.tokens]
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
        *,
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
        chosen = (float(window_s), float(explore), float(penalty))
        self._windows = np.array([chosen], dtype=WINDOW_DTYPE)
        self._clocks = np.asarray(context.clocks.levels_mhz, dtype=np.float64)
        self.memory_size = ARMS + self._clocks.size * SIZE

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
        memory, freq, seen = memory.copy(), np.empty(len(x)), np.empty((len(x), D + 4))
        if self.context.phase == "prefill":
            measure_prefill(x, float(self.context.token_budget), seen)
        else:
            measure_decode(x, float(self.context.max_seqs), seen)
        bandit(seen, self._clocks, self._windows, memory, freq)
        return freq, memory
