"""Whole runs at one clock in a single compiled call, and the capacity search made of them.

A capacity that was found is kept on disk, by the hash of all that it depends on.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.core.jit import PACKAGE, python_files, source_digest
from biscale_env.core.user_cache import cache_root, recall, remember
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.loads.workloads import (
    CAPACITY_SAMPLE_RPS,
    CAPACITY_SAMPLE_S,
    Maker,
    generated,
)
from biscale_env.envs.plant import Plant
from biscale_env.sim.constant_clock import decode_static, prefill_static
from biscale_env.sim.decode import running_of
from biscale_env.traces import Trace

# requests, pooled over the choices, below which a P99 is not taken for one (three may miss);
# assumed
MIN_JUDGED = 300

MIN_REQUESTS = 100  # of a trace that loads are made of
HIGHEST_MULTIPLE = 256  # of the trace's own rate that is tried
ALONE_S = 3600.0  # between requests that shall not meet


@dataclass(frozen=True)
class StaticRun:
    """Result of a run at one clock.

    Attributes:
        latency_s: TTFT (prefill) or TPOT (decode) per request, s.
        energy_j: energy of the instance, idle included, J.
        duration_s: length of the run, s.
        busy_s: time spent in iterations, s.
        iterations: engine iterations.
        output_tokens: tokens asked for.
        slo_class: number of each request's class in the SLO; empty where it has none.
    """

    latency_s: NDArray[np.float64]
    energy_j: float
    duration_s: float
    busy_s: float
    iterations: int
    output_tokens: int
    slo_class: NDArray[np.int8]


def run_static(plant: Plant, trace: Trace, freq_mhz: float, member: int = -1) -> StaticRun:
    """Run a workload to its last token at one (settled) clock.

    Args:
        plant: phase, hardware and engine settings.
        trace: workload.
        freq_mhz: clock within the GPU's range, MHz.
        member: ensemble member, -1 nominal.

    Raises:
        BiscaleError: a clock that the GPU does not have, or coefficients that make times or
            energies which are no numbers.
    """
    plant.gpu.check_clock(freq_mhz)
    batch = Batch(plant, 1, RequestTable.of(plant, [trace]), record=True)
    pool = batch.pool
    st, c = (
        batch.states[0],
        np.array(tuple(plant.model.member(member)), dtype=batch.coefs.dtype)[()],
    )
    params = plant.params(member, trace.duration_s)
    params["drain"] = 1
    freq_ghz = float(plant.clocks.snap_mhz(freq_mhz)) / 1e3
    if plant.phase == "prefill":
        prefill_static(st, c, params[()], pool.requests, batch.times, freq_ghz)
        latency = batch.times.finish_s - pool.arrival_s
    else:
        running = running_of(batch.running, 0)
        decode_static(st, c, params[()], pool.requests, batch.times, running, freq_ghz)
        latency = (batch.times.finish_s - pool.arrival_s) / (pool.output - 1)
    output_tokens = int(pool.output.sum(dtype=np.int64))
    energy_j, time_s, busy_s = (float(st[name]) for name in ("energy_j", "time_s", "busy_s"))
    if not np.isfinite(latency).all() or not np.isfinite(energy_j):
        raise BiscaleError(
            f"model '{plant.model.name}' gives times or energies of {trace.name} that are not "
            "finite: check its coefficients"
        )
    iterations = int(st["iterations"])
    return StaticRun(latency, energy_j, time_s, busy_s, iterations, output_tokens, pool.slo_class)


def attained_by(plant: Plant, runs: Sequence[StaticRun]) -> float:
    """Attainment over the requests of several runs, see :meth:`Slo.attained`."""
    latency_s = np.concatenate([run.latency_s for run in runs])
    numbers = np.concatenate([run.slo_class for run in runs]) if plant.slo.classes else None
    return plant.slo.attained(latency_s, plant.phase, numbers)


def slowest_alone_s(plant: Plant, trace: Trace) -> float:
    """Greatest latency of any request that has the instance to itself at max clock, s.

    TTFT in prefill, TPOT in decode.

    Args:
        plant: phase, hardware and engine settings.
        trace: the requests; their times do not matter.
    """
    apart = replace(
        trace,
        arrival_s=np.arange(len(trace), dtype=np.float64) * ALONE_S,
        duration_s=len(trace) * ALONE_S,
    )
    return float(run_static(plant, apart, plant.gpu.freq_max_mhz).latency_s.max())


@dataclass(frozen=True)
class Capacity:
    """Highest load that one instance serves within its SLO at a clock.

    Attributes:
        rate_rps: requests per second; 0 when even the lowest load tried misses the SLO.
        attainment: fraction of requests within the SLO at that load.
        tried: every (rate, attainment) pair of the search, in order.
    """

    rate_rps: float
    attainment: float
    tried: tuple[tuple[float, float], ...]


def loaded(trace: Trace, rate_rps: float, seed: int, make: Maker | None = None) -> Trace:
    """The workload at a load: requests chosen from the trace.

    Above the trace's own rate made anew, or shifted copies of it.

    Copies that are shifted against each other smooth the swings of the rate out: a generated
    workload of the same mean rate is harder.

    Args:
        trace: the workload's shape.
        rate_rps: wanted mean rate, requests/s.
        seed: every choice follows from it.
        make: generator behind the trace; None where there is none (a real trace).
    """
    if make is not None and rate_rps > trace.rate_rps:
        trace = make(rate_rps, trace.duration_s, seed)
    return trace.scaled_to(rate_rps, seed)


def windows_of_work(work: Trace | Sequence[Trace]) -> tuple[Trace, ...]:
    """The windows of a workload's shape: one trace, or those of several days."""
    return (work,) if isinstance(work, Trace) else tuple(work)


