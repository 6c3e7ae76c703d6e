"""Fitted latency and power models.

One formula (`physics`), coefficient files with provenance, and an ensemble of members.
"""

from biscale_env.models.iteration_model import (
    DEFAULT_NAME,
    IterationModel,
    ModelName,
    as_record,
    instance_hardware,
    instance_model,
    load_model,
)
from biscale_env.models.physics import COEFFICIENT_DTYPE, Coefficients

__all__ = [
    "COEFFICIENT_DTYPE",
    "DEFAULT_NAME",
    "Coefficients",
    "IterationModel",
    "ModelName",
    "as_record",
    "instance_hardware",
    "instance_model",
    "load_model",
]
