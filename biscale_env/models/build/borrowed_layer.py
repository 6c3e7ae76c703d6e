"""The layer of a GPU about which nothing is measured, borrowed from a fitted one.

What follows from the data sheets is scaled: clocks and voltage curve with the highest clock,
operations per clock and SM and HBM bandwidth with the peaks, the clock at which the SMs ask for
just what HBM gives with the bytes per SM, power with the cap, energy per operation with cap over
peak. Energy per byte, host time and the delay of a clock change are kept. All of it is assumed, so
the ensemble is wider.
"""

import zlib
from pathlib import Path
from typing import Final

import numpy as np

from biscale_env.config import DEFAULT_GPU, Gpu, load_gpu
from biscale_env.models.coefficient import Coefficient, dump_fitted, rounded
from biscale_env.models.ensemble_table import table_text
from biscale_env.models.gpu_layer import GpuLayer, LayerFiles, layer_files, layer_path

LENDER: Final = DEFAULT_GPU
CLOCKS: Final = ("freq_profile_ghz", "v_knee_ghz", "gemm_profile_ghz")
POWERS: Final = ("p_static_w", "p_busy_w", "p_seq_w")
# standard deviation (of the logarithm) that a borrowed coefficient adds to the lender's; assumed
SPREAD: Final = {"energy": 0.20, "clock": 0.05}


def operations_per_clock(gpu: Gpu) -> float:
    """Peak bf16 operations per clock and SM: a power of two, which the data sheet rounds."""
    at_top = gpu.peak_bf16_tflops * 1e12 / (gpu.sms * gpu.freq_max_mhz * 1e6)
    return float(2.0 ** round(np.log2(at_top)))


def factors(gpu: Gpu, lender: Gpu) -> dict[str, float]:
    """What the lender's coefficients are multiplied by; those not named are kept."""
    clock = gpu.freq_max_mhz / lender.freq_max_mhz
    cap = gpu.power_cap_w / lender.power_cap_w
    peak = gpu.peak_bf16_tflops / lender.peak_bf16_tflops
    hbm = gpu.hbm_gb_per_s / lender.hbm_gb_per_s
    found = dict.fromkeys(CLOCKS, clock) | dict.fromkeys(POWERS, cap)
    found |= {f"e_flop_{dtype}_j": cap / peak for dtype in ("bf16", "fp8", "mxfp4")}
    return found | {
        "v_slope_per_ghz": 1.0 / clock,
        "p_clock_w_per_ghz": cap / clock,
        "stream_knee_ghz": hbm * lender.sms / gpu.sms,
        "stream_gb_per_s": hbm,
        "flops_per_clock_sm": operations_per_clock(gpu) / operations_per_clock(lender),
    }


def borrowed_layer(gpu: Gpu) -> LayerFiles:
    """Layer and ensemble of a GPU, scaled from the lender's.

    Raises:
        BiscaleError: the lender's layer cannot be read.
    """
    path = layer_path(LENDER)
    if path is None:
        raise FileNotFoundError(f"the layer of {LENDER} is part of the installation")
    files = layer_files(path)
    own, scale = files.layer(), factors(gpu, load_gpu(LENDER))
    made = {
        name: Coefficient(
            value=rounded(c.value * scale.get(name, 1.0)),
            provenance="assumed",
            source=f"{'scaled' if name in scale else 'kept'} from {LENDER}: {c.source}",
        )
        for name, c in own.coefficients.items()
    }
    kept = {"borrowed_from": LENDER, "server_power": files.layer().fit["server_power"]}
    layer = GpuLayer(gpu=gpu.name, coefficients=made, fit=kept)
    members = _members(gpu, files, scale, layer)
    return LayerFiles(f"{gpu.name}.yaml", dump_fitted(layer).encode(), members)


def _members(gpu: Gpu, lent: LayerFiles, scale: dict[str, float], layer: GpuLayer) -> bytes:
    """Text of the ensemble: the lender's members scaled, each off by its own factor."""
    table = lent.table()
    n = len(next(iter(table.values())))
    rng = np.random.default_rng(zlib.crc32(gpu.name.encode()))
    columns = {}
    for name in layer.coefficients:
        lender = table.get(name)
        clock = name in (*CLOCKS, "stream_knee_ghz", "v_slope_per_ghz")
        if lender is None or name not in scale:
            if lender is not None:
                columns[name] = lender
            continue
        sigma = SPREAD["clock" if clock else "energy"]
        columns[name] = lender * scale[name] * np.exp(rng.normal(0.0, sigma, n))
    comment = f"Members of {LENDER}, scaled to {gpu.name} and widened: nothing of it is measured"
    return table_text(comment, columns).encode()


def layer_texts_of(files: LayerFiles, folder: str = "fitted") -> dict[str, str]:
    """File names below a folder of models to texts."""
    name = Path(files.path).name
    members = (files.members or b"").decode()
    ensemble = Path(name).with_suffix(".ensemble.csv").name
    return {f"{folder}/{name}": files.content.decode(), f"{folder}/{ensemble}": members}
