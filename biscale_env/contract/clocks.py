"""Clocks and actions: [-1, 1] spans the control range of the GPU, snapped to its clock grid."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biscale_env.config import Gpu
from biscale_env.core.clockqueue import grid, snapped, snapped_up


@dataclass(frozen=True)
class ClockRange:
    """SM clocks a policy may ask for, MHz.

    Attributes:
        freq_min_mhz: lowest clock, action -1.
        freq_max_mhz: highest clock, action +1.
        freq_step_mhz: grid, counted from the highest clock.
        levels_mhz: the few levels that level-based controllers and discrete environments use,
            rising.
    """

    freq_min_mhz: float
    freq_max_mhz: float
    freq_step_mhz: float
    levels_mhz: tuple[float, ...]

    @classmethod
    def of(cls, gpu: Gpu) -> "ClockRange":
        """The range of a GPU."""
        return cls(gpu.freq_min_mhz, gpu.freq_max_mhz, gpu.freq_step_mhz, gpu.control_levels_mhz)

    def to_action(self, freq_mhz: ArrayLike) -> NDArray[np.float32]:
        """Action for a clock; same shape."""
        span = self.freq_max_mhz - self.freq_min_mhz
        return np.asarray(
            2.0 * (np.asarray(freq_mhz, dtype=np.float64) - self.freq_min_mhz) / span - 1.0,
            dtype=np.float32,
        )

    def to_freq_mhz(self, action: ArrayLike) -> NDArray[np.float64]:
        """Clock that an action asks for, before snapping; same shape."""
        span = self.freq_max_mhz - self.freq_min_mhz
        clipped = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        return np.asarray(self.freq_min_mhz + 0.5 * (clipped + 1.0) * span)

    def snap_mhz(self, freq_mhz: ArrayLike) -> NDArray[np.float64]:
        """Nearest supported clock, MHz; same shape."""
        asked: Any = np.asarray(freq_mhz, dtype=np.float64)
        return np.asarray(snapped(asked, *self._grid))

    def snap_up_mhz(self, freq_mhz: ArrayLike, tolerance_mhz: float) -> NDArray[np.float64]:
        """Lowest supported clock that is at most ``tolerance_mhz`` below; same shape."""
        asked: Any = np.asarray(freq_mhz, dtype=np.float64)
        return np.asarray(snapped_up(asked, *self._grid, tolerance_mhz))

    @property
    def grid_mhz(self) -> NDArray[np.float64]:
        """All supported clocks, rising, MHz."""
        return grid(*self._grid)

    @property
    def _grid(self) -> tuple[float, float, float]:
        return self.freq_min_mhz, self.freq_max_mhz, self.freq_step_mhz
