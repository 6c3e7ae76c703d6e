"""GPU and LLM descriptions: the public facts that the models are built on."""

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from biscale_env.config.loader import Config, load_named
from biscale_env.core.errors import BiscaleError

Dtype = Literal["bf16", "fp8"]
ROUNDING = 1e-9  # steps; a range of whole steps may miss one by the last bit


def clock_grid_mhz(
    freq_min_mhz: float, freq_max_mhz: float, freq_step_mhz: float
) -> NDArray[np.float64]:
    """Clocks in whole steps below the highest, down to the lowest, rising, MHz."""
    steps = int(np.floor((freq_max_mhz - freq_min_mhz) / freq_step_mhz + ROUNDING))
    return freq_max_mhz - freq_step_mhz * np.arange(steps, -1, -1.0)


class Gpu(Config):
    """One GPU type.

    Clocks are SM clocks in MHz: the hardware supports ``freq_step_mhz`` steps up to
    ``freq_max_mhz``; controllers may ask for anything within ``[freq_min_mhz, freq_max_mhz]``.
    ``control_levels_mhz`` are the few levels that level-based controllers scan. ``idle_power_w`` is
    the power of a GPU without a context; it need not be known.
    """

    name: str
    freq_min_mhz: float = Field(gt=0)
    freq_max_mhz: float = Field(gt=0)
    freq_step_mhz: float = Field(gt=0)
    control_levels_mhz: tuple[float, ...] = Field(min_length=2)
    power_cap_w: float = Field(gt=0)
    memory_gb: float = Field(gt=0)
    memory_share: float = Field(gt=0, le=1)
    memory_overhead_gb: float = Field(ge=0)
    hbm_gb_per_s: float = Field(gt=0)
    nvlink_gb_per_s: float = Field(gt=0)
    peak_bf16_tflops: float = Field(gt=0)
    off_power_w: float = Field(ge=0)
    idle_power_w: float | None = Field(default=None, ge=0)
    sources: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _clocks_in_order(self) -> "Gpu":
        levels = self.control_levels_mhz
        if self.freq_min_mhz >= self.freq_max_mhz:
            raise ValueError("freq_min_mhz must lie below freq_max_mhz")
        if (
            list(levels) != sorted(levels)
            or levels[0] < self.freq_min_mhz
            or levels[-1] > self.freq_max_mhz
        ):
            raise ValueError(
                "control_levels_mhz must rise and lie within [freq_min_mhz, freq_max_mhz]"
            )
        return self

    @property
    def clocks_mhz(self) -> NDArray[np.float64]:
        """All clocks a controller may ask for, rising, MHz."""
        return clock_grid_mhz(self.freq_min_mhz, self.freq_max_mhz, self.freq_step_mhz)

    def check_clock(self, freq_mhz: float) -> float:
        """Return the clock if the GPU can run it.

        Raises:
            BiscaleError: outside the range of the GPU.
        """
        if not self.freq_min_mhz <= freq_mhz <= self.freq_max_mhz:
            raise BiscaleError(
                f"clock {freq_mhz:g} MHz is impossible on {self.name}: choose "
                f"{self.freq_min_mhz:g} to {self.freq_max_mhz:g} MHz"
            )
        return float(freq_mhz)


class Llm(Config):
    """Geometry of a dense decoder-only transformer."""

    name: str
    parameters: float = Field(gt=0)
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    intermediate: int = Field(gt=0)
    vocabulary: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    max_context: int = Field(gt=0)
    sources: dict[str, str] = Field(default_factory=dict)

    def kv_bytes_per_token(self, dtype: Dtype) -> float:
        """KV-cache bytes per token over all GPUs (fp8 keeps an fp8 cache)."""
        return 2.0 * self.layers * self.kv_heads * self.head_dim * (2 if dtype == "bf16" else 1)

    def weight_bytes(self, dtype: Dtype) -> float:
        """Bytes of the weights over all GPUs.

        Fp8 checkpoints keep the embedding and the output matrix in bf16.
        """
        kept_in_bf16 = 2.0 * self.vocabulary * self.hidden
        return self.parameters * 2 if dtype == "bf16" else self.parameters + kept_in_bf16

    def kv_capacity_tokens(self, gpu: Gpu, tp: int, dtype: Dtype) -> int:
        """Tokens of KV cache that fit beside the weights of a TP group.

        Raises:
            BiscaleError: the model does not fit on so few GPUs.
        """
        per_gpu = (
            gpu.memory_share * gpu.memory_gb * 1e9
            - gpu.memory_overhead_gb * 1e9
            - self.weight_bytes(dtype) / tp
        )
        tokens = int(per_gpu * tp / self.kv_bytes_per_token(dtype))
        if tokens < 1:
            raise BiscaleError(
                f"{self.name} in {dtype} does not fit on TP {tp} of {gpu.name}: use a larger TP or "
                "fp8"
            )
        return tokens


def load_gpu(name: str = "h100-sxm", beside: Path | None = None) -> Gpu:
    """Load a GPU description by name or YAML file (looked for in the folder ``beside`` first)."""
    return load_named("gpus", name, Gpu, beside)


def load_llm(name: str = "llama-3.3-70b", beside: Path | None = None) -> Llm:
    """Load an LLM description by name or YAML file (looked for in the folder ``beside`` first)."""
    return load_named("llms", name, Llm, beside)
