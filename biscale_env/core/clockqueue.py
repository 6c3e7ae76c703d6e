"""A clock that takes time to change: one change in flight, the newest request waits.

A requested clock takes effect ``delay_s`` later. One change is in flight at a time; what is
requested meanwhile waits, the newest request replaces the one that waited (a conflating queue of
length one), and it sets out when the one before has taken effect. A request equal to the newest one
is skipped. The simulator, the pretended GPUs and the controller's view of a real clock all follow
these rules.

All functions run in Python and inside kernels. A unit of clocks is the caller's choice (GHz in the
simulator, MHz on hardware); times are seconds of any one clock.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.jit import inlined

ROUNDING = 1e-9  # of a grid step: the lowest clock is on the grid in spite of rounding


class ClockQueue(NamedTuple):
    """The state of one clock.

    Attributes:
        applied: clock that is in effect.
        inflight: clock that takes effect next; equal to ``applied`` when nothing is in flight.
        requested: newest request.
        apply_at_s: when the one in flight takes effect, s; inf: nothing is in flight.
    """

    applied: float
    inflight: float
    requested: float
    apply_at_s: float


@inlined
def settled_at(freq: float) -> ClockQueue:
    """A clock in effect, nothing in flight."""
    return ClockQueue(freq, freq, freq, np.inf)


@inlined
def request(q: ClockQueue, freq: float, now_s: float, delay_s: float) -> ClockQueue:
    """Request a clock now; without a delay it takes effect at once."""
    if freq == q.requested:
        return q
    if q.apply_at_s < np.inf:
        return ClockQueue(q.applied, q.inflight, freq, q.apply_at_s)
    if delay_s <= 0.0:
        return ClockQueue(freq, freq, freq, np.inf)
    return ClockQueue(q.applied, freq, freq, now_s + delay_s)


@inlined
def take_effect(q: ClockQueue, delay_s: float) -> ClockQueue:
    """The clock in flight takes effect (at ``apply_at_s``); a newer one that waits sets out."""
    if q.requested == q.inflight:
        return ClockQueue(q.inflight, q.inflight, q.inflight, np.inf)
    return ClockQueue(q.inflight, q.requested, q.requested, q.apply_at_s + delay_s)


@inlined
def advance_to(q: ClockQueue, now_s: float, delay_s: float) -> ClockQueue:
    """Let everything take effect that is due by ``now_s``."""
    while q.apply_at_s <= now_s and q.apply_at_s < np.inf:
        q = take_effect(q, delay_s)
    return q


@inlined
def wait_s(q: ClockQueue, now_s: float, delay_s: float) -> float:
    """Time until the newest request is in effect, s; 0 when it is."""
    if not q.apply_at_s < np.inf:
        return 0.0
    wait = q.apply_at_s - now_s
    return wait if q.requested == q.inflight else wait + delay_s


@inlined
def snapped(freq: float, freq_min: float, freq_max: float, step: float) -> float:
    """Nearest clock of the grid ``freq_max - k step`` within the range.

    Between two clocks the even ``k`` wins. Also for arrays, of any shape.
    """
    last = np.floor((freq_max - freq_min) / step + ROUNDING)
    return freq_max - step * np.minimum(np.maximum(np.rint((freq_max - freq) / step), 0.0), last)


@inlined
def snapped_up(
    freq: float, freq_min: float, freq_max: float, step: float, tolerance: float
) -> float:
    """Lowest clock of the grid that is not below ``freq - tolerance``, within the range.

    Also for arrays, of any shape.
    """
    last = np.floor((freq_max - freq_min) / step + ROUNDING)
    steps = np.floor((freq_max - freq) / step + tolerance / step)
    return freq_max - step * np.minimum(np.maximum(steps, 0.0), last)


def grid(freq_min: float, freq_max: float, step: float) -> NDArray[np.float64]:
    """All clocks of the grid, rising."""
    last = np.floor((freq_max - freq_min) / step + ROUNDING)
    return np.asarray(freq_max - step * np.arange(last, -1.0, -1.0))
