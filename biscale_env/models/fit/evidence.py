"""What the fit rests on: the schema of `configs/models/evidence/*.yaml`."""

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from biscale_env.config import configs_dir
from biscale_env.config.hardware import Dtype
from biscale_env.config.loader import Config, load_yaml
from biscale_env.core.errors import BiscaleError

EnergyName = Literal[
    "p_static_w", "p_clock_w_per_ghz", "p_busy_w", "e_flop_j", "e_byte_j", "e_hbm_j", "e_link_j"
]
ENERGY_NAMES: tuple[EnergyName, ...] = (
    "p_static_w",
    "p_clock_w_per_ghz",
    "p_busy_w",
    "e_flop_j",
    "e_byte_j",
    "e_hbm_j",
    "e_link_j",
)
SAMPLED_COEFFICIENTS = (
    "freq_profile_ghz",
    "core_share",
    "mem_knee_ghz",
    "mem_loss_per_ghz",
    "v_knee_ghz",
    "v_slope_per_ghz",
)
WORLD_NAMES = (
    *SAMPLED_COEFFICIENTS,
    "gemm_clock_ghz",
    "idle_full_w",
    "idle_knee_share",
    "decode_power_share_780",
    "prefill_host_s",
    "decode_host_s",
    "delay_s",
)
ParameterSample = dict[str, float]


class Configuration(Config):
    """One (dtype, TP) to fit, both phases."""

    dtype: Dtype
    tp: int = Field(ge=1)
    max_prefill_tokens: int = Field(ge=1)


class ServingPoint(Config):
    """One measured batch size of a co-located server.

    Attributes:
        batch: mean running requests.
        output_tokens: mean output length.
        output_tokens_per_s: token rate of the server.
        itl_p50_s: median inter-token latency, s.
        power_w: mean power per GPU, W.
        fitted: whether the fit uses the point.
    """

    batch: float = Field(gt=0)
    output_tokens: float = Field(gt=0)
    output_tokens_per_s: float = Field(gt=0)
    itl_p50_s: float = Field(gt=0)
    power_w: float = Field(gt=0)
    fitted: bool

    @property
    def interval_s(self) -> float:
        """Mean time between tokens, s: requests over token rate."""
        return self.batch / self.output_tokens_per_s


class Serving(Config):
    """Measured serving points and what is assumed to read them."""

    source: str
    dtype: Dtype
    tp: int
    freq_mhz: float = Field(gt=0)
    output_age_share: float = Field(gt=0)
    infer_prompt_up_to_batch: float = Field(gt=0)
    points: tuple[ServingPoint, ...] = Field(min_length=2)


class GemmCap(Config):
    """Sustained GEMM work sits at the power cap."""

    source: str
    rows: tuple[int, ...] = Field(min_length=1)
    clock_range_ghz: tuple[float, float]


class HbmPoint(Config):
    """Power of memory-bound work at one fraction of the HBM bandwidth."""

    hbm_use: float = Field(gt=0, le=1)
    power_w: float = Field(gt=0)


class HbmPower(Config):
    """Power of memory-bound work against HBM use."""

    source: str
    bandwidth_gb_per_s: float = Field(gt=0)
    freq_mhz: float = Field(gt=0)
    points: tuple[HbmPoint, ...]


class Sigma(Config):
    """Relative trust in each kind of evidence."""

    serving: float = Field(gt=0)
    gemm_cap: float = Field(gt=0)
    hbm_power: float = Field(gt=0)
    idle: float = Field(gt=0)
    shape: float = Field(gt=0)


class Prior(Config):
    """Bounds of an energy coefficient and a weak pull towards a textbook value."""

    mean: float = Field(gt=0)
    sigma: float = Field(gt=0)
    low: float = Field(ge=0)
    high: float = Field(gt=0)
    source: str


class Range(Config):
    """Nominal value and spread of something that no public table settles."""

    nominal: float = Field(gt=0)
    low: float = Field(gt=0)
    high: float = Field(gt=0)
    mode: float | None = None
    log: bool = False
    provenance: Literal["measured", "derived", "assumed"]
    source: str

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if (
            not self.low <= self.nominal <= self.high
            or not self.low <= (self.mode or self.low) <= self.high
        ):
            raise ValueError("low <= nominal, mode <= high must hold")
        return self

    def sample(self, rng: np.random.Generator) -> float:
        """Sample one value."""
        low, high, mode = (
            (np.log(v) if self.log else v) for v in (self.low, self.high, self.mode or self.low)
        )
        value = rng.triangular(low, mode, high) if self.mode else rng.uniform(low, high)
        return float(np.exp(value) if self.log else value)


class Accept(Config):
    """Bands that a member must keep."""

    serving_error: float = Field(gt=0)
    idle_w: tuple[float, float]
    power_share_780: tuple[float, float]
    saving_at_best: tuple[float, float]
    slowdown_1200: float = Field(gt=0)
    best_clock_mhz: tuple[float, float]


class Evidence(Config):
    """All evidence of one model family."""

    name: str
    gpu: str
    llm: str
    profile: str
    profile_source: str
    configurations: tuple[Configuration, ...] = Field(min_length=1)
    serving: Serving
    gemm_cap: GemmCap
    hbm_power: HbmPower
    sigma: Sigma
    energy: dict[EnergyName, Prior]
    sample: dict[str, Range]
    accept: Accept
    n_members: int = Field(ge=1)
    seed: int

    @model_validator(mode="after")
    def _complete(self) -> "Evidence":
        if set(self.energy) != set(ENERGY_NAMES) or set(self.sample) != set(WORLD_NAMES):
            raise ValueError("energy and sample must name exactly the known quantities")
        return self

    @property
    def nominal_sample(self) -> ParameterSample:
        """The nominal value of everything that is sampled."""
        return {name: self.sample[name].nominal for name in WORLD_NAMES}

    def random_sample(self, rng: np.random.Generator) -> ParameterSample:
        """One member of everything, in a fixed order."""
        return {name: self.sample[name].sample(rng) for name in WORLD_NAMES}


def evidence_path(name: str) -> Path:
    """File with the evidence of a shipped model family.

    Raises:
        BiscaleError: no such family.
    """
    path = configs_dir() / "models" / "evidence" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise BiscaleError(f"no evidence for model family '{name}'; known: {known}")
    return path


def load_evidence(name: str) -> Evidence:
    """Read the evidence of a shipped model family."""
    return load_yaml(evidence_path(name), Evidence)


def profile_path(evidence: Evidence) -> Path:
    """The kernel table that belongs to the evidence."""
    return configs_dir() / "models" / "profiles" / evidence.profile
