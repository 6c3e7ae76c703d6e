"""A policy: a low clock while nothing waits, else the highest."""

from typing import ClassVar

import numpy as np

from controllers import Controller, PolicyContext


class TwoClocks(Controller):
    """Two clocks, no model."""

    TUNABLE: ClassVar = {"low_mhz": (900.0, 600.0, 1200.0)}

    def __init__(self, context: PolicyContext, low_mhz: float = 900.0) -> None:
        """Keep the low clock, MHz."""
        super().__init__(context)
        self.low_mhz = low_mhz

    def decide(self, x, memory, deterministic):
        """A clock per row of physical observations."""
        waits = x[:, self.context.spec.index("oldest_wait")] > 0
        return np.where(waits, self.context.clocks.freq_max_mhz, self.low_mhz), memory
