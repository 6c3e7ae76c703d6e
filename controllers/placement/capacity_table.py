"""Building the capacity table of tier 1 in the compiled simulator, in parallel, and keeping it by
the hash of all that it depends on.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import joblib

from biscale_env.config import load_slo
from biscale_env.core import user_cache
from biscale_env.core.errors import BiscaleError
from biscale_env.core.jit import source_digest
from biscale_env.envs.capacity import find_capacity, run_static
from biscale_env.envs.cluster.cluster_options import fitting_tps
from biscale_env.envs.cluster.cluster_settings import ClusterPlant, ClusterSettings, check_gpus
from biscale_env.models import instance_model
from biscale_env.traces import Trace
from controllers.placement.ilp import PHASES, CapacityEntry, CapacityTable, Phase

MIN_REQUESTS = 100  # find_capacity needs as many


@dataclass(frozen=True)
class TableRequest:
    """What a table is made for; everything the result depends on but the trace.

    Attributes:
        settings: the cluster.
        freqs_mhz: base clocks to consider; empty: the GPU's levels.
        seeds: choices of requests that are pooled at each load.
        tolerance: relative width at which the bisection stops.
    """

    settings: ClusterSettings
    freqs_mhz: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1)
    tolerance: float = 0.01


def measure(
    request: TableRequest, trace: Trace, phase: Phase, tp: int, freq_mhz: float
) -> CapacityEntry:
    """R_c by bisection on chosen requests of the trace, and E_c at that load."""
    plant = ClusterPlant(request.settings).plant(phase, tp)
    member = request.settings.ensemble_member
    capacity = find_capacity(plant, trace, freq_mhz, request.seeds, member, request.tolerance)
    if capacity.rate_rps <= 0:
        return CapacityEntry(phase, tp, freq_mhz, 0.0, 0.0)
    energy, requests = 0.0, 0
    for seed in request.seeds:
        load = trace.scaled_to(capacity.rate_rps, seed)
        energy += run_static(plant, load, freq_mhz, member).energy_j
        requests += len(load)
    return CapacityEntry(phase, tp, freq_mhz, capacity.rate_rps, energy / requests)


def table_key(request: TableRequest, trace: Trace) -> str:
    """Hash of the trace, the settings, the coefficients and the code of the simulator."""
    digest = hashlib.sha256(source_digest().encode())
    depends = request.settings.model_dump(
        exclude={"prefill_policy", "decode_policy", "prefill_margin", "decode_margin", "kv_guard", "ahead", "transfer",
                 "transitions", "spare", "spare_idle_w", "prefill_router", "decode_router"}
    )  # fmt: skip
    digest.update(
        json.dumps(
            [depends, request.freqs_mhz, request.seeds, request.tolerance], sort_keys=True
        ).encode()
    )
    digest.update(trace.sha256.encode())
    for phase in PHASES:
        for tp in fitting_tps(request.settings, phase):
            model = instance_model(phase, request.settings.instance(phase, tp))
            digest.update(f"{phase} {tp} {model.digest}".encode())
    digest.update(load_slo(request.settings.slo).model_dump_json().encode())
    return digest.hexdigest()[:24]


def cache_folder() -> Path:
    """Where tables are kept: ``$BISCALE_CACHE`` or the user's cache folder."""
    return (user_cache.writable_root() or user_cache.cache_root()) / "capacity"


def capacity_table(
    request: TableRequest,
    trace: Trace,
    n_jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
    use_cache: bool = True,
) -> CapacityTable:
    """The table of every (phase, TP, base clock) for one workload, from the cache if it was made
    before.

    Args:
        request: cluster, clocks, seeds, tolerance.
        trace: workload; loads are made by choosing requests from it.
        n_jobs: processes.
        progress: called with (done, all) after each configuration.
        use_cache: read and write the cache.

    Raises:
        BiscaleError: a workload that is too small to make loads of, or GPUs that no TP divides.
    """
    tps = {phase: fitting_tps(request.settings, phase) for phase in PHASES}
    both = tuple(sorted({tp for found in tps.values() for tp in found}))
    if not both:
        s = request.settings
        raise BiscaleError(
            f"model '{s.model}' in {s.dtype} fits on no instance of up to {s.gpus} GPUs"
        )
    check_gpus(request.settings.gpus, both)
    if len(trace) < MIN_REQUESTS:
        raise BiscaleError(
            f"{trace.name} has {len(trace)} requests: a capacity table needs at least {MIN_REQUESTS}"
        )
    plant = ClusterPlant(request.settings).plant(PHASES[0], tps[PHASES[0]][0])
    freqs = request.freqs_mhz or plant.clocks.levels_mhz
    path = cache_folder() / f"{table_key(request, trace)}.json"
    if use_cache and (kept := user_cache.recall(path)):
        entries = [CapacityEntry(**row) for row in kept]
        return CapacityTable(tuple(entries), request.settings.slo, trace.name)
    todo = [(phase, tp, freq) for phase in PHASES for tp in tps[phase] for freq in freqs]
    found = _measure_all(request, trace, todo, n_jobs, progress)
    if use_cache:
        user_cache.remember(path, json.dumps([asdict(e) for e in found], indent=1))
    return CapacityTable(tuple(found), request.settings.slo, trace.name)


def _measure_all(
    request: TableRequest,
    trace: Trace,
    todo: Sequence[tuple[Phase, int, float]],
    n_jobs: int,
    progress: Callable[[int, int], None] | None,
) -> list[CapacityEntry]:
    jobs = (joblib.delayed(measure)(request, trace, *one) for one in todo)
    found = []
    for entry in joblib.Parallel(n_jobs=n_jobs, return_as="generator")(jobs):
        found.append(entry)
        if progress is not None:
            progress(len(found), len(todo))
    return found
