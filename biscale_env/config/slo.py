"""The one definition of the service level objective.

Reward, MPC, placement and reports all use it.
"""

import re
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, field_validator, model_serializer

from biscale_env.config.loader import Config, load_named
from biscale_env.core.errors import BiscaleError

NO_CLASS: Final = "none"
"""What requests without a class are called in tables."""
MOST_CLASSES: Final = 8
"""Classes of an SLO, requests without one among them (assumed: operators have two or three)."""
LEAST_ALLOWED: Final = 1e-3
"""Fraction of misses that an SLO of 100 % is taken to allow where shares are compared (assumed)."""
TIME_RESOLUTION_S: Final = 1e-9
"""Differences of float64 instants carry rounding: 1.6 s - 1.0 s is more than 0.6 s.

A nanosecond is no violation.
"""


def within(latency_s: ArrayLike, bound_s: ArrayLike) -> NDArray[np.bool_]:
    """Whether latencies keep their bounds, up to rounding; NaN (never finished) does not.

    Every judgement of requests is this one. The compiled transitions (``finish_requests`` of the
    simulator) count violations while they run, by the same comparison without the nanosecond; a
    test holds the two together.

    Args:
        latency_s: TTFT, TPOT, or the span of a request, s.
        bound_s: the bound, or for a span the bound times its intervals, s.
    """
    return (
        np.asarray(latency_s, dtype=np.float64)
        <= np.asarray(bound_s, dtype=np.float64) + TIME_RESOLUTION_S
    )


class SloClass(Config):
    """What requests of one class are promised; what is not given is the SLO's own.

    Attributes:
        ttft_s: bound on the time to first token, s.
        tpot_s: bound on the time per output token, s.
        attainment: fraction of its requests that must meet the bound.
    """

    ttft_s: float | None = Field(default=None, gt=0)
    tpot_s: float | None = Field(default=None, gt=0)
    attainment: float | None = Field(default=None, gt=0, le=1)


