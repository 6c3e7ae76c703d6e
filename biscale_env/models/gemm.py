"""One GEMM on one GPU: how the layer of a GPU is held against measurements of kernels.

A GEMM of ``rows`` x ``k`` times ``k`` x ``n`` is an iteration that does nothing else, so time,
power and the clock under the cap come from the same formula as everywhere.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.config import Gpu, load_gpu
from biscale_env.config.hardware import MXFP4_BYTES, Dtype
from biscale_env.core.errors import BiscaleError
from biscale_env.models import physics
from biscale_env.models.gpu_layer import DTYPES, load_layer, names_in_layer
from biscale_env.models.physics import Coefficients

WEIGHT_BYTES: Final = {"bf16": 2.0, "fp8": 1.0, "mxfp4": MXFP4_BYTES}
# 4-bit weights are widened to bf16 before they are multiplied (Hopper and older have no unit for
# them)
SPEED_UP: Final = {"bf16": 1.0, "fp8": 2.0, "mxfp4": 1.0}
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class GemmResult:
    """What one GEMM takes.

    Attributes:
        freq_effective_mhz: clock under the power cap, MHz.
        time_s: duration, s.
        power_w: power, W.
        tflops: rate, 10^12 operations per second.
        energy_per_tflop_j: energy per 10^12 operations, J.
    """

    freq_effective_mhz: float
    time_s: float
    power_w: float
    tflops: float
    energy_per_tflop_j: float


def gemm_coefficients(
    values: dict[str, float], gpu: Gpu, dtype: Dtype, k: float, n: float
) -> Coefficients:
    """Coefficients of an iteration that is one GEMM.

    Args:
        values: fields of the GPU's layer, one member's or the nominal ones.
        gpu: its description.
        dtype: number format of the weights.
        k: inner dimension.
        n: columns of the weights.
    """
    weight_bytes = k * n * WEIGHT_BYTES[dtype]
    per_clock = values["flops_per_clock_sm"] * gpu.sms * SPEED_UP[dtype]
    own = {name: values[column] for name, column in names_in_layer("decode", dtype).items()}
    f0 = values["freq_profile_ghz"]
    work = {
        "n_gpus": 1.0,
        "weights_s": weight_bytes / (values["stream_gb_per_s"] * 1e9),
        "gemm0_s": values["kernel0_s"],
        "gemm_s_per_token": 2.0 * k * n / (per_clock * f0 * 1e9),
        "flops_per_token": 2.0 * k * n,
        "weight_bytes": weight_bytes,
        "bytes_per_token": 2.0 * (k + n),
        "host0_s": 0.0,
        "host_s_per_seq": 0.0,
        "p_busy_w": 0.0,  # an engine's other kernels
        "energy_factor": 1.0,
        "p_cap_w": gpu.power_cap_w,
    }
    return Coefficients(**{name: (own | work).get(name, 0.0) for name in Coefficients._fields})


def predict_gemm(
    gpu: str, rows: float, k: float, n: float, dtype: str = "bf16", freq_mhz: float | None = None
) -> GemmResult:
    """Time, power and effective clock of one GEMM.

    Args:
        gpu: name of a GPU with a fitted layer.
        rows: rows of the activations.
        k: inner dimension.
        n: columns of the weights.
        dtype: ``bf16``, ``fp8`` or ``mxfp4`` (weights).
        freq_mhz: requested SM clock, MHz; None: the highest.

    Raises:
        BiscaleError: unknown GPU or dtype, a dimension below one, a clock outside the range.
    """
    if dtype not in DTYPES:
        raise BiscaleError(f"unknown dtype '{dtype}': choose {', '.join(DTYPES)}")
    for name, value in (("rows", rows), ("k", k), ("n", n)):
        if not value >= 1 or not np.isfinite(value):
            raise BiscaleError(f"{name} of a GEMM must be 1 or more, but is {value:g}")
    description = load_gpu(gpu)
    freq = description.freq_max_mhz if freq_mhz is None else description.check_clock(freq_mhz)
    c = gemm_coefficients(load_layer(gpu).values, description, dtype, k, n)
    f = physics.effective_freq_ghz(
        c, rows, 0.0, 0.0, 1.0, freq * 1e-3, description.freq_min_mhz * 1e-3
    )
    time_s = float(physics.latency_s(c, rows, 0.0, 0.0, 1.0, f))
    power = float(physics.power_w(c, rows, 0.0, 0.0, 1.0, f))
    tflop = 2.0 * rows * k * n / 1e12
    return GemmResult(f * 1e3, time_s, power, tflop / time_s, power * time_s / tflop)
