"""Memory of a cluster: records and queues of its instances.

They grow when more instances or longer queues need it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from biscale_env.contract import HORIZON
from biscale_env.models import COEFFICIENT_DTYPE
from biscale_env.sim.cluster.layout import (
    INSTANCE_DTYPE,
    BatchPlans,
    Decodes,
    Prefills,
    PromptQueue,
    ReadyQueue,
)
from biscale_env.sim.prefix_cache import PrefixCache, empty_cache
from biscale_env.sim.state import (
    DECODE_DTYPE,
    PARAMS_DTYPE,
    PREFILL_DTYPE,
    SLOT_DTYPE,
    RunningRequests,
    tree_size,
    wheel_size,
)

QUEUES: Mapping[str, Mapping[str, DTypeLike]] = {
    "prefill": {
        "arrival_s": np.float64,
        "prompt": np.int32,
        "output": np.int32,
        "prefix": np.int32,
        "request": np.int64,
    },
    "decode": {
        "ready_s": np.float64,
        "first_s": np.float64,
        "arrival_s": np.float64,
        "prompt": np.int32,
        "output": np.int32,
        "cached": np.int32,
        "request": np.int64,
        "source": np.int32,
    },
}
LEAST_ROWS = 64


def widen(rows: int) -> int:
    """Next power of two, at least 64: arrays grow seldom."""
    return int(2 ** np.ceil(np.log2(max(rows, LEAST_ROWS))))


def grown(array: NDArray[Any], shape: tuple[int, ...], fill: float = 0.0) -> NDArray[Any]:
    """A larger array with the old one in its corner; the rest is ``fill`` (records: zero)."""
    records = array.dtype.fields is not None
    out = np.zeros(shape, array.dtype) if records else np.full(shape, fill, array.dtype)
    out[tuple(slice(0, n) for n in array.shape)] = array
    return out


class InstanceArrays:
    """Records and queues of the instances of one phase."""

    def __init__(self, phase: str, n_levels: int) -> None:
        """Arrays without instances; ``n_levels`` clocks are considered by rules that look ahead."""
        self.phase, self.n_levels = phase, n_levels
        self.tps = np.zeros(0, dtype=np.int64)
        self.states = np.zeros(0, dtype=PREFILL_DTYPE if phase == "prefill" else DECODE_DTYPE)
        self.coefs = np.zeros(0, dtype=COEFFICIENT_DTYPE)
        self.params = np.zeros(0, dtype=PARAMS_DTYPE)
        self.meta = np.zeros(0, dtype=INSTANCE_DTYPE)
        self.next_s = np.zeros(0)
        self.queues: dict[str, NDArray[Any]] = {
            name: np.zeros((0, LEAST_ROWS), dtype=kind) for name, kind in QUEUES[phase].items()
        }
        self.slots = np.zeros((0, 1), dtype=SLOT_DTYPE)
        self.tree = np.zeros((0, 2))
        self.stack = np.zeros((0, 1, 2), dtype=np.int64)
        self.wheel = np.zeros((0, 4), dtype=np.int32)
        self.cache = empty_cache((0,), 0)
        self.past = dict.fromkeys(
            ("energy_j", "energy_idle_j", "iterations", "preemptions", "gpu_s"), 0.0
        )  # of instances whose row was given to another

    def add(self, tp: int) -> int:
        """Room for one more instance: that of a retired one, else a new row; returns its number."""
        retired = np.flatnonzero(np.isfinite(self.meta["retired_s"]))
        if retired.size:
            i = int(retired[0])
            self._clear(i)
            self.tps[i] = tp
            return i
        n = len(self.tps)
        self.tps = np.append(self.tps, tp)
        for name in ("states", "coefs", "params", "meta", "next_s"):
            setattr(self, name, grown(getattr(self, name), (n + 1,), np.inf))
        for name, queue in self.queues.items():
            self.queues[name] = grown(queue, (n + 1, queue.shape[1]))
        for name in ("slots", "tree", "stack", "wheel"):
            old = getattr(self, name)
            setattr(self, name, grown(old, (n + 1, *old.shape[1:])))
        self.cache = PrefixCache(*(grown(old, (n + 1, old.shape[1])) for old in self.cache))
        return n

    def _clear(self, i: int) -> None:
        """Keep the totals of a retired instance and clear its row."""
        for field in ("energy_j", "energy_idle_j", "iterations", "preemptions"):
            if field in (self.states.dtype.names or ()):
                self.past[field] += float(self.states[field][i])
        in_service_s = self.meta["retired_s"][i] - self.meta["born_s"][i]
        self.past["gpu_s"] += float(self.tps[i] * in_service_s)
        self.states[i] = np.zeros((), dtype=self.states.dtype)
        self.meta[i] = np.zeros((), dtype=INSTANCE_DTYPE)

    def total(self, field: str) -> float:
        """Sum of a field over all instances there have been."""
        return self.past[field] + float(self.states[field].sum())

    def gpu_seconds(self, now_s: float) -> float:
        """GPU time in service until now, s."""
        end_s = np.minimum(self.meta["retired_s"], now_s)
        in_service_s = np.maximum(end_s - self.meta["born_s"], 0.0)
        return self.past["gpu_s"] + float(np.sum(self.tps * in_service_s))

    def fit_rows(self, rows: int) -> None:
        """Make every queue at least ``rows`` long."""
        for name, queue in self.queues.items():
            n, have = queue.shape
            if rows > have:
                self.queues[name] = grown(queue, (n, rows))

    def fit_slots(self, max_seqs: int) -> None:
        """Make room for ``max_seqs`` running requests per instance.

        Only while nothing runs: the slots are cleared.
        """
        n, have = self.slots.shape
        if max_seqs > have:
            self.slots = np.zeros((n, max_seqs), dtype=SLOT_DTYPE)
            self.tree = np.zeros((n, tree_size(max_seqs)))
            self.stack = np.zeros((n, max_seqs, 2), dtype=np.int64)

    def fit_blocks(self, n_ids: int) -> None:
        """Make room for so many block numbers in the prefix caches that there are."""
        n, have = self.cache.tokens.shape
        if n_ids + 1 > have and bool((self.meta["cache_tokens"] > 0).any()):
            newer, older, tokens = (grown(old, (n, widen(n_ids + 1))) for old in self.cache[:3])
            self.cache = PrefixCache(newer, older, tokens, self.cache.used)

    def fit_wheel(self, longest_output: int) -> None:
        """Make every timing wheel long enough; what is linked in the old ones moves over."""
        size = wheel_size(longest_output)
        n, have = self.wheel.shape
        if size <= have:
            return
        wheel = np.full((n, size), -1, dtype=np.int32)
        for j in range(n):
            passed = int(self.states["iterations"][j])  # the one under way is counted already
            for k in range(have):
                iteration = passed + (k - passed) % have  # the one that cell k stands for
                wheel[j, iteration % size] = self.wheel[j, k]
        self.wheel = wheel

    def prefills(self) -> Prefills:
        """The group that kernels take."""
        n, q = len(self.tps), self.queues
        table = (n, HORIZON, self.n_levels)
        plans = BatchPlans(
            np.zeros(table),
            np.zeros(table),
            np.zeros((n, HORIZON)),
            np.zeros((n, HORIZON), dtype=np.int64),
        )
        queue = PromptQueue(q["arrival_s"], q["prompt"], q["output"], q["prefix"], q["request"])
        return Prefills(*self._records(), queue, plans, self.cache)

    def decodes(self) -> Decodes:
        """The group that kernels take."""
        q = self.queues
        queue = ReadyQueue(
            q["ready_s"],
            q["first_s"],
            q["arrival_s"],
            q["prompt"],
            q["output"],
            q["cached"],
            q["request"],
            q["source"],
        )
        slots: Any = self.slots  # a structured array stands for an array of records
        running = RunningRequests(slots, self.wheel, self.tree, self.stack)
        return Decodes(*self._records(), queue, running)

    def _records(self) -> tuple[Any, Any, Any, Any, NDArray[np.float64]]:
        """What both phases begin with; structured arrays stand for arrays of records."""
        return self.states, self.coefs, self.params, self.meta, self.next_s
