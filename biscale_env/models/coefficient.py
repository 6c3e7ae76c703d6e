"""A fitted figure with where it comes from, and how files write figures."""

import math
from typing import Literal

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
