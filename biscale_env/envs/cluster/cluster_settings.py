"""Everything that defines a cluster but its placement.

Hardware, engine limits, routing, transfer, tier-2 rules, idle GPUs.
"""

from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from biscale_env.config import InstanceSpec, Slo, load_slo, with_published_dtype
from biscale_env.config.hardware import Dtype
from biscale_env.config.instance import PARKED_RAMP_S, IdleRule, PrefixCacheRule
from biscale_env.config.loader import Config, validate
from biscale_env.config.slo import one_bound
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.models.physics import idle_power_w
from biscale_env.sim.cluster.layout import POLICIES, ROUTERS
from biscale_env.sim.prefix_cache import NO_LIMIT

Router = Literal["weighted", "round_robin", "shortest", "what_if", "cache_aware"]
PrefillPolicy = Literal["static", "mpc", "ecofreq", "throttllem", "external"]
DecodePolicy = Literal["static", "slack", "ecofreq", "throttllem", "external"]


class Transfer(Config):
    """KV transfer from prefill to decode.

    Attributes:
        latency_s: fixed part, s; measured on 4 NICs of 400 Gbit/s together with the bandwidth
            below.
        gb_per_s_per_gpu: network bandwidth per GPU; 165 GB/s over the 4 GPUs of a TP4 instance. A
            single slow Ethernet is 12.5 GB/s.
        overlap: fraction of the bytes that travel while prefill still computes (layer by layer);
            0 as measured.
    """

    latency_s: float = Field(default=0.0017, ge=0)
    gb_per_s_per_gpu: float = Field(default=41.25, gt=0)
    overlap: float = Field(default=0.0, ge=0, le=1)


class Transitions(Config):
    """What a change of the placement costs.

    All 0 (the default) as in BiScale, which does not charge them.

    Attributes:
        cold_start_s: a new instance runs nothing for so long and draws idle power; measured 67 s to
            8 min.
        reshard_s: the same when GPUs of the same phase change their TP degree; 1 to 5 s.
    """

    cold_start_s: float = Field(default=0.0, ge=0)
    reshard_s: float = Field(default=0.0, ge=0)


