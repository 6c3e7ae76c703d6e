"""`Batch`: n instances of one phase in lock-step over shared workload arrays.

Single env, vector env and rollouts are all this.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.envs import kernels
from biscale_env.envs.plant import Plant
from biscale_env.models import COEFFICIENT_DTYPE
from biscale_env.sim.state import DECODE_DTYPE, PARAMS_DTYPE, PREFILL_DTYPE, SLOT_DTYPE
from biscale_env.traces import Trace

REWARD_TERMS = ("energy", "slo")


@dataclass(frozen=True)
class RequestTable:
    """Workloads laid end to end: requests of workload k are rows ``begins[k] .. ends[k] - 1``."""

    arrival_s: NDArray[np.float64]
    prompt: NDArray[np.int32]
    output: NDArray[np.int32]
    cumulative: NDArray[np.int64]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    durations_s: NDArray[np.float64]

    @classmethod
    def of(cls, plant: Plant, workloads: Sequence[Trace]) -> "RequestTable":
        """Concatenate workloads.

        A decode pool never sees requests of a single output token (prefill makes it), so they are
        left out there.

        Raises:
            BiscaleError: no request at all, or one that cannot fit into the instance.
        """
        decode = plant.phase == "decode"
        parts = []
        for w in workloads:
            plant.check_fits(w)
            keep = w.output_tokens >= 2 if decode else np.ones(len(w), dtype=bool)
            parts.append((w.arrival_s[keep], w.prompt_tokens[keep], w.output_tokens[keep]))
        sizes = np.array([len(a) for a, _, _ in parts], dtype=np.int64)
        if not len(sizes) or sizes.min() == 0:
            raise BiscaleError(
                f"a {plant.phase} workload has no requests: use a longer window or a higher rate"
            )
        ends = np.cumsum(sizes)
        prompt = np.concatenate([p for _, p, _ in parts]).astype(np.int32)
        return cls(
            np.concatenate([a for a, _, _ in parts]).astype(np.float64),
            prompt,
            np.concatenate([o for _, _, o in parts]).astype(np.int32),
            np.concatenate([[0], np.cumsum(prompt, dtype=np.int64)]),
            ends - sizes,
            ends,
            np.array([w.duration_s for w in workloads]),
        )


class Batch:
    """n instances of one phase.

    Attributes:
        states: records of shape (n,), see :mod:`biscale_env.sim.state`; read them freely, the
            kernels write them.
        obs: encoded observations, float32 (n, dim); overwritten by every call, so hand out copies.
        reward: float64 (n,).
        terms: reward parts (n, 2): energy, slo.
    """

    def __init__(self, plant: Plant, n: int, pool: RequestTable, record: bool = False) -> None:
        """Allocate a batch.

        Args:
            plant: the plant's settings and models.
            n: instances.
            pool: workloads they may run.
            record: keep per-request times; every workload must then be run by one instance only.
        """
        self.plant, self.n, self.record = plant, n, record
        decode = plant.phase == "decode"
        self.states = np.zeros(n, dtype=DECODE_DTYPE if decode else PREFILL_DTYPE)
        self.states["done"] = 1
        self.coefs = np.zeros(n, dtype=COEFFICIENT_DTYPE)
        self.params = np.zeros(n, dtype=PARAMS_DTYPE)
        self.obs = np.zeros((n, plant.spec.dim), dtype=np.float32)
        self.reward = np.zeros(n)
        self.terms = np.zeros((n, len(REWARD_TERMS)))
        low, high = plant.spec.low.astype(np.float64), plant.spec.high.astype(np.float64)
        self._encoding = (plant.spec.scale, low, high, np.zeros(plant.spec.dim))
        self._member_cache: dict[int, tuple[Any, Any]] = {}
        if decode:
            slots = plant.settings.max_seqs
            self.slots = np.zeros((n, slots), dtype=SLOT_DTYPE)
            self.tree = np.zeros((n, 2 * int(2 ** np.ceil(np.log2(slots)))))
            self.stack = np.zeros((n, slots, 2), dtype=np.int64)
            self.ring = np.zeros((n, 0), dtype=np.int32)
        self.use(pool)

    def use(self, pool: RequestTable) -> None:
        """Run on another pool of workloads from the next reset on."""
        self.pool = pool
        size = len(pool.arrival_s) if self.record else 0
        self.start_s, self.finish_s = np.full(size, np.nan), np.full(size, np.nan)
        if self.plant.phase == "decode":
            ring = kernels.ring_size(int(pool.output.max()))
            if ring > self.ring.shape[1]:
                self.ring = np.zeros((self.n, ring), dtype=np.int32)

    def _plant_of(self, member: int) -> tuple[Any, Any]:
        if member not in self._member_cache:
            coefs = np.array(tuple(self.plant.model.member(member)), dtype=COEFFICIENT_DTYPE)
            self._member_cache[member] = (coefs, self.plant.params(member, 0.0))
        return self._member_cache[member]

    def reset(
        self,
        rows: NDArray[np.int64],
        workloads: NDArray[np.int64],
        members: NDArray[np.int64],
        changes: Mapping[str, NDArray[np.float64]] | None = None,
    ) -> None:
        """Start episodes: row ``rows[k]`` runs workload ``workloads[k]`` in a plant of ensemble
        member ``members[k]``.

        ``changes`` sets engine parameters per episode (fields of ``PARAMS_DTYPE``, e.g.
        ``delay_s``, ``slo_s``), one value per row; training randomises with it.

        Raises:
            BiscaleError: a change of something unknown, or of ``max_seqs`` above what the batch was
                made for.
        """
        p = self.pool
        for member in set(members.tolist()):
            mine = rows[members == member]
            self.coefs[mine], self.params[mine] = self._plant_of(member)
        self.params["end_s"][rows] = p.durations_s[workloads]
        for name, values in (changes or {}).items():
            self._change(name, rows, values)
        begins, ends = p.begins[workloads], p.ends[workloads]
        if self.plant.phase == "prefill":
            kernels.prefill_reset_batch(
                rows, self.states, self.coefs, self.params, p.arrival_s, p.prompt, p.cumulative, begins, ends,
                *self._encoding, self.obs,
            )  # fmt: skip
        else:
            kernels.decode_reset_batch(
                rows, self.states, self.coefs, self.params, p.arrival_s, p.prompt, p.output, p.cumulative, self.start_s,
                self.slots, self.ring, self.tree, self.stack, begins, ends, *self._encoding, self.obs,
            )  # fmt: skip

    def _change(self, name: str, rows: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        if name not in (PARAMS_DTYPE.names or ()):
            raise BiscaleError(
                f"unknown engine parameter '{name}'; known: {', '.join(PARAMS_DTYPE.names or ())}"
            )
        if name == "max_seqs" and np.max(values, initial=0) > self.plant.settings.max_seqs:
            raise BiscaleError(
                f"max_seqs {np.max(values):g} is above the {self.plant.settings.max_seqs} of the settings"
            )
        self.params[name][rows] = values

    def step(self, actions: NDArray[np.float32]) -> None:
        """One decision in every row that is not done; ``actions`` has shape (n,)."""
        p = self.pool
        if self.plant.phase == "prefill":
            kernels.prefill_step_batch(
                self.states, self.coefs, self.params, p.arrival_s, p.prompt, p.cumulative, self.finish_s, actions,
                *self._encoding, self.obs, self.reward, self.terms,
            )  # fmt: skip
        else:
            kernels.decode_step_batch(
                self.states, self.coefs, self.params, p.arrival_s, p.prompt, p.output, p.cumulative, self.start_s,
                self.finish_s, self.slots, self.ring, self.tree, self.stack, actions, *self._encoding, self.obs, self.reward,
                self.terms,
            )  # fmt: skip

    @property
    def done(self) -> NDArray[np.bool_]:
        """Rows whose episode is over, (n,)."""
        return np.asarray(self.states["done"] == 1)
