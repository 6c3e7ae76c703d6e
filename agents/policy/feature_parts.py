"""What the compiled features of both phases share: the clock levels they look at, and scales."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from biscale_env.contract import ClockRange
from biscale_env.core.jit import inlined

Floats32 = NDArray[np.float32]
Floats64 = NDArray[np.float64]
Records = NDArray[np.void]

N_LEVELS = 7
"""Clock levels that the features look at, on every GPU: the length of a network's input."""


class FeatureClocks:
    """One record of :data:`CLOCKS_DTYPE`: control range and levels of a GPU, GHz.

    The array of levels has a fixed length within the record, so no kernel can read past it.
    """

    freq_min_ghz: float
    freq_max_ghz: float
    levels_ghz: Floats64


CLOCKS_DTYPE = np.dtype(
    [
        ("freq_min_ghz", np.float64),
        ("freq_max_ghz", np.float64),
        ("levels_ghz", np.float64, (N_LEVELS,)),
    ]
)


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


def feature_clocks(clocks: ClockRange) -> Records:
    """Control range and levels of a GPU as the kernels read them, one record, GHz."""
    record = np.zeros(1, dtype=CLOCKS_DTYPE)
    record["freq_min_ghz"] = clocks.freq_min_mhz * 1e-3
    record["freq_max_ghz"] = clocks.freq_max_mhz * 1e-3
    record["levels_ghz"] = spread_levels_mhz(clocks) * 1e-3
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
