"""Constructor options of the environments, resolved into a plant and a source of workloads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from biscale_env.config import Slo
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.capacity import find_capacity, profile_capacity
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.envs.workloads import WorkloadSource, generated, trace_windows
from biscale_env.traces import Trace, read_trace

DEFAULT_PROFILE = "azure-conv-like"
DEFAULT_LOAD = 0.75  # of the capacity at max clock: busy, yet served
DEFAULT_EPISODE_S = 120.0
_capacities: dict[tuple[Any, ...], float] = {}


@dataclass(frozen=True)
class EnvOptions:
    """A plant, its workloads, and how an episode is chosen."""

    plant: Plant
    source: WorkloadSource
    n_workloads: int

    def choose(
        self, rng: np.random.Generator, fixed: dict[str, Any] | None = None
    ) -> tuple[int, int]:
        """Workload and ensemble member of the next episode, from the generator unless fixed."""
        fixed = fixed or {}
        unknown = set(fixed) - {"workload", "member"}
        if unknown:
            raise BiscaleError(f"unknown reset option '{min(unknown)}'; known: workload, member")
        workload = int(rng.integers(self.n_workloads))
        setting = self.plant.settings.ensemble_member
        member = (
            int(rng.integers(self.plant.model.n_members)) if setting == "random" else int(setting)
        )
        workload, member = int(fixed.get("workload", workload)), int(fixed.get("member", member))
        if workload < 0:
            raise BiscaleError(f"reset option 'workload' must not be negative, got {workload}")
        return workload, member


def capacity_rps(plant: Plant, trace: Trace | None, profile: str) -> float:
    """Capacity at max clock of a trace or a generator profile, searched once per process.

    Raises:
        BiscaleError: no load at all is served within the SLO.
    """
    s = plant.settings
    key = (
        plant.model.digest,
        s.instance.changed(slo="").model_dump_json(),
        s.actuation_delay_s,
        s.phase,
        plant.slo,
        trace.sha256 if trace is not None else profile,
    )
    if key not in _capacities:
        found = (
            find_capacity(plant, trace) if trace is not None else profile_capacity(plant, profile)
        )
        _capacities[key] = found.rate_rps
    if _capacities[key] <= 0:
        what = trace.name if trace is not None else profile
        raise BiscaleError(
            f"{what}: not even a small load meets SLO '{plant.slo.name}' at max clock; use a wider SLO or more GPUs"
        )
    return _capacities[key]


def make_options(
    phase: str,
    trace: Trace | str | Path | None = None,
    profile: str = DEFAULT_PROFILE,
    slo: str | Slo = "biscale",
    load: float | None = None,
    rate_rps: float | None = None,
    episode_s: float = DEFAULT_EPISODE_S,
    workload_seed: int = 0,
    n_workloads: int = 256,
    **settings: Any,
) -> EnvOptions:
    """Resolve the options of an environment.

    Args:
        phase: ``prefill`` or ``decode``.
        trace: a trace or the path of one; episodes are random windows of it.
        profile: generator profile, used without a trace.
        slo: an SLO or its name.
        load: fraction of the capacity at max clock; the default is 0.75.
        rate_rps: mean request rate instead of a load.
        episode_s: length of an episode, s.
        workload_seed: root of the workloads.
        n_workloads: how many different workloads the episodes are drawn from.
        **settings: fields of :class:`biscale_env.envs.plant.PlantSettings`, e.g. ``tp``,
            ``actuation_delay_s``, ``ensemble_member``.

    Raises:
        BiscaleError: an unknown option or an impossible value.
    """
    if load is not None and rate_rps is not None:
        raise BiscaleError("give either load or rate_rps, not both")
    if n_workloads < 1:
        raise BiscaleError(f"n_workloads must be at least 1, got {n_workloads}")
    named = slo if isinstance(slo, str) else slo.name
    plant = Plant(
        PlantSettings.of(phase, slo=named, **settings), None if isinstance(slo, str) else slo
    )
    loaded = trace if isinstance(trace, Trace) or trace is None else read_trace(trace)
    if loaded is not None:
        plant.check_fits(loaded)
    if rate_rps is None:
        share = DEFAULT_LOAD if load is None else load
        if not share > 0:
            raise BiscaleError(f"load must be a positive fraction of the capacity, got {share}")
        rate_rps = share * capacity_rps(plant, loaded, profile)
    make = trace_windows(loaded) if loaded is not None else generated(profile)
    return EnvOptions(plant, WorkloadSource(make, rate_rps, episode_s, workload_seed), n_workloads)
