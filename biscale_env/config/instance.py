"""`InstanceSpec`: what one instance of an engine is, said once.

GPU, LLM, fitted model, tensor parallelism, number format, engine limits and SLO. Everything that
simulates, controls, emulates or measures an instance takes this object; child processes get it as a
YAML file.
"""

from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import Field

from biscale_env.config.hardware import Dtype
from biscale_env.config.loader import Config, configs_dir, load_yaml, validate

DEFAULT_MODEL: Final = "h100-llama70b"
MAX_SEQS_LIMIT: Final = 4096  # requests of a batch that the simulator has room for
_FILES: Final = {"gpu": "gpus", "llm": "llms", "model": "models", "slo": "slos"}


class InstanceSpec(Config):
    """One instance: hardware, weights, engine limits and the SLO it is held to.

    Where ``gpu`` or ``llm`` is another one than the fitted model names, all that is physical
    follows it: KV capacity, power cap, clock range, grid and levels, counted work; see
    :mod:`biscale_env.models.transfer` for what is kept of the fit.

    Attributes:
        gpu: name of a GPU description (``configs/gpus``) or a YAML file; None: the model's.
        llm: name of an LLM description (``configs/llms``) or a YAML file; None: the model's.
        model: name of a fitted model (``configs/models``), a folder of coefficient files, or one.
        tp: GPUs of the instance (tensor parallel degree).
        dtype: ``bf16`` or ``fp8``.
        token_budget: new tokens per prefill batch; 2048 is vLLM's long-time default for chunked
            prefill.
        max_seqs: requests per batch. Assumed: 512, the edge of the fitted domain; the KV cache, not
            this cap, then limits a decode batch.
        kv_watermark: fraction of KV kept free on admission; 0.01 as in vLLM.
        slo: name of an SLO (``configs/slos``) or a YAML file.
    """

    gpu: str | None = None
    llm: str | None = None
    model: str = DEFAULT_MODEL
    tp: int = Field(default=4, gt=0)
    dtype: Dtype = "bf16"
    token_budget: int = Field(default=2048, gt=0)
    max_seqs: int = Field(default=512, gt=0, le=MAX_SEQS_LIMIT)
    kv_watermark: float = Field(default=0.01, ge=0, lt=1)
    slo: str = "biscale"

    @classmethod
    def of(cls, **values: Any) -> "InstanceSpec":
        """An instance with some values given; mistakes raise BiscaleError naming the key."""
        return validate(values, cls, "instance")

    def changed(self, **values: Any) -> "InstanceSpec":
        """A copy with some values changed, validated anew."""
        return self.of(**{**self.model_dump(), **values})

    def to_yaml(self, path: str | Path) -> Path:
        """Write the description to a YAML file, for a child process or for later.

        Files that it names are written as absolute paths, so that it can be read from anywhere.

        Raises:
            OSError: the file cannot be written.
        """
        data = self.model_dump(mode="json")
        data |= {key: _absolute(kind, data[key], Path()) for key, kind in _FILES.items()}
        path = Path(path)
        path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
        return path

    @classmethod
    def from_yaml(cls, path: str | Path) -> "InstanceSpec":
        """Read a description; files that it names may lie beside it.

        Raises:
            BiscaleError: not readable, not YAML, an unknown key or an impossible value.
        """
        spec = load_yaml(Path(path), cls)
        folder = Path(path).resolve().parent
        found = {key: _absolute(kind, getattr(spec, key), folder) for key, kind in _FILES.items()}
        return spec.changed(**found)


def _absolute(kind: str, name: str | None, folder: Path) -> str | None:
    """Absolute path of a file or folder that ``name`` means relative to ``folder``, else itself."""
    shipped = configs_dir() / kind
    if name is None or (shipped / name).is_dir() or (shipped / f"{name}.yaml").is_file():
        return name
    path = folder / name
    return str(path.resolve()) if path.exists() else name
