"""GPU and LLM descriptions: the public facts that the models are built on."""

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from biscale_env.config.loader import Config, load_named
from biscale_env.core.errors import BiscaleError

Dtype = Literal["bf16", "fp8", "mxfp4"]
MXFP4_BYTES = 4.25 / 8  # OCP microscaling formats: 4 bits and one 8-bit scale per block of 32
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
    the power of a GPU without a context; it need not be known. ``sms`` are its streaming
    multiprocessors; a GPU that does not multiply ``mxfp4`` widens such weights to bf16.
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
    sms: int = Field(default=132, gt=0)
    has_fp8: bool = True
    multiplies_mxfp4: bool = False
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
    """Geometry of a decoder-only transformer: dense or with experts.

    Attributes:
        name: short name, as in ``configs/llms``.
        parameters: all of them, experts included.
        layers: transformer layers.
        hidden: width of the residual stream.
        intermediate: width of a dense MLP (three matrices); 0 where every layer has experts.
        vocabulary: rows of the embedding table.
        heads: query heads.
        kv_heads: heads of keys and values.
        head_dim: width of a head.
        max_context: longest context.
        dtype: number format that the weights are published in.
        tied_embeddings: the output head is the embedding table.
        experts: routed experts per layer; 0: dense.
        experts_per_token: experts that a token is sent to.
        expert_intermediate: width of an expert's MLP.
        shared_intermediate: width of the MLP beside the experts that every token passes.
        dense_layers: leading layers without experts.
        window_tokens: sliding window of the windowed layers.
        window_layers: attention layers that see no more than the window.
        kv_lora_rank: width of the compressed keys and values (MLA); 0: plain heads.
        qk_rope_head_dim: part of a head that carries the position, beside the compressed part.
        sources: where it is from.
    """

    name: str
    parameters: float = Field(gt=0)
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    intermediate: int = Field(ge=0)
    vocabulary: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    max_context: int = Field(gt=0)
    dtype: Dtype = "bf16"
    tied_embeddings: bool = False
    experts: int = Field(default=0, ge=0)
    experts_per_token: int = Field(default=0, ge=0)
    expert_intermediate: int = Field(default=0, ge=0)
    shared_intermediate: int = Field(default=0, ge=0)
    dense_layers: int = Field(default=0, ge=0)
    window_tokens: int = Field(default=0, ge=0)
    window_layers: int = Field(default=0, ge=0)
    kv_lora_rank: int = Field(default=0, ge=0)
    qk_rope_head_dim: int = Field(default=0, ge=0)
    sources: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "Llm":
        if self.experts and not 0 < self.experts_per_token <= self.experts:
            raise ValueError("experts_per_token must lie within 1 and experts")
        if bool(self.experts) != bool(self.expert_intermediate):
            raise ValueError("experts and expert_intermediate belong together")
        if not self.experts and not self.intermediate:
            raise ValueError("intermediate must be above zero where there are no experts")
        if self.window_layers > self.layers or bool(self.window_layers) != bool(self.window_tokens):
            raise ValueError("window_layers (of all layers) and window_tokens belong together")
        if self.expert_parameters >= self.parameters:
            raise ValueError("the experts alone have more than the given parameters")
        return self

    @property
    def expert_layers(self) -> int:
        """Layers with experts."""
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def expert_parameters(self) -> float:
        """Parameters of all routed experts."""
        each = 3.0 * self.hidden * self.expert_intermediate
        return self.expert_layers * self.experts * each

    @property
    def embedding_parameters(self) -> float:
        """Parameters of the embedding table, and of the output head if it is another matrix."""
        return (1.0 if self.tied_embeddings else 2.0) * self.vocabulary * self.hidden

    @property
    def active_parameters(self) -> float:
        """Parameters that a token passes: all but the experts that it is not sent to."""
        chosen = self.experts_per_token / self.experts if self.experts else 0.0
        return self.parameters - (1.0 - chosen) * self.expert_parameters

    @property
    def kv_values_per_token(self) -> float:
        """Numbers that the KV cache holds per token and layer."""
        if self.kv_lora_rank:
            return float(self.kv_lora_rank + self.qk_rope_head_dim)
        return 2.0 * self.kv_heads * self.head_dim

    def kv_bytes_per_token(self, dtype: Dtype) -> float:
        """KV-cache bytes per token, counted once (fp8 keeps an fp8 cache).

        Windowed layers count in full: engines without a hybrid KV manager keep all their tokens
        (assumed; conservative).
        """
        return self.layers * self.kv_values_per_token * (1 if dtype == "fp8" else 2)

    def kv_copies(self, tp: int) -> float:
        """How often a token's KV cache stands on the GPUs of an instance.

        Heads are spread over the GPUs and repeated where there are fewer heads than GPUs; the
        compressed cache of MLA cannot be spread.
        """
        return float(tp) if self.kv_lora_rank else max(1.0, tp / self.kv_heads)

    def expert_weight_bytes(self, dtype: Dtype) -> float:
        """Bytes of all routed experts over all GPUs; mxfp4 has 4 bits and a scale per 32."""
        return self.expert_parameters * {"bf16": 2.0, "fp8": 1.0, "mxfp4": MXFP4_BYTES}[dtype]

    def dense_weight_bytes(self, dtype: Dtype) -> float:
        """Bytes of everything but the routed experts and the embedding's copy, over all GPUs.

        Fp8 checkpoints keep the embedding and the output matrix in bf16; mxfp4 ones all but the
        experts.
        """
        dense = self.parameters - self.expert_parameters
        if dtype != "fp8":
            return 2.0 * dense
        return dense + self.embedding_parameters

    def weight_bytes(self, dtype: Dtype) -> float:
        """Bytes of the weights over all GPUs."""
        return self.dense_weight_bytes(dtype) + self.expert_weight_bytes(dtype)

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
        per_token = self.kv_bytes_per_token(dtype) * self.kv_copies(tp)
        tokens = int(per_gpu * tp / per_token)
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
