"""Days of a service as workloads of ``BiScale/Cluster-v1``: measured rates, generated requests.

A rate profile (``configs/traces/rates-*.yaml``) gives the load of every window, which holds all
through it; gaps and lengths come from the workload profile of the environment.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_env import ClusterEnv
from biscale_env.envs.cluster.stream import DAY_S
from biscale_env.envs.loads.workloads import WorkloadSource
from biscale_env.traces import Trace, load_envelope, load_lengths, load_workload
from biscale_env.traces.synthetic.arrival_times import renewal_points
from biscale_env.traces.synthetic.lengths import LengthSampler


@dataclass(frozen=True)
class ServiceDay:
    """A day of a service.

    Attributes:
        service: name of a rate profile.
        day: number of the day, from 0.
        mean_rps: mean load of the service over the whole profile, requests/s.
        profile: workload profile that gaps and lengths come from.
        seed: of gaps and lengths.
    """

    service: str
    day: int
    mean_rps: float
    profile: str = "gamma-sharegpt-like"
    seed: int = 0

    def rates_rps(self, windows: int, window_s: float) -> NDArray[np.float64]:
        """Load of each window, requests/s.

        A step of the profile that lasts longer than a window is interpolated, as everywhere.

        Raises:
            BiscaleError: a day that the profile does not have.
        """
        envelope = load_envelope(self.service)
        days = int(envelope.period_s // DAY_S)
        if not 0 <= self.day < days:
            raise BiscaleError(
                f"rate profile '{self.service}' has days 0 to {days - 1}, not {self.day}"
            )
        middle_s = self.day * DAY_S + (np.arange(windows) + 0.5) * window_s
        factors = np.array(envelope.factors)
        position = middle_s / envelope.step_s - 0.5  # a factor holds in the middle of its step
        found = np.interp(position, np.arange(factors.size), factors)
        return np.asarray(self.mean_rps * found)

    def trace(self, windows: int, window_s: float) -> Trace:
        """The requests of the first ``windows`` of the day.

        Raises:
            BiscaleError: an unknown profile, or a day that it does not have.
        """
        rates = self.rates_rps(windows, window_s)
        workload, sampler = load_workload(self.profile), lengths_of(self.profile)
        arrival_rng, length_rng = (
            np.random.default_rng(child)
            for child in np.random.SeedSequence([self.seed, self.day]).spawn(2)
        )
        expected = np.concatenate([[0.0], np.cumsum(rates * window_s)])
        points = renewal_points(workload.arrivals.gap_cv, float(expected[-1]), arrival_rng)
        arrival_s = np.interp(points, expected, np.arange(windows + 1) * window_s)
        prompt, output = sampler.sample(arrival_s.size, length_rng)
        name = f"{self.service}-day-{self.day}"
        source = f"generated: {self.profile}, rates of {self.service}, seed {self.seed}"
        return Trace(name, arrival_s, prompt, output, source, duration_s=windows * window_s)

    def into(self, env: ClusterEnv) -> None:
        """Make this day the only workload of an environment, from its next reset on."""
        made = self.trace(env.windows, env.window_s)
        episode_s = env.windows * env.window_s
        source = WorkloadSource(lambda rate, length, seed: made, self.mean_rps, episode_s)
        env.options = replace(env.options, source=source)


class ConstantLoad(ServiceDay):
    """The mean load in every window; the service has no profile."""

    def rates_rps(self, windows: int, window_s: float) -> NDArray[np.float64]:
        """See :class:`ServiceDay`."""
        return np.full(windows, self.mean_rps)


@lru_cache
def lengths_of(profile: str) -> LengthSampler:
    """The lengths of a workload profile, ready to be sampled."""
    return LengthSampler.of(load_lengths(load_workload(profile).lengths))


def all_days(
    services: Sequence[str], days: Sequence[int], mean_rps: float, profile: str, seed: int
) -> list[ServiceDay]:
    """The same days of several services."""
    return [ServiceDay(s, day, mean_rps, profile, seed) for s in services for day in days]
