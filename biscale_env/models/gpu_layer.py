"""The GPU's layer of a model: what is true of a GPU, whatever LLM runs on it.

``configs/gpus/fitted/<gpu>.yaml`` holds the coefficients ``physics.GPU_FIELDS`` (energy per
operation by number format), the host time of an engine iteration, the delay of a clock change, and
what a lone kernel needs (:mod:`biscale_env.models.gemm`), each with provenance; the ensemble lies
beside it as CSV. `biscale fit --gpu` makes both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from biscale_env.config import configs_dir
from biscale_env.config.hardware import Dtype
from biscale_env.config.loader import Config, parse_yaml, read_bytes, validate
from biscale_env.core.errors import BiscaleError
from biscale_env.models.coefficient import Coefficient
from biscale_env.models.ensemble_table import read_table
from biscale_env.models.physics import GPU_FIELDS

DTYPES: Final[tuple[Dtype, ...]] = ("bf16", "fp8", "mxfp4")
HOST_FIELDS: Final = ("host0_s", "host_s_per_seq")
DELAY: Final = "delay_s"
_SHARED: Final = tuple(n for n in GPU_FIELDS if n not in ("e_flop_j", "p_cap_w"))
_BY_DTYPE: Final = tuple(f"e_flop_{d}_j" for d in DTYPES)
_BY_PHASE: Final = tuple(f"{p}_{n}" for p in ("prefill", "decode") for n in HOST_FIELDS)
KERNEL_FIELDS: Final = (
    "flops_per_clock_sm",
    "stream_gb_per_s",
    "kernel0_s",
    "gemm_profile_ghz",
)
LAYER_FIELDS: Final = (*_SHARED, *_BY_DTYPE, *_BY_PHASE, DELAY, *KERNEL_FIELDS)


class GpuLayer(Config):
    """Content of one fitted GPU file.

    Attributes:
        format: version of the file format.
        gpu: name of the GPU description.
        coefficients: every one of ``LAYER_FIELDS`` with its provenance: ``physics.GPU_FIELDS``
            without the cap (the description has it), ``e_flop_<dtype>_j``, host times
            ``<phase>_host0_s`` and ``<phase>_host_s_per_seq`` in s, ``delay_s``, sustained bf16
            operations per clock and SM, sustained HBM rate in GB/s, constant time of a kernel in s,
            and the clock in GHz at which the large GEMMs of the kernel tables ran.
        fit: what was fitted and how well: evidence, errors, what is borrowed.
    """

    format: Literal[2] = 2
    gpu: str
    coefficients: dict[str, Coefficient]
    fit: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> "GpuLayer":
        if wrong := set(self.coefficients) ^ set(LAYER_FIELDS):
            raise ValueError(
                f"coefficients must name exactly the known fields; wrong or missing: "
                f"{sorted(wrong)}"
            )
        return self

    @property
    def values(self) -> dict[str, float]:
        """Nominal value of every one of ``LAYER_FIELDS``."""
        return {name: c.value for name, c in self.coefficients.items()}

    def value(self, name: str) -> float:
        """Nominal value of one of ``LAYER_FIELDS``."""
        return self.coefficients[name].value

    def for_phase(self, phase: str, dtype: str) -> dict[str, Coefficient]:
        """Coefficients of the formula that the layer gives to one phase and number format."""
        return {name: self.coefficients[own] for name, own in names_in_layer(phase, dtype).items()}


def names_in_layer(phase: str, dtype: str) -> dict[str, str]:
    """Coefficient of the formula to its name in the layer, the delay among them."""
    names = {name: name for name in (*_SHARED, DELAY)}
    names["e_flop_j"] = f"e_flop_{dtype}_j"
    return names | {name: f"{phase}_{name}" for name in HOST_FIELDS}


@dataclass(frozen=True)
class LayerFiles:
    """The bytes of a layer: what a model's digest covers.

    Attributes:
        path: of the YAML.
        content: its bytes.
        members: bytes of its ensemble; None without one.
    """

    path: str
    content: bytes
    members: bytes | None

    def layer(self) -> GpuLayer:
        """The parsed layer."""
        return _parsed(self)

    def table(self) -> Mapping[str, NDArray[np.float64]]:
        """Ensemble: column name to values, one per member; empty without one."""
        return _table(self)


@lru_cache(maxsize=32)
def _parsed(files: LayerFiles) -> GpuLayer:
    return validate(parse_yaml(files.content, files.path), GpuLayer, files.path)


@lru_cache(maxsize=32)
def _table(files: LayerFiles) -> Mapping[str, NDArray[np.float64]]:
    if files.members is None:
        return {}
    return read_table(ensemble_path(Path(files.path)), files.members, LAYER_FIELDS)


def ensemble_path(path: Path) -> Path:
    """File with the ensemble that belongs to a coefficient file of either layer."""
    return path.with_suffix(".ensemble.csv")


def layer_path(gpu: str, beside: Path | None = None) -> Path | None:
    """File of the fitted layer of a GPU, by the name or the file of its description.

    Looked for in the folder ``fitted`` next to the description. None where nothing was fitted.
    """
    name = Path(gpu).stem if Path(gpu).suffix in (".yaml", ".yml") else gpu
    folders = [configs_dir() / "gpus"]
    if Path(gpu).is_absolute():
        folders = [Path(gpu).parent]
    elif beside is not None and (beside / gpu).is_file():
        folders = [(beside / gpu).parent]
    for folder in folders:
        path = folder / "fitted" / f"{name}.yaml"
        if path.is_file():
            return path
    return None


def layer_files(path: Path) -> LayerFiles:
    """Read the files of a layer.

    Raises:
        BiscaleError: not readable.
    """
    members = ensemble_path(path)
    return LayerFiles(
        str(path), read_bytes(path), read_bytes(members) if members.is_file() else None
    )


def load_layer(gpu: str) -> GpuLayer:
    """The fitted layer of a GPU.

    Raises:
        BiscaleError: nothing was fitted for it.
    """
    path = layer_path(gpu)
    if path is None:
        known = ", ".join(sorted(p.stem for p in (configs_dir() / "gpus/fitted").glob("*.yaml")))
        raise BiscaleError(
            f"nothing is known of power and clocks of GPU '{gpu}'; fitted are: {known}"
        )
    return layer_files(path).layer()
