"""Kernel times counted from the shape of an LLM and a GPU's data sheet.

For what the kernel tables do not have, and without the extra: work divided by data-sheet rates
times the share of them that kernels of this family reach on measured GPUs. The form is that of the
tables, so the same fit takes both; nothing in it is measured.
"""

from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from biscale_env.config.hardware import Dtype, Gpu, Llm
from biscale_env.models.build.grid import WorkPoint, decode_points, prefill_points
from biscale_env.models.build.kernel_tables import KernelTable, with_partition
from biscale_env.models.build.partition import Partition
from biscale_env.models.geometry import counted_work

Floats = NDArray[np.float64]
# Shares of data-sheet rates, and constants: what the measured tables of H100, H200, B200 and A100
# show in the middle (tests/models/build/test_roofline.py holds the outcome against them).
GEMM_SHARE: Final = 0.75
EXPERT_SHARE: Final = 0.35  # grouped GEMMs of few rows each
WEIGHT_SHARE: Final = 0.80  # of HBM bandwidth while weights stream
MXFP4_SHARE: Final = 0.55  # the same of 4-bit experts, which are widened on the way
PREFILL_ATTENTION_SHARE: Final = 0.40
DECODE_ATTENTION_SHARE: Final = 0.65
HBM_SHARE: Final = 0.80  # of element-wise kernels
FUSED: Final = 0.55  # part of the counted activations that fused kernels still move
LINK_SHARE: Final = 0.60
GEMM_S: Final = 3e-6  # constant time of a GEMM kernel
PREFILL_ATTENTION_S: Final = 15e-6
DECODE_ATTENTION_S: Final = 7e-6
REDUCE_S: Final = 3.6e-6  # of an all-reduce, and per GPU that takes part
REDUCE_S_PER_GPU: Final = 0.6e-6
ELEMENT_S: Final = 2.5e-6
GEMMS_PER_LAYER: Final = 4.0
ELEMENTS_PER_LAYER: Final = 3.0
SPEED_UP: Final[dict[Dtype, float]] = {"bf16": 1.0, "fp8": 1.6, "mxfp4": 1.0}


def _axes(points: list[WorkPoint]) -> dict[str, Floats]:
    batch, new, prefix, context = (
        np.array([getattr(p, name) for p in points], dtype=np.float64)
        for name in ("batch", "new_tokens", "prefix", "context")
    )
    decode = context > 0
    return {
        "tokens": np.where(decode, batch, batch * new),
        "pairs": np.where(decode, 0.0, batch * new * (new / 2.0 + prefix)),
        "cached": batch * context,
        "seqs": batch,
    }


def _windowed(llm: Llm, amount: Floats, bound: Floats) -> Floats:
    """Attention work averaged over full and windowed layers."""
    share = llm.window_layers / llm.layers
    return np.asarray((1.0 - share) * amount + share * np.minimum(amount, bound))


def family_times(llm: Llm, gpu: Gpu, part: Partition, points: list[WorkPoint]) -> dict[str, Floats]:
    """Time of every kernel family, s, shape (len(points),).

    Args:
        llm: the transformer.
        gpu: the GPU; its data sheet alone counts.
        part: number format, GPUs and expert groups.
        points: iterations.
    """
    work, axis = counted_work(llm, part.tp, part.dtype), _axes(points)
    rows, hbm = axis["tokens"], gpu.hbm_gb_per_s * 1e9
    peak = gpu.peak_bf16_tflops * 1e12
    expert_flops = _expert_flops(llm, part)
    dense = np.maximum(
        work["weight_bytes"] / (hbm * WEIGHT_SHARE),
        (work["flops_per_token"] - expert_flops)
        * rows
        / (peak * SPEED_UP[part.dtype] * GEMM_SHARE),
    )
    streamed = MXFP4_SHARE if part.dtype == "mxfp4" else WEIGHT_SHARE
    touched = 1.0 - work["expert_miss"] ** rows if llm.experts else np.zeros_like(rows)
    experts = np.maximum(
        work["expert_bytes"] * touched / (hbm * streamed),
        expert_flops * rows / (peak * SPEED_UP[part.dtype] * EXPERT_SHARE),
    )
    pairs = _windowed(llm, axis["pairs"], rows * llm.window_tokens)
    read = _windowed(llm, axis["cached"], axis["seqs"] * llm.window_tokens)
    attention = work["flops_per_attn"] * pairs / (peak * PREFILL_ATTENTION_SHARE)
    attention += work["kv_bytes_per_token"] * read / (hbm * DECODE_ATTENTION_SHARE)
    started = np.where(axis["cached"] > 0, DECODE_ATTENTION_S, PREFILL_ATTENTION_S)
    link = work["link_bytes_per_token"] * rows / (gpu.nvlink_gb_per_s * 1e9 * LINK_SHARE)
    spread = float(part.tp > 1)
    return {
        "gemm_s": dense + llm.layers * GEMMS_PER_LAYER * GEMM_S,
        "expert_s": experts,
        "attn_s": attention + llm.layers * started,
        "comm_s": link + spread * 2.0 * llm.layers * (REDUCE_S + REDUCE_S_PER_GPU * part.tp),
        "elem_s": FUSED * work["bytes_per_token"] * rows / (hbm * HBM_SHARE)
        + llm.layers * ELEMENTS_PER_LAYER * ELEMENT_S,
    }


def _expert_flops(llm: Llm, part: Partition) -> float:
    """Operations of the experts per row and GPU."""
    if not llm.experts:
        return 0.0
    return 2.0 * llm.expert_parameters * llm.experts_per_token / llm.experts / part.tp


def roofline_table(llm: Llm, gpu: Gpu, part: Partition) -> KernelTable:
    """Counted kernel times of an LLM on a GPU, both phases.

    Raises:
        BiscaleError: weights or KV cache do not fit.
    """
    kv = llm.kv_capacity_tokens(gpu, part.tp, part.dtype)
    frames = []
    for phase, points in (
        ("prefill", prefill_points(kv, llm.max_context)),
        ("decode", decode_points(kv, llm.max_context)),
    ):
        times = family_times(llm, gpu, part, points)
        frame = pd.DataFrame([vars(p) for p in points])
        frame.insert(0, "phase", phase)
        frame["latency_s"] = sum(times.values())
        frames.append(frame.assign(**times, estimated_share=1.0))
    rows = pd.concat(frames, ignore_index=True)
    source = f"roofline: counted work over data-sheet rates of {gpu.name}; nothing measured"
    return KernelTable(with_partition(rows, part), source, measured=False)
