"""Arrivals that may come next, drawn from other workloads of the same kind.

A causal stand-in for knowing the future: of all moments of the known workloads, those are taken
whose arrival rates over the last second, ten seconds and minute are nearest to the present ones,
and what followed them there may follow here.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.sim.state import RATE_WINDOWS_S
from biscale_env.traces import Trace

Floats = NDArray[np.float64]
EVERY_S: Final = 0.1  # between two moments of a known workload
SETTLED_S: Final = 20.0  # rates before this much of a workload say little
NEAREST: Final = 2000  # moments among which futures are drawn (at most a tenth of all)


class Future(NamedTuple):
    """Requests that may come.

    Attributes:
        after_s: arrivals from now on, s, rising.
        prompt: their prompt tokens.
    """

    after_s: Floats
    prompt: NDArray[np.int32]


def decayed_rates(arrival_s: Floats, times_s: Floats) -> Floats:
    """Arrival rates that forget with the time constants of the simulator, (times, 3), requests/s.

    Args:
        arrival_s: arrivals, rising.
        times_s: when rates are asked for, rising; an arrival at that very time counts.
    """
    out = np.empty((len(times_s), len(RATE_WINDOWS_S)))
    before = np.searchsorted(arrival_s, times_s, side="right")
    for k, window_s in enumerate(RATE_WINDOWS_S):
        total, last_s, seen = 0.0, 0.0, 0
        for row, (now_s, count) in enumerate(zip(times_s.tolist(), before.tolist(), strict=True)):
            ages = np.exp((arrival_s[seen:count] - now_s) / window_s).sum()
            total = total * np.exp((last_s - now_s) / window_s) + ages / window_s
            last_s, seen = now_s, count
            out[row, k] = total
    return out


class SampledFutures:
    """Draws futures for given rates."""

    def __init__(self, known: Sequence[Trace], horizon_s: float, seed: int = 0) -> None:
        """Index every moment of the known workloads.

        Args:
            known: workloads other than the one that is controlled.
            horizon_s: how far a future goes, s.
            seed: of the draws.

        Raises:
            BiscaleError: no known workload is long enough.
        """
        self.horizon_s, self._known = horizon_s, list(known)
        self._rng = np.random.default_rng(seed)
        moments = [np.arange(SETTLED_S, t.duration_s - horizon_s, EVERY_S) for t in self._known]
        self._times_s = np.concatenate([*moments, np.empty(0)])
        if not len(self._times_s):
            raise BiscaleError(
                f"futures of {horizon_s:g} s need known workloads of more than "
                f"{SETTLED_S + horizon_s:g} s"
            )
        self._of = np.repeat(np.arange(len(moments)), [len(m) for m in moments])
        rates = [
            decayed_rates(trace.arrival_s, at)
            for trace, at in zip(self._known, moments, strict=True)
        ]
        self._roots = np.sqrt(np.concatenate(rates))  # counts spread like their roots
        self._scale = self._roots.std(axis=0) + 1e-9
        self._near = min(NEAREST, max(len(self._times_s) // 10, 1))

    def __call__(self, rates: Floats, n: int) -> list[Future]:
        """``n`` futures.

        Args:
            rates: present ones of :func:`decayed_rates`, (3,).
            n: how many, with replacement.
        """
        away = (((np.sqrt(rates) - self._roots) / self._scale) ** 2).sum(axis=1)
        near = np.argpartition(away, self._near - 1)[: self._near]
        return [self._after(int(k)) for k in self._rng.choice(near, n)]

    def _after(self, moment: int) -> Future:
        trace, now_s = self._known[self._of[moment]], self._times_s[moment]
        until = [now_s, now_s + self.horizon_s]
        first, last = np.searchsorted(trace.arrival_s, until, side="right")
        prompt = trace.prompt_tokens[first:last].astype(np.int32)
        return Future(trace.arrival_s[first:last] - now_s, prompt)
