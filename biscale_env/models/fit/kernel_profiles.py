"""Shipped kernel tables: ``configs/models/profiles/<gpu>-<llm>.csv``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from biscale_env.config import Llm, configs_dir, list_names, load_llm
from biscale_env.models.fit.profile_table import ProfileTable, read_profile

# Larger prefill batches are kept out of the fit and of the validity domain. fp8: the tables
# have few measured fp8 GEMMs there and jump; 8192 tokens is vLLM's own default budget on an H100.
MAX_PREFILL_TOKENS: Final = {"bf16": 16384, "fp8": 8192, "mxfp4": 16384}


@dataclass(frozen=True)
class KernelProfile:
    """The kernel tables of one LLM on one GPU.

    Attributes:
        gpu: name of the GPU description.
        llm: the LLM.
        path: the file.
        source: what its first comment line says.
    """

    gpu: str
    llm: Llm
    path: Path
    source: str

    @property
    def family(self) -> str:
        """Name of the model family that is made of it."""
        return f"{self.gpu}/{self.llm.name}"

    def tables(self) -> list[ProfileTable]:
        """One per configuration; prefill is cut at its token limit."""
        return [cut(t) for t in read_profile(self.path)]

    def whole_tables(self) -> list[ProfileTable]:
        """As in the file."""
        return read_profile(self.path)


def cut(table: ProfileTable) -> ProfileTable:
    """The table without prefill batches beyond the limit."""
    if table.phase == "decode":
        return table
    inside = table.work.tokens <= MAX_PREFILL_TOKENS[table.dtype]
    rows = table.rows[inside].reset_index(drop=True)
    return ProfileTable(table.phase, table.tp, table.dtype, rows, table.shard, table.ep)


def profiles_dir() -> Path:
    """Folder of the shipped kernel tables."""
    return configs_dir() / "models" / "profiles"


def shipped_profiles(gpu: str | None = None) -> list[KernelProfile]:
    """All shipped kernel tables, those of one GPU where one is named."""
    found = []
    for name in list_names("gpus"):
        if gpu not in (None, name):
            continue
        for path in sorted(profiles_dir().glob(f"{name}-*.csv")):
            llm = path.stem.removeprefix(f"{name}-")
            if llm in list_names("llms"):
                found.append(KernelProfile(name, load_llm(llm), path, _source(path)))
    return found


def _source(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        lines = []
        for line in file:
            if not line.startswith("#"):
                break
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)
