"""Coefficient files: one YAML per (phase, dtype, TP), with provenance.

Beside it lie the members of the ensemble as CSV.
"""

import csv
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field, model_validator

from biscale_env.config import configs_dir
from biscale_env.config.hardware import Dtype
from biscale_env.config.loader import Config, nearest, parse_yaml, read_bytes, validate
from biscale_env.core.errors import BiscaleError
from biscale_env.models.physics import COEFFICIENT_DTYPE, Coefficients

Phase = Literal["prefill", "decode"]
WORK_AXES = ("tokens", "attn_work", "cached", "n_seq", "freq_mhz")
DELAY_COLUMN = "delay_s"


class Coefficient(Config):
    """One fitted figure and where it comes from."""

    value: float = Field(ge=0)
    provenance: Literal["measured", "derived", "assumed"]
    source: str = Field(min_length=1)


class ModelFile(Config):
    """Content of one coefficient file.

    Attributes:
        format: version of the file format.
        name: model family, e.g. ``h100-llama70b``.
        phase: ``prefill`` or ``decode``.
        dtype: ``bf16``, or ``fp8`` for weights and KV cache.
        tp: GPUs per instance.
        gpu: name of the GPU description.
        llm: name of the LLM description.
        coefficients: every field of ``physics.Coefficients`` with its provenance.
        box: the validity domain: per work axis the range that the fitted points cover; outside it
            the model extrapolates.
        delay_s: nominal actuation delay of a clock change, s.
        fit: what was fitted: data hash, split, held-out errors.
    """

    format: Literal[1] = 1
    name: str
    phase: Phase
    dtype: Dtype
    tp: int = Field(ge=1)
    gpu: str
    llm: str
    coefficients: dict[str, Coefficient]
    box: dict[str, tuple[float, float]]
    delay_s: float = Field(ge=0)
    fit: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> "ModelFile":
        for what, have, want in (
            ("coefficients", set(self.coefficients), set(Coefficients._fields)),
            ("box", set(self.box), set(WORK_AXES)),
        ):
            if have != want:
                raise ValueError(
                    f"{what} must name exactly the known fields; wrong or missing: "
                    f"{sorted(have ^ want)}"
                )
        return self

    def as_tuple(self) -> Coefficients:
        """Return the values alone, in the order of the formula."""
        return Coefficients(*(self.coefficients[field].value for field in Coefficients._fields))


def stem(phase: str, dtype: str, tp: int) -> str:
    """File name without ending of one configuration, e.g. ``decode-bf16-tp4``."""
    return f"{phase}-{dtype}-tp{tp}"


def known_names() -> list[str]:
    """Names of the shipped model families."""
    folder = configs_dir() / "models"
    return sorted(path.name for path in folder.iterdir() if any(path.glob("*-tp*.yaml")))


def find_file(name: str, phase: str, dtype: str, tp: int) -> Path:
    """Path of a coefficient file: a shipped family, a folder of files, or one YAML file.

    Raises:
        BiscaleError: no such family, or it has no such configuration.
    """
    folder = find_folder(name)
    if folder is None:
        return Path(name)
    path = folder / f"{stem(phase, dtype, tp)}.yaml"
    if path.is_file():
        return path
    have = ", ".join(p.stem for p in files_in(folder)) or "none"
    raise BiscaleError(
        f"model '{name}' has no {phase} model for {dtype} at TP {tp}; it has: {have}"
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
    known = known_names()
    raise BiscaleError(
        f"unknown model '{name}'; known: {', '.join(known)}, or a path to a file of `biscale fit`; "
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


def members_path(path: Path) -> Path:
    """File with the ensemble that belongs to a coefficient file."""
    return path.with_suffix(".ensemble.csv")


def read_members(
    path: Path, content: bytes | None, nominal: Coefficients
) -> tuple[np.recarray, NDArray[np.float64]]:
    """Parse an ensemble: columns that vary replace the nominal values.

    Args:
        path: its file, for messages.
        content: what is in the file; None if there is none.
        nominal: values of the columns that do not vary.

    Returns:
        Records of ``COEFFICIENT_DTYPE``, one per member (none without a file), and the delays in s.

    Raises:
        BiscaleError: not a table, an unknown column, or a value that is not a finite number >= 0.
    """
    if content is None:
        return np.recarray(0, dtype=COEFFICIENT_DTYPE), np.zeros(0)
    names, values = _table(path, content)
    unknown = sorted(set(names) - set(Coefficients._fields) - {DELAY_COLUMN})
    if unknown or DELAY_COLUMN not in names:
        raise BiscaleError(
            f"{path}: columns must be {DELAY_COLUMN} and coefficient names; wrong or missing: "
            f"{', '.join(unknown) or DELAY_COLUMN}"
        )
    if not np.all(np.isfinite(values) & (values >= 0.0)):
        raise BiscaleError(f"{path}: every value must be a finite number, zero or above")
    columns = dict(zip(names, values.T, strict=True))
    records = np.recarray(len(values), dtype=COEFFICIENT_DTYPE)
    for field, value in zip(Coefficients._fields, nominal, strict=True):
        records[field] = columns.get(field, value)
    return records, columns[DELAY_COLUMN].copy()


def _table(path: Path, content: bytes) -> tuple[list[str], NDArray[np.float64]]:
    """Header and values, shape (rows, columns), of a CSV; NaN where there is no number.

    By hand, since pandas takes longer to import than an environment may take to make.
    """
    try:
        lines = [r for r in content.decode("utf-8").splitlines() if r and not r.startswith("#")]
    except UnicodeDecodeError:
        raise BiscaleError(f"cannot read {path}: not UTF-8 text") from None
    header, *rows = list(csv.reader(lines)) or [[]]
    if any(len(row) != len(header) for row in rows):
        raise BiscaleError(f"{path}: not a table: its rows differ in length")
    values = np.array([[_number(cell) for cell in row] for row in rows], dtype=np.float64)
    return [name.strip() for name in header], values.reshape(len(rows), len(header))


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def rounded(value: float, digits: int = 6) -> float:
    """Round to significant digits.

    So files are short and do not depend on the last bit of a solver.
    """
    return float(f"{value:.{digits}g}") if math.isfinite(value) else value


def dump_model_file(content: ModelFile) -> str:
    """Return the YAML text of a coefficient file."""
    return yaml.safe_dump(
        content.model_dump(mode="json"), sort_keys=False, width=150, allow_unicode=True
    )
