"""What changes from episode to episode: workload, plant, SLO, delay, penalty."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agents.training.train_config import AgentConfig
from agents.training.worlds.mixture import WorkloadGroup

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Episodes(NamedTuple):
    """Some episodes, arrays (n,).

    Attributes:
        group: whose workload it is.
        workload: number of the workload in the table.
        member: ensemble member of the plant; -1 nominal.
        price: SLO-violation penalty that the network is told.
        slo_s: bound of the phase, s.
        delay_s: actuation delay, s; None where the member's own is kept.
    """

    group: Ints
    workload: Ints
    member: Ints
    price: Floats
    slo_s: Floats
    delay_s: Floats | None


class EpisodeSampler:
    """Samples episodes for a run's config.

    Attributes:
        rng: its generator; the warm start samples from it, too.
    """

    def __init__(
        self,
        config: AgentConfig,
        groups: Sequence[WorkloadGroup],
        first: Ints,
        n_members: Ints,
        seed: int,
    ) -> None:
        """Keep the ranges.

        Args:
            config: the run.
            groups: families at loads.
            first: number of the first workload of each group, and their total.
            n_members: members of each group's ensemble, (groups,).
            seed: of the generator.
        """
        self._config, self._first, self._n_members = config, first, n_members
        self._slo_s = np.array([g.slo_s for g in groups])
        self.rng = np.random.default_rng(seed)

    def prices(self, n: int) -> Floats:
        """SLO-violation penalties of n episodes: log-uniform over the config's range."""
        if self._config.price is None:
            return np.full(n, self._config.constraint.start)
        low, high = self._config.price
        return np.exp(self.rng.uniform(np.log(low), np.log(high), size=n))

    def sample(self, n: int) -> Episodes:
        """``n`` episodes."""
        r, rng = self._config.randomise, self.rng
        group = rng.integers(len(self._slo_s), size=n)
        random = (rng.random(n) >= r.nominal_share) & (self._n_members[group] > 0)
        member = np.where(random, rng.integers(0, np.maximum(self._n_members[group], 1)), -1)
        price = self.prices(n)
        slo_s = self._slo_s[group] * rng.uniform(*r.slo_scale, size=n)
        delay_s = None if r.delay_s is None else rng.uniform(*r.delay_s, size=n)
        workload = rng.integers(self._first[group], self._first[group + 1])
        return Episodes(group, workload, member, price, slo_s, delay_s)

    def state(self) -> dict[str, Any]:
        """State of the generator, for a resumed run."""
        return dict(self.rng.bit_generator.state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.rng.bit_generator.state = state
