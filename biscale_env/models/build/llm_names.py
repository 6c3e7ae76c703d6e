"""Which LLM a user means: a shipped description, a `config.json`, or a Hugging Face Hub name."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from biscale_env.config import Llm, list_names, load_llm
from biscale_env.config.loader import nearest
from biscale_env.core.errors import BiscaleError
from biscale_env.models.build.hf_config import llm_of, read_hub_config
from biscale_env.models.build.table_package import PACKAGE

# parts of Hub names that do not change the geometry
_TRIMMED: Final = re.compile(
    r"^meta-|-(instruct|it|chat|thinking|base|hf|fp8|bf16|v0\.\d|\d{4}|fp8-static-pertensor)$"
)
_SAME_GEOMETRY: Final = {
    "llama-3.1-70b": "llama-3.3-70b",
    "llama-3-70b": "llama-3.3-70b",
    "deepseek-r1": "deepseek-v3",
}


def short_name(hub_name: str) -> str:
    """Short name of a Hub name, e.g. ``qwen3-14b`` of ``Qwen/Qwen3-14B-FP8``."""
    name = hub_name.rsplit("/", 1)[-1].lower()
    while (trimmed := _TRIMMED.sub("", name)) != name:
        name = trimmed
    return _SAME_GEOMETRY.get(name, name)


def find_llm(text: str) -> Llm:
    """The LLM that a text means.

    Args:
        text: name of a shipped description, its YAML file, a `config.json` or the folder with it,
            or a name on the Hugging Face Hub that is shipped here or in the optional kernel tables.
            Nothing is downloaded.

    Raises:
        BiscaleError: none of these, or a file that cannot be read.
    """
    path = Path(text)
    if path.suffix in (".yaml", ".yml") or text in list_names("llms"):
        return load_llm(text)
    if path.suffix == ".json" or path.is_dir():
        return read_hub_config(path)
    name = short_name(text)
    if name in list_names("llms"):
        return load_llm(name)
    cached = _cached_config(text)
    if cached is not None:
        return llm_of(json.loads(cached.read_bytes()), name, text)
    known = list_names("llms")
    raise BiscaleError(
        f"unknown LLM '{text}': give the path of its Hugging Face config.json, or one of "
        f"{', '.join(known)}; the nearest name is '{nearest(name, known)}'"
    )


def _cached_config(hub_name: str) -> Path | None:
    """Configuration that the kernel tables' package brings along, by its exact Hub name."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None or hub_name.count("/") != 1:
        return None
    file = f"{hub_name.replace('/', '--')}_config.json"
    path = Path(spec.origin).parent / "model_configs" / file
    return path if path.is_file() else None
