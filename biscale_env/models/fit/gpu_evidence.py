"""What the fit of a GPU's layer rests on: the schema of ``configs/gpus/evidence/*.yaml``."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from biscale_env.config import configs_dir
from biscale_env.config.hardware import Dtype
from biscale_env.config.loader import Config, list_names, load_yaml
from biscale_env.core.errors import BiscaleError
from biscale_env.models.coefficient import Provenance
from biscale_env.models.gpu_layer import LAYER_FIELDS, layer_files, layer_path, load_layer


class KernelPoint(Config):
    """One measured GEMM at one requested clock.

    Attributes:
        rows: rows of the activations.
        k: inner dimension.
        n: columns of the weights.
        dtype: number format.
        freq_mhz: locked clock, or the highest where none was locked, MHz.
        time_us: median duration, microseconds.
        power_w: NVML power, W.
    """

    rows: float = Field(gt=0)
    k: float = Field(gt=0)
    n: float = Field(gt=0)
    dtype: Dtype = "bf16"
    freq_mhz: float = Field(gt=0)
    time_us: float = Field(gt=0)
    power_w: float = Field(gt=0)


class Kernels(Config):
    """Measured GEMMs.

    Attributes:
        source: citation.
        long_us: duration from which the power reading is trusted more, microseconds.
        points: the measurements.
    """

    source: str
    long_us: float = Field(default=300.0, gt=0)
    points: tuple[KernelPoint, ...] = ()


class ServingPoint(Config):
    """One measured batch size of a server that holds prefill and decode.

    Attributes:
        batch: mean running requests.
        output_tokens: mean output length.
        output_tokens_per_s: token rate of the server.
        itl_p50_s: median inter-token latency, s.
        power_w: mean power per GPU, W.
    """

    batch: float = Field(gt=0)
    output_tokens: float = Field(gt=0)
    output_tokens_per_s: float = Field(gt=0)
    itl_p50_s: float = Field(gt=0)
    power_w: float = Field(gt=0)

    @property
    def interval_s(self) -> float:
        """Mean time between tokens, s: requests over token rate."""
        return self.batch / self.output_tokens_per_s


class ServingGroup(Config):
    """Measured points of one LLM on one instance.

    Attributes:
        llm: name of the LLM description.
        dtype: number format of the weights.
        tp: GPUs of the instance.
        ep: groups that the experts are spread over.
        task: data set that was served; ``gpqa`` has outputs of thousands of tokens.
        points: one per batch size.
    """

    llm: str
    dtype: Dtype
    tp: int = Field(ge=1)
    ep: int = Field(default=1, ge=1)
    task: str
    points: tuple[ServingPoint, ...] = Field(min_length=1)

    @property
    def label(self) -> str:
        """LLM, configuration and task, for tables."""
        spread = f" EP{self.ep}" if self.ep > 1 else ""
        return f"{self.llm} {self.dtype} TP{self.tp}{spread} {self.task}"


class Serving(Config):
    """Measured servers and what is assumed to read them.

    Attributes:
        source: citation.
        freq_mhz: requested clock, MHz.
        output_age_share: mean age of a running request's output as a share of the mean output
            length: 0.5 for equal lengths, 1.0 for exponential ones.
        prompt_tokens: mean prompt length per task; not published, assumed or inferred.
        left_out: what was measured and is not used, and why.
        groups: the servers.
    """

    source: str
    freq_mhz: float = Field(gt=0)
    output_age_share: float = Field(gt=0)
    prompt_tokens: dict[str, float]
    left_out: str = ""
    groups: tuple[ServingGroup, ...] = ()


class IdlePoint(Config):
    """Power of a GPU that holds a context and waits."""

    freq_mhz: float = Field(gt=0)
    power_w: float = Field(gt=0)
    sigma_w: float = Field(gt=0)
    source: str


class Prior(Config):
    """Bounds of a fitted figure, and how strongly it is held to what is known without the fit.

    Attributes:
        mean: value without evidence.
        sigma: its spread: standard deviation of the value, or of its logarithm where ``log``.
        low: smallest value.
        high: largest value.
        log: the spread is relative.
        fixed: the data of this GPU do not bear on it: every member samples it from the prior.
        provenance: of the value where it is not fitted.
        source: where it is from.
    """

    mean: float = Field(ge=0)
    sigma: float = Field(ge=0)
    low: float = Field(ge=0)
    high: float = Field(ge=0)
    log: bool = False
    fixed: bool = False
    provenance: Provenance = "assumed"
    source: str

    @model_validator(mode="after")
    def _ordered(self) -> "Prior":
        if not self.low <= self.mean <= self.high:
            raise ValueError("low <= mean <= high must hold")
        if self.log and self.mean <= 0:
            raise ValueError("a logarithmic prior needs a mean above zero")
        return self

    def sample(self, rng: np.random.Generator) -> float:
        """One value from the prior, within its bounds."""
        z = float(rng.normal())
        value = self.mean * np.exp(self.sigma * z) if self.log else self.mean + self.sigma * z
        return float(np.clip(value, self.low, self.high))

    def pull(self, value: float) -> float:
        """Distance of a value from the mean in standard deviations; 0 without a spread."""
        if self.sigma <= 0:
            return 0.0
        if self.log:
            return float(np.log(max(value, 1e-300) / self.mean)) / self.sigma
        return (value - self.mean) / self.sigma


class Noise(Config):
    """Relative standard deviations of the evidence.

    Attributes:
        kernel_time: of a kernel's duration against the formula.
        kernel_power: of a long kernel's power against the formula.
        short_kernel_power: of a short one's.
        kernel_gain: of all kernel powers together (the meter's gain).
        serving_power: of one serving point against its server.
        server_power: of one server's power against the formula: LLMs differ.
        server_gain: of all servers together (the meter's gain).
        itl: of one median interval against its server.
    """

    kernel_time: float = Field(gt=0)
    kernel_power: float = Field(gt=0)
    short_kernel_power: float = Field(gt=0)
    kernel_gain: float = Field(ge=0)
    serving_power: float = Field(gt=0)
    server_power: float = Field(ge=0)
    server_gain: float = Field(ge=0)
    itl: float = Field(gt=0)


class GpuEvidence(Config):
    """All evidence about one GPU.

    Attributes:
        gpu: name of its description.
        base: GPU whose fitted layer gives the priors that are not listed.
        borrowed_spread: relative standard deviation that is added to borrowed priors; assumed.
        kernels: measured GEMMs.
        serving: measured servers.
        idle: measured idle power.
        noise: how far each kind is trusted.
        prior: per field of the layer; with a base, those that differ from it.
        n_members: size of the ensemble.
        seed: of its sampling.
    """

    gpu: str
    base: str | None = None
    borrowed_spread: float = Field(default=0.2, ge=0)
    kernels: Kernels
    serving: Serving
    idle: tuple[IdlePoint, ...] = ()
    noise: Noise
    prior: dict[str, Prior]
    n_members: int = Field(ge=1)
    seed: int

    @model_validator(mode="after")
    def _complete(self) -> "GpuEvidence":
        unknown = set(self.prior) - set(LAYER_FIELDS)
        missing = set(LAYER_FIELDS) - set(self.prior) if self.base is None else set()
        if wrong := unknown | missing:
            raise ValueError(
                f"prior must name the fields of a layer; wrong or missing: {sorted(wrong)}"
            )
        return self

    def with_base(self) -> "GpuEvidence":
        """The evidence with every prior: those that are not listed come from the base's fit.

        Raises:
            BiscaleError: the base has no evidence or no fitted layer.
        """
        if self.base is None:
            return self
        base = load_gpu_evidence(self.base)
        layer = load_layer(self.base)
        path = layer_path(self.base)
        table = layer_files(path).table() if path is not None else {}
        found = dict(self.prior)
        for name in LAYER_FIELDS:
            if name not in found:
                values = table.get(name, np.zeros(1))
                found[name] = _borrowed(
                    base.prior[name], layer.value(name), values, self.borrowed_spread, self.base
                )
        return self.model_copy(update={"prior": found})


def _borrowed(
    prior: Prior, value: float, members: NDArray[np.float64], spread: float, base: str
) -> Prior:
    """A prior around the fitted value of another GPU, wider than that one's ensemble."""
    fixed = prior.fixed
    if prior.sigma <= 0 or value <= 0:
        sigma = prior.sigma
    elif prior.log:
        sigma = float(np.hypot(np.std(np.log(np.maximum(members, 1e-300))), spread))
    else:
        sigma = float(np.hypot(np.std(members), spread * value))
    return prior.model_copy(
        update={
            "mean": value,
            "sigma": sigma,
            "low": min(prior.low, value),
            "high": max(prior.high, value),
            "fixed": fixed,
            "provenance": "assumed",
            "source": f"borrowed from the fit of {base}: {prior.source}",
        }
    )


def evidence_dir() -> Path:
    """Folder of the evidence files."""
    return configs_dir() / "gpus" / "evidence"


def known_evidence() -> list[str]:
    """GPUs with evidence, each after the one that it borrows from."""
    names = list_names("gpus/evidence")
    bases = {n: load_yaml(evidence_dir() / f"{n}.yaml", GpuEvidence).base for n in names}
    depth = {n: _depth(n, bases) for n in names}
    return sorted(names, key=lambda n: (depth[n], n))


def _depth(name: str, bases: dict[str, str | None]) -> int:
    base = bases[name]
    return 0 if base is None else 1 + _depth(base, bases)


def load_gpu_evidence(gpu: str) -> GpuEvidence:
    """Evidence about a GPU.

    Raises:
        BiscaleError: there is none, or the file is wrong.
    """
    path = evidence_dir() / f"{gpu}.yaml"
    if not path.is_file():
        raise BiscaleError(
            f"there is no evidence about GPU '{gpu}'; there is about: {', '.join(known_evidence())}"
        )
    return load_yaml(path, GpuEvidence).with_base()
