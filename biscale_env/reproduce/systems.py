"""The systems of the headline experiment.

Which tier 1 and which tier 2 each has, how its free parameters are chosen, how it is run.

Free parameters (headroom alpha, margins, static clocks) are chosen on tuning workloads: the value
of least energy that meets the SLO there. Where none does, the safest value is taken and the tables
say that the SLO is missed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from biscale_env.config.cluster_layout import InstanceGroup, Placement
from biscale_env.envs.cluster.cluster_options import fitting_tps
from biscale_env.envs.cluster.cluster_settings import ClusterPlant, ClusterSettings
from biscale_env.envs.cluster.whole_run import ClusterRun, Planner, Window, run_windows
from biscale_env.traces import Trace
from controllers.placement.capacity_table import MIN_REQUESTS, TableRequest, capacity_table
from controllers.placement.coarse_rules import TUNE_GUARD
from controllers.placement.ilp import (
    PHASES,
    CapacityTable,
    NoPlacementError,
    at_clocks,
    biscale_plan,
    distserve_plan,
)

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
MARGINS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
# of a window's table: half the time of a workload's, and B-67 stays within 4 %
WINDOW_CHOICES = (0,)
WINDOW_TOLERANCE = 0.02


@dataclass(frozen=True)
class System:
    """What a system is made of.

    Attributes:
        tier1: where the instances come from: DistServe's search, BiScale's ILP, or co-located
            servers.
        prefill: tier-2 rule of prefill.
        decode: tier-2 rule of decode.
        best_clock: static clocks are chosen per phase instead of the highest (DistServe's and
            co-located instances only).
        title: name in tables.
    """

    tier1: Literal["distserve", "biscale", "colocated"]
    prefill: str
    decode: str
    best_clock: bool
    title: str

    @property
    def has_margin(self) -> bool:
        """Whether tier 2 has margins to choose."""
        return (self.prefill, self.decode) != ("static", "static")


SYSTEMS = {
    "distserve": System("distserve", "static", "static", False, "DistServe (max clock)"),
    "static-best": System(
        "distserve", "static", "static", True, "DistServe instances, best static clock per phase"
    ),
    "placeonly": System("biscale", "static", "static", False, "PlaceOnly (tier 1)"),
    "biscale": System("biscale", "mpc", "slack", False, "BiScale (tier 1 + 2)"),
    "tier2-only": System(
        "distserve", "mpc", "slack", False, "tier 2 only (MPC, slack on DistServe's instances)"
    ),
    "ecofreq": System("distserve", "ecofreq", "ecofreq", False, "EcoFreq on DistServe's instances"),
    "throttllem": System(
        "distserve", "throttllem", "throttllem", False, "throttLL'eM on DistServe's instances"
    ),
    "colocated": System("colocated", "static", "static", False, "co-located, max clock"),
    "colocated-best": System(
        "colocated", "static", "static", True, "co-located, best static clock"
    ),
}


@dataclass(frozen=True)
class TunedSystem:
    """Free parameters of a system.

    Attributes:
        alpha: headroom of tier 1.
        freq_mhz: static clock per phase, where one was chosen.
        tp: TP of co-located servers.
        prefill_margin: fraction of the TTFT SLO kept back.
        decode_margin: fraction of the TPOT SLO kept back.
        met: whether the SLO was met on the tuning workloads.
    """

    alpha: float = 0.1
    freq_mhz: dict[str, float] = field(default_factory=dict)
    tp: int = 0
    prefill_margin: float = 0.0
    decode_margin: float = 0.0
    met: bool = True


@dataclass(frozen=True)
class Bench:
    """Everything that a system is run in: one operating point in one plant.

    Attributes:
        settings: the cluster, without tier-2 rules.
        table: capacity table of the tuning workload.
        rate_rps: forecast of the first window.
        window_s: period of tier 1.
        spare_w: what BiScale's ILP takes an unused GPU to draw, W.
        alpha: headroom of tier 1; None: chosen on the tuning workloads.
        per_window: BiScale's tier 1 measures a table of its own on the requests of every window.
        measured: tables of windows, by the hash of the window: tuning meets each many times.
    """

    settings: ClusterSettings
    table: CapacityTable
    rate_rps: float
    window_s: float
    spare_w: float = 0.0
    alpha: float | None = None
    per_window: bool = False
    measured: dict[str, CapacityTable] = field(default_factory=dict, compare=False, repr=False)

    def table_after(self, window: Trace) -> CapacityTable:
        """Capacity table that tier 1 plans with once it has seen a window.

        A window of too few requests for a table of its own leaves that of the tuning workload.
        """
        if not self.per_window or len(window) < MIN_REQUESTS:
            return self.table
        if window.sha256 not in self.measured:
            clocks = tuple(self.levels_mhz())
            request = TableRequest(self.settings, clocks, WINDOW_CHOICES, WINDOW_TOLERANCE)
            self.measured[window.sha256] = capacity_table(request, window)
        return self.measured[window.sha256]

    def plant(self, system: System, tuned: TunedSystem) -> ClusterPlant:
        """The cluster with the system's rules and margins."""
        return ClusterPlant(
            self.settings.changed(
                prefill_policy=system.prefill,
                decode_policy=system.decode,
                prefill_margin=tuned.prefill_margin,
                decode_margin=tuned.decode_margin,
            )
        )

    def top_mhz(self) -> float:
        """Highest clock of the table."""
        return max(e.freq_mhz for e in self.table.entries)

    def levels_mhz(self) -> list[float]:
        """Clocks of the table, rising."""
        return sorted({e.freq_mhz for e in self.table.entries})


