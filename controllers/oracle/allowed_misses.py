"""How many requests may miss the SLO, and what a miss weighs: one number, or one per SLO class.

With classes every class has a number of its own, so a search has several constraints but one price.
A miss is weighed as in the reward, by what its class may miss; then for every price ``L(price) -
price * sum(weight * allowed)`` is still below the energy of whatever holds all classes (weak
duality, with multipliers in a fixed proportion), and a plan counts only if it holds all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.config.slo import Slo, per_class
from biscale_env.envs.batch import RequestTable

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class AllowedMisses:
    """Requests of each class that may miss their bound; one class where there is one bound for all.

    Attributes:
        counts: how many, (classes,).
        requests: requests of each class, (classes,).
        weights: what a miss of each class weighs, (classes,).
    """

    counts: Counts
    requests: Counts
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, slo: Slo, pool: RequestTable, attainment: float | None) -> "AllowedMisses":
        """What an attainment allows; all requests without one.

        Args:
            slo: the SLO; an attainment is told in its own terms, as of :meth:`Slo.worst_off`.
            pool: the workload.
            attainment: fraction of requests that must be within their bound.
        """
        n_classes = len(slo.class_names)
        requests = np.bincount(class_numbers(slo, pool), minlength=n_classes)
        shares = np.array([slo.allowed(k) for k in range(n_classes)])
        if attainment is None:
            return cls(requests, requests, 1.0 / shares)
        most = np.floor((1.0 - attainment) * shares * requests + 1e-9).astype(np.int64)
        return cls(np.minimum(most, requests), requests, 1.0 / shares)

    @property
    def total(self) -> int:
        """Requests of all classes that may miss."""
        return int(self.counts.sum())

    @property
    def weighted(self) -> float:
        """What they weigh together."""
        return self.weigh(self.counts)

    def weigh(self, missed: Sequence[int] | Counts) -> float:
        """What misses of each class weigh together."""
        return float(np.asarray(missed) @ self.weights)

    def holds(self, missed: Sequence[int] | Counts) -> bool:
        """Whether no class misses more than it may."""
        return bool((np.asarray(missed) <= self.counts).all())

    def beyond(self, missed: Sequence[int] | Counts) -> float:
        """Misses beyond what is allowed, weighed."""
        return float(np.maximum(np.asarray(missed) - self.counts, 0) @ self.weights)

    def uses_all(self, missed: Sequence[int] | Counts) -> bool:
        """Whether every class misses just what it may."""
        return bool((np.asarray(missed) == self.counts).all())

    def or_these(self, missed: Sequence[int] | Counts) -> "AllowedMisses":
        """Allow these misses too."""
        return self.exactly(np.maximum(self.counts, np.asarray(missed)))

    def exactly(self, missed: Sequence[int] | Counts) -> "AllowedMisses":
        """Allow just these misses."""
        return AllowedMisses(np.asarray(missed, dtype=np.int64), self.requests, self.weights)

    def within_weight(self, weight: float) -> Counts:
        """Most misses of each class by itself that weigh no more than this."""
        most = np.floor(weight / self.weights + 1e-9).astype(np.int64)
        return np.minimum(most, self.requests)


def missed_by_class(
    slo: Slo, phase: str, pool: RequestTable, finish_s: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], Counts]:
    """Which requests completed too late, and how many of each class.

    The comparison is that of the compiled transitions; what never finished is not counted, as
    there.

    Args:
        slo: the SLO.
        phase: ``prefill`` or ``decode``.
        pool: the workload.
        finish_s: when requests completed, s.
    """
    numbers = class_numbers(slo, pool)
    bound_s = slo.bound_s(phase) * slo.class_scales(phase)[numbers]
    steps = pool.output - 1 if phase == "decode" else 1
    missed = finish_s - pool.arrival_s > bound_s * steps
    return missed, per_class(numbers, missed, len(slo.class_names))[1]


def class_numbers(slo: Slo, pool: RequestTable) -> NDArray[np.integer[Any]]:
    """Class of each request; that of none where there is one bound for all."""
    return pool.slo_class if slo.classes else np.zeros(len(pool.prompt), dtype=np.int8)
