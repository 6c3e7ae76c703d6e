"""Linear equations for energy coefficients: the formula is linear in them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.models.physics import Coefficients

Floats = NDArray[np.float64]
ENERGY_NAMES: Final = (
    "p_static_w",
    "p_clock_w_per_ghz",
    "p_busy_w",
    "e_flop_j",
    "e_byte_j",
    "e_hbm_j",
    "e_link_j",
)
SCALE: Final = {
    "e_flop_j": 1e-12,
    "e_byte_j": 1e-12,
    "e_hbm_j": 1e-12,
    "e_link_j": 1e-12,
}  # keeps the system well conditioned


def energy_columns(energy: Callable[[Coefficients], Floats | float], c: Coefficients) -> Floats:
    """Derivative of an energy (or power) by each energy coefficient.

    The formula with one of them at a time, against that with none.
    """
    nothing = c._replace(**dict.fromkeys(ENERGY_NAMES, 0.0))
    without = energy(nothing)
    each = [energy(nothing._replace(**{n: SCALE.get(n, 1.0)})) - without for n in ENERGY_NAMES]
    return np.array(each).T


def remainder(energy: Callable[[Coefficients], Floats | float], c: Coefficients) -> Floats:
    """Energy (or power) that none of the energy coefficients explains: what is not fitted."""
    return np.asarray(energy(c._replace(**dict.fromkeys(ENERGY_NAMES, 0.0))))


@dataclass
class LinearSystem:
    """Weighted linear equations for the energy coefficients, in the units of ``SCALE``."""

    rows: list[Floats]
    targets: list[float]
    sigmas: list[float]

    def add(self, row: Floats, target: float, sigma: float) -> None:
        """One equation ``row . x = target`` with its standard deviation, in the target's unit."""
        self.rows.append(row)
        self.targets.append(target)
        self.sigmas.append(sigma)

    def weighted(self) -> tuple[Floats, Floats]:
        """Matrix and right-hand side, every equation divided by its standard deviation."""
        weight = 1.0 / np.array(self.sigmas)
        return np.array(self.rows) * weight[:, None], np.array(self.targets) * weight
