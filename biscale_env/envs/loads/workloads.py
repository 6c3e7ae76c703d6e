"""Workloads of episodes.

Workload k of a source is the same for every controller, on every machine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from biscale_env.core.errors import BiscaleError
from biscale_env.traces import Trace

Maker = Callable[[float, float, int], Trace]  # (rate_rps, duration_s, seed) -> workload; picklable
CAPACITY_SAMPLE_S = 3600.0  # long against the slow swings of the profiles' rates
CAPACITY_SAMPLE_RPS = (
    5.53  # rate of the Azure conversation trace; the search makes other loads from it
)
EMPTY_WINDOWS = 100  # windows without a request that are passed over before giving up


@dataclass(frozen=True)
class WorkloadSource:
    """Makes workload 0, 1, 2, ... of one family.

    Attributes:
        make: makes a workload from ``(rate_rps, duration_s, seed)``.
        rate_rps: mean request rate, requests/s.
        episode_s: length of each workload, s.
        seed: root of all workloads of this source.
    """

    make: Maker
    rate_rps: float
    episode_s: float
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rate_rps", "episode_s"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise BiscaleError(f"workload: {name} must be a positive number, got {value}")

    def workload(self, k: int) -> Trace:
        """Workload ``k``.

        Raises:
            BiscaleError: the source yields no requests at this rate.
        """
        for attempt in range(EMPTY_WINDOWS):
            seed = int(np.random.SeedSequence([self.seed, k, attempt]).generate_state(1)[0])
            made = self.make(self.rate_rps, self.episode_s, seed)
            if len(made) and (made.output_tokens >= 2).any():
                return made
        raise BiscaleError(
            f"no request within {self.episode_s:g} s at {self.rate_rps:g} req/s: "
            "use a longer episode or a higher rate"
        )


def trace_windows(trace: Trace) -> Maker:
    """Maker of workloads cut from a trace.

    A random window, with requests chosen to meet the rate on average.

    The rate holds over the whole trace, so a busy window stays busy. A window longer than the trace
    is the whole trace.
    """
    if trace.rate_rps <= 0:
        raise BiscaleError(f"{trace.name} has no requests")
    return partial(_window, trace)


def _window(trace: Trace, rate_rps: float, duration_s: float, seed: int) -> Trace:
    room = trace.duration_s - duration_s
    start = float(np.random.default_rng(seed).uniform(0.0, room)) if room > 0 else 0.0
    piece = trace.window(start, start + duration_s) if room > 0 else trace
    if len(piece) == 0:
        return piece
    return piece.scaled_to(rate_rps * piece.rate_rps / trace.rate_rps, seed)


def generated(profile: str) -> Maker:
    """Maker of workloads from a generator profile (``biscale traces list`` shows them).

    What the profile names is read here, once, and not for every workload.

    Raises:
        BiscaleError: an unknown profile.
    """
    from biscale_env.traces.synthetic.synthesize import WorkloadRecipe

    return WorkloadRecipe.of(profile).make


def capacity_sample(profile: str) -> Trace:
    """The generated trace that a profile's capacity, and so every load of it, is measured on."""
    return generated(profile)(CAPACITY_SAMPLE_RPS, CAPACITY_SAMPLE_S, 0)
