"""The workloads that an agent is trained on.

Families and loads in groups, each with its own attainment target.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agents.training.train_config import AgentConfig, Part
from biscale_env.config import load_slo
from biscale_env.config.slo import one_bound, within
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.loads.capacity import run_static
from biscale_env.envs.loads.prefix_hits import with_cache
from biscale_env.envs.loads.workloads import (
    WorkloadSource,
    capacity_sample,
    generated,
    trace_windows,
)
from biscale_env.envs.options import capacity_rps
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.traces import Trace, load_named

HELD_OUT = 5000  # held-out workloads are number HELD_OUT, HELD_OUT + 1, ... of the same sources
TRAINED_FRACTION = 0.5  # of a trace; its second half is for tables


@dataclass(frozen=True)
class WorkloadGroup:
    """One family at one load.

    Attributes:
        name: e.g. ``azure-conv-like-75``.
        plant: its plant; all groups share the observation, everything else may be the group's own.
        source: its workloads.
        slo_s: bound of the phase, s.
        attainment: fraction of requests that the SLO asks for.
    """

    name: str
    plant: Plant
    source: WorkloadSource
    slo_s: float
    attainment: float


def plant_of(config: AgentConfig, part: Part | None = None, drain: bool = False) -> Plant:
    """Plant of a training run, or of one of its groups."""
    base = config.instance.changed(slo="biscale")
    return Plant(
        PlantSettings.of(
            config.phase,
            instance=base if part is None else part.instance_of(base),
            drain=drain,
            min_decision_interval_s=config.decision_interval_s,
        )
    )


def _trace_of(part: Part, prefix_cache: str) -> Trace | None:
    if part.trace is None:
        with_cache(prefix_cache, capacity_sample(part.profile))  # says which cache there is
        return None
    return with_cache(prefix_cache, load_named(part.trace)).split(TRAINED_FRACTION)[0]


def _groups_of(config: AgentConfig, part: Part, number: int) -> list[WorkloadGroup]:
    plant = plant_of(config, part)
    trace = _trace_of(part, config.instance.prefix_cache)
    make = trace_windows(trace) if trace is not None else generated(part.profile)
    family = part.trace or part.profile
    slo = one_bound(load_slo(part.slo), "training")
    rates = {
        f"{round(100 * load)}": load * capacity_rps(plant, trace, part.profile)
        for load in part.loads
    }
    rates |= {f"{rate:g}rps": rate for rate in part.rates_rps}
    suffix = f"-{part.label}" if part.label else ""
    return [
        WorkloadGroup(
            f"{Path(family).stem}{suffix}-{label}",
            plant,
            WorkloadSource(make, rate, part.episode_s, number),
            slo.bound_s(config.phase),
            slo.attainment,
        )
        for label, rate in rates.items()
    ]


def make_groups(config: AgentConfig) -> tuple[list[WorkloadGroup], list[int]]:
    """All groups, and how many workloads each has.

    Raises:
        BiscaleError: a trace that is not there and not optional, or nothing left at all.
    """
    groups: list[WorkloadGroup] = []
    counts: list[int] = []
    for number, part in enumerate(config.mixture):
        try:
            made = _groups_of(config, part, number)
        except BiscaleError:
            if not part.optional:
                raise
            continue
        groups += made
        counts += [part.workloads] * len(made)
    if not groups:
        raise BiscaleError(
            "the mixture is empty: none of its optional traces is there, fetch one or add a profile"
        )
    return groups, counts


def run_at_max(group: WorkloadGroup, workload: Trace) -> tuple[NDArray[np.bool_], float]:
    """Which requests of a workload violate the SLO at max clock; its energy, J.

    In the nominal plant; one flag per request that the phase sees.
    """
    run = run_static(group.plant, workload, group.plant.clocks.freq_max_mhz)
    return ~within(run.latency_s, group.slo_s), run.energy_j


def targets(
    config: AgentConfig, groups: list[WorkloadGroup], lost: list[NDArray[np.bool_]]
) -> NDArray[np.float64]:
    """Attainment that each group is held to.

    The SLO's plus a reserve, but never more than max clock can give.

    Args:
        config: the run.
        groups: families at loads.
        lost: per group, which requests of its training workloads violate the SLO at max clock.
    """
    c = config.constraint
    best = [1.0 - float(np.mean(mine)) for mine in lost]
    asked = [
        min(g.attainment + c.reserve, b - c.below_max) for g, b in zip(groups, best, strict=True)
    ]
    return np.maximum(asked, 0.0)
