"""From a kernel table to the LLM's layer: what an LLM asks of one GPU.

Every kernel family is fitted to its own column, then all together to the total. The tables are
bursts: small kernels ran at the highest clock, large GEMMs already under the power cap. All times
are given at the layer's profile clock, so the compute time of GEMMs is converted from the clock at
which the large ones ran (``gemm_profile_ghz``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from biscale_env.config.hardware import Llm
from biscale_env.models.fit.latency import (
    LATENCY_FIELDS,
    WORK_FIELD,
    fit_components,
    mape,
    predict_s,
    refine,
)
from biscale_env.models.fit.profile_table import ProfileTable
from biscale_env.models.geometry import counted_work
from biscale_env.models.physics import Coefficients

# how far (in the logarithm) the joint fit may pull a coefficient from its own kernel family, see
# `latency.refine`
SIGMA: Final = 0.1
GEMMS_PER_LAYER: Final = 4.0  # q-k-v, output, gate with up, down
EXPERT_GEMMS: Final = 2.0  # of those, in the expert column of a layer with experts
COMPUTE_FIELDS: Final = ("gemm_s_per_token", "expert_s_per_token")
ZERO: Final = Coefficients(*[0.0] * len(Coefficients._fields))


@dataclass(frozen=True)
class WorkFit:
    """An LLM's layer for one phase of one configuration.

    Attributes:
        table: what was fitted.
        coefficients: ``physics.WORK_FIELDS``; host times zero, other fields as in ``layer``.
        train_mape: mean error of the totals on the fitted rows.
        held_out_mape: on those kept from the fit.
        held_out_max: largest of the latter.
    """

    table: ProfileTable
    coefficients: Coefficients
    train_mape: float
    held_out_mape: float
    held_out_max: float


def gemm_kernels(llm: Llm) -> float:
    """Dense GEMM kernels of an iteration: those of every layer, and the head."""
    experts = llm.expert_layers * (EXPERT_GEMMS - 1.0)  # the router is one more
    return 1.0 + GEMMS_PER_LAYER * llm.layers - experts


def fit_work(
    table: ProfileTable, llm: Llm, layer: Mapping[str, float], multiplies_mxfp4: bool = False
) -> WorkFit:
    """Fit one configuration's kernel table; no host time.

    Args:
        table: kernel times by family.
        llm: the LLM.
        layer: values of the GPU's layer: profile clocks, share of the clock, constant of a kernel.
        multiplies_mxfp4: of the GPU.
    """
    held_out = table.held_out()
    shared = {name: layer[name] for name in ("freq_profile_ghz", "core_share", "stream_knee_ghz")}
    start = ZERO._replace(
        **shared,
        **counted_work(llm, table.tp, table.dtype, multiplies_mxfp4),
        gemm0_s=layer["kernel0_s"] * gemm_kernels(llm),
        expert_skew=1.0,
        energy_factor=1.0,
    )
    start = start._replace(**fit_components(table, ~held_out, start))
    f0 = layer["freq_profile_ghz"]
    clock = np.full(len(table.rows), f0)
    c = refine(start, [*LATENCY_FIELDS, WORK_FIELD[table.phase]], table, ~held_out, clock, SIGMA)
    predicted, measured = predict_s(c, table, f0), table.column("latency_s")
    errors = np.abs(predicted / measured - 1.0)[held_out]
    to_profile = layer["gemm_profile_ghz"] / f0
    c = c._replace(**{name: getattr(c, name) * to_profile for name in COMPUTE_FIELDS})
    return WorkFit(
        table,
        c,
        mape(predicted[~held_out], measured[~held_out]),
        float(errors.mean()),
        float(errors.max()),
    )
