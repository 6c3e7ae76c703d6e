"""Tier 1: which instances, at which base clocks.

BiScale's integer programme and DistServe's max-goodput search over one capacity table.

A table holds, per configuration c = (phase, TP, base clock), the highest load R_c that one instance
serves within its SLO, and the energy E_c per request at that load. BiScale (arXiv 2602.18755,
second-hand): minimise ``sum n_c E_c R_c`` subject to ``sum n_c G_c <= G`` and, per phase, ``sum n_c
R_c >= (1 + alpha) R``. DistServe (OSDI 2024): enumerate counts and TP per phase at the highest
clock and take the placement with the largest goodput.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from biscale_env.config.cluster_layout import InstanceGroup, Placement
from biscale_env.core.errors import BiscaleError

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
MIN_WEIGHT = 1e-3  # routing weight of a configuration that serves nothing within the SLO


class NoPlacementError(BiscaleError):
    """No placement serves a load within the SLO; says what would be possible."""


@dataclass(frozen=True)
class CapacityEntry:
    """What one instance of a configuration can do.

    Attributes:
        phase: ``prefill`` or ``decode``.
        tp: GPUs.
        freq_mhz: base clock.
        rate_rps: highest load within the SLO, requests/s; 0 when there is none.
        energy_j: energy per request at that load, idle time included, J.
    """

    phase: Phase
    tp: int
    freq_mhz: float
    rate_rps: float
    energy_j: float

    @property
    def power_w(self) -> float:
        """Power of the instance at its capacity, W."""
        return self.rate_rps * self.energy_j


@dataclass(frozen=True)
class CapacityTable:
    """Entries of all configurations for one workload and SLO.

    Attributes:
        entries: one per configuration.
        slo: name of the SLO.
        workload: name of the workload.
    """

    entries: tuple[CapacityEntry, ...]
    slo: str = ""
    workload: str = ""

    def usable(self, phase: Phase | None = None) -> list[CapacityEntry]:
        """Entries that serve any load at all, of one phase or both."""
        return [e for e in self.entries if e.rate_rps > 0 and phase in (None, e.phase)]

    def at_max(self) -> "CapacityTable":
        """The entries at the highest clock only."""
        top = max(e.freq_mhz for e in self.entries)
        return CapacityTable(
            tuple(e for e in self.entries if e.freq_mhz == top), self.slo, self.workload
        )

    def find(self, phase: str, tp: int, freq_mhz: float) -> CapacityEntry:
        """The entry of a configuration.

        Raises:
            BiscaleError: not in the table.
        """
        for e in self.entries:
            if (e.phase, e.tp, e.freq_mhz) == (phase, tp, freq_mhz):
                return e
        raise BiscaleError(f"the capacity table has no {phase} TP{tp} at {freq_mhz:g} MHz")


@dataclass(frozen=True)
class Plan:
    """A placement with what the table predicts of it.

    Attributes:
        placement: the instances, with R_c as routing weights.
        capacity_rps: load each phase can serve, requests/s.
        power_w: power at capacity, spare GPUs not counted: BiScale's objective, W.
        rate_rps: load it was made for.
    """

    placement: Placement
    capacity_rps: dict[str, float]
    power_w: float
    rate_rps: float

    @property
    def goodput_rps(self) -> float:
        """Load that both phases can serve, requests/s."""
        return min(self.capacity_rps.values())

    @property
    def headroom(self) -> float:
        """Fraction of capacity above the load; negative when it does not suffice."""
        return self.goodput_rps / self.rate_rps - 1.0


def make_plan(
    name: str, chosen: list[tuple[CapacityEntry, int]], rate_rps: float, source: str
) -> Plan:
    """Plan of ``(entry, count)`` pairs; pairs with count 0 are left out."""
    kept = [(e, n) for e, n in chosen if n > 0]
    groups = tuple(
        InstanceGroup(
            phase=e.phase, tp=e.tp, freq_mhz=e.freq_mhz, count=n, weight=max(e.rate_rps, MIN_WEIGHT)
        )
        for e, n in kept
    )
    capacity = {
        str(phase): sum((n * e.rate_rps for e, n in kept if e.phase == phase), 0.0)
        for phase in PHASES
    }
    power = sum(n * e.power_w for e, n in kept)
    return Plan(Placement(name=name, groups=groups, source=source), capacity, power, rate_rps)


def max_rate_rps(table: CapacityTable, gpus: int) -> float:
    """Highest load that any placement on ``gpus`` GPUs can serve, requests/s.

    0 when a phase has no usable configuration.
    """
    entries = table.usable()
    if any(not table.usable(phase) for phase in PHASES):
        return 0.0
    n = len(entries)
    cost = np.append(np.zeros(n), -1.0)
    rows = [np.append([e.tp for e in entries], 0.0)]
    rows += [
        np.append([-e.rate_rps * (e.phase == phase) for e in entries], 1.0) for phase in PHASES
    ]
    found = milp(
        cost,
        constraints=LinearConstraint(np.array(rows), -np.inf, [gpus, 0.0, 0.0]),
        integrality=np.append(np.ones(n), 0),
        bounds=Bounds(0, np.inf),
    )
    return float(-found.fun) if found.success else 0.0


def explain_infeasible(table: CapacityTable, rate_rps: float, gpus: int, alpha: float) -> str:
    """One sentence: what was asked, what is possible, and why."""
    asked = (
        f"no placement on {gpus} GPUs serves {rate_rps:g} requests/s with {100 * alpha:g} % "
        "headroom"
    )
    for phase in PHASES:
        if not table.usable(phase):
            return (
                f"{asked}: no {phase} configuration meets SLO '{table.slo}' at any load; choose a "
                "wider SLO"
            )
    smallest = sum(min(e.tp for e in table.usable(phase)) for phase in PHASES)
    if smallest > gpus:
        return (
            f"{asked}: one prefill and one decode instance need {smallest} GPUs; give at least so "
            "many"
        )
    best = max_rate_rps(table, gpus) / (1 + alpha)
    return (
        f"{asked} under SLO '{table.slo}': at most {best:.4g} requests/s are possible; lower the "
        "rate or add GPUs"
    )


def check_request(rate_rps: float, gpus: int, alpha: float) -> None:
    """Refuse impossible numbers.

    Raises:
        BiscaleError: names the number.
    """
    if not 0 < rate_rps < np.inf:
        raise BiscaleError(f"the rate must be a positive number of requests/s, got {rate_rps:g}")
    if gpus < 1:
        raise BiscaleError(f"a placement needs at least one GPU, got {gpus}")
    if not -1 < alpha < np.inf:
        raise BiscaleError(f"the headroom alpha must be above -1, got {alpha:g}")


def ilp_matrices(
    entries: list[CapacityEntry], rate_rps: float, gpus: int, alpha: float, spare_w: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """BiScale's programme: cost vector, and matrix and upper bounds of ``A n <= b``."""
    cost = np.array([e.power_w - e.tp * spare_w for e in entries])
    rows = [[float(e.tp) for e in entries]]
    rows += [[-e.rate_rps * (e.phase == phase) for e in entries] for phase in PHASES]
    need = (1 + alpha) * rate_rps
    return cost, np.array(rows), np.array([float(gpus), -need, -need])


