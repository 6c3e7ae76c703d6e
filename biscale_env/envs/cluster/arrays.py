"""Memory of a cluster: arrays of instance records and queues that grow when more instances or
longer queues need it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.contract import HORIZON
from biscale_env.envs.kernels import ring_size
from biscale_env.models import COEFFICIENT_DTYPE
from biscale_env.sim.cluster.layout import INSTANCE_DTYPE, Decodes, Prefills
from biscale_env.sim.state import DECODE_DTYPE, PARAMS_DTYPE, PREFILL_DTYPE, SLOT_DTYPE

QUEUES: dict[str, dict[str, Any]] = {
    "prefill": {
        "arrival_s": np.float64,
        "prompt": np.int32,
        "output": np.int32,
        "request": np.int64,
    },
    "decode": {
        "ready_s": np.float64,
        "first_s": np.float64,
        "arrival_s": np.float64,
        "prompt": np.int32,
        "output": np.int32,
        "request": np.int64,
        "source": np.int32,
    },
}


def widen(rows: int) -> int:
    """Next power of two, at least 64: arrays grow seldom."""
    return int(2 ** np.ceil(np.log2(max(rows, 64))))


def grown(array: NDArray[Any], shape: tuple[int, ...], fill: float = 0.0) -> NDArray[Any]:
    """A larger array with the old one in its corner."""
    out = (
        np.full(shape, fill, dtype=array.dtype)
        if array.dtype.fields is None
        else np.zeros(shape, dtype=array.dtype)
    )
    out[tuple(slice(0, n) for n in array.shape)] = array
    return out


class Arrays:
    """Records and queues of the instances of one phase."""

    def __init__(self, phase: str, n_levels: int) -> None:
        """An empty pool; ``n_levels`` clocks are considered by the MPC rule."""
        self.phase, self.n_levels = phase, n_levels
        self.tps = np.zeros(0, dtype=np.int64)
        self.states = np.zeros(0, dtype=PREFILL_DTYPE if phase == "prefill" else DECODE_DTYPE)
        self.coefs = np.zeros(0, dtype=COEFFICIENT_DTYPE)
        self.params = np.zeros(0, dtype=PARAMS_DTYPE)
        self.meta = np.zeros(0, dtype=INSTANCE_DTYPE)
        self.next_s = np.zeros(0)
        self.queues: dict[str, NDArray[Any]] = {
            n: np.zeros((0, 64), dtype=t) for n, t in QUEUES[phase].items()
        }
        self.cumulative = np.zeros((0, 65), dtype=np.int64)
        self.slots = np.zeros((0, 1), dtype=SLOT_DTYPE)
        self.tree = np.zeros((0, 2))
        self.stack = np.zeros((0, 1, 2), dtype=np.int64)
        self.ring = np.zeros((0, 4), dtype=np.int32)
        self.past = dict.fromkeys(
            ("energy_j", "energy_idle_j", "iterations", "preemptions", "gpu_s"), 0.0
        )  # of instances whose row was given to another

    def add(self, tp: int) -> int:
        """Room for one more instance: that of a retired one, else a new row; returns its number."""
        retired = np.flatnonzero(np.isfinite(self.meta["retired_s"]))
        if retired.size:
            i = int(retired[0])
            self._bury(i)
            self.tps[i] = tp
            return i
        n = len(self.tps)
        self.tps = np.append(self.tps, tp)
        for name in ("states", "coefs", "params", "meta", "next_s"):
            setattr(self, name, grown(getattr(self, name), (n + 1,), np.inf))
        for name, queue in self.queues.items():
            self.queues[name] = grown(queue, (n + 1, queue.shape[1]))
        for name in ("cumulative", "slots", "tree", "stack", "ring"):
            old = getattr(self, name)
            setattr(self, name, grown(old, (n + 1, *old.shape[1:])))
        return n

    def _bury(self, i: int) -> None:
        """Keep the totals of a retired instance and clear its row."""
        for field in (
            "energy_j",
            "energy_idle_j",
            "iterations",
            *(("preemptions",) if self.phase == "decode" else ()),
        ):
            self.past[field] += float(self.states[field][i])
        self.past["gpu_s"] += float(
            self.tps[i] * (self.meta["retired_s"][i] - self.meta["born_s"][i])
        )
        self.states[i] = np.zeros((), dtype=self.states.dtype)
        self.meta[i] = np.zeros((), dtype=INSTANCE_DTYPE)

    def total(self, field: str) -> float:
        """Sum of a field over all instances there have been."""
        return self.past[field] + float(self.states[field].sum())

    def gpu_seconds(self, now_s: float) -> float:
        """GPU time in service until now."""
        end_s = np.minimum(self.meta["retired_s"], now_s)
        return self.past["gpu_s"] + float(
            np.sum(self.tps * np.maximum(end_s - self.meta["born_s"], 0.0))
        )

    def fit_rows(self, rows: int) -> None:
        """Make every queue at least ``rows`` long."""
        n, have = self.cumulative.shape[0], self.cumulative.shape[1] - 1
        if rows > have:
            for name, queue in self.queues.items():
                self.queues[name] = grown(queue, (n, rows))
            self.cumulative = grown(self.cumulative, (n, rows + 1))

    def fit_slots(self, max_seqs: int) -> None:
        """Make room for ``max_seqs`` running requests per instance; only while nothing runs."""
        n, have = self.slots.shape
        if max_seqs > have:
            self.slots = np.zeros((n, max_seqs), dtype=SLOT_DTYPE)
            self.tree = np.zeros((n, 2 * int(2 ** np.ceil(np.log2(max_seqs)))))
            self.stack = np.zeros((n, max_seqs, 2), dtype=np.int64)

    def fit_ring(self, longest_output: int) -> None:
        """Make every finish ring long enough; what hangs in the old ones moves over."""
        size = ring_size(longest_output)
        n, have = self.ring.shape
        if size <= have:
            return
        ring = np.full((n, size), -1, dtype=np.int32)
        for j in range(n):
            passed = int(self.states["iterations"][j])
            for k in range(have):
                at = (
                    passed + (k - passed) % have
                )  # the iteration that cell k stands for; the one under way is already counted
                ring[j, at % size] = self.ring[j, k]
        self.ring = ring

    def prefills(self) -> Prefills:
        """The view that kernels take."""
        n = len(self.tps)
        q = self.queues
        return Prefills(
            self.states, self.coefs, self.params, self.meta, self.next_s, q["arrival_s"], q["prompt"], q["output"], q["request"],
            self.cumulative, np.zeros((n, HORIZON, self.n_levels)), np.zeros((n, HORIZON, self.n_levels)),
            np.zeros((n, HORIZON)), np.zeros((n, HORIZON), dtype=np.int64),
        )  # fmt: skip

    def decodes(self) -> Decodes:
        """The view that kernels take."""
        q = self.queues
        return Decodes(
            self.states, self.coefs, self.params, self.meta, self.next_s, q["ready_s"], q["first_s"], q["arrival_s"], q["prompt"],
            q["output"], q["request"], q["source"], self.cumulative, self.slots, self.ring, self.tree, self.stack,
        )  # fmt: skip
