"""Kernel times of an iteration from measured tables (optional extra ``tables``).

`aiconfigurator-core` (NVIDIA, Apache-2.0) holds measured GEMM, attention, expert and all-reduce
kernels of ten GPUs: bursts at the default clock, without power cap and host time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

import pandas as pd

from biscale_env.config.hardware import Gpu, Llm
from biscale_env.core.errors import BiscaleError
from biscale_env.models.build.grid import WorkPoint, decode_points, prefill_points
from biscale_env.models.build.partition import Partition
from biscale_env.models.build.table_package import (
    SYSTEMS,
    first_engine,
    quiet,
    tables_installed,
)

MEASURED: Final = "silicon"  # the package's word for a time that rests on measured points alone
FAMILIES: Final = ("gemm_s", "expert_s", "attn_s", "comm_s", "elem_s")
DISTRIBUTION: Final = "aiconfigurator-core"
DIGITS: Final = 5


def kernel_family(operation: str) -> str:
    """Column of a kernel, by the package's name of it, e.g. ``generation_ffn2_gemm``."""
    name = operation.split("_", 1)[1]
    if name.endswith(("_ar", "ar_1", "ar_2", "allreduce", "dispatch", "p2p")):
        return "comm_s"
    if name.startswith("moe"):
        return "expert_s"
    if "attention" in name or "mla" in name or "bmm" in name:
        return "attn_s"
    return "gemm_s" if name.endswith("gemm") else "elem_s"


@dataclass(frozen=True)
class KernelTable:
    """Kernel times of one configuration.

    Attributes:
        rows: columns of a profile table (:mod:`biscale_env.models.fit.profile_table`), both phases.
        source: where they come from, a sentence.
        measured: from measured tables; else counted.
    """

    rows: pd.DataFrame
    source: str
    measured: bool


def _row(phase: str, point: WorkPoint, times: Sequence[tuple[str, float, float, str]]) -> dict:
    seconds = dict.fromkeys(FAMILIES, 0.0)
    estimated = 0.0
    for name, ms, _, source in times:
        seconds[kernel_family(name)] += ms * 1e-3
        estimated += ms * 1e-3 * (source != MEASURED)
    total = sum(seconds.values())
    work = {f: getattr(point, f) for f in ("batch", "new_tokens", "prefix", "context")}
    return {"phase": phase, **work, "latency_s": total, **seconds} | {
        "estimated_share": estimated / total
    }


def kernel_table(
    llm: Llm, gpu: Gpu, part: Partition, progress: Callable[[str], None] = lambda _: None
) -> KernelTable:
    """Kernel times of an LLM on a GPU, both phases.

    Args:
        llm: the transformer.
        gpu: the GPU; its name must be one of ``SYSTEMS``.
        part: number format, GPUs and expert groups; checked before
            (:func:`~biscale_env.models.build.partition.check_partition`).
        progress: told what happens.

    Raises:
        BiscaleError: the extra is missing, or the tables have nothing for this GPU or LLM.
    """
    if not tables_installed():
        raise BiscaleError("kernel tables need an extra: pip install 'biscale-env[tables]'")
    if gpu.name not in SYSTEMS:
        known = ", ".join(SYSTEMS)
        raise BiscaleError(f"there are no kernel tables of GPU '{gpu.name}'; there are of: {known}")
    kv = llm.kv_capacity_tokens(gpu, part.tp, part.dtype)
    points = {"prefill": prefill_points(kv, llm.max_context)}
    points["decode"] = decode_points(kv, llm.max_context)
    with quiet():
        engine = first_engine(llm, gpu, part)
        rows = []
        for phase, some in points.items():
            progress(f"{llm.name} {part.label} on {gpu.name}: {len(some)} {phase} points")
            rows += [_row(phase, point, engine.times(point)) for point in some]
    source = (
        f"aiconfigurator-core {version(DISTRIBUTION)} (NVIDIA, Apache-2.0), "
        f"system {SYSTEMS[gpu.name]}, engine {engine.name}"
    )
    return KernelTable(with_partition(pd.DataFrame(rows), part), source, measured=True)


def with_partition(rows: pd.DataFrame, part: Partition) -> pd.DataFrame:
    """Rows with the columns of their configuration, times rounded as files hold them."""
    times = ["latency_s", *FAMILIES]
    rows[times] = rows[times].map(lambda v: float(f"{v:.{DIGITS}g}"))
    rows["estimated_share"] = rows["estimated_share"].round(3)
    rows.insert(1, "tp", part.tp)
    rows.insert(2, "ep", part.ep)
    rows.insert(3, "dtype", part.dtype)
    return rows
