"""What a controller may know (`PolicyContext`) and how it answers (`Controller`).

It answers with the ``predict`` of Stable-Baselines3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from biscale_env.config import Slo
from biscale_env.contract import ClockRange, ObservationSpec
from biscale_env.core.errors import BiscaleError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
# Ranges of parameters, written beside each in its constructor; the registry refuses what lies
# outside.
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0)]
MARGINS: Mapping[str, tuple[Any, ...]] = {
    "margin": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8)
}
"""Fractions of the SLO kept free that tuning may try, the same for every rule with a margin."""


class LatencyModel(Protocol):
    """What a level-scanning controller asks of its model.

    `IterationModel` and the fitted predictors offer it.

    Work arguments broadcast: ``tokens`` (GEMM rows), ``attn_work`` (attention token-pairs),
    ``cached`` (KV tokens), ``n_seq`` (requests), ``freq_mhz``.
    """

    def latency_s(
        self,
        tokens: ArrayLike,
        attn_work: ArrayLike,
        cached: ArrayLike,
        n_seq: ArrayLike,
        freq_mhz: ArrayLike,
        member: int | None = None,
    ) -> Floats:
        """Duration of an iteration, s."""
        ...

    def energy_j(
        self,
        tokens: ArrayLike,
        attn_work: ArrayLike,
        cached: ArrayLike,
        n_seq: ArrayLike,
        freq_mhz: ArrayLike,
        member: int | None = None,
    ) -> Floats:
        """Energy of an iteration over all GPUs of the instance, J."""
        ...


@dataclass(frozen=True)
class PolicyContext:
    """Everything a controller is told besides the observation.

    Attributes:
        phase: ``prefill`` or ``decode``.
        spec: observation of that phase.
        clocks: clocks it may request.
        model: its nominal model of latency and energy (a `LatencyModel`, most often an
            `IterationModel`); not necessarily the plant's.
        slo: the objective.
        token_budget: new tokens per prefill batch.
        max_seqs: requests per batch.
        kv_capacity_tokens: KV cache of the instance, tokens.
        member: which coefficients of ``model`` it takes for true; -1 nominal.
        parked_power_w: power of one GPU while the instance waits, W; None: that of its clock.
    """

    phase: str
    spec: ObservationSpec
    clocks: ClockRange
    model: Any
    slo: Slo
    token_budget: int
    max_seqs: int
    kv_capacity_tokens: int
    member: int = -1
    parked_power_w: float | None = None


def context_of(plant: Any, member: int = -1) -> PolicyContext:
    """Context of a plant (any object with the attributes of `biscale_env.envs.plant.Plant`).

    Args:
        plant: gives phase, observation, clocks, model, SLO, engine limits.
        member: coefficients that the controllers take for true; -1 nominal.
    """
    return PolicyContext(
        phase=plant.phase,
        spec=plant.spec,
        clocks=plant.clocks,
        model=plant.model,
        slo=plant.slo,
        token_budget=plant.settings.token_budget,
        max_seqs=plant.settings.max_seqs,
        kv_capacity_tokens=plant.kv_capacity_tokens,
        member=member,
        parked_power_w=plant.parked_power_w(member),
    )


class Controller:
    """Base of the controllers: decodes observations, keeps memory per row, encodes clocks.

    A subclass implements :meth:`decide`; one that remembers something sets ``memory_size`` and may
    override :meth:`first_memory`.

    Class attributes:
        phases: phases it can run.
        TUNABLE: free parameters and the values that equal-attainment tuning may try; the first is
            the default.
        memory_size: float64 values remembered per row; 0 for none.
    """

    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    TUNABLE: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    memory_size: int = 0

    def __init__(self, context: PolicyContext) -> None:
        """Keep the context.

        Raises:
            BiscaleError: the controller cannot run this phase.
        """
        if context.phase not in self.phases:
            raise BiscaleError(
                f"{type(self).__name__} controls {' and '.join(self.phases)} only, not "
                f"{context.phase}: choose another policy"
            )
        self.context = context
        self._scale = context.spec.scale
        self._action_offset = context.clocks.freq_min_mhz
        self._action_gain = 2.0 / (context.clocks.freq_max_mhz - context.clocks.freq_min_mhz)

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """Choose clocks.

        Args:
            x: physical observation, (n, dim), units of the spec.
            memory: what it returned last time, (n, memory_size), first_memory() where an episode
                begins; None if memory_size is 0.
            deterministic: False lets it sample.

        Returns:
            Clocks in MHz, (n,), and the new memory (a fresh array).
        """
        raise NotImplementedError

    def first_memory(self) -> Floats:
        """Memory at the start of an episode, (memory_size,)."""
        return np.zeros(self.memory_size)

    def stats(self) -> dict[str, float]:
        """Counters since it was made (e.g. solver_failures, iterations).

        Empty when there is nothing to count.
        """
        return {}

    def predict(
        self,
        observation: NDArray[np.float32],
        state: Any = None,
        episode_start: Bools | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[np.float32], Any]:
        """Choose clocks; see :class:`biscale_env.contract.Policy`.

        Raises:
            BiscaleError: an observation of another length.
        """
        single = observation.ndim == 1
        rows = observation[None] if single else observation
        if rows.shape[-1] != self._scale.size:
            raise BiscaleError(
                f"observation has {rows.shape[-1]} values, but {self.context.spec.id} has "
                f"{self._scale.size}: wrong phase?"
            )
        memory = self._memory(state, episode_start, len(rows)) if self.memory_size else None
        freq_mhz, memory = self.decide(rows * self._scale, memory, deterministic)
        action = ((freq_mhz - self._action_offset) * self._action_gain - 1.0).astype(np.float32)
        return (action if single else action[:, None]), memory

    def _memory(self, state: Any, episode_start: Bools | None, n: int) -> Floats:
        if state is None:
            memory = np.empty((n, self.memory_size))
            memory[:] = self.first_memory()
            return memory
        memory = np.asarray(state, dtype=np.float64)
        if episode_start is not None and np.any(episode_start):
            memory = memory.copy()
            memory[np.asarray(episode_start, dtype=bool).reshape(n)] = self.first_memory()
        return memory
