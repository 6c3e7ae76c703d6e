"""The capacity table of tier 1, measured in the compiled simulator, in parallel.

It is kept on disk by the hash of all that it depends on.
"""

import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from biscale_env.config import Slo
from biscale_env.core import user_cache
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import lock
from biscale_env.core.jit import PACKAGE, source_digest
from biscale_env.envs.cluster.cluster_options import fitting_tps
from biscale_env.envs.cluster.cluster_settings import ClusterPlant, ClusterSettings, check_gpus
from biscale_env.envs.loads.capacity import find_capacity, run_static
from biscale_env.jobs.workers import Workers, in_order
from biscale_env.traces import Trace
from controllers.placement.ilp import PHASES, CapacityEntry, CapacityTable, NoPlacementError, Phase

MIN_REQUESTS: Final = 100  # find_capacity needs as many
LOCK_WAIT_S: Final = 3600.0  # for another process that measures the same table
# fields of the settings that a single instance at a constant clock does not know
NOT_OF_AN_INSTANCE: Final = frozenset(
    {
        "prefill_policy",
        "decode_policy",
        "prefill_margin",
        "decode_margin",
        "kv_guard",
        "ahead",
        "transfer",
        "transitions",
        "spare",
        "spare_idle_w",
        "prefill_router",
        "decode_router",
    }
)


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
    """Hash of the trace, the settings, what they load, and the code that measures.

    What is loaded counts by content (coefficients, engine parameters, SLO, clocks), not by name:
    a changed YAML file, ensemble or transfer to another GPU gives another key.
    """
    own = Path(__file__).resolve().parent
    digest = hashlib.sha256(source_digest(PACKAGE, own).encode())
    for kind in (Trace, Slo):  # loads and attainment are made by their methods
        digest.update(Path(inspect.getfile(kind)).read_bytes())
    settings = request.settings.model_dump(mode="json", exclude=set(NOT_OF_AN_INSTANCE))
    asked = [settings, request.freqs_mhz, request.seeds, request.tolerance]
    digest.update(json.dumps(asked, sort_keys=True).encode())
    digest.update(trace.sha256.encode())
    plants, member = ClusterPlant(request.settings), request.settings.ensemble_member
    digest.update(plants.slo.model_dump_json().encode())
    for phase in PHASES:
        for tp in fitting_tps(request.settings, phase):
            plant = plants.plant(phase, tp)
            digest.update(f"{phase} {tp} {plant.clocks}".encode())
            digest.update(np.array(plant.model.member(member)).tobytes())
            digest.update(plant.params(member, 0.0).tobytes())
    return digest.hexdigest()[:24]


def cache_folder() -> Path:
    """Where tables are kept: ``$BISCALE_CACHE`` or the user's cache folder."""
    return (user_cache.writable_root() or user_cache.cache_root()) / "capacity"


def capacity_table(
    request: TableRequest,
    trace: Trace,
    n_jobs: int | Workers = 1,
    progress: Callable[[int, int], None] | None = None,
    use_cache: bool = True,
) -> CapacityTable:
    """The table of every (phase, TP, base clock) for one workload.

    It comes from the cache if it was made before, also by another process meanwhile.

    Args:
        request: cluster, clocks, seeds, tolerance.
        trace: workload; loads are made by choosing requests from it.
        n_jobs: processes, or which workers.
        progress: called with (done, all) after each configuration.
        use_cache: read and write the cache.

    Raises:
        BiscaleError: a workload that is too small to make loads of, or GPUs that no TP divides.
    """
    tps = {phase: fitting_tps(request.settings, phase) for phase in PHASES}
    both = tuple(sorted({tp for found in tps.values() for tp in found}))
    if not both:
        s = request.settings
        raise NoPlacementError(
            f"model '{s.instance('decode', 1).family}' in {s.dtype} fits on no "
            f"instance of up to {s.gpus} GPUs"
        )
    check_gpus(request.settings.gpus, both)
    if len(trace) < MIN_REQUESTS:
        raise BiscaleError(
            f"{trace.name} has {len(trace)} requests: a capacity table needs at least "
            f"{MIN_REQUESTS}"
        )
    plant = ClusterPlant(request.settings).plant(PHASES[0], tps[PHASES[0]][0])
    freqs = request.freqs_mhz or plant.clocks.levels_mhz
    todo = [(phase, tp, freq) for phase in PHASES for tp in tps[phase] for freq in freqs]
    if not use_cache:
        found = _measure_all(request, trace, todo, n_jobs, progress)
        return CapacityTable(tuple(found), request.settings.slo, trace.name)
    path = cache_folder() / f"{table_key(request, trace)}.json"
    found = _kept(path, todo)
    if not found:
        with _measured_once(path):
            found = _kept(path, todo) or _measure_all(request, trace, todo, n_jobs, progress)
            user_cache.remember(path, json.dumps([asdict(e) for e in found], indent=1))
    return CapacityTable(tuple(found), request.settings.slo, trace.name)


def _kept(path: Path, todo: Sequence[tuple[Phase, int, float]]) -> list[CapacityEntry]:
    """Entries of a kept table; none if it is absent, damaged or not of these configurations."""
    rows: Any = user_cache.recall(path)
    try:
        found = [CapacityEntry(**row) for row in rows or []]
    except TypeError:
        return []
    return found if [(e.phase, e.tp, e.freq_mhz) for e in found] == list(todo) else []


@contextlib.contextmanager
def _measured_once(path: Path) -> Iterator[None]:
    """Wait for another process that measures the same table; without a lock where none can be."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, BiscaleError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(path.with_suffix(".lock"), LOCK_WAIT_S))
        yield


def _measure_all(
    request: TableRequest,
    trace: Trace,
    todo: Sequence[tuple[Phase, int, float]],
    n_jobs: int | Workers,
    progress: Callable[[int, int], None] | None,
) -> list[CapacityEntry]:
    calls = [(request, trace, *one) for one in todo]
    return in_order(measure, calls, Workers.of(n_jobs), progress)
