"""The contract between plants and policies.

What every policy sees and what it may answer, in simulation and on hardware.
"""

from biscale_env.contract.clocks import ClockRange
from biscale_env.contract.observation import (
    DECODE_SPEC,
    HORIZON,
    PREFILL_SPEC,
    Feature,
    ObservationSpec,
    spec_for,
)
from biscale_env.contract.policy import Policy

__all__ = [
    "DECODE_SPEC",
    "HORIZON",
    "PREFILL_SPEC",
    "ClockRange",
    "Feature",
    "ObservationSpec",
    "Policy",
    "spec_for",
]
