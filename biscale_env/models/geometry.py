"""Operations and bytes of an iteration, counted from the shape of the transformer."""

from typing import Final

from biscale_env.config.hardware import Dtype, Llm

ACTIVATION_BYTES: Final = 2.0  # activations are bf16 in either dtype


def counted_work(
    llm: Llm, tp: int, dtype: Dtype, multiplies_mxfp4: bool = False
) -> dict[str, float]:
    """Coefficients of one GPU that follow from the shape of the transformer alone.

    GEMMs: 2 operations per parameter that a row passes, without embedding and output head (the head
    runs on one row per request). Attention: 4 x heads x head size per layer and query-key pair.
    Weights: everything but the embedding table is read once; of the experts, those that some row is
    sent to. Activations: every tensor of a layer is written once and read once (norms with
    residuals 12 x hidden; q, k, v and attention output; gate, up and down of every MLP that a row
    passes). Link: two ring all-reduces of a hidden vector per layer, with and without expert
    parallelism (vLLM: every GPU holds all rows, computes its own experts and adds up).

    Args:
        llm: the transformer.
        tp: GPUs that share it.
        dtype: ``bf16``, ``fp8`` or ``mxfp4``.
        multiplies_mxfp4: whether the GPU multiplies 4-bit weights without widening them to bf16.
    """
    heads = llm.heads * llm.head_dim
    qkv = heads + llm.kv_values_per_token
    embedding = float(llm.vocabulary * llm.hidden)
    head = 0.0 if llm.tied_embeddings else embedding
    on_chip: Dtype = "bf16" if dtype == "mxfp4" and not multiplies_mxfp4 else dtype
    reduced = 2.0 * llm.layers * llm.hidden * ACTIVATION_BYTES
    table = 0.0 if llm.tied_embeddings else ACTIVATION_BYTES * embedding  # only looked up
    return {
        "n_gpus": float(tp),
        "expert_miss": 1.0 - llm.experts_per_token / llm.experts if llm.experts else 0.0,
        "window_tokens": float(llm.window_tokens),
        "window_share": llm.window_layers / llm.layers,
        "flops_per_token": 2.0 * (llm.active_parameters - embedding - head) / tp,
        "flops_per_attn": 4.0 * heads * llm.layers / tp,
        "weight_bytes": (llm.dense_weight_bytes(dtype) - table) / tp,
        "expert_bytes": llm.expert_weight_bytes(dtype) / tp,
        "expert_core_bytes": llm.expert_weight_bytes(on_chip) / tp,
        "bytes_per_token": _activations(llm, qkv + heads / 3.0, tp) * ACTIVATION_BYTES,
        "kv_bytes_per_token": llm.kv_bytes_per_token(dtype) * llm.kv_copies(tp) / tp,
        "link_bytes_per_token": reduced * 2.0 * (tp - 1) / tp,
    }


def _activations(llm: Llm, attention: float, tp: int) -> float:
    """Numbers written or read per row and GPU in all layers."""
    routed = llm.experts_per_token * llm.expert_intermediate + llm.shared_intermediate
    dense_layers = llm.layers - llm.expert_layers
    mlp = dense_layers * llm.intermediate + llm.expert_layers * routed
    return llm.layers * (12.0 * llm.hidden + 3.0 * attention / tp) + 6.0 * mlp / tp
