"""Operations and bytes of an iteration, counted from the shape of the transformer."""

from typing import Final

from biscale_env.config.hardware import Dtype, Llm

ACTIVATION_BYTES: Final = 2.0  # activations are bf16 in either dtype


def counted_work(llm: Llm, tp: int, dtype: Dtype) -> dict[str, float]:
    """Coefficients of one GPU that follow from the shape of the transformer alone.

    GEMMs: 2 operations per parameter and row without embedding and output head (the head runs on
    one row per request). Attention: 4 x heads x head size per layer and query-key pair. Weights:
    everything but the embedding table is read once. Activations: every tensor of a layer is written
    once and read once (norms with residuals 12 x hidden; q, k, v and attention output; gate, up and
    down). Link: two ring all-reduces of a hidden vector per layer.

    Args:
        llm: the transformer.
        tp: GPUs that share it.
        dtype: ``bf16`` or ``fp8``.
    """
    heads = llm.heads * llm.head_dim
    qkv = heads + 2 * llm.kv_heads * llm.head_dim
    embedding = float(llm.vocabulary * llm.hidden)
    elements = 12.0 * llm.hidden + (3.0 * qkv + heads + 6.0 * llm.intermediate) / tp
    reduced = 2.0 * llm.layers * llm.hidden * ACTIVATION_BYTES
    return {
        "n_gpus": float(tp),
        "flops_per_token": 2.0 * (llm.parameters - 2.0 * embedding) / tp,
        "flops_per_attn": 4.0 * heads * llm.layers / tp,
        "weight_bytes": (llm.parameters - embedding) * (2.0 if dtype == "bf16" else 1.0) / tp,
        "bytes_per_token": elements * ACTIVATION_BYTES * llm.layers,
        "kv_bytes_per_token": llm.kv_bytes_per_token(dtype) / tp,
        "link_bytes_per_token": reduced * 2.0 * (tp - 1) / tp,
    }
