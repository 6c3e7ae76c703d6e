"""Coefficient files: one YAML per (phase, dtype, TP), with provenance.

It holds the layer of the LLM; that of the GPU is in :mod:`biscale_env.models.gpu_layer`. Beside it
may lie members of the ensemble as CSV.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from biscale_env.config import configs_dir
from biscale_env.config.hardware import Dtype, Gpu
from biscale_env.config.installed_files import installed_names, installed_path
from biscale_env.config.loader import Config, nearest, parse_yaml, read_bytes, validate
from biscale_env.core.errors import BiscaleError
from biscale_env.models.coefficient import Coefficient
from biscale_env.models.ensemble_table import read_table
from biscale_env.models.gpu_layer import DELAY, HOST_FIELDS
from biscale_env.models.physics import COEFFICIENT_DTYPE, WORK_FIELDS, Coefficients

Phase = Literal["prefill", "decode"]
WORK_AXES = ("tokens", "attn_work", "cached", "n_seq", "freq_mhz")
DELAY_COLUMN: Final = DELAY
OWN_FIELDS: Final = tuple(name for name in WORK_FIELDS if name not in HOST_FIELDS)


class ModelFile(Config):
    """Content of one coefficient file: what an LLM asks of one GPU.

    Attributes:
        format: version of the file format.
        name: model family, e.g. ``h100-sxm/llama-3.3-70b``.
        phase: ``prefill`` or ``decode``.
        dtype: ``bf16``, ``fp8`` (weights and KV cache) or ``mxfp4`` (experts).
        tp: GPUs per instance.
        ep: groups that the experts are spread over; 1 where every GPU holds a part of each.
        gpu: name of the GPU description.
        llm: name of the LLM description.
        coefficients: ``physics.WORK_FIELDS`` with provenance; host times may be left out, and
            fields of the GPU may be given: what is not here comes from the GPU's fitted layer.
        box: the validity domain: per work axis the range that the fitted points cover; outside it
            the model extrapolates.
        delay_s: nominal actuation delay of a clock change, s; None: the GPU layer's.
        fit: what was fitted: data hash, split, held-out errors.
    """

    format: Literal[2] = 2
    name: str
    phase: Phase
    dtype: Dtype
    tp: int = Field(ge=1)
    ep: int = Field(default=1, ge=1)
    gpu: str
    llm: str
    coefficients: dict[str, Coefficient]
    box: dict[str, tuple[float, float]]
    delay_s: float | None = Field(default=None, ge=0)
    fit: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _of_this_version(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("format") == 1:
            raise ValueError("it was written by version 0.1, whose formula was another: fit anew")
        return data

    @model_validator(mode="after")
    def _complete(self) -> "ModelFile":
        have = set(self.coefficients)
        if wrong := (set(OWN_FIELDS) - have) | (have - set(Coefficients._fields)):
            raise ValueError(
                f"coefficients must name every known field of an LLM's work and no unknown one; "
                f"wrong or missing: {sorted(wrong)}"
            )
        if wrong := set(self.box) ^ set(WORK_AXES):
            raise ValueError(
                f"box must name exactly {WORK_AXES}; wrong or missing: {sorted(wrong)}"
            )
        return self

    def with_layer(self, layer: Mapping[str, Coefficient], gpu: Gpu) -> "ModelFile":
        """The complete file: what it leaves open filled in from the GPU.

        Args:
            layer: coefficients of the GPU's layer for this phase and dtype, the delay among them.
            gpu: gives the power limit.
        """
        cap = Coefficient(
            value=gpu.power_cap_w, provenance="measured", source=f"description of {gpu.name}"
        )
        found = {**layer, **self.coefficients, "p_cap_w": cap}
        delay = layer[DELAY_COLUMN].value if self.delay_s is None else self.delay_s
        return self.model_copy(
            update={
                "coefficients": {name: found[name] for name in Coefficients._fields},
                "delay_s": delay,
            }
        )

    def as_tuple(self) -> Coefficients:
        """Return the values alone, in the order of the formula; of a complete file."""
        return Coefficients(*(self.coefficients[field].value for field in Coefficients._fields))


def stem(phase: str, dtype: str, tp: int, ep: int = 1) -> str:
    """File name without ending of one configuration, e.g. ``decode-bf16-tp4``."""
    return f"{phase}-{dtype}-tp{tp}" + (f"-ep{ep}" if ep > 1 else "")


def known_names() -> list[str]:
    """Names of the shipped model families."""
    folder = configs_dir() / "models"
    found = {path.parent for path in folder.glob("*/*/*-tp*.yaml")}
    return sorted(path.relative_to(folder).as_posix() for path in found)


def find_file(name: str, phase: str, dtype: str, tp: int, ep: int = 1) -> Path:
    """Path of a coefficient file: a shipped family, a folder of files, or one YAML file.

    Raises:
        BiscaleError: no such family, or it has no such configuration.
    """
    folder = find_folder(name)
    if folder is None:
        return Path(name)
    path = folder / f"{stem(phase, dtype, tp, ep)}.yaml"
    if path.is_file():
        return path
    have = ", ".join(p.stem for p in files_in(folder)) or "none"
    spread = f", EP {ep}" if ep > 1 else ""
    raise BiscaleError(
        f"model '{name}' has no {phase} model for {dtype} at TP {tp}{spread}; it has: {have}"
    )


def find_folder(name: str) -> Path | None:
    """Folder of a model family, or None where the name is that of one YAML file.

    Raises:
        BiscaleError: neither a shipped family, nor a folder, nor a YAML file.
    """
    for folder in (configs_dir() / "models" / name, Path(name)):
        if folder.is_dir():
            return folder
    if Path(name).suffix in {".yaml", ".yml"}:
        return None
    outside = installed_path("models", name)
    if outside is not None:
        return outside
    known = [*known_names(), *installed_names("models")]
    raise BiscaleError(
        f"unknown model '{name}'; known: {', '.join(known)}, or a path to files of `biscale models "
        "build` or `biscale fit`; "
        f"the nearest name is '{nearest(name, known)}'"
    )


def files_in(folder: Path) -> list[Path]:
    """Coefficient files of a family, sorted."""
    return sorted(folder.glob("*-tp*.yaml"))


def any_file(name: str) -> Path:
    """One coefficient file of a family, for what all of them share: GPU and LLM.

    Raises:
        BiscaleError: no such family, or an empty folder.
    """
    folder = find_folder(name)
    if folder is None:
        return Path(name)
    for path in files_in(folder):
        return path
    raise BiscaleError(f"model '{name}' has no coefficient file such as prefill-bf16-tp4.yaml")


def parse_model_file(content: bytes, where: str) -> ModelFile:
    """Parse and validate the content of one coefficient file; ``where`` names it in errors.

    Raises:
        BiscaleError: not YAML, an unknown key, a missing or negative coefficient.
    """
    return validate(parse_yaml(content, where), ModelFile, where)


def read_model_file(path: Path) -> ModelFile:
    """Read and validate one coefficient file.

    Raises:
        BiscaleError: missing, not YAML, an unknown key, a missing or negative coefficient.
    """
    return parse_model_file(read_bytes(path), str(path))


def read_members(
    path: Path,
    content: bytes | None,
    complete: ModelFile,
    layer: Mapping[str, NDArray[np.float64]],
) -> tuple[np.recarray, NDArray[np.float64]]:
    """Members of the ensemble: columns that vary replace the nominal values.

    Member k is member k of the GPU's layer and row k of the file's own table; where the table is
    longer than the layer, the layer repeats.

    Args:
        path: file of the own table, for messages.
        content: what is in it; None if there is none.
        complete: the nominal values.
        layer: columns of the GPU's layer by the names of the formula, those that the file leaves to
            it.

    Returns:
        Records of ``COEFFICIENT_DTYPE``, one per member (none without any table), delays in s.

    Raises:
        BiscaleError: not a table, an unknown column, or a value that is not a finite number >= 0.
    """
    columns = dict(layer)
    if content is not None:
        own = read_table(path, content, (*Coefficients._fields, DELAY_COLUMN))
        n = len(next(iter(own.values())))
        columns = {name: np.resize(values, n) for name, values in layer.items()} | own
    n = len(next(iter(columns.values()))) if columns else 0
    records = np.recarray(n, dtype=COEFFICIENT_DTYPE)
    for field, value in zip(Coefficients._fields, complete.as_tuple(), strict=True):
        records[field] = columns.get(field, value)
    return records, np.array(columns.get(DELAY_COLUMN, np.full(n, complete.delay_s or 0.0)))
