"""Observations of the instances of a cluster.

The very vectors of the single-instance environments.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.contract import DECODE_SPEC, PREFILL_SPEC, ClockRange, ObservationSpec
from biscale_env.core.jit import compiled
from biscale_env.envs.cluster.engine import Cluster
from biscale_env.envs.observe import encode, observe_decode, observe_prefill


@compiled
def observe_prefill_instance(
    pool: Any, i: int, scale: Any, low: Any, high: Any, physical: Any, out: Any
) -> None:
    """Observation of prefill instance ``i``."""
    observe_prefill(
        pool.states[i], pool.params[i], pool.arrival_s[i], pool.prompt[i], pool.cumulative[i], physical
    )  # fmt: skip
    encode(physical, scale, low, high, out)


@compiled
def observe_decode_instance(
    pool: Any, j: int, scale: Any, low: Any, high: Any, physical: Any, out: Any
) -> None:
    """Observation of decode instance ``j``."""
    observe_decode(
        pool.states[j], pool.params[j], pool.ready_s[j], pool.prompt[j], pool.cumulative[j], pool.tree[j], pool.stack[j],
        physical,
    )  # fmt: skip
    encode(physical, scale, low, high, out)


class ClusterObserver:
    """Reads observations out of a cluster and turns actions into clocks."""

    def __init__(self, cluster: Cluster) -> None:
        """Watch a cluster."""
        self.cluster = cluster
        gpu = cluster.plant.plant(
            cluster.placement.groups[0].phase, cluster.placement.groups[0].tp
        ).gpu
        self.clocks = ClockRange.of(gpu)
        self._parts = {spec.name: self._part(spec) for spec in (PREFILL_SPEC, DECODE_SPEC)}

    @staticmethod
    def _part(spec: ObservationSpec) -> tuple[Any, ...]:
        low, high = spec.low.astype(np.float64), spec.high.astype(np.float64)
        return spec.scale, low, high, np.zeros(spec.dim)

    def phase_of(self, instance: int) -> tuple[str, int]:
        """Phase and number within it of an instance, counted prefill first."""
        n = len(self.cluster.prefills.meta)
        return ("prefill", instance) if instance < n else ("decode", instance - n)

    def observe(self, instance: int) -> tuple[str, NDArray[np.float32]]:
        """Phase and a fresh observation of an instance."""
        phase, i = self.phase_of(instance)
        spec = PREFILL_SPEC if phase == "prefill" else DECODE_SPEC
        out = np.zeros(spec.dim, dtype=np.float32)
        if phase == "prefill":
            observe_prefill_instance(self.cluster.prefills, i, *self._parts[phase], out)
        else:
            observe_decode_instance(self.cluster.decodes, i, *self._parts[phase], out)
        return phase, out

    def freq_mhz(self, phase: str, action: float) -> float:
        """Supported clock that an action in [-1, 1] asks for, MHz."""
        return float(self.clocks.snap_mhz(self.clocks.to_freq_mhz(action)))
