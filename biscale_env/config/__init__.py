"""Configuration: YAML files read into frozen, validated models."""

from biscale_env.config.hardware import Gpu, Llm, load_gpu, load_llm
from biscale_env.config.instance import (
    DEFAULT_GPU,
    DEFAULT_LLM,
    DEFAULT_MODEL,
    InstanceSpec,
    WithInstance,
    with_published_dtype,
)
from biscale_env.config.loader import configs_dir, list_names, load_named, load_yaml
from biscale_env.config.slo import Slo, load_slo

__all__ = [
    "DEFAULT_GPU",
    "DEFAULT_LLM",
    "DEFAULT_MODEL",
    "Gpu",
    "InstanceSpec",
    "Llm",
    "Slo",
    "WithInstance",
    "configs_dir",
    "list_names",
    "load_gpu",
    "load_llm",
    "load_named",
    "load_slo",
    "load_yaml",
    "with_published_dtype",
]
