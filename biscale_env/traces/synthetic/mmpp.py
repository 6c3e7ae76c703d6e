"""Closed forms of the two-state Markov-modulated Poisson process.

Source: Heffes and Lucantoni, IEEE JSAC 1986.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from biscale_env.traces.synthetic.profiles import Modulation


def mmpp_dispersion(
    modulation: Modulation, rate_rps: float, window_s: ArrayLike
) -> NDArray[np.float64]:
    """Index of dispersion of counts, variance / mean of the arrivals in a window; 1 for Poisson.

    Args:
        modulation: the two states.
        rate_rps: mean rate, requests/s.
        window_s: window lengths, any shape, s.
    """
    variance = (
        modulation.high_share
        * (1 - modulation.high_share)
        * (modulation.high_factor - modulation.low_factor) ** 2
    )
    tau_s = 1 / (1 / modulation.mean_high_s + 1 / modulation.mean_low_s)
    x = np.asarray(window_s, dtype=np.float64) / tau_s
    return 1 + 2 * variance * rate_rps * tau_s * (1 + np.expm1(-x) / x)


def mmpp_gap_cv(modulation: Modulation, rate_rps: float) -> float:
    """Coefficient of variation of the inter-arrival times.

    Args:
        modulation: the two states.
        rate_rps: mean rate, requests/s.
    """
    high, low = modulation.high_factor * rate_rps, modulation.low_factor * rate_rps
    leave_high, leave_low = 1 / modulation.mean_high_s, 1 / modulation.mean_low_s
    excess = 2 * leave_high * leave_low * (high - low) ** 2 / (leave_high + leave_low) ** 2
    return float(np.sqrt(1 + excess / (high * low + high * leave_low + low * leave_high)))
