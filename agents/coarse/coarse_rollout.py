"""Days of ``BiScale/Cluster-v1`` under a coarse policy, and the one free parameter of each."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Final

from agents.coarse.service_days import ServiceDay
from biscale_env.envs.cluster.cluster_env import ClusterEnv
from controllers.placement.coarse_rules import TUNE_GUARD, CoarsePolicy

BOUNDS: Final = ("ttft", "tpot")


@dataclass(frozen=True)
class CoarseDay:
    """What came of a day.

    Attributes:
        day: the workload.
        windows: a row per window: load, energy, misses of each bound, GPUs, placement.
        requests: that were finished.
        unfinished: that were still in flight at the end.
    """

    day: ServiceDay
    windows: list[dict[str, Any]]
    requests: float
    unfinished: float = 0.0

    def total(self, name: str) -> float:
        """Sum over the windows."""
        return float(sum(w[name] for w in self.windows))

    @property
    def changes(self) -> int:
        """Windows whose instances are not those of the window before; clocks aside."""
        shapes = [w["shape"] for w in self.windows]
        return sum(a != b for a, b in pairwise(shapes))

    def row(self) -> dict[str, Any]:
        """Sums of the day."""
        sums = ("energy_j", "late_ttft", "late_tpot")
        return {
            "service": self.day.service,
            "day": self.day.day,
            "seed": self.day.seed,
            "requests": self.requests,
            "unfinished": self.unfinished,
            **{name: self.total(name) for name in sums},
            "gpus": self.total("gpus") / max(len(self.windows), 1),
            "changes": self.changes,
        }


def run_coarse_day(env: ClusterEnv, policy: CoarsePolicy, day: ServiceDay) -> CoarseDay:
    """A day under a policy, which sees the observation of the environment only.

    Args:
        env: takes the day as its workload.
        policy: chooses the placements.
        day: what arrives.
    """
    day.into(env)
    observation, _ = env.reset()
    rates = day.rates_rps(env.windows, env.window_s).tolist()
    rows: list[dict[str, Any]] = []
    memory, over = None, False
    while not over:
        placement, memory = policy.place(observation, memory)
        observation, _, _, over, info = env.step_placement(placement)
        rows.append(
            {
                "time_s": info["time_s"],
                "rate_rps": rates[len(rows)],
                "energy_j": info["energy_j"],
                "late_ttft": info["cost_ttft"],
                "late_tpot": info["cost_tpot"],
                "gpus": placement.gpus,
                "placement": placement.label(),
                "shape": placement.shape(),
            }
        )
    kpis = info["kpis"]
    return CoarseDay(day, rows, kpis["requests_finished"], kpis["requests_unfinished"])


@dataclass(frozen=True)
class Sums:
    """Several days together.

    Attributes:
        energy_j: of all GPUs.
        requests: finished.
        late_ttft: of them beyond the TTFT bound.
        late_tpot: of them beyond the TPOT bound.
    """

    energy_j: float
    requests: float
    late_ttft: float
    late_tpot: float

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> "Sums":
        """Of rows of days (:meth:`CoarseDay.row`)."""
        kept = list(rows)
        return cls(*(float(sum(row[f.name] for row in kept)) for f in fields(cls)))

    def attained(self, bound: str) -> float:
        """Fraction of the finished requests that kept ``ttft`` or ``tpot``."""
        return 1.0 - float(getattr(self, f"late_{bound}")) / max(self.requests, 1.0)

    def told(self) -> str:
        """In words."""
        kept = ", ".join(f"{bound.upper()} {self.attained(bound):.3%}" for bound in BOUNDS)
        return f"{self.energy_j / 3.6e6:.2f} kWh, {kept}"


def tuned_enough(sums: Sums, required: float) -> bool:
    """Whether both bounds are kept with something to spare, as the project tunes everything."""
    least = required + TUNE_GUARD * (1.0 - required)
    return all(sums.attained(bound) >= least for bound in BOUNDS)


def least_careful(
    settings: Sequence[float], is_enough: Callable[[float], bool]
) -> tuple[float, bool]:
    """The first of rising settings that is enough, by bisection; the last one if none is.

    Args:
        settings: from the least careful on; what is enough stays so further on.
        is_enough: runs the tuning days with a setting.

    Returns:
        The setting, and whether it is enough.
    """
    low, high = 0, len(settings)
    while low < high:
        middle = (low + high) // 2
        if is_enough(settings[middle]):
            high = middle
        else:
            low = middle + 1
    return settings[min(low, len(settings) - 1)], low < len(settings)
