"""Everything that defines a plant of one phase.

An instance (hardware, model, engine limits, SLO), actuation delay and reward. One validated object.
"""

from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from biscale_env.config import Gpu, Llm, Slo, WithInstance, load_slo
from biscale_env.config.loader import validate
from biscale_env.config.slo import MOST_CLASSES
from biscale_env.contract import ClockRange, ObservationSpec, spec_for
from biscale_env.core.errors import BiscaleError
from biscale_env.models import IterationModel, instance_model
from biscale_env.models.physics import idle_power_w
from biscale_env.sim.clock import waiting_power_w
from biscale_env.sim.state import PARAMS_DTYPE
from biscale_env.traces import Trace
from biscale_env.traces.request_classes import class_numbers

# one unit of energy in the reward: a prompt of this length, near the Azure conversation mean (1155)
REFERENCE_PROMPT_TOKENS = 1024
REFERENCE_OUTPUT_TOKENS = (
    128  # or this many output tokens at batch 32: near that trace's median output (129)
)
REFERENCE_BATCH = 32

Means = Literal["lock", "cap"]


class PlantSettings(WithInstance):
    """Plant of one phase.

    The keys of :class:`biscale_env.config.InstanceSpec` (``gpu``, ``llm``, ``model``, ``tp``,
    ``dtype``, ``token_budget``, ``max_seqs``, ``kv_watermark``, ``slo``) may stand beside its own:
    ``PlantSettings.of("decode", tp=8)``.

    Attributes:
        phase: ``prefill`` or ``decode``.
        actuation_delay_s: delay of a clock change; None takes that of the ensemble member.
        min_decision_interval_s: a decision stands at least this long; 0 decides at every iteration.
        ensemble_member: -1 nominal, k a member of the ensemble, ``random`` a fresh one per episode.
        violation_weight: reward lost per request that misses the SLO, in units of the reference
            energy. Assumed: 30, so that 1 % of SLO-violating requests cost as much as the 30 % of
            energy that is at stake. A request of an SLO class that may miss five times as many as
            the SLO says costs a fifth of it.
        drain: run an episode on after its end until every request is served.
        means: how a clock that is asked for is held: ``lock`` locks it, ``cap`` limits the power
            instead, see :mod:`biscale_env.envs.power_caps`.
    """

    phase: Literal["prefill", "decode"]
    actuation_delay_s: float | None = Field(default=None, ge=0)
    min_decision_interval_s: float = Field(default=0.0, ge=0)
    ensemble_member: int | Literal["random"] = -1
    violation_weight: float = Field(default=30.0, ge=0)
    drain: bool = False
    means: Means = "lock"

    @classmethod
    def of(cls, phase: str, **changes: Any) -> "PlantSettings":
        """Settings of a phase with some values changed.

        Mistakes raise BiscaleError naming the key.
        """
        return validate({"phase": phase, **changes}, cls, "environment settings")


