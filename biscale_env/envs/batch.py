"""`Batch`: n instances of one phase in lock-step over shared workload arrays.

Single env, vector env and rollouts are all this.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biscale_env.contract import spec_for
from biscale_env.core.errors import BiscaleError
from biscale_env.core.jit import native
from biscale_env.envs import kernels
from biscale_env.envs.kernels import Instances, OfferedRequests, Results, Starts
from biscale_env.envs.loads.prefix_hits import cached_prefixes
from biscale_env.envs.observe import Encoding
from biscale_env.envs.plant import Plant
from biscale_env.envs.power_caps import PowerCaps
from biscale_env.models import COEFFICIENT_DTYPE
from biscale_env.sim.state import (
    DECODE_DTYPE,
    NO_CLASSES,
    NO_PREFIXES,
    PARAMS_DTYPE,
    PREFILL_DTYPE,
    Requests,
    RequestTimes,
    running_requests,
    wheel_size,
)
from biscale_env.traces import Trace

REWARD_TERMS = ("energy", "slo")
BOUND = (
    "_step",
    "_reset",
    "_results",
    "_words",
    "told",
)  # of a batch, made from its other attributes


class ToldRows(NamedTuple):
    """What infos tell of every row after a step or reset, (n,) each; written by the kernels."""

    time_s: NDArray[np.float64]  # since the start of the episode
    dt: NDArray[np.float64]  # length of the step, s
    energy_j: NDArray[np.float64]  # of the step
    freq_mhz: NDArray[np.float64]  # mean clock while busy
    cost: NDArray[np.float64]  # requests of the step that missed their SLO
    done: NDArray[np.float64]  # 1: the episode is over


@dataclass(frozen=True)
class RequestTable:
    """Workloads laid end to end: requests of workload k are rows ``begins[k] .. ends[k] - 1``.

    In prefill ``prompt`` holds the tokens that are to be computed, ``prefix`` those before them
    that the prefix cache has; in decode ``prompt`` is the whole prompt and ``prefix`` 0.
    ``cumulative`` counts ``prompt``. ``slo_class`` is empty where the SLO has one bound for all.
    ``reuses``: some ``prefix`` may be above 0; kernels look at it only then.
    """

    arrival_s: NDArray[np.float64]
    prompt: NDArray[np.int32]
    output: NDArray[np.int32]
    cumulative: NDArray[np.int64]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    durations_s: NDArray[np.float64]
    prefix: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    slo_class: NDArray[np.int8] = field(default_factory=lambda: NO_CLASSES)
    reuses: bool = True

    def __post_init__(self) -> None:
        if not self.prefix.size:  # not given: nothing is cached
            object.__setattr__(self, "prefix", np.zeros(self.prompt.size, dtype=np.int32))
            object.__setattr__(self, "reuses", False)

    @classmethod
    def of(
        cls,
        plant: Plant,
        workloads: Sequence[Trace],
        owners: Sequence[Plant] | None = None,
    ) -> "RequestTable":
        """Concatenate workloads.

        A decode pool never sees requests of a single output token (prefill makes it), so they are
        left out there.

        Args:
            plant: instance that will run them.
            workloads: each is served by one instance, with a prefix cache of its own.
            owners: the instance that runs each workload, where they are of several kinds.

        Raises:
            BiscaleError: no request at all, or one that cannot fit into the instance.
        """
        decode = plant.phase == "decode"
        parts, promised = [], []
        for k, w in enumerate(workloads):
            owner = plant if owners is None else owners[k]
            owner.check_fits(w)
            keep = w.output_tokens >= 2 if decode else np.ones(len(w), dtype=bool)
            finds = w.blocks is not None and not decode
            prefix = cached_prefixes(w, owner.prefix_cache_tokens if finds else 0)
            prompt = w.prompt_tokens - prefix
            parts.append((w.arrival_s[keep], prompt[keep], w.output_tokens[keep], prefix[keep]))
            numbers = plant.class_numbers(w)
            promised.append(NO_CLASSES if numbers is None else numbers[keep])
        sizes = np.array([len(part[0]) for part in parts], dtype=np.int64)
        if not len(sizes) or sizes.min() == 0:
            raise BiscaleError(
                f"a {plant.phase} workload has no requests: use a longer window or a higher rate"
            )
        ends = np.cumsum(sizes)
        arrival_s, new, output, cached = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        prompt = new.astype(np.int32)
        return cls(
            arrival_s.astype(np.float64),
            prompt,
            output.astype(np.int32),
            np.concatenate([[0], np.cumsum(prompt, dtype=np.int64)]),
            ends - sizes,
            ends,
            np.array([w.duration_s for w in workloads], dtype=np.float64),
            cached.astype(np.int32),
            np.concatenate(promised),
            bool(cached.any()),
        )

    @property
    def requests(self) -> Requests:
        """The group that kernels take."""
        prefix = self.prefix if self.reuses else NO_PREFIXES
        return Requests(
            np.ascontiguousarray(self.arrival_s, dtype=np.float64),
            np.ascontiguousarray(self.prompt, dtype=np.int32),
            np.ascontiguousarray(self.output, dtype=np.int32),
            np.ascontiguousarray(prefix, dtype=np.int32),
            np.ascontiguousarray(self.slo_class, dtype=np.int8),
        )


class InstanceRecords(NamedTuple):
    """What the instances of some rows are: records as kernels take them, one per row."""

    coefs: NDArray[Any]
    params: NDArray[Any]


def words(records: NDArray[Any]) -> NDArray[np.int64]:
    """The memory of records of 8-byte fields, (n, fields): numpy copies it ten times as fast."""
    return records.view(np.int64).reshape(len(records), -1)


@cache
def calls(phase: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Compiled step and reset of a phase, for the types that a batch always has."""
    spec, decode = spec_for(phase), phase == "decode"
    state: NDArray[Any] = np.zeros(1, dtype=DECODE_DTYPE if decode else PREFILL_DTYPE)
    coef: NDArray[Any] = np.zeros(1, dtype=COEFFICIENT_DTYPE)
    param: NDArray[Any] = np.zeros(1, dtype=PARAMS_DTYPE)
    short, whole, floats = np.zeros(1, dtype=np.int32), np.zeros(1, dtype=np.int64), np.zeros(1)
    of, times = Instances(state, coef, param), RequestTimes(floats, floats)
    work = OfferedRequests(Requests(floats, short, short, short, NO_CLASSES.copy()), times)
    first = (of, work, running_requests((1,), 1)) if decode else (of, work)
    step = kernels.decode_step_batch if decode else kernels.prefill_step_batch
    reset = kernels.decode_reset_batch if decode else kernels.prefill_reset_batch
    how, obs = Encoding.of(spec), np.zeros((1, spec.dim), dtype=np.float32)
    table = np.zeros((len(ToldRows._fields), 1))
    results = Results(obs, floats, np.zeros((1, len(REWARD_TERMS))), table)
    return (
        native(step, *first, np.zeros(1, dtype=np.float32), how, results),
        native(reset, *first, Starts(whole, whole, whole), how, results),
    )


