"""A fitted figure with where it comes from, and how files write figures."""

import math
from typing import Literal

import yaml
from pydantic import Field

from biscale_env.config.loader import Config

Provenance = Literal["measured", "derived", "assumed"]


class Coefficient(Config):
    """One fitted figure and where it comes from."""

    value: float = Field(ge=0)
    provenance: Provenance
    source: str = Field(min_length=1)


def rounded(value: float, digits: int = 6) -> float:
    """Round to significant digits.

    So files are short and do not depend on the last bit of a solver.
    """
    return float(f"{value:.{digits}g}") if math.isfinite(value) else value


def dump_fitted(content: Config) -> str:
    """YAML text of a fitted file, of a GPU's layer and of an LLM's alike."""
    return yaml.safe_dump(
        content.model_dump(mode="json"), sort_keys=False, width=150, allow_unicode=True
    )
