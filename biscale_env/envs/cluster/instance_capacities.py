"""Load that each kind of instance serves within the SLO, measured when first asked for."""

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Final

from biscale_env.config.cluster_layout import InstanceGroup, Placement
from biscale_env.envs.cluster.cluster_settings import ClusterPlant
from biscale_env.envs.loads.capacity import find_capacity
from biscale_env.envs.loads.workloads import Maker, generated
from biscale_env.traces import Trace

# a shape of five minutes at 30 requests/s, one choice of requests, 5 % wide; assumed
SAMPLE_S: Final = 300.0
SAMPLE_RPS: Final = 30.0
TOLERANCE: Final = 0.05
MIN_SAMPLE: Final = 100  # requests; find_capacity needs as many

Capacities = Mapping[tuple[str, int, float], float]  # (phase, TP, MHz) -> requests/s


class InstanceCapacities:
    """Capacities of instances for one workload, for action masks and relative loads.

    Coarser than the table of tier 1 (:mod:`controllers.placement.capacity_table`), and without
    energies: a capacity takes tens of milliseconds.
    """

    def __init__(self, plant: ClusterPlant, profile: str, trace: Trace | None = None) -> None:
        """Nothing is measured yet.

        Args:
            plant: the cluster without its placement.
            profile: generator profile of the workload, used without a trace.
            trace: the trace that the workload is cut from.
        """
        self.plant, self.profile, self.trace = plant, profile, trace
        self._generator: Maker | None = generated(profile) if trace is None else None
        self._known: dict[tuple[str, int, float], float] = {}

    def capacity_rps(self, phase: str, tp: int, freq_mhz: float) -> float:
        """Highest load that one instance serves within the SLO at a clock, requests/s.

        Raises:
            BiscaleError: a trace with too few requests to make loads of.
        """
        key = (phase, tp, freq_mhz)
        if key not in self._known:
            search = partial(
                find_capacity,
                self.plant.plant(phase, tp),
                self.sample,
                freq_mhz,
                seeds=(0,),
                member=self.plant.settings.ensemble_member,
                tolerance=TOLERANCE,
            )
            self._known[key] = search(make=self._generator).rate_rps
        return self._known[key]

    def goodput_rps(self, placement: Placement, given: Capacities | None = None) -> float:
        """Load that both phases of a placement are predicted to serve within the SLO, requests/s.

        Args:
            placement: a disaggregated placement.
            given: capacities in place of measured ones; what is not in it serves nothing.
        """
        sums = dict.fromkeys(("prefill", "decode"), 0.0)
        for g in placement.groups:
            sums[g.phase] += g.count * self._of_one(g, given)
        return min(sums.values())

    def _of_one(self, g: InstanceGroup, given: Capacities | None) -> float:
        if given is None:
            return self.capacity_rps(g.phase, g.tp, g.freq_mhz)
        return given.get((g.phase, g.tp, g.freq_mhz), 0.0)

    @cached_property
    def sample(self) -> Trace:
        """The workload's shape; of a trace its first minutes, or as much as has enough requests."""
        if self.trace is None:
            return generated(self.profile)(SAMPLE_RPS, SAMPLE_S, 0)
        length_s = SAMPLE_S
        while length_s < self.trace.duration_s:
            piece = self.trace.window(0.0, length_s)
            if len(piece) >= MIN_SAMPLE:
                return piece
            length_s *= 2
        return self.trace