class Batch:
    """n instances of one phase.

    Attributes:
        states: records of shape (n,), see :mod:`biscale_env.sim.state`; read them freely, the
            kernels write them.
        obs: encoded observations, float32 (n, dim); overwritten by every call, so hand out copies.
        reward: float64 (n,).
        terms: reward parts (n, 2): energy, slo.
        told: what infos tell of them; ``told_table`` holds it, (6, n).
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
        self.told_table = np.zeros((len(ToldRows._fields), n))
        self.coefs: NDArray[Any] = np.zeros(n, dtype=COEFFICIENT_DTYPE)
        self.params: NDArray[Any] = np.zeros(n, dtype=PARAMS_DTYPE)
        self._view()
        self.obs = np.zeros((n, plant.spec.dim), dtype=np.float32)
        self.reward = np.zeros(n)
        self.terms = np.zeros((n, len(REWARD_TERMS)))
        self.running = running_requests((n,), plant.settings.max_seqs if decode else 1)
        self._actions = np.zeros(n, dtype=np.float32)
        self._how = Encoding.of(plant.spec)
        self._member_rows: dict[int, int] = {}
        self._members = words(self.coefs)[:0], words(self.params)[:0]
        self._caps = PowerCaps(plant, n) if plant.settings.means == "cap" else None
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

    def _view(self) -> None:
        self.told = ToldRows(*self.told_table)
        self._words = words(self.coefs), words(self.params)

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
        work = OfferedRequests(self.pool.requests, self.times)
        first = (of, work, self.running) if self.plant.phase == "decode" else (of, work)
        step, reset = calls(self.plant.phase)
        results = Results(self.obs, self.reward, self.terms, self.told_table)
        self._step = partial(step, *first, self._actions, self._how, results)
        self._reset = partial(reset, *first)
        self._results = results

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs: compiled calls are looked up again."""
        return {k: v for k, v in self.__dict__.items() if k not in BOUND}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was copied."""
        self.__dict__.update(state)
        self._view()
        self._bind()

    def _of_members(self, members: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Records of the plant in these ensemble members, as words, each worked out once."""
        known = self._member_rows
        for member in members:
            if member not in known:
                made = np.array([tuple(self.plant.model.member(member))], dtype=COEFFICIENT_DTYPE)
                params = self.plant.params(member, 0.0).reshape(1)
                kept = self._members
                self._members = (
                    np.concatenate([kept[0], words(made)]),
                    np.concatenate([kept[1], words(params)]),
                )
                known[member] = len(known)
        rows = [known[member] for member in members]
        return self._members[0].take(rows, axis=0), self._members[1].take(rows, axis=0)

    def reset(
        self,
        rows: NDArray[np.int64],
        workloads: NDArray[np.int64],
        members: NDArray[np.int64],
        changes: Mapping[str, NDArray[np.float64]] | None = None,
        records: InstanceRecords | None = None,
    ) -> None:
        """Start episodes.

        Row ``rows[k]`` runs workload ``workloads[k]`` in a plant of ensemble member ``members[k]``,
        or of ``records[k]``, which may be of any GPU and LLM with the batch's ``max_seqs`` or less.
        ``changes`` sets engine parameters per episode (fields of ``PARAMS_DTYPE``, e.g.
        ``delay_s``, ``slo_s``), one value per row; training randomises with it.

        Raises:
            BiscaleError: a change of something unknown, or of ``max_seqs`` above what the batch was
                made for.
        """
        p = self.pool
        if self._caps is not None:
            if records is not None:
                raise BiscaleError(
                    "power caps are for one kind of instance: leave means='cap' out where the "
                    "instances of a batch differ"
                )
            self._caps.reset(rows)
        if records is None:
            self._words[0][rows], self._words[1][rows] = self._of_members(members.tolist())
        else:
            self._check_seqs(records.params["max_seqs"])
            self.coefs[rows], self.params[rows] = records
        self.params["end_s"][rows] = p.durations_s[workloads]
        for name, values in (changes or {}).items():
            self._change(name, rows, values)
        whole = (rows, p.begins[workloads], p.ends[workloads])
        starts = Starts(*(np.ascontiguousarray(x, dtype=np.int64) for x in whole))
        self._reset(starts, self._how, self._results)

    def _change(self, name: str, rows: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        known = PARAMS_DTYPE.names or ()
        if name not in known:
            raise BiscaleError(f"unknown engine parameter '{name}'; known: {', '.join(known)}")
        if name == "max_seqs":
            self._check_seqs(values)
        self.params[name][rows] = values

    def _check_seqs(self, values: NDArray[Any]) -> None:
        limit, most = self.plant.settings.max_seqs, np.max(values, initial=0)
        if most > limit:
            raise BiscaleError(f"max_seqs {most:g} is above the {limit} of the settings")

    def step(self, actions: NDArray[np.float32]) -> None:
        """One decision in every row that is not done; ``actions`` has shape (n,)."""
        if self._caps is None:
            self._actions[:] = actions
            self._step()
            return
        self._actions[:] = self._caps.ask(self, actions)
        self._step()
        self._caps.show(self)

    @property
    def done(self) -> NDArray[np.bool_]:
        """Rows whose episode is over, (n,)."""
        return np.asarray(self.states["done"] == 1)
