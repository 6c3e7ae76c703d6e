"""Policies that do not look: ``f = freq_mhz`` (DistServe, OSDI 2024, at the highest), or random."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from biscale_env.core.errors import BiscaleError
from controllers.base import Controller, Floats, PolicyContext, Seed


class StaticClock(Controller):
    """One clock for ever.

    At the highest clock this is DistServe (OSDI 2024), whose engines run at the default maximum.
    The best single clock found offline ("static best") is this policy with ``freq_mhz`` tuned.
    """

    TUNABLE: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "freq_mhz": (None, *np.arange(810.0, 1981.0, 45.0).tolist())
    }

    def __init__(self, context: PolicyContext, freq_mhz: float | None = None) -> None:
        """Fix the clock.

        Args:
            context: what it may know.
            freq_mhz: clock in MHz, snapped to the grid; None is the highest.

        Raises:
            BiscaleError: outside the clock range.
        """
        super().__init__(context)
        clocks = context.clocks
        freq = clocks.freq_max_mhz if freq_mhz is None else float(freq_mhz)
        if not clocks.freq_min_mhz <= freq <= clocks.freq_max_mhz:
            raise BiscaleError(
                f"static clock {freq:g} MHz is impossible: choose {clocks.freq_min_mhz:g} to "
                f"{clocks.freq_max_mhz:g} MHz"
            )
        self.freq_mhz = float(clocks.snap_mhz(freq))

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """The one clock, whatever is seen."""
        return np.full(len(x), self.freq_mhz), None


class RandomClock(Controller):
    """A uniformly random clock of the grid at every decision.

    What any controller must beat, and a test of every loop.
    """

    def __init__(self, context: PolicyContext, seed: Seed = 0) -> None:
        """Seed its own generator."""
        super().__init__(context)
        self._rng = np.random.default_rng(seed)
        self._grid = context.clocks.grid_mhz

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """Independent samples per row."""
        return self._rng.choice(self._grid, size=len(x)), None
