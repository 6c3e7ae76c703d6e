"""What a window costs by instances and load, tier 2 inside: measured once, then looked up.

The phases are looked at one by one: instances of one TP at the highest base clock (tier 2 lowers
it) beside more than enough of the other phase. Their power, and the fraction of requests that miss
the phase's bound, over the load relative to what the capacity table promises. What a window leaves
behind counts, too: it is followed by one of the same load with enough instances, and what is missed
there is added.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agents.coarse.service_days import ConstantLoad
from biscale_env.config.cluster_layout import InstanceGroup, Placement
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_env import ClusterEnv
from biscale_env.envs.cluster.cluster_settings import ClusterPlant, Transitions
from biscale_env.envs.cluster.whole_run import WindowedRun, cut
from controllers.placement.ilp import PHASES
from controllers.placement.load_plans import LoadPlans

Floats = NDArray[np.float64]
BELOW: Final = (0.05, 0.15, 0.3, 0.45, 0.6, 0.7, 0.78, 0.84, 0.88, 0.92, 0.96)
ABOVE: Final = (1.0, 1.04, 1.08, 1.13, 1.2, 1.3, 1.5, 1.8)
SHARES: Final = np.array([*BELOW, *ABOVE])
"""Loads at which windows are measured, relative to the capacity; dense where misses begin."""
OTHERS: Final = 1.5  # capacity of the other phase over the load; assumed to be more than enough
RECOVERY: Final = 1.3  # capacity over the load in the window after; assumed, as for a day
LEFT_BEHIND: Final = 0.02  # fewer missed requests than this leave nothing behind (assumed)
WARM_UP_S: Final = 60.0
BEYOND: Final = 2.0  # instances that serve more than this times the largest placement are left out
ELSEWHERE: Final = {"gpus", "transitions", "spare", "spare_idle_w"}
"""Settings that a measured window does not depend on; the agent takes them from its cluster."""


@dataclass(frozen=True)
class WindowCosts:
    """Measured costs of instances; arrays over m kinds of them and k loads.

    Attributes:
        kinds: (phase, TP, number of instances) of each.
        capacity_rps: (m,), by the capacity table.
        power_w: (m, k), of all of the instances.
        missed: (m, k), requests beyond the phase's bound over those of a window; up to 2, since
            what a window leaves behind may make the next one miss all.
        about: what they were measured on: settings, workload profile.
    """

    kinds: tuple[tuple[str, int, int], ...]
    capacity_rps: Floats
    power_w: Floats
    missed: Floats
    about: dict[str, Any]

    def at(self, kind: int, loads_rps: Floats) -> tuple[Floats, Floats]:
        """Power, W, and missed fraction of one kind at loads (n,), requests/s.

        Linear in between. Misses never fall with the load, and what exceeds the capacity counts
        once more, since it is still there afterwards: else all placements would be alike where
        none serves the load, and the smallest would be the cheapest.
        """
        share = loads_rps / self.capacity_rps[kind]
        missed = np.interp(share, SHARES, np.maximum.accumulate(self.missed[kind]))
        left = 1.0 - 1.0 / np.maximum(share, 1.0)
        return np.interp(share, SHARES, self.power_w[kind]), missed + left

    def number(self, phase: str, tp: int, count: int) -> int | None:
        """Which kind this is; None where it was not measured."""
        kind = (phase, tp, count)
        return self.kinds.index(kind) if kind in self.kinds else None

    @property
    def request_j(self) -> float:
        """Energy of a mean request at best, J: the unit of prices."""
        load = SHARES * self.capacity_rps[:, None]
        per_request = self.power_w / load
        phases = np.array([kind[0] for kind in self.kinds])
        served = np.where(self.missed < 0.01, per_request, np.inf)
        return float(sum(served[phases == phase].min() for phase in PHASES))

    def check_made_for(self, env: ClusterEnv) -> None:
        """Refuse an environment that these costs say nothing about.

        Raises:
            BiscaleError: names the first setting that differs.
        """
        here = measured_on(env)
        for name in sorted(here.keys() | self.about.keys()):
            if here.get(name) != self.about.get(name):
                raise BiscaleError(
                    f"the costs of windows were measured with {name}={self.about.get(name)!r}, not "
                    f"{here.get(name)!r}: train for this cluster with 'biscale train cluster'"
                )


def measured_on(env: ClusterEnv) -> dict[str, Any]:
    """What costs of windows depend on: settings of instances, workload profile."""
    settings = env.plant.settings.model_dump(mode="json", exclude=ELSEWHERE)
    trace = env.options.capacities.trace
    return {**settings, "profile": env.options.capacities.profile if trace is None else trace.name}


@dataclass(frozen=True)
class KindAtLoads:
    """Instances to be measured.

    Attributes:
        phase: of the instances.
        tp: their TP.
        count: how many.
        capacity_rps: of all of them.
        other_rps: capacity of one instance of the other phase.
        window_s: length of a measured window.
        freq_mhz: base clock.
        other_tp: TP of that instance.
    """

    phase: str
    tp: int
    count: int
    capacity_rps: float
    other_rps: float
    window_s: float
    freq_mhz: float
    other_tp: int

    def placement(self, load_rps: float, recovers: bool = False) -> Placement:
        """The instances, beside more than enough of the other phase.

        Args:
            load_rps: that is to be run.
            recovers: at least as many instances as a headroom of 30 % asks for.
        """
        other = next(str(p) for p in PHASES if p != self.phase)
        enough = int(np.ceil(RECOVERY * load_rps * self.count / self.capacity_rps))
        own = max(self.count, enough) if recovers else self.count
        count = int(np.ceil(OTHERS * load_rps / self.other_rps)) + 1
        groups = (
            _group(self.phase, self.tp, own, self.freq_mhz),
            _group(other, self.other_tp, count, self.freq_mhz),
        )
        return Placement(name="measured", groups=groups)


def _group(phase: Any, tp: int, count: int, freq_mhz: float) -> InstanceGroup:
    return InstanceGroup(phase=phase, tp=tp, count=count, freq_mhz=freq_mhz)


def measure_kind(plant: ClusterPlant, kind: KindAtLoads, profile: str) -> tuple[Floats, Floats]:
    """Power, W, and missed fraction at each of the loads, (k,) each."""
    index, power_w, missed = PHASES.index(kind.phase), [], []  # type: ignore[arg-type]
    bounds = (plant.slo.ttft_s, plant.slo.tpot_s)
    for share in SHARES:
        load_rps = float(share * kind.capacity_rps)
        trace = ConstantLoad("constant", 0, load_rps, profile).trace(3, kind.window_s)
        first, second, third = cut(trace, kind.window_s)
        run = WindowedRun(plant, kind.placement(load_rps))
        run.window(0, first.window(max(kind.window_s - WARM_UP_S, 0.0), kind.window_s))
        window = run.window(1, second)
        energy_j = (window.energy.prefill_j, window.energy.decode_j)[index]
        power_w.append(energy_j / window.duration_s)
        late = window.missed(*bounds)[index]
        if late > LEFT_BEHIND * len(second):
            run.cluster.place(kind.placement(load_rps, recovers=True))
            late += run.window(2, third).missed(*bounds)[index]
        missed.append(late / max(len(second), 1))
    return np.array(power_w), np.array(missed)


def kinds_of(env: ClusterEnv, plans: LoadPlans, window_s: float) -> list[KindAtLoads]:
    """Instances of every placement of an environment, but those far beyond its largest one."""
    table = plans.table.at_max()
    top = max(e.freq_mhz for e in table.entries)
    most = min(plans.capacity_rps(plans.largest, phase) for phase in PHASES)
    smallest = {p: min(table.usable(p), key=lambda e: e.tp) for p in PHASES}
    asked = {(g.phase, g.tp, g.count) for p in env.placements for g in p.groups}
    found = []
    for phase, tp, count in sorted(asked):
        capacity = count * table.find(phase, tp, top).rate_rps
        other = smallest["decode" if phase == "prefill" else "prefill"]
        if 0 < capacity <= BEYOND * most:
            found.append(
                KindAtLoads(phase, tp, count, capacity, other.rate_rps, window_s, top, other.tp)
            )
    return found


def measure_costs(
    env: ClusterEnv, kinds: Sequence[KindAtLoads], told: Callable[[int, int], None]
) -> WindowCosts:
    """Measure every kind in the simulator behind an environment; seconds.

    Args:
        env: settings and workload profile.
        kinds: instances.
        told: called with (done, all) after each.
    """
    settings = env.plant.settings
    most = max(
        g.tp * g.count for kind in kinds for g in kind.placement(kind.capacity_rps * 2).groups
    )
    free = Transitions()
    plant = ClusterPlant(settings.changed(gpus=2 * most + settings.gpus, transitions=free))
    rows = []
    for done, kind in enumerate(kinds, start=1):
        rows.append(measure_kind(plant, kind, env.options.capacities.profile))
        told(done, len(kinds))
    return WindowCosts(
        tuple((k.phase, k.tp, k.count) for k in kinds),
        np.array([k.capacity_rps for k in kinds]),
        np.array([power for power, _ in rows]),
        np.array([missed for _, missed in rows]),
        measured_on(env),
    )
