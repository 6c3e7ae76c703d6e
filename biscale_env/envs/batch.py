"""`Batch`: n instances of one phase in lock-step over shared workload arrays.

Single env, vector env and rollouts are all this.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.contract import spec_for
from biscale_env.core.errors import BiscaleError
from biscale_env.core.jit import native
from biscale_env.envs import kernels
from biscale_env.envs.kernels import Instances, OfferedRequests, Results, Starts
from biscale_env.envs.observe import Encoding
from biscale_env.envs.plant import Plant
from biscale_env.models import COEFFICIENT_DTYPE
from biscale_env.sim.state import (
    DECODE_DTYPE,
    PARAMS_DTYPE,
    PREFILL_DTYPE,
    Requests,
    RequestTimes,
    running_requests,
    wheel_size,
)
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
            np.array([w.duration_s for w in workloads], dtype=np.float64),
        )

    @property
    def requests(self) -> Requests:
        """The group that kernels take."""
        return Requests(self.arrival_s, self.prompt, self.output)


@cache
def calls(phase: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Compiled step and reset of a phase, for the types that a batch always has."""
    spec, decode = spec_for(phase), phase == "decode"
    state: NDArray[Any] = np.zeros(1, dtype=DECODE_DTYPE if decode else PREFILL_DTYPE)
    coef: NDArray[Any] = np.zeros(1, dtype=COEFFICIENT_DTYPE)
    param: NDArray[Any] = np.zeros(1, dtype=PARAMS_DTYPE)
    short, whole, floats = np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int64), np.zeros(1)
    of, times = Instances(state, coef, param), RequestTimes(floats, floats)
    work = OfferedRequests(Requests(floats, short, short), whole, times)
    first = (of, work, running_requests((1,), 1)) if decode else (of, work)
    step = kernels.decode_step_batch if decode else kernels.prefill_step_batch
    reset = kernels.decode_reset_batch if decode else kernels.prefill_reset_batch
    how, obs = Encoding.of(spec), np.zeros((1, spec.dim), dtype=np.float32)
    results = Results(obs, floats, np.zeros((1, len(REWARD_TERMS))))
    return (
        native(step, *first, np.zeros(1, dtype=np.float32), how, results),
        native(reset, *first, Starts(whole, whole, whole), how, obs),
    )


class Batch:
    """n instances of one phase.

    Attributes:
        states: records of shape (n,), see :mod:`biscale_env.sim.state`; read them freely, the
            kernels write them.
        obs: encoded observations, float32 (n, dim); overwritten by every call, so hand out copies.
        reward: float64 (n,).
        terms: reward parts (n, 2): energy, slo.
        times: per-request times, empty unless they are recorded.
        running: decode: what runs in each instance, with a leading axis (n,).
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
        self.states: NDArray[Any] = np.zeros(n, dtype=DECODE_DTYPE if decode else PREFILL_DTYPE)
        self.states["done"] = 1
        self.coefs: NDArray[Any] = np.zeros(n, dtype=COEFFICIENT_DTYPE)
        self.params: NDArray[Any] = np.zeros(n, dtype=PARAMS_DTYPE)
        self.obs = np.zeros((n, plant.spec.dim), dtype=np.float32)
        self.reward = np.zeros(n)
        self.terms = np.zeros((n, len(REWARD_TERMS)))
        self.running = running_requests((n,), plant.settings.max_seqs if decode else 1)
        self._actions = np.zeros(n, dtype=np.float32)
        self._how = Encoding.of(plant.spec)
        self._member_cache: dict[int, tuple[Any, Any]] = {}
        self.use(pool)

    def use(self, pool: RequestTable) -> None:
        """Run on another table of workloads from the next reset on."""
        self.pool = pool
        size = len(pool.arrival_s) if self.record else 0
        self.times = RequestTimes(np.full(size, np.nan), np.full(size, np.nan))
        if self.plant.phase == "decode":
            wheel = wheel_size(int(pool.output.max()))
            if wheel > self.running.wheel.shape[1]:
                self.running = self.running._replace(
                    wheel=np.zeros((self.n, wheel), dtype=np.int32)
                )
        self._bind()

    @property
    def start_s(self) -> NDArray[np.float64]:
        """When each request was first admitted, s (decode, if recorded)."""
        return self.times.start_s

    @property
    def finish_s(self) -> NDArray[np.float64]:
        """First token (prefill) or last token (decode) of each request, s (if recorded)."""
        return self.times.finish_s

    def _bind(self) -> None:
        """Fill in what kernels take; the types are those of :func:`calls`."""
        of = Instances(self.states, self.coefs, self.params)
        p = self.pool
        requests = Requests(
            np.ascontiguousarray(p.arrival_s, dtype=np.float64),
            np.ascontiguousarray(p.prompt, dtype=np.int32),
            np.ascontiguousarray(p.output, dtype=np.int32),
        )
        work = OfferedRequests(
            requests, np.ascontiguousarray(p.cumulative, dtype=np.int64), self.times
        )
        first = (of, work, self.running) if self.plant.phase == "decode" else (of, work)
        step, reset = calls(self.plant.phase)
        results = Results(self.obs, self.reward, self.terms)
        self._step = partial(step, *first, self._actions, self._how, results)
        self._reset = partial(reset, *first)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs: compiled calls are looked up again."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_step", "_reset")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was copied."""
        self.__dict__.update(state)
        self._bind()

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
        """Start episodes.

        Row ``rows[k]`` runs workload ``workloads[k]`` in a plant of ensemble member ``members[k]``.
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
        whole = (rows, p.begins[workloads], p.ends[workloads])
        starts = Starts(*(np.ascontiguousarray(x, dtype=np.int64) for x in whole))
        self._reset(starts, self._how, self.obs)

    def _change(self, name: str, rows: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        known = PARAMS_DTYPE.names or ()
        if name not in known:
            raise BiscaleError(f"unknown engine parameter '{name}'; known: {', '.join(known)}")
        limit = self.plant.settings.max_seqs
        if name == "max_seqs" and np.max(values, initial=0) > limit:
            raise BiscaleError(f"max_seqs {np.max(values):g} is above the {limit} of the settings")
        self.params[name][rows] = values

    def step(self, actions: NDArray[np.float32]) -> None:
        """One decision in every row that is not done; ``actions`` has shape (n,)."""
        self._actions[:] = actions
        self._step()

    @property
    def done(self) -> NDArray[np.bool_]:
        """Rows whose episode is over, (n,)."""
        return np.asarray(self.states["done"] == 1)