def mean_rate_rps(windows: Sequence[Trace]) -> float:
    """Request rate over all windows together, requests/s; of a single one its own."""
    seconds = sum(window.duration_s for window in windows)
    return sum(len(window) for window in windows) / seconds if seconds > 0 else 0.0


def attainment_at(
    plant: Plant,
    trace: Trace | Sequence[Trace],
    rate_rps: float,
    freq_mhz: float,
    seeds: Sequence[int],
    member: int,
    make: Maker | None = None,
) -> float:
    """Share of requests within the SLO at a load, over several choices of requests.

    Of several windows each is brought to the same multiple of its own rate, so that a busy day
    stays busy, and the requests of all are pooled.
    """
    windows = windows_of_work(trace)
    mean_rps = mean_rate_rps(windows)
    runs = []
    for window in windows:
        own_rps = rate_rps * (window.rate_rps / mean_rps)
        for seed in seeds:
            load = loaded(window, own_rps, seed, make)
            if len(windows) > 1 and not _judged(plant, load):
                continue  # a calm window of several, at a low load
            runs.append(run_static(plant, load, freq_mhz, member))
    return attained_by(plant, runs)


def _judged(plant: Plant, trace: Trace) -> bool:
    """Whether a workload has a request that the phase sees."""
    least = 2 if plant.phase == "decode" else 1
    return bool((trace.output_tokens >= least).any())


@dataclass(frozen=True)
class SearchSettings:
    """How a capacity is searched.

    Attributes:
        freq_mhz: clock, MHz.
        seeds: choices of requests that are pooled, so that one unlucky choice does not decide.
        member: ensemble member, -1 nominal.
        tolerance: relative width at which the search stops.
    """

    freq_mhz: float
    seeds: tuple[int, ...] = (0, 1, 2)
    member: int = -1
    tolerance: float = 0.01


def find_capacity(
    plant: Plant,
    trace: Trace | Sequence[Trace],
    freq_mhz: float | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    member: int = -1,
    tolerance: float = 0.01,
    make: Maker | None = None,
) -> Capacity:
    """Bisect for the highest load within the SLO; what was found before is not searched again.

    Loads are made as in :func:`loaded`, never by stretching time.

    Args:
        plant: phase, hardware and engine settings.
        trace: the workload's shape; of several windows (of several days) the capacity is their mean
            rate at the highest common multiple of their own rates.
        freq_mhz: clock; None is the highest.
        seeds: choices of requests that are pooled, so that one unlucky choice does not decide.
        member: ensemble member.
        tolerance: relative width at which the search stops.
        make: generator behind the trace, for loads above its rate; None where there is none.

    Raises:
        BiscaleError: the trace is too short to make loads of (fewer than 100 requests), or a
            request cannot fit.
    """
    windows = windows_of_work(trace)
    for window in windows:  # before requests are chosen, while their lines in the file are known
        plant.check_fits(window)
    n_requests = sum(len(window) for window in windows)
    if n_requests < MIN_REQUESTS:
        names = ", ".join(window.name for window in windows)
        raise BiscaleError(
            f"{names} has {n_requests} requests: a capacity search needs at least {MIN_REQUESTS}"
        )
    how = _settings(plant, freq_mhz, seeds, member, tolerance)
    told = getattr(getattr(make, "__self__", None), "digest", None)
    if make is not None and told is None:  # a generator that cannot say what it makes
        return _search(plant, windows, how, make)
    key = capacity_key(plant, how, f"{' '.join(window.sha256 for window in windows)} {told}")
    return _known(key) or _keep(key, _search(plant, windows, how, make))


