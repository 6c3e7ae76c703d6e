"""What load the next window may have: a small network over the changes of the load so far.

It gives location and spread of the logarithm of the next load over the last one; the shape around
them is that of its own residuals, and a share of all forecasts is what any window may bring. Plain
NumPy, no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LONGEST: Final = 12  # changes looked back on
LEAST_RPS: Final = 1e-2
NAMES: Final = (
    "change_1",
    "change_2",
    "change_3",
    "over_mean_6",
    "over_mean_12",
    "mean_change_6",
    "mean_change_12",
    "largest_rise_6",
    "under_peak_6",
    "over_low_6",
)
FORECAST_ID: Final = "load-changes-v1"
_CLIP: Final = 3.0


def load_changes(rates_rps: Sequence[float]) -> Floats:
    """Features of the loads so far, shape (10,), see :data:`NAMES`.

    Differences of logarithms, so that they do not depend on how large a service is. Before the
    first window the load is taken to have been that of the first.
    """
    logs = np.log(np.maximum(rates_rps, LEAST_RPS))
    logs = np.concatenate([np.full(LONGEST + 1, logs[0]), logs])[-LONGEST - 1 :]
    last, changes, six = logs[-1], np.diff(logs), logs[-6:]
    found = [
        *(last - logs[-1 - k] for k in (1, 2, 3)),
        last - six.mean(),
        last - logs[-LONGEST:].mean(),
        np.abs(changes[-6:]).mean(),
        np.abs(changes).mean(),
        changes[-6:].max(),
        last - six.max(),
        last - six.min(),
    ]
    return np.clip(found, -_CLIP, _CLIP)


@dataclass(frozen=True)
class LoadForecast:
    """The mean of several networks of one hidden layer (tanh), and the shape of residuals.

    Attributes:
        centre: (10,), subtracted from the features.
        scale: (10,), divides them.
        weights: (members, 10, hidden).
        biases: (members, hidden).
        out_weights: (members, hidden, 2).
        out_biases: (members, 2).
        residuals: (k,), equally likely residuals, in units of the spread, rising.
        jumps: (j,), further equally likely changes, of logarithms, rising: those of all windows,
            whatever was before, since a calm service may jump, too.
    """

    centre: Floats
    scale: Floats
    weights: Floats
    biases: Floats
    out_weights: Floats
    out_biases: Floats
    residuals: Floats
    jumps: Floats

    def location_and_spread(self, seen: Floats) -> tuple[Floats, Floats]:
        """Of the logarithm of next load over last load, (n,) each, for features (n, 10)."""
        x = (seen - self.centre) / self.scale
        hidden = np.tanh(np.einsum("ni,mih->mnh", x, self.weights) + self.biases[:, None])
        out = np.einsum("mnh,mho->mno", hidden, self.out_weights) + self.out_biases[:, None]
        mean = out.mean(axis=0)
        return mean[:, 0], np.exp(mean[:, 1])

    def loads_rps(self, rates_rps: Sequence[float]) -> Floats:
        """Equally likely loads of the next window, (k + j,), requests/s.

        Args:
            rates_rps: load of each window so far, the last one above 0.
        """
        location, spread = self.location_and_spread(load_changes(rates_rps)[None])
        change = np.concatenate([location + spread * self.residuals, self.jumps])
        return np.asarray(rates_rps[-1] * np.exp(np.clip(change, -_CLIP, _CLIP)))