class Slo(Config):
    """Service level objective.

    Attributes:
        name: short name used in tables.
        ttft_s: bound on the time to first token (prefill completes minus arrival), s.
        tpot_s: bound on the time per output token of a request, (last - first) / (tokens - 1), s.
        attainment: fraction of requests that must meet the bound: 0.99 is "P99".
        statistic: ``each``: TTFT and TPOT must each be met by that fraction; ``joint``: by the same
            requests.
        classes: classes of requests by their name in a trace, each with a bound and a fraction of
            its own; requests without a class are held to the SLO's own. Without classes there is
            one bound for all, whatever a trace says.
        source: where the numbers come from.
    """

    name: str
    ttft_s: float = Field(gt=0)
    tpot_s: float = Field(gt=0)
    attainment: float = Field(gt=0, le=1)
    statistic: Literal["each", "joint"] = "each"
    classes: dict[str, SloClass] = Field(default_factory=dict, max_length=MOST_CLASSES - 1)
    source: str = ""

    def __hash__(self) -> int:
        return hash((self.name, self.ttft_s, self.tpot_s, self.attainment, tuple(self.classes)))

    @field_validator("classes")
    @classmethod
    def _named(cls, classes: dict[str, SloClass]) -> dict[str, SloClass]:
        for name in classes:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name == NO_CLASS:
                raise ValueError(
                    f"a class is named by letters, digits, '.', '-' and '_', and not {NO_CLASS}, "
                    f"got '{name}'"
                )
        return classes

    @model_serializer(mode="wrap")
    def _without_empty(self, plain: Any) -> Any:
        """An SLO of one bound for all is written as it always was."""
        found = plain(self)
        if not self.classes:
            found.pop("classes", None)
        return found

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by number; 0 are requests without a class."""
        return (NO_CLASS, *self.classes)

    def of_class(self, k: int) -> "Slo":
        """What class number ``k`` is promised, as an SLO of one bound for all."""
        own = {} if k == 0 else self.classes[self.class_names[k]].model_dump(exclude_none=True)
        return self.model_copy(update={**own, "classes": {}})

    def bounds_s(self, phase: str, slo_class: ArrayLike | None) -> float | NDArray[np.float64]:
        """Bound of each request, s: of its class, or one for all where there are no classes.

        Args:
            phase: ``prefill`` or ``decode``.
            slo_class: number of each request's class; None: of none.
        """
        if not self.classes or slo_class is None:
            return self.bound_s(phase)
        each = [self.of_class(k).bound_s(phase) for k in range(len(self.class_names))]
        return np.array(each)[np.asarray(slo_class, dtype=np.int64)]

    def class_scales(self, phase: str) -> NDArray[np.float64]:
        """Bound of each class in units of the SLO's own, (classes,)."""
        numbers = range(len(self.class_names))
        return np.array([self.of_class(k).bound_s(phase) / self.bound_s(phase) for k in numbers])

    def bound_s(self, phase: str) -> float:
        """Bound that applies to one phase: TTFT for ``prefill``, TPOT for ``decode``, s.

        With classes, that of requests without one.
        """
        return self.ttft_s if phase == "prefill" else self.tpot_s

    def attained(
        self, latency_s: NDArray[np.float64], phase: str, slo_class: ArrayLike | None = None
    ) -> float:
        """Fraction of requests within the bound; with classes, of the class that is worst off.

        A request without a latency (NaN: never finished) is a violation. An empty sample attains
        1.0: nothing was asked, nothing was missed.

        Args:
            latency_s: latency of each request, s.
            phase: ``prefill`` or ``decode``.
            slo_class: number of each request's class; None: of none.
        """
        met = within(latency_s, self.bounds_s(phase, slo_class))
        if self.classes:
            codes = np.zeros(met.shape, dtype=np.int64) if slo_class is None else slo_class
            return self.worst_off(*per_class(codes, ~met, len(self.class_names)))[0]
        return float(np.mean(met)) if met.size else 1.0

    def allowed(self, k: int) -> float:
        """Fraction of class ``k`` that may miss, in units of what the SLO itself allows.

        An SLO that allows none counts as one that allows `LEAST_ALLOWED`.
        """
        own, base = (1.0 - slo.attainment for slo in (self.of_class(k), self))
        return max(own, LEAST_ALLOWED) / max(base, LEAST_ALLOWED)

    def worst_off(self, counted: ArrayLike, missed: ArrayLike) -> tuple[float, int]:
        """Attainment of the class that uses up most of what it may miss, and its number.

        It is told in the SLO's own terms, so that it reaches ``attainment`` exactly where every
        class holds what it is promised: where a class may miss five times as many as the SLO says,
        its misses count a fifth. With one promise for all classes it is their least attainment.

        Args:
            counted: requests of each class.
            missed: how many of them missed their bound.
        """
        n, late = np.asarray(counted, dtype=np.float64), np.asarray(missed, dtype=np.float64)
        allowed = np.array([self.allowed(k) for k in range(n.size)])
        used = np.divide(late, n, out=np.zeros_like(n), where=n > 0) / allowed
        k = int(np.argmax(used)) if used.any() else int(np.argmax(n))
        return float(1.0 - used[k]), k


def per_class(
    slo_class: ArrayLike, missed: ArrayLike, n_classes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Requests of each class, and how many of them missed their bound."""
    codes = np.asarray(slo_class, dtype=np.int64)
    late = codes[np.asarray(missed, dtype=np.bool_)]
    return np.bincount(codes, minlength=n_classes), np.bincount(late, minlength=n_classes)


def one_bound(slo: Slo, what: str) -> Slo:
    """The SLO, unless it has classes that something does not know.

    Raises:
        BiscaleError: it has classes; ``what`` names what does not know them.
    """
    if slo.classes:
        raise BiscaleError(
            f"{what}: SLO '{slo.name}' has classes, which only instances of one phase know "
            "(compare, evaluate, capacity, the environments of one instance): use an SLO without"
        )
    return slo


def load_slo(name: str = "biscale") -> Slo:
    """Load an SLO by name (``configs/slos``) or YAML file."""
    return load_named("slos", name, Slo)
