"""Arrival times: a renewal process in operational time, and time changes of it.

Operational time advances at the momentary relative rate; an arrival happens where the integral of
the rate over time reaches the next point of a unit-rate renewal process with gamma gaps. A constant
rate gives Poisson (CV 1) and gamma arrivals, a two-state Markov rate an MMPP, an envelope a diurnal
workload, and all of them combine.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.checks import MAX_REQUESTS
from biscale_env.traces.synthetic.profiles import Arrivals, Modulation, RateEnvelope, load_envelope

FloatArray = NDArray[np.float64]
BURN_IN_GAPS = 200
GRID_S = 60.0


@dataclass(frozen=True)
class PiecewiseRate:
    """A rate that is constant between ``edges_s`` (shape (m + 1,), s).

    ``rate`` has shape (m,), requests/s.
    """

    edges_s: FloatArray
    rate: FloatArray

    def __mul__(self, other: "PiecewiseRate") -> "PiecewiseRate":
        if len(self.rate) == 1 and (self.edges_s == other.edges_s[[0, -1]]).all():
            return PiecewiseRate(other.edges_s, self.rate * other.rate)
        edges = np.union1d(self.edges_s, other.edges_s)
        middle = (edges[:-1] + edges[1:]) / 2
        return PiecewiseRate(edges, self.at(middle) * other.at(middle))

    def at(self, time_s: FloatArray) -> FloatArray:
        """Rate at the given times."""
        index = np.searchsorted(self.edges_s, time_s, side="right") - 1
        return self.rate[np.clip(index, 0, len(self.rate) - 1)]

    def cumulative(self) -> FloatArray:
        """Integral of the rate up to each edge, shape (m + 1,)."""
        return np.concatenate([[0.0], np.cumsum(np.diff(self.edges_s) * self.rate)])


def markov_rate(
    modulation: Modulation, duration_s: float, rng: np.random.Generator
) -> PiecewiseRate:
    """One random path of the two-state modulation, started in its stationary state.

    The expected factor is 1.
    """
    means = (modulation.mean_high_s, modulation.mean_low_s)
    factors = (modulation.high_factor, modulation.low_factor)
    first = int(rng.random() >= modulation.high_share)
    edges = np.zeros(1)
    while edges[-1] < duration_s:
        pairs = 16 + int(1.2 * (duration_s - edges[-1]) / sum(means))
        stays = rng.exponential((means[first], means[1 - first]), size=(pairs, 2)).ravel()
        edges = np.concatenate([edges, edges[-1] + np.cumsum(stays)])
    edges = np.append(edges[edges < duration_s], duration_s)
    states = (np.arange(len(edges) - 1) + first) % 2
    return PiecewiseRate(edges, np.where(states == 0, *factors))


def envelope_rate(envelope: RateEnvelope, start_s: float, duration_s: float) -> PiecewiseRate:
    """The envelope from ``start_s`` on, repeated as often as needed.

    Its mean over the duration is 1.

    Raises:
        BiscaleError: the envelope is zero all through the chosen time.
    """
    cells = max(1, int(np.ceil(duration_s / min(GRID_S, envelope.step_s / 8))))
    edges = np.linspace(0.0, duration_s, cells + 1)
    position = (start_s + (edges[:-1] + edges[1:]) / 2) / envelope.step_s - 0.5
    steps = np.arange(-1, len(envelope.factors) + 1)
    values = np.array(envelope.factors)[steps % len(envelope.factors)]
    rate = np.interp(np.mod(position + 0.5, len(envelope.factors)) - 0.5, steps, values)
    if not rate.any():
        raise BiscaleError(
            f"rate profile '{envelope.name}' is zero from {start_s:g} s on for {duration_s:g} s"
        )
    return PiecewiseRate(edges, rate / rate.mean())


def renewal_points(gap_cv: float, length: float, rng: np.random.Generator) -> FloatArray:
    """Points in ``[0, length)`` of a unit-rate renewal process with gamma gaps, past its start-up.

    Args:
        gap_cv: coefficient of variation of the gaps.
        length: operational time to cover, in mean gaps.
        rng: source of randomness.
    """
    shape = 1 / gap_cv**2
    # a random start within a few gaps, then enough gaps that the start is forgotten (longer for
    # rare, long gaps)
    points = np.array([-BURN_IN_GAPS * max(1.0, gap_cv**2) * (1 + rng.random())])
    while points[-1] < length:
        missing = length - points[-1]
        count = int(missing + 5 * gap_cv * np.sqrt(missing)) + 16
        points = np.concatenate(
            [points, points[-1] + np.cumsum(rng.gamma(shape, 1 / shape, count))]
        )
    first, stop = np.searchsorted(points, (0.0, length))  # gaps are not negative
    return points[first:stop]


def sample_arrivals(
    arrivals: Arrivals,
    rate_rps: float,
    duration_s: float,
    rng: np.random.Generator,
    envelope: RateEnvelope | None = None,
) -> FloatArray:
    """Sample sorted arrival times in ``[0, duration_s)``, s.

    Args:
        arrivals: the process.
        rate_rps: expected mean rate, requests/s.
        duration_s: length, s.
        rng: source of randomness.
        envelope: the envelope that the process names, where it was loaded before.

    Raises:
        BiscaleError: a rate or duration that is not positive, or more requests than fit in memory.
    """
    if not (0 < rate_rps < np.inf and 0 < duration_s < np.inf):
        raise BiscaleError(
            f"rate and duration must be positive, got {rate_rps:g} requests/s for {duration_s:g} s"
        )
    if rate_rps * duration_s > MAX_REQUESTS:
        raise BiscaleError(
            f"{rate_rps:g} requests/s for {duration_s:g} s are more than {MAX_REQUESTS} requests"
        )
    rate = PiecewiseRate(np.array([0.0, duration_s]), np.array([rate_rps]))
    if arrivals.envelope is not None:
        shape = envelope or load_envelope(arrivals.envelope)
        rate = rate * envelope_rate(shape, arrivals.start_s, duration_s)
    modulation_rng, gap_rng = rng.spawn(2)
    if arrivals.modulation is not None:
        rate = rate * markov_rate(arrivals.modulation, duration_s, modulation_rng)
    integral = rate.cumulative()
    points = renewal_points(arrivals.gap_cv, float(integral[-1]), gap_rng)
    return np.interp(points, integral, rate.edges_s)
