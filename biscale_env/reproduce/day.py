"""A whole day of a cluster: requests are streamed and only sums are kept.

Tier 1 plans every window, tier 2 runs inside.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from biscale_env.envs.cluster.cluster_settings import ClusterSettings
from biscale_env.envs.cluster.stream import daily_windows
from biscale_env.envs.cluster.whole_run import Window, WindowedRun
from biscale_env.reproduce.day_defaults import BOTH_TIERS, DAY_MARGIN
from biscale_env.reproduce.systems import SYSTEMS, Bench, System, TunedSystem, planner_of
from biscale_env.traces import Trace, generate, load_lengths
from controllers.placement.capacity_table import TableRequest, capacity_table
from controllers.placement.ilp import check_request

WINDOW_S = 300.0
LATE = ("late_ttft", "late_tpot")


@dataclass(frozen=True)
class Day:
    """What came of a day.

    Attributes:
        windows: one row per window.
        seconds: wall time of the simulation (the generation of requests included).
        memory_mb: largest resident memory of the process.
    """

    windows: list[dict[str, Any]]
    seconds: float
    memory_mb: float

    def totals(self) -> dict[str, float]:
        """Sums and fractions over the day."""
        sums = {
            name: float(sum(w[name] for w in self.windows))
            for name in ("requests", "tokens", "energy_j", *LATE)
        }
        for stage in ("prefill_j", "decode_j", "spare_j"):
            sums[stage] = float(sum(w[stage] for w in self.windows))
        return {
            **sums,
            "j_per_token": sums["energy_j"] / max(sums["tokens"], 1.0),
            "attainment_ttft": 1.0 - sums["late_ttft"] / max(sums["requests"], 1.0),
            "attainment_tpot": 1.0 - sums["late_tpot"] / max(sums["requests"], 1.0),
            "changes": float(
                sum(
                    a["placement"] != b["placement"]
                    for a, b in zip(self.windows, self.windows[1:], strict=False)
                )
            ),
        }

    def figures(self) -> dict[str, float]:
        """Sums, and what the simulation took."""
        return {**self.totals(), "seconds": self.seconds, "memory_mb": self.memory_mb}


def day_row(window: Window, ttft_s: float, tpot_s: float) -> dict[str, Any]:
    """Metrics of a window; requests count where they end."""
    late, slow = window.missed(ttft_s, tpot_s)
    length = max(window.duration_s, 1e-9)
    return {
        "index": window.index,
        "duration_s": window.duration_s,
        "rate_rps": window.arrived / length,
        "requests": len(window.finished),
        "tokens": window.produced_tokens,
        "energy_j": window.energy.total_j,
        "prefill_j": window.energy.prefill_j,
        "decode_j": window.energy.decode_j,
        "spare_j": window.energy.spare_j,
        "power_w": window.energy.total_j / length,
        "late_ttft": late,
        "late_tpot": slow,
        "gpus": window.placement.gpus,
        "placement": window.placement.label(),
    }


def run_day(
    system: System,
    tuned: TunedSystem,
    bench: Bench,
    pieces: Iterable[Trace],
    progress: Callable[[int], None] | None = None,
) -> Day:
    """Run a system over a stream of windows.

    Args:
        system: tier 1 and tier 2.
        tuned: its free parameters.
        bench: cluster, table, forecast of the first window.
        pieces: the stream.
        progress: called with the number of each finished window.
    """
    start = time.perf_counter()
    plant = bench.plant(system, tuned)
    planner = planner_of(system, tuned, bench)
    loop = WindowedRun(plant, planner(0, None))
    rows = []
    for window in loop.over(pieces, planner):
        rows.append(day_row(window, plant.slo.ttft_s, plant.slo.tpot_s))
        if progress is not None:
            progress(window.index)
    return Day(rows, time.perf_counter() - start, peak_memory_mb())


def peak_memory_mb() -> float:
    """Most memory that this process has held, MB; NaN where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 2**20 if sys.platform == "darwin" else 2**10  # getrusage(2): bytes there, kB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def day_bench(settings: dict[str, Any], rate: float, lengths: str) -> Bench:
    """The cluster of a day and its capacity table, made on ten minutes of generated requests."""
    cluster = ClusterSettings.of(**settings)
    sample = generate(
        "azure-conv-like",
        rate_rps=rate,
        duration_s=600.0,
        seed=1_000_003,
        lengths=load_lengths(lengths),
    )
    return Bench(cluster, capacity_table(TableRequest(cluster), sample), rate, WINDOW_S)


def day_systems() -> dict[str, System]:
    """The systems of a day; tier 2 has EcoFreq in prefill and the slack rule in decode."""
    both = replace(SYSTEMS["biscale"], prefill="ecofreq")
    return {"DistServe": SYSTEMS["distserve"], "tier 1": SYSTEMS["placeonly"], BOTH_TIERS: both}


@dataclass(frozen=True)
class DayPlan:
    """What a day is made of.

    Attributes:
        settings: the cluster, keys of ``ClusterSettings``.
        rate_rps: mean load, requests/s.
        duration_s: how long, s.
        lengths: length profile.
        alpha: headroom of tier 1 over the load of the window before.
    """

    settings: dict[str, Any]
    rate_rps: float
    duration_s: float
    lengths: str
    alpha: float


def run_days(
    plan: DayPlan, progress: Callable[[int], None] | None = None
) -> Iterator[tuple[str, Day]]:
    """Run every system over the same stream; yields title and day.

    Args:
        plan: what the day is made of.
        progress: called with the number of each finished window.

    Raises:
        BiscaleError: an impossible load, cluster or headroom.
    """
    check_request(plan.rate_rps, plan.settings["gpus"], plan.alpha)
    bench = day_bench(plan.settings, plan.rate_rps, plan.lengths)
    tuned = TunedSystem(alpha=plan.alpha, prefill_margin=DAY_MARGIN, decode_margin=DAY_MARGIN)
    for title, system in day_systems().items():
        pieces = daily_windows(
            rate_rps=plan.rate_rps, duration_s=plan.duration_s, lengths=plan.lengths
        )
        yield title, run_day(system, tuned, bench, pieces, progress)
