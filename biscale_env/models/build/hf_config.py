"""A Hugging Face `config.json` as an LLM description."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from biscale_env.config.hardware import Dtype, Llm
from biscale_env.config.loader import nearest, read_bytes, validate
from biscale_env.core.errors import BiscaleError
from biscale_env.models.build.attention_windows import window_layers


@dataclass(frozen=True)
class Family:
    """What a configuration leaves unsaid, by architecture.

    Attributes:
        nested: key of the language model's own configuration in one of several modalities.
        tied: whether the output head is the embedding table where nothing is said.
        experts: the layers have experts.
    """

    nested: str | None = None
    tied: bool = False
    experts: bool = False


FAMILIES: Final = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "Mistral3ForConditionalGeneration": Family(nested="text_config"),
    "Qwen2ForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(),
    "Phi3ForCausalLM": Family(),
    "Gemma2ForCausalLM": Family(tied=True),
    "Gemma3ForCausalLM": Family(tied=True),
    "Gemma3ForConditionalGeneration": Family(nested="text_config", tied=True),
    "MixtralForCausalLM": Family(experts=True),
    "Qwen2MoeForCausalLM": Family(experts=True),
    "Qwen3MoeForCausalLM": Family(experts=True),
    "GptOssForCausalLM": Family(experts=True),
    "DeepseekV3ForCausalLM": Family(experts=True),
}
"""Architectures that can be read."""
# Hugging Face leaves out of `text_config` what equals these defaults (Gemma3TextConfig)
GEMMA3_DEFAULTS: Final = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_ALIASES: Final = {
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "experts_per_token"),
    "expert_intermediate": ("moe_intermediate_size", "intermediate_size"),
}


class HubConfig:
    """The keys of one `config.json`, asked by name.

    Raises:
        BiscaleError: from every question whose key is missing or is not a number.
    """

    def __init__(self, data: Mapping[str, Any], where: str, architecture: str) -> None:
        self.data, self.where, self.architecture = data, where, architecture

    def number(self, *keys: str, default: int | None = None) -> int:
        """The first of several keys that is there, a whole number >= 0."""
        for key in keys:
            value = self.data.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise BiscaleError(f"{self.where}: {key} must be a whole number, but is {value!r}")
            return value
        if default is None:
            raise BiscaleError(
                f"{self.where}: key '{keys[0]}' is missing, which {self.architecture} needs"
            )
        return default


def read_hub_config(path: Path) -> Llm:
    """The LLM that a `config.json`, or the folder with it, describes.

    Raises:
        BiscaleError: not readable, not JSON, an unknown architecture or number format, or a missing
            key.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(read_bytes(file))
    except (ValueError, UnicodeDecodeError) as error:
        raise BiscaleError(f"{file}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise BiscaleError(f"{file}: must hold an object of keys, as Hugging Face writes it")
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return llm_of(data, name.lower(), str(file))


def llm_of(data: Mapping[str, Any], name: str, where: str) -> Llm:
    """The LLM of a parsed `config.json`.

    Args:
        data: its keys.
        name: short name of the LLM.
        where: names it in messages.

    Raises:
        BiscaleError: an unknown architecture or number format, a missing key, or numbers that do
            not belong together.
    """
    architecture = str((data.get("architectures") or ["none"])[0])
    family = FAMILIES.get(architecture)
    if family is None:
        near = nearest(architecture, list(FAMILIES))
        raise BiscaleError(
            f"{where}: architecture '{architecture}' is not known, the nearest that is is '{near}'"
        )
    inner = data.get(family.nested, {}) if family.nested else data
    if architecture == "Gemma3ForConditionalGeneration":
        inner = {**GEMMA3_DEFAULTS, **inner}
    config = HubConfig(inner, where, architecture)
    shape = _shape(config, family)
    shape["dtype"] = _dtype(
        data.get("quantization_config") or inner.get("quantization_config"), where
    )
    shape["parameters"] = _parameters(config, shape)
    sources = {"geometry": f"Hugging Face config.json, {architecture}"}
    return validate({"name": name, **shape, "sources": sources}, Llm, where)


def _shape(config: HubConfig, family: Family) -> dict[str, Any]:
    """Every field of :class:`Llm` but name, parameters, dtype and sources."""
    layers = config.number("num_hidden_layers")
    heads = config.number("num_attention_heads")
    hidden = config.number("hidden_size")
    window, windowed = window_layers(config.data, config.architecture, layers)
    shape: dict[str, Any] = {
        "layers": layers,
        "hidden": hidden,
        "intermediate": config.number("intermediate_size"),
        "vocabulary": config.number("vocab_size"),
        "heads": heads,
        "kv_heads": config.number("num_key_value_heads", default=heads),
        "head_dim": config.number("head_dim", default=hidden // max(heads, 1)),
        "max_context": config.number("max_position_embeddings"),
        "tied_embeddings": bool(config.data.get("tie_word_embeddings", family.tied)),
        "window_tokens": window,
        "window_layers": windowed,
    }
    if family.experts:
        shape |= _experts(config, layers)
    if "kv_lora_rank" in config.data:
        shape |= {
            "kv_lora_rank": config.number("kv_lora_rank"),
            "qk_rope_head_dim": config.number("qk_rope_head_dim"),
            "head_dim": config.number("v_head_dim"),
        }
    return shape


def _experts(config: HubConfig, layers: int) -> dict[str, int]:
    found = {name: config.number(*keys) for name, keys in _ALIASES.items()}
    step = config.number("decoder_sparse_step", default=1)
    plain = len(config.data.get("mlp_only_layers") or [])
    found["dense_layers"] = config.number(
        "first_k_dense_replace", default=max(plain, layers - layers // max(step, 1))
    )
    shared = config.number("n_shared_experts", default=0) * found["expert_intermediate"]
    found["shared_intermediate"] = config.number("shared_expert_intermediate_size", default=shared)
    if not found["dense_layers"]:
        found["intermediate"] = 0
    return found


def _dtype(quantization: Any, where: str) -> Dtype:
    """Number format of the published weights."""
    if not isinstance(quantization, dict):
        return "bf16"
    words = json.dumps(quantization).lower()
    method = str(quantization.get("quant_method", quantization.get("quant_algo", ""))).lower()
    if "mxfp4" in method:
        return "mxfp4"
    floats = '"type": "float"' in words and '"num_bits": 8' in words
    if "fp8" in method or "fp8" in str(quantization.get("quant_algo", "")).lower() or floats:
        return "fp8"
    raise BiscaleError(
        f"{where}: weights in '{method or 'an unknown format'}' are not modelled: name a "
        "checkpoint in bf16, fp8 or mxfp4"
    )


def _parameters(config: HubConfig, shape: Mapping[str, Any]) -> float:
    """All parameters, from the shape of every matrix; norms and biases left out."""
    hidden, heads, dim = shape["hidden"], shape["heads"], shape["head_dim"]
    if shape.get("kv_lora_rank"):
        rank, rope = shape["kv_lora_rank"], shape["qk_rope_head_dim"]
        nope = config.number("qk_nope_head_dim")
        low = config.number("q_lora_rank", default=0)
        queries = (hidden + heads * (nope + rope)) * low if low else hidden * heads * (nope + rope)
        attention = queries + hidden * (rank + rope) + rank * heads * (nope + dim)
        attention += heads * dim * hidden
    else:
        attention = 2 * hidden * (heads + shape["kv_heads"]) * dim
    experts = shape.get("experts", 0)
    expert_layers = shape["layers"] - shape.get("dense_layers", 0) if experts else 0
    routed = experts * (3 * hidden * shape.get("expert_intermediate", 0) + hidden)
    beside = 3 * hidden * shape.get("shared_intermediate", 0)
    dense = (shape["layers"] - expert_layers) * 3 * hidden * shape["intermediate"]
    tables = (1 if shape["tied_embeddings"] else 2) * shape["vocabulary"] * hidden
    return float(shape["layers"] * attention + dense + expert_layers * (routed + beside) + tables)
