"""What the compiled features of both phases share: the clock levels they look at, and scales."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biscale_env.contract import ClockRange
from biscale_env.core.jit import inlined
from biscale_env.models.physics import idle_power_w

Floats32 = NDArray[np.float32]
Floats64 = NDArray[np.float64]
Records = NDArray[np.void]

N_LEVELS = 7
"""Clock levels that the features look at, on every GPU: the length of a network's input."""


FEATURE_PLANT_DTYPE = np.dtype(
    [
        ("freq_min_ghz", np.float64),
        ("freq_max_ghz", np.float64),
        ("levels_ghz", np.float64, (N_LEVELS,)),
        ("cheapest_ghz", np.float64),  # of least energy for a typical iteration
        ("parked", np.int64),  # 1: idle power does not follow the clock
        ("parked_w", np.float64),  # it then, of one GPU
    ]
)
"""What kernels know of a plant: clocks of its GPU, and its power while idle.

The levels have a fixed length within the record, so no kernel can read past it.
"""


def spread_levels_mhz(clocks: ClockRange, count: int = N_LEVELS) -> Floats64:
    """``count`` levels spread over a GPU's own control levels, rising, MHz.

    Level k stands where the fraction ``k / (count - 1)`` of the control levels lies below it,
    linearly between two of them. As many as the GPU has are its own, unchanged.
    """
    own = np.asarray(clocks.levels_mhz, dtype=np.float64)
    if own.size == count:
        return own
    at = np.linspace(0.0, own.size - 1.0, count)
    return np.interp(at, np.arange(own.size), own)


def feature_plants(
    clocks: ClockRange, cheapest_ghz: Sequence[float], parked_w: Sequence[float | None]
) -> Records:
    """Records of plants with one GPU, as the kernels read them.

    Args:
        clocks: the GPU's.
        cheapest_ghz: clock of least energy of each plant.
        parked_w: power of a GPU of each plant while it is parked; None: it never is.
    """
    record = np.zeros(len(cheapest_ghz), dtype=FEATURE_PLANT_DTYPE)
    record["freq_min_ghz"] = clocks.freq_min_mhz * 1e-3
    record["freq_max_ghz"] = clocks.freq_max_mhz * 1e-3
    record["levels_ghz"] = spread_levels_mhz(clocks) * 1e-3
    record["cheapest_ghz"] = cheapest_ghz
    record["parked"] = [w is not None for w in parked_w]
    record["parked_w"] = [w or 0.0 for w in parked_w]
    return record


class FeatureRows(NamedTuple):
    """What the features of n observations consist of.

    Attributes:
        features: (n, F).
        rule: the rule's actions in [-1, 1], (n,).
        lost: requests that miss their deadline even at the highest clock, (n,).
    """

    features: Floats32
    rule: Floats32
    lost: Floats32


@inlined
def squash(value: float, scale: float) -> float:
    """Logarithm that is about linear below ``scale``."""
    return np.log1p(max(value, 0.0) / scale)


@inlined
def symmetric_log(value: float) -> float:
    """Signed logarithm, linear near 0."""
    return np.log1p(value) if value >= 0.0 else -np.log1p(-value)


@inlined
def between_levels(levels_ghz: Floats64, k: int, last_spare: float, spare: float) -> float:
    """Clock at which the spare time crosses zero between levels ``k - 1`` and ``k``, GHz.

    Linear in the spare times of the two; the lowest level itself when already that one has some.
    """
    if k == 0:
        return levels_ghz[0]
    fraction = -last_spare / (spare - last_spare) if spare > last_spare else 0.0
    return levels_ghz[k - 1] + fraction * (levels_ghz[k] - levels_ghz[k - 1])


@inlined
def idle_share(c: Any, g: Any, freq_ghz: float, busy_w: float) -> float:
    """Power of a waiting GPU at a clock, relative to a busy one's."""
    idle_w = g.parked_w if g.parked == 1 else idle_power_w(c, freq_ghz)
    return min(idle_w / busy_w, 2.0)


@inlined
def range_share(g: Any, freq_ghz: float) -> float:
    """Where a clock stands in the control range, 0 at its lowest and 1 at its highest."""
    return (freq_ghz - g.freq_min_ghz) / (g.freq_max_ghz - g.freq_min_ghz)
