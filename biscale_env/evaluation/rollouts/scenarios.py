"""Scenarios: which workload, load, SLO, delay and ensemble members.

Named ones are frozen in YAML.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from biscale_env.config import Slo, WithInstance, load_slo
from biscale_env.config.load_share import checked_load
from biscale_env.config.loader import load_named
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.loads.capacity import (
    Capacity,
    find_capacity,
    profile_capacity,
    slowest_alone_s,
)
from biscale_env.envs.loads.prefix_hits import windows_with_cache, with_cache
from biscale_env.envs.loads.workloads import capacity_sample, generated
from biscale_env.envs.plant import Means, Plant, PlantSettings
from biscale_env.evaluation.rollouts.sides import Side, cut_to, early_and_late, halves
from biscale_env.evaluation.runs.blocks import Copies
from biscale_env.traces import Trace, TraceWindow, WindowSpacing, named_windows
from biscale_env.traces import load_named as load_named_trace
from biscale_env.traces.reading.reading_options import ReadingOptions

TUNE_SEED = 1_000_003  # workloads for tuning are generated from here on, those for tables from 0


class Infeasible(BiscaleError):
    """Max clock itself cannot serve the scenario at any load.

    Attributes:
        point: the columns of ``INFEASIBLE_COLUMNS``: the operating point and, in words, what was
            tried.
    """

    def __init__(self, scenario: "Scenario", phase: str, reason: str) -> None:
        super().__init__(scenario, phase, reason)
        self.point = {"scenario": scenario.name, "phase": phase, "reason": reason} | {
            name: getattr(scenario, name) for name in ("load", "tp", "dtype")
        }
        self.point["slo"] = scenario.slo_name

    def __str__(self) -> str:
        return "scenario {scenario}, {phase}: infeasible, since {reason}".format(**self.point)


class Scenario(WithInstance):
    """One operating point of both phases; the instance's keys (``gpu``, ``slo``, ``tp``, ...) too.

    Attributes:
        name: short name used in tables.
        workload: what several scenarios of other folds have in common; empty is the name itself.
        trace: name or path of a trace; without one, workloads are generated from ``profile``.
        reading: how a trace's file is read, and which part of it.
        windows: cut a long trace into windows of several days (``30min/1d``), whose early days tune
            and whose other days are judged; None takes it as one stretch of time.
        profile: generator profile.
        load: fraction of the capacity of one instance at max clock; in the evaluated part of that
            part's own, in the tuning part of that one's own.
        delay_s: actuation delay; None takes that of the ensemble member.
        duration_s: length of generated workloads; of a trace, the length used of the evaluated part
            (or of each evaluated window) at most.
        decode_duration_s: for decode, the first part of each half (or window) used at most (a
            decode instance serves ten times the requests).
        tune_fraction: the first part of a trace (or of the days), on which free parameters are
            tuned and which no table shows.
        fold: ``forward`` tunes on the first part of a trace and judges on the rest, ``backward``
            exchanges the two. Generated workloads know no order, so both are the same for them.
        seeds: how many workloads are judged, of each window.
        first_seed: seed of the first of them; ablations start high, so that no table shows what a
            preset was chosen on.
        members: ensemble members, -1 nominal.
        means: how clocks are held, ``lock`` or ``cap``; the capacity is the same for both.
    """

    name: str
    workload: str = ""
    trace: str | None = None
    reading: ReadingOptions | None = None
    windows: WindowSpacing | None = None
    profile: str = "azure-conv-like"
    load: float = Field(default=0.75, gt=0)
    delay_s: float | None = Field(default=None, ge=0)
    duration_s: float | None = Field(default=None, gt=0)
    decode_duration_s: float | None = Field(default=None, gt=0)
    tune_fraction: float = Field(default=0.5, gt=0, lt=1)
    fold: Literal["forward", "backward"] = "forward"
    seeds: int = Field(default=3, gt=0)
    first_seed: int = Field(default=0, ge=0)
    members: tuple[int, ...] = (-1,)
    means: Means = "lock"

    _no_per_cent = field_validator("load")(checked_load)

    @model_validator(mode="after")
    def _windows_of_a_trace(self) -> "Scenario":
        if self.windows is not None and self.trace is None:
            raise BiscaleError("windows are cut out of a trace: give one with --trace")
        return self

    @property
    def choices(self) -> range:
        """Numbers of the workloads that are judged, of each window of time."""
        return range(self.first_seed, self.first_seed + self.seeds)

    @property
    def slo_name(self) -> str:
        """Name of the SLO as it stands in results, whether it was given by name or as a file."""
        return load_slo(self.slo).name

    def plant_settings(self, phase: str) -> PlantSettings:
        """Settings of the plant of a phase; runs go on until every request is served."""
        return PlantSettings.of(
            phase,
            instance=self.instance,
            actuation_delay_s=self.delay_s,
            drain=True,
            means=self.means,
        )


@dataclass(frozen=True)
class Case:
    """A scenario resolved for one phase.

    Attributes:
        scenario: what was asked for.
        plant: the phase's plant (``drain`` on).
        judged: what tables are made of.
        tuning: what free parameters are chosen on; shares no request with ``judged``.
    """

    scenario: Scenario
    plant: Plant
    judged: Side
    tuning: Side

    @property
    def capacity(self) -> Capacity:
        """Capacity of one instance at max clock on the judged side."""
        return self.judged.capacity

    @property
    def tune_capacity(self) -> Capacity:
        """The same on the tuning side."""
        return self.tuning.capacity

    @property
    def rate_rps(self) -> float:
        """Mean rate of the judged workloads: the load times the capacity of their side."""
        return self.scenario.load * self.capacity.rate_rps

    @property
    def tune_rate_rps(self) -> float:
        """Mean rate of the tuning workloads: the same load times their own side's capacity."""
        return self.scenario.load * self.tune_capacity.rate_rps

    @property
    def of_trace(self) -> bool:
        """Whether workloads are choices of requests of a trace, and not generated."""
        return bool(self.judged.windows)

    @property
    def phase(self) -> str:
        """``prefill`` or ``decode``."""
        return self.plant.phase

    def workload(self, seed: int) -> Trace:
        """Workload ``seed`` for tables, the same for every policy."""
        if self.of_trace:
            return self.judged.workload(self.scenario.load, seed)
        return self._generated(seed, self.rate_rps)

    def workload_seeds(self, choices: int | None = None) -> tuple[int, ...]:
        """Seeds of the workloads that are judged: every window, each with some choices.

        Args:
            choices: the first few choices only; None for all.
        """
        return self.judged.numbers(choices, self.scenario.choices)

    def workloads(self) -> list[Trace]:
        """All workloads that are judged, in the order of their seeds."""
        return [self.workload(seed) for seed in self.workload_seeds()]

    def copies(self, seed: int) -> Copies:
        """Shift and share of each copy of the trace that workload ``seed`` is put together of."""
        if self.of_trace:
            return self.judged.copies(self.scenario.load, seed)
        return ((0.0, 1.0),)

    def tuning_workload(self, seed: int) -> Trace:
        """Workload ``seed`` for tuning free parameters; shares no request with those for tables."""
        if self.of_trace:
            return self.tuning.workload(self.scenario.load, seed)
        return self._generated(TUNE_SEED + seed, self.tune_rate_rps)

    def _generated(self, seed: int, rate_rps: float) -> Trace:
        """A generated workload brought to the exact rate, as the choices from a trace are."""
        made = generated(self.scenario.profile)(rate_rps, self.scenario.duration_s or 600.0, seed)
        return made.scaled_to(rate_rps, seed)