def biscale_plan(
    table: CapacityTable,
    rate_rps: float,
    gpus: int,
    alpha: float = 0.1,
    spare_w: float = 0.0,
    name: str = "biscale",
    at_most: Mapping[tuple[str, int], int] | None = None,
) -> Plan:
    """BiScale's integer programme, solved by HiGHS to proven optimality.

    Args:
        table: capacities and energies.
        rate_rps: forecast load.
        gpus: GPUs of the cluster.
        alpha: headroom on the load; not published, 0.1 is assumed.
        spare_w: power that a GPU outside the placement still draws, W; 0 as in BiScale's objective.
        name: name of the placement.
        at_most: instances there can be of each (phase, TP), at all clocks together; None: as many
            as fit.

    Raises:
        NoPlacementError: no placement is feasible; says what would be possible.
    """
    check_request(rate_rps, gpus, alpha)
    entries = table.usable()
    if any(not table.usable(phase) for phase in PHASES):
        raise NoPlacementError(explain_infeasible(table, rate_rps, gpus, alpha))
    cost, rows, upper = ilp_matrices(entries, rate_rps, gpus, alpha, spare_w)
    for kind, count in (at_most or {}).items():
        rows = np.vstack([rows, [float((e.phase, e.tp) == kind) for e in entries]])
        upper = np.append(upper, float(count))
    found = milp(
        cost,
        constraints=LinearConstraint(rows, -np.inf, upper),
        integrality=np.ones(len(entries)),
        bounds=Bounds(0, np.array([gpus // e.tp for e in entries], dtype=float)),
        options={"mip_rel_gap": 0.0},
    )
    if not found.success:
        raise NoPlacementError(explain_infeasible(table, rate_rps, gpus, alpha))
    counts = np.rint(found.x).astype(int)
    source = f"BiScale's ILP for {rate_rps:g} requests/s, alpha {alpha:g}, on {table.workload}"
    return make_plan(name, list(zip(entries, counts.tolist(), strict=True)), rate_rps, source)


def distserve_plan(
    table: CapacityTable, rate_rps: float, gpus: int, name: str = "distserve"
) -> Plan:
    """DistServe's placement: counts and one TP per phase with the largest goodput.

    It is chosen at the highest clock and for goodput, whatever the load, on all GPUs it can use;
    among equals the one with fewer GPUs.

    Raises:
        NoPlacementError: no placement fits.
    """
    check_request(rate_rps, gpus, 0.0)
    top = table.at_max()
    best: tuple[float, int, list[tuple[CapacityEntry, int]]] | None = None
    for p, d in product(top.usable("prefill"), top.usable("decode")):
        for n_p in range(1, gpus // p.tp + 1):
            left = gpus - n_p * p.tp
            n_d = left // d.tp
            if n_d < 1:
                break
            goodput = min(n_p * p.rate_rps, n_d * d.rate_rps)
            used = n_p * p.tp + n_d * d.tp
            if best is None or (goodput, -used) > (best[0], best[1]):
                best = (goodput, -used, [(p, n_p), (d, n_d)])
    if best is None:
        raise NoPlacementError(explain_infeasible(table, rate_rps, gpus, 0.0))
    return make_plan(name, best[2], rate_rps, f"DistServe's max goodput on {table.workload}")


def at_clocks(plan: Plan, table: CapacityTable, freq_mhz: dict[str, float], name: str) -> Plan:
    """The same instances with one base clock per phase.

    Args:
        plan: where the instances come from.
        table: capacities at the new clocks.
        freq_mhz: clock of each phase, MHz.
        name: name of the new placement.
    """
    chosen = [
        (table.find(g.phase, g.tp, freq_mhz[g.phase]), g.count) for g in plan.placement.groups
    ]
    return make_plan(name, chosen, plan.rate_rps, f"{plan.placement.name} at fixed clocks")


def plan_row(plan: Plan) -> dict[str, Any]:
    """Flat metrics of a plan for tables."""
    return {
        "placement": plan.placement.name,
        "instances": plan.placement.label(),
        "gpus": plan.placement.gpus,
        "prefill_capacity_rps": plan.capacity_rps["prefill"],
        "decode_capacity_rps": plan.capacity_rps["decode"],
        "headroom": plan.headroom,
        "power_at_capacity_w": plan.power_w,
    }
