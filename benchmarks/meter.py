"""Speed metrics on pytest-benchmark: each with its target, shown as a ratio, kept as JSON.

CPU time of this process counts (other programs then disturb little) and the
best of many rounds is the metric: the question is what the code costs, not what else was running.
Wall time is measured where a benchmark says so.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

ROUNDS = 20


@dataclass(frozen=True)
class Metric:
    """One measured metric.

    Attributes:
        name: what was measured.
        value: in ``unit``.
        unit: unit of value, beside and target.
        target: a bound from above, or from below if ``better`` is ``higher``.
        better: ``lower`` or ``higher``.
        beside: a second value, e.g. the median beside the best.
        beside_is: what the second value is.
    """

    name: str
    value: float
    unit: str
    target: float
    better: str = "lower"
    beside: float | None = None
    beside_is: str = "median"

    @property
    def ratio(self) -> float:
        """How many times better than the target; below 1 misses it."""
        if self.better == "higher":
            return self.value / self.target
        if self.value == 0.0:
            return float("inf")
        return self.target / self.value

    def line(self) -> str:
        """One line of the table at the end."""
        bound = "<=" if self.better == "lower" else ">="
        met = self.value <= self.target if self.better == "lower" else self.value >= self.target
        beside = "" if self.beside is None else f"  ({self.beside_is} {short(self.beside)})"
        return (
            f"{self.name:64s} {short(self.value):>9s} {self.unit:8s} {bound} "
            f"{short(self.target):>7s} {self.ratio:8.2f} x  {'met' if met else 'MISSED'}{beside}"
        )


def short(value: float) -> str:
    """Three digits, with k and M for thousands and millions."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.2f} M"
    return f"{value / 1e3:.0f} k" if abs(value) >= 1e4 else f"{value:.3g}"


class Meter:
    """Runs work under pytest-benchmark and keeps metrics of it."""

    def __init__(self, benchmark: Any) -> None:
        """Wrap the plug-in's fixture."""
        self.benchmark = benchmark
        self.metrics: list[Metric] = []

    def run(self, work: Callable[[], object], rounds: int = ROUNDS) -> tuple[float, float]:
        """Best and median time of the work, s, after one run to compile and warm up."""
        self.benchmark.pedantic(work, rounds=rounds, warmup_rounds=1)
        return self.benchmark.stats.stats.min, self.benchmark.stats.stats.median

    def once(self, work: Callable[[], Any]) -> Any:
        """Result of work that runs once and measures itself."""
        return self.benchmark.pedantic(work, rounds=1)

    def keep(self, *metrics: Metric) -> None:
        """Show these at the end and write them to the JSON."""
        self.metrics += metrics
        self.benchmark.extra_info["metrics"] = [
            asdict(m) | {"ratio": m.ratio} for m in self.metrics
        ]

    def time(
        self, work: Callable[[], object], name: str, unit: str, target: float, rounds: int = ROUNDS
    ) -> None:
        """Keep the time of the work; ``unit`` is s, ms or us."""
        factor = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
        best, median = self.run(work, rounds)
        self.keep(Metric(name, best * factor, unit, target, "lower", median * factor))

    def rate(
        self,
        work: Callable[[], object],
        count: float,
        name: str,
        unit: str,
        target: float,
        rounds: int = ROUNDS,
    ) -> None:
        """Keep how many of ``count`` things the work does per second."""
        best, median = self.run(work, rounds)
        self.keep(Metric(name, count / best, unit, target, "higher", count / median))