def load_scenario(name: str) -> Scenario:
    """A frozen scenario ``configs/scenarios/<name>.yaml``."""
    return load_named("scenarios", name, Scenario)


Stamp = tuple[tuple[int, ...], ...]


def _stamp(*names: str | None) -> Stamp:
    """What tells one content of files (and of folders of files) from the next.

    Names that are no paths add nothing: what is shipped does not change.
    """
    paths = [Path(name) for name in names if name]
    inside = [sorted(path.iterdir()) if path.is_dir() else [path] for path in paths]
    found = [file.stat() for files in inside for file in files if file.is_file()]
    return tuple((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found)


@lru_cache(maxsize=8)
def _trace(name: str, reading: ReadingOptions | None, stamp: Stamp) -> Trace:
    return load_named_trace(name, reading)


@lru_cache(maxsize=8)
def _windows(
    name: str, plan: WindowSpacing, reading: ReadingOptions | None, stamp: Stamp
) -> list[TraceWindow]:
    return named_windows(name, plan, reading)


class Sides(NamedTuple):
    """What loads of a scenario are shares of: the judged side and the tuning side."""

    judged: Side
    tuning: Side


@lru_cache(maxsize=64)
def _sides(phase: str, scenario_key: str, slo: Slo, stamp: Stamp) -> Sides:
    scenario = Scenario.model_validate_json(scenario_key)
    plant = Plant(scenario.plant_settings(phase))
    rule = scenario.instance.prefix_cache
    if scenario.trace is None:
        with_cache(rule, capacity_sample(scenario.profile))
        found = profile_capacity(plant, scenario.profile)
        return Sides(Side(found), Side(found))
    name, plan, reading = scenario.trace, scenario.windows, scenario.reading
    if plan is None:
        read = with_cache(rule, _trace(name, reading, _stamp(name)))
        first, rest = halves(read, scenario.tune_fraction)
    else:
        cut = windows_with_cache(rule, _windows(name, plan, reading, _stamp(name)))
        first, rest = early_and_late(cut, scenario.tune_fraction, name)
    tune, judged = (first, rest) if scenario.fold == "forward" else (rest, first)
    judged = cut_to(judged, scenario.duration_s)
    if phase == "decode":
        judged, tune = (cut_to(side, scenario.decode_duration_s) for side in (judged, tune))
    # each side serves another load: the minimum of both would make "90 %" of one 49 % of the other
    return Sides(*(_side(plant, windows, plan is not None) for windows in (judged, tune)))


def _side(plant: Plant, windows: list[TraceWindow], days: bool) -> Side:
    if days:  # the first seconds of a window may hold no request
        windows = [window for window in windows if len(window.trace)]
    return Side(find_capacity(plant, [w.trace for w in windows]), tuple(windows), days)


def resolve(scenario: Scenario, phase: str) -> Case:
    """Load the plant of a phase, measure the capacity of both parts, fix the rates.

    Raises:
        Infeasible: on one of the parts not even a small load meets the SLO at max clock, so there
            is no capacity to take a fraction of.
    """
    slo = load_slo(scenario.slo)
    same = {
        "name": "",
        "workload": "",
        "load": 1.0,
        "seeds": 1,
        "first_seed": 0,
        "members": (-1,),
        "delay_s": 0.0,
        "means": "lock",
    }
    spec = scenario.instance
    stamp = _stamp(scenario.trace, scenario.profile, spec.gpu, spec.llm, spec.family)
    key = scenario.model_copy(update=same).model_dump_json()
    sides = _sides(phase, key, slo, stamp)
    plant = Plant(scenario.plant_settings(phase))
    for side, which in ((sides.judged, "evaluated"), (sides.tuning, "tuning")):
        if side.capacity.rate_rps <= 0:
            raise Infeasible(scenario, phase, _why_infeasible(plant, scenario, side, which))
    return Case(scenario, plant, sides.judged, sides.tuning)


def _why_infeasible(plant: Plant, scenario: Scenario, side: Side, which: str) -> str:
    rate_rps, attainment = side.capacity.tried[-1]
    samples = side.traces or (capacity_sample(scenario.profile),)
    alone_s = max(slowest_alone_s(plant, sample) for sample in samples)
    where = f" on the {which} part of the trace" if side.windows else ""
    return (
        f"even {rate_rps:.3g} req/s on one TP{scenario.tp} {scenario.dtype} instance misses "
        f"SLO '{scenario.slo}' at max clock{where} (attainment {attainment:.2%}; with the instance "
        f"to itself, the slowest request takes {1e3 * alone_s:.0f} of "
        f"{1e3 * plant.slo.bound_s(plant.phase):.0f} ms); use a wider SLO or a larger TP"
    )