def colocated_placement(gpus: int, tp: int, freq_mhz: float) -> Placement:
    """As many co-located servers as fit."""
    group = InstanceGroup(phase="colocated", tp=tp, freq_mhz=freq_mhz, count=gpus // tp)
    return Placement(
        name=f"colocated-tp{tp}", groups=(group,), source="every GPU in a co-located server"
    )


Plans = dict[tuple[float, float], Placement | None]
"""Placements by forecast, requests/s, and headroom; None where there is none."""


def planner_of(
    system: System, tuned: TunedSystem, bench: Bench, plans: Plans | None = None
) -> Planner:
    """Tier 1 of a system: called at the start of every window.

    BiScale's forecast is the load of the window before, and where the bench says so its table is
    measured on the same requests. If no placement serves it with the headroom, DistServe's is
    taken; a window without requests changes nothing.

    Args:
        system: tier 1 and tier 2.
        tuned: its free parameters.
        bench: cluster, table, forecast of the first window.
        plans: those made before of the bench's table, shared by the planners of one bench; whoever
            gives them clears them. None: every window is solved.
    """
    gpus = bench.settings.gpus
    if system.tier1 == "colocated":
        top = tuned.freq_mhz.get("colocated", bench.top_mhz())
        placement = colocated_placement(gpus, tuned.tp, top)
        return lambda k, before: placement
    base = distserve_plan(bench.table, bench.rate_rps, gpus)
    if tuned.freq_mhz:
        base = at_clocks(base, bench.table, tuned.freq_mhz, "distserve-best")
    if system.tier1 == "distserve":
        return lambda k, before: base.placement
    current = {"placement": base.placement}

    def plan(k: int, before: Trace | None) -> Placement:
        rate = bench.rate_rps if before is None else before.rate_rps
        if rate > 0:
            table = bench.table if before is None else bench.table_after(before)
            known = plans if plans is not None and table is bench.table else {}
            if (rate, tuned.alpha) not in known:
                known[rate, tuned.alpha] = _solved(bench, table, rate, tuned.alpha)
            current["placement"] = known[rate, tuned.alpha] or base.placement
        return current["placement"]

    return plan


def _solved(bench: Bench, table: CapacityTable, rate: float, alpha: float) -> Placement | None:
    """BiScale's placement for a forecast; None where nothing serves it."""
    try:
        return biscale_plan(table, rate, bench.settings.gpus, alpha, bench.spare_w).placement
    except NoPlacementError:
        return None


def run_system(
    system: System, tuned: TunedSystem, bench: Bench, trace: Trace, seed: int = 0
) -> tuple[ClusterRun, list[Window]]:
    """Run a system over a trace."""
    return run_windows(
        bench.plant(system, tuned), planner_of(system, tuned, bench), trace, bench.window_s, seed
    )


def attained(runs: Sequence[ClusterRun], phase: str) -> float:
    """Attainment of one bound over several runs, requests weighted alike."""
    counts = np.array([len(r.requests) for r in runs], dtype=float)
    return float(np.average([r.attainment(phase) for r in runs], weights=counts))


def meets(runs: Sequence[ClusterRun], phase: str) -> bool:
    """Whether the bound of a phase is met over several tuning runs, with something to spare."""
    required = runs[0].slo.attainment
    return attained(runs, phase) >= required + TUNE_GUARD * (1.0 - required)


def tune(system: System, bench: Bench, workloads: Sequence[Trace]) -> TunedSystem:
    """Choose the free parameters of a system on tuning workloads."""
    if system.tier1 == "colocated":
        return _tune_colocated(system, bench, workloads)
    if system.best_clock:
        return _tune_clocks(system, bench, workloads)
    tuned = TunedSystem()
    if system.tier1 == "biscale":
        tuned = (
            _tune_alpha(bench, workloads) if bench.alpha is None else TunedSystem(alpha=bench.alpha)
        )
    return _tune_margins(system, tuned, bench, workloads) if system.has_margin else tuned


def _runs(
    system: System, tuned: TunedSystem, bench: Bench, workloads: Sequence[Trace]
) -> list[ClusterRun]:
    return [run_system(system, tuned, bench, w, seed)[0] for seed, w in enumerate(workloads)]


def _tune_alpha(bench: Bench, workloads: Sequence[Trace]) -> TunedSystem:
    """Smallest headroom with which tier 1 alone meets the SLO."""
    for alpha in ALPHAS:
        tuned = TunedSystem(alpha=alpha)
        runs = _runs(SYSTEMS["placeonly"], tuned, bench, workloads)
        if all(meets(runs, phase) for phase in PHASES):
            return tuned
    return replace(tuned, met=False)


def _tune_margins(
    system: System, tuned: TunedSystem, bench: Bench, workloads: Sequence[Trace]
) -> TunedSystem:
    """Per phase the smallest margin that meets the SLO.

    Margins of one phase do not touch the other but through load.
    """
    chosen: dict[str, float] = {}
    for margin in MARGINS:
        both = {phase: chosen.get(phase, margin) for phase in PHASES}
        trial = replace(tuned, prefill_margin=both["prefill"], decode_margin=both["decode"])
        runs = _runs(system, trial, bench, workloads)
        for phase in PHASES:
            if phase not in chosen and meets(runs, phase):
                chosen[phase] = margin
        if len(chosen) == len(PHASES):
            break
    worst = MARGINS[-1]
    return replace(
        tuned,
        prefill_margin=chosen.get("prefill", worst),
        decode_margin=chosen.get("decode", worst),
        met=len(chosen) == len(PHASES),
    )


def _stage_energy_j(run: ClusterRun, phase: str) -> float:
    row = run.row()
    return row[f"{phase}_j_per_token"]


def _tune_clocks(system: System, bench: Bench, workloads: Sequence[Trace]) -> TunedSystem:
    """Per phase the static clock of least energy that meets the SLO."""
    found: dict[str, tuple[float, float]] = {}
    for freq in bench.levels_mhz():
        runs = _runs(system, TunedSystem(freq_mhz=dict.fromkeys(PHASES, freq)), bench, workloads)
        for phase in PHASES:
            energy = float(np.mean([_stage_energy_j(r, phase) for r in runs]))
            if meets(runs, phase) and (phase not in found or energy < found[phase][0]):
                found[phase] = (energy, freq)
    clocks = {str(phase): found.get(phase, (0.0, bench.top_mhz()))[1] for phase in PHASES}
    return TunedSystem(freq_mhz=clocks, met=len(found) == len(PHASES))


def _tune_colocated(system: System, bench: Bench, workloads: Sequence[Trace]) -> TunedSystem:
    """TP (and clock) of least energy that meets the SLO.

    Where none does, the TP that comes nearest at the highest clock.
    """
    best: tuple[bool, float] | None = None
    tuned = TunedSystem()
    for tp in fitting_tps(bench.settings, "colocated"):
        for freq in bench.levels_mhz() if system.best_clock else [bench.top_mhz()]:
            trial = TunedSystem(tp=tp, freq_mhz={"colocated": freq})
            runs = _runs(system, trial, bench, workloads)
            ok = all(meets(runs, phase) for phase in PHASES)
            worst = min(attained(runs, phase) for phase in PHASES)
            score = -float(np.mean([r.row()["total_j_per_token"] for r in runs])) if ok else worst
            if best is None or (ok, score) > best:
                best, tuned = (ok, score), replace(trial, met=ok)
    return tuned


def result_row(
    name: str, tuned: TunedSystem, run: ClusterRun, windows: Sequence[Window]
) -> dict[str, Any]:
    """Flat metrics of one run of a system."""
    inside = [w for w in windows if w.index >= 0]
    return {
        "system": name,
        **run.row(),
        "placement": inside[-1].placement.label(),
        "gpus_mean": float(np.mean([w.placement.gpus for w in inside])),
        "alpha": tuned.alpha,
        "prefill_margin": tuned.prefill_margin,
        "decode_margin": tuned.decode_margin,
        "tuned_met": tuned.met,
    }