class Plant:
    """Settings with what they name loaded: model, GPU, LLM, SLO, clocks, observation."""

    def __init__(self, settings: PlantSettings, slo: Slo | None = None) -> None:
        """Load what the settings name; ``slo`` overrides the named one.

        Raises:
            BiscaleError: an unknown name, an ensemble member that does not exist, or an LLM that
                does not fit on so few GPUs.
        """
        instance = settings.instance
        self.settings = settings
        self.slo: Slo = slo or load_slo(instance.slo)
        self.model: IterationModel = instance_model(settings.phase, instance)
        self.gpu: Gpu = self.model.gpu
        self.llm: Llm = self.model.llm
        self.clocks = ClockRange.of(self.gpu)
        self.spec: ObservationSpec = spec_for(settings.phase)
        self.llm.kv_capacity_tokens(self.gpu, instance.tp, instance.dtype)
        if settings.ensemble_member != "random":
            self.model.member(settings.ensemble_member)
        elif self.model.n_members == 0:
            raise BiscaleError(
                f"model '{self.model.name}' has no ensemble: choose ensemble_member -1, not "
                "'random'"
            )

    @property
    def phase(self) -> str:
        """``prefill`` or ``decode``."""
        return self.settings.phase

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens of KV cache of the instance."""
        return int(self.model.kv_capacity_tokens)

    @property
    def prefix_cache_tokens(self) -> int | None:
        """Room of the prefix cache, tokens; 0: there is none, None: it gives nothing up."""
        return self.settings.instance.prefix_cache_tokens(self.kv_capacity_tokens)

    def check_fits(self, trace: Trace) -> None:
        """Refuse a workload with a request that can never fit into the KV cache.

        In decode its output counts too.

        Raises:
            BiscaleError: names the request, by file and line where the trace is (a window of) a
                file.
        """
        trace.check_fits(self.kv_capacity_tokens, with_output=self.phase == "decode")

    def class_numbers(self, trace: Trace) -> NDArray[np.int8] | None:
        """SLO class of each request of a workload by its number; None: one bound for all.

        Raises:
            BiscaleError: a class that the SLO does not name.
        """
        if not self.slo.classes:
            return None
        return class_numbers(trace.classes, self.slo, len(trace), trace.name)

    @cached_property
    def energy_ref_j(self) -> float:
        """Unit of energy of the reward: a reference prompt or reference output at max clock, J.

        Computed when it is first needed, since the first compiled call of a process takes long.
        """
        top = self.gpu.freq_max_mhz
        if self.phase == "prefill":
            n = REFERENCE_PROMPT_TOKENS
            return float(self.model.energy_j(n, n * n / 2, 0, 1, top))
        cached = REFERENCE_BATCH * REFERENCE_PROMPT_TOKENS
        per_iteration = self.model.energy_j(REFERENCE_BATCH, 0, cached, REFERENCE_BATCH, top)
        return float(per_iteration) * REFERENCE_OUTPUT_TOKENS / REFERENCE_BATCH

    def delay_s(self, member: int) -> float:
        """Actuation delay in a plant of this member, s."""
        fixed = self.settings.actuation_delay_s
        return float(self.model.delay_s(member)) if fixed is None else fixed

    def parked_power_w(self, member: int) -> float | None:
        """Power of a GPU of a parked instance in a plant of this member, W; None: never parked."""
        limits = self.settings.instance
        if limits.idle != "parked":
            return None
        if limits.parked_power_w is not None:
            return limits.parked_power_w
        return float(idle_power_w(self.model.member(member), self.clocks.freq_min_mhz / 1e3))

    def waiting_power_w(self, member: int, freq_mhz: float) -> float:
        """Power of the whole instance while it waits with this clock in effect, W."""
        c, p = self.model.member(member), self.params(member, 0.0).view(np.recarray)[()]
        return c.n_gpus * waiting_power_w(c, p, freq_mhz / 1e3)

    def least_power_w(self, member: int) -> float:
        """Power that the whole instance never draws less than, waiting or running, W.

        That of the lowest clock without work, or of a parked instance where it is lower.
        """
        c, low_mhz = self.model.member(member), self.clocks.freq_min_mhz
        idle_w = float(c.n_gpus * idle_power_w(c, low_mhz / 1e3))
        return min(idle_w, self.waiting_power_w(member, low_mhz))

    def params(self, member: int, end_s: float) -> np.ndarray:
        """Engine parameters of one instance as a structured record (shape ())."""
        s, limits = self.settings, self.settings.instance
        record = np.zeros((), dtype=PARAMS_DTYPE)
        parked_w = self.parked_power_w(member)
        values = {
            "token_budget": limits.token_budget,
            "max_seqs": limits.max_seqs,
            "kv_capacity": self.kv_capacity_tokens,
            "kv_watermark": limits.kv_watermark,
            "delay_s": self.delay_s(member),
            "min_interval_s": s.min_decision_interval_s,
            "freq_min_ghz": self.clocks.freq_min_mhz / 1e3,
            "freq_max_ghz": self.clocks.freq_max_mhz / 1e3,
            "freq_step_ghz": self.clocks.freq_step_mhz / 1e3,
            "slo_s": self.slo.bound_s(self.phase),
            "end_s": end_s,
            "drain": int(s.drain),
            "parked": int(parked_w is not None),
            "parked_w": parked_w or 0.0,
            "parked_ramp_s": limits.parked_ramp_s,
            "energy_ref_j": self.energy_ref_j,
            "violation_weight": s.violation_weight,
            **self._class_params(),
        }
        for name, value in values.items():
            record[name] = value
        return record

    def _class_params(self) -> dict[str, Any]:
        """Bounds and weights of the SLO's classes, in units of its own."""
        if not self.slo.classes:
            return {"classes": 0}
        n = len(self.slo.class_names)
        scale, weight = np.ones(MOST_CLASSES), np.ones(MOST_CLASSES)
        scale[:n] = self.slo.class_scales(self.phase)
        weight[:n] = [1.0 / self.slo.allowed(k) for k in range(n)]
        return {"classes": n, "class_scale": scale, "class_weight": weight}