def profile_capacity(
    plant: Plant, profile: str, freq_mhz: float | None = None, member: int = -1
) -> Capacity:
    """Capacity of a generator profile, wherever a load is a fraction of it.

    Args:
        plant: phase, hardware and engine settings.
        profile: generator profile.
        freq_mhz: clock; None is the highest.
        member: ensemble member.
    """
    make: Any = generated(profile)
    how = _settings(plant, freq_mhz, (0, 1, 2), member, 0.01)
    sample = (CAPACITY_SAMPLE_RPS, CAPACITY_SAMPLE_S, 0)
    key = capacity_key(plant, how, f"{make.__self__.digest} {sample}")
    if (kept := _known(key)) is not None:
        return kept
    trace = make(*sample)
    plant.check_fits(trace)
    return _keep(key, _search(plant, (trace,), how, make))


def _settings(
    plant: Plant, freq_mhz: float | None, seeds: Sequence[int], member: int, tolerance: float
) -> SearchSettings:
    freq = plant.gpu.freq_max_mhz if freq_mhz is None else float(freq_mhz)
    return SearchSettings(freq, tuple(int(seed) for seed in seeds), int(member), float(tolerance))


def _search(
    plant: Plant, windows: Sequence[Trace], how: SearchSettings, make: Maker | None
) -> Capacity:
    """Bisect, see :func:`find_capacity`."""
    tried: list[tuple[float, float]] = []

    def meets(rate: float) -> bool:
        got = attainment_at(plant, windows, rate, how.freq_mhz, how.seeds, how.member, make)
        tried.append((rate, got))
        return got >= plant.slo.attainment

    own_rps = mean_rate_rps(windows)
    low, high = 0.0, own_rps
    floor = MIN_JUDGED / (len(how.seeds) * sum(window.duration_s for window in windows))
    while meets(high):
        low, high = high, 2.0 * high
        if high > HIGHEST_MULTIPLE * own_rps:
            break
    while high - low > how.tolerance * high and 0.5 * (low + high) >= floor:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if meets(middle) else (low, middle)
    best = max((t for t in tried if t[0] == low), default=(0.0, 0.0))
    return Capacity(best[0], best[1], tuple(tried))


@lru_cache(maxsize=1)
def _code() -> str:
    """Hash of the code between the files and a capacity."""
    digest = hashlib.sha256(source_digest().encode())
    for part in ("config", "models", "traces"):
        for file in python_files(PACKAGE / part):
            digest.update(file.relative_to(PACKAGE).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def capacity_key(plant: Plant, how: SearchSettings, work: str) -> str:
    """Hash of all that a capacity depends on.

    The code, the coefficients with GPU and LLM, the engine limits, the ramp of a parked instance,
    the prefix cache,
    the bounds of the SLO, the search and the workload. Not: actuation delay, reward, and names.

    Args:
        plant: phase, hardware and engine settings.
        how: the search.
        work: what tells the workload from others.
    """
    s, slo = plant.settings.instance, plant.slo
    limits: list[Any] = [s.tp, s.dtype, s.token_budget, s.max_seqs, s.kv_watermark]
    if s.idle == "parked":  # its ramp delays requests; what it draws does not
        limits.append(s.parked_ramp_s)
    if plant.phase == "prefill":
        limits.append(s.prefix_cache)
    bound: list[Any] = [slo.bound_s(plant.phase), slo.attainment]
    if slo.classes:
        bound.append(slo.model_dump_json())
    search = [how.freq_mhz, how.seeds, how.member, how.tolerance]
    parts = [_code(), plant.phase, plant.model.digest, limits, bound, search, work]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


_found: dict[str, Capacity] = {}  # where no file can be kept


def _path(key: str) -> Path:
    return cache_root() / "instance-capacity" / f"{key}.json"


def _known(key: str) -> Capacity | None:
    """The capacity of a key, found before; None also where the file is damaged."""
    if key not in _found:
        kept = recall(_path(key))
        try:
            rate, attainment = float(kept["rate_rps"]), float(kept["attainment"])
            tried = tuple((float(r), float(a)) for r, a in kept["tried"])
        except (TypeError, KeyError, ValueError):
            return None
        if not (np.isfinite(rate) and rate >= 0.0 and 0.0 <= attainment <= 1.0 and tried):
            return None
        _found[key] = Capacity(rate, attainment, tried)
    return _found[key]


def _keep(key: str, found: Capacity) -> Capacity:
    _found[key] = found
    data = {"rate_rps": found.rate_rps, "attainment": found.attainment, "tried": found.tried}
    remember(_path(key), json.dumps(data))
    return found
