"""Observations of the instances of a cluster.

The very vectors of the single-instance environments.
"""

import numpy as np
from numpy.typing import NDArray

from biscale_env.contract import DECODE_SPEC, PREFILL_SPEC, ClockRange
from biscale_env.core.jit import compiled
from biscale_env.envs.cluster.engine import Cluster
from biscale_env.envs.observe import Encoding, encode, observe_decode, observe_prefill
from biscale_env.sim.cluster.layout import Decodes, Prefills
from biscale_env.sim.cluster.queues import prompts_of
from biscale_env.sim.decode import running_of
from biscale_env.sim.state import NO_CLASSES, Requests


@compiled
def observe_prefill_instance(
    pool: Prefills, i: int, how: Encoding, out: NDArray[np.float32]
) -> None:
    """Observation of prefill instance ``i``."""
    observe_prefill(pool.states[i], pool.params[i], prompts_of(pool, i), how.physical)
    encode(how, out)


@compiled
def observe_decode_instance(pool: Decodes, j: int, how: Encoding, out: NDArray[np.float32]) -> None:
    """Observation of decode instance ``j``."""
    q, run = pool.queue, running_of(pool.running, j)
    requests = Requests(q.ready_s[j], q.prompt[j], q.output[j], q.cached[j], NO_CLASSES)
    observe_decode(pool.states[j], pool.params[j], requests, run, how.physical)
    encode(how, out)


class ClusterObserver:
    """Reads observations out of a cluster and turns actions into clocks."""

    def __init__(self, cluster: Cluster) -> None:
        """Watch a cluster."""
        self.cluster = cluster
        gpu = cluster.plant.plant(
            cluster.placement.groups[0].phase, cluster.placement.groups[0].tp
        ).gpu
        self.clocks = ClockRange.of(gpu)
        self._parts = {spec.name: Encoding.of(spec) for spec in (PREFILL_SPEC, DECODE_SPEC)}

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
            observe_prefill_instance(self.cluster.prefills, i, self._parts[phase], out)
        else:
            observe_decode_instance(self.cluster.decodes, i, self._parts[phase], out)
        return phase, out

    def observe_phase(self, phase: str) -> NDArray[np.float32]:
        """Fresh observations of all instances of a phase, (instances, dim)."""
        n = len(self.cluster.prefills.meta)
        first, count = (0, n) if phase == "prefill" else (n, len(self.cluster.decodes.meta))
        return np.stack([self.observe(first + k)[1] for k in range(count)])

    def set_clock(self, instance: int, freq_mhz: float) -> None:
        """Clock at which an instance of the static rule starts its iterations from now on, MHz."""
        phase, i = self.phase_of(instance)
        pool = self.cluster.prefills if phase == "prefill" else self.cluster.decodes
        pool.meta[i]["base_ghz"] = freq_mhz / 1e3

    def act(self, phase: str, actions: NDArray[np.float32]) -> None:
        """Set the clocks of all instances of a phase, (instances,) in [-1, 1]."""
        pool = self.cluster.prefills if phase == "prefill" else self.cluster.decodes
        pool.meta["base_ghz"] = self.clocks.snap_mhz(self.clocks.to_freq_mhz(actions)) / 1e3

    def freq_mhz(self, phase: str, action: float) -> float:
        """Supported clock that an action in [-1, 1] asks for, MHz."""
        return float(self.clocks.snap_mhz(self.clocks.to_freq_mhz(action)))