class ClusterSettings(Config):
    """A cluster without its placement.

    Attributes:
        gpus: GPUs of the cluster, in the placement or not.
        gpu: name of a GPU description or a YAML file; None: the one that the model was fitted on.
        llm: name of an LLM description or a YAML file, likewise.
        model: family of fitted models.
        dtype: ``bf16`` or ``fp8``.
        slo: name of the SLO or a path.
        token_budget: new tokens per prefill batch (co-located: rows per iteration).
        prefill_max_seqs: requests per prefill batch.
        decode_max_seqs: requests per decode batch; not published for BiScale, assumed 512: the
            fitted range.
        kv_watermark: fraction of KV kept free on admission.
        actuation_delay_s: delay of a clock change; None takes that of the ensemble member.
        idle: what an instance without work draws, ``last-clock`` or ``parked``; see
            :class:`biscale_env.config.InstanceSpec`.
        parked_power_w: power of one GPU of a parked instance, W; None: the model's at the lowest
            clock.
        parked_ramp_s: how long a parked instance runs at the lowest clock when work arrives, s.
        ensemble_member: -1 nominal, or a member of the ensemble; all instances live in the same
            member.
        prefix_cache: prefix cache of the prefill instances, ``off``, ``lru``, ``lru:TOKENS`` or
            ``infinite``; co-located servers have none. See
            :class:`biscale_env.config.InstanceSpec`.
        prefill_router: how requests are spread over prefill instances; ``cache_aware``: to the
            longest cached prefix among instances whose queue is not long.
        decode_router: how requests are spread over decode instances.
        prefill_policy: tier-2 rule of prefill.
        decode_policy: tier-2 rule of decode (and of co-located servers).
        prefill_margin: fraction of the TTFT SLO that the rule keeps free.
        decode_margin: fraction of the TPOT SLO that the rule keeps free.
        kv_guard: KV use above which the slack rule runs at the highest clock; not published,
            assumed.
        ahead: iterations that throttLL'eM projects the KV ahead; assumed.
        transfer: KV transfer.
        transitions: cost of changing the placement.
        spare: GPUs outside the placement are ``idle`` or ``off``.
        spare_idle_w: power of an idle GPU without a context, W; None: that of the GPU description.
    """

    gpus: int = Field(default=16, gt=0)
    gpu: str | None = None
    llm: str | None = None
    model: str | None = None
    ep: int = Field(default=1, gt=0)
    dtype: Dtype = "bf16"
    slo: str = "biscale"
    token_budget: int = Field(default=2048, gt=0)
    prefill_max_seqs: int = Field(default=256, gt=0, le=4096)
    decode_max_seqs: int = Field(default=512, gt=0, le=4096)
    kv_watermark: float = Field(default=0.01, ge=0, lt=1)
    actuation_delay_s: float | None = Field(default=None, ge=0)
    idle: IdleRule = "last-clock"
    parked_power_w: float | None = Field(default=None, ge=0)
    parked_ramp_s: float = Field(default=PARKED_RAMP_S, ge=0)
    ensemble_member: int = -1
    prefix_cache: PrefixCacheRule = "lru"
    prefill_router: Router = "shortest"
    decode_router: Router = "shortest"
    prefill_policy: PrefillPolicy = "static"
    decode_policy: DecodePolicy = "static"
    prefill_margin: float = Field(default=0.0, ge=0, lt=1)
    decode_margin: float = Field(default=0.0, ge=0, lt=1)
    kv_guard: float = Field(default=0.9, ge=0)
    ahead: float = Field(default=32.0, ge=0)
    transfer: Transfer = Transfer()
    transitions: Transitions = Transitions()
    spare: Literal["idle", "off"] = "idle"
    spare_idle_w: float | None = Field(default=None, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_dtype(cls, data: Any) -> Any:
        return with_published_dtype(data)

    @classmethod
    def of(cls, **values: Any) -> "ClusterSettings":
        """Settings with some values changed; mistakes raise BiscaleError naming the key."""
        return validate(values, cls, "cluster settings")

    def changed(self, **values: Any) -> "ClusterSettings":
        """A copy with some values changed, validated anew."""
        return self.of(**{**self.model_dump(exclude_unset=True), **values})

    def instance(self, phase: str, tp: int) -> InstanceSpec:
        """One instance of the cluster."""
        return InstanceSpec(
            gpu=self.gpu,
            llm=self.llm,
            model=self.model,
            tp=tp,
            ep=min(self.ep, tp),
            dtype=self.dtype,
            token_budget=self.token_budget,
            max_seqs=self.prefill_max_seqs if phase == "prefill" else self.decode_max_seqs,
            kv_watermark=self.kv_watermark,
            slo=self.slo,
            idle=self.idle,
            parked_power_w=self.parked_power_w,
            parked_ramp_s=self.parked_ramp_s,
            prefix_cache=self.prefix_cache,
        )


class ClusterPlant:
    """Settings with what they name loaded.

    Plants of single instances are made on demand and kept.
    """

    def __init__(self, settings: ClusterSettings, slo: Slo | None = None) -> None:
        """Load what the settings name; ``slo`` overrides the named one."""
        self.settings = settings
        self.slo = one_bound(slo or load_slo(settings.slo), "the cluster")
        self._plants: dict[tuple[str, int], Plant] = {}

    def plant(self, phase: str, tp: int) -> Plant:
        """Plant of one instance; a co-located instance lives in the decode plant.

        Raises:
            BiscaleError: no fitted model for this TP, or the LLM does not fit.
        """
        key = ("decode" if phase == "colocated" else phase, tp)
        if key not in self._plants:
            s = self.settings
            settings = PlantSettings.of(
                key[0],
                instance=s.instance(key[0], tp),
                actuation_delay_s=s.actuation_delay_s,
                ensemble_member=s.ensemble_member,
                drain=True,
            )
            self._plants[key] = Plant(settings, self.slo)
        return self._plants[key]

    def params(self, phase: str, tp: int) -> np.ndarray:
        """Engine parameters of an instance.

        Its episode ends at 0, so that it idles only when the cluster says so.
        """
        return self.plant(phase, tp).params(self.settings.ensemble_member, 0.0)

    def meta(self, phase: str, tp: int) -> dict[str, Any]:
        """Fields of the instance record that follow from the settings."""
        s = self.settings
        prefill = phase == "prefill"
        return {
            "policy": POLICIES.index(s.prefill_policy if prefill else s.decode_policy),
            "margin": s.prefill_margin if prefill else s.decode_margin,
            "kv_guard": s.kv_guard,
            "ahead": s.ahead,
            "cache_tokens": self._cache_tokens(tp) if prefill else 0,
            "link_bytes_per_s": s.transfer.gb_per_s_per_gpu * 1e9 * tp,
        }

    def _cache_tokens(self, tp: int) -> int:
        tokens = self.plant("prefill", tp).prefix_cache_tokens
        return NO_LIMIT if tokens is None else tokens

    def spare_power_w(self, prefill_plant: Plant) -> float:
        """Power of one GPU outside the placement, W.

        An idle one whose description does not say takes what the model gives an instance that waits
        at the lowest clock; with its context loaded, so rather more.
        """
        gpu, given = prefill_plant.gpu, self.settings.spare_idle_w
        if self.settings.spare == "off":
            return gpu.off_power_w
        if given is not None:
            return given
        if gpu.idle_power_w is not None:
            return gpu.idle_power_w
        c = prefill_plant.model.member(self.settings.ensemble_member)
        return float(idle_power_w(c, gpu.freq_min_mhz / 1e3))

    def router(self, phase: str) -> int:
        """Number of the router of a phase."""
        s = self.settings
        return ROUTERS.index(s.prefill_router if phase == "prefill" else s.decode_router)


def check_gpus(gpus: int, tps: tuple[int, ...]) -> None:
    """Refuse a number of GPUs that no instance fits on.

    Raises:
        BiscaleError: names the TP degrees that exist.
    """
    if gpus < 1 or not any(gpus % tp == 0 for tp in tps):
        known = ", ".join(map(str, tps))
        raise BiscaleError(
            f"{gpus} GPUs cannot be divided into instances: TP degrees that fit the model are "
            f"{known}"
        )
