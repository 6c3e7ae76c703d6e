"""Scenarios: which workload, load, SLO, delay and ensemble members.

Named ones are frozen in YAML.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, field_validator

from biscale_env.config import Slo, WithInstance, load_slo
from biscale_env.config.load_share import checked_load
from biscale_env.config.loader import load_named
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.capacity import Capacity, find_capacity, profile_capacity, slowest_alone_s
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.envs.workloads import capacity_sample, generated
from biscale_env.traces import Trace
from biscale_env.traces import load_named as load_named_trace
from biscale_env.traces.reading_options import ReadingOptions

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
        profile: generator profile.
        load: fraction of the capacity of one instance at max clock; in the evaluated part of that
            part's own, in the tuning part of that one's own.
        delay_s: actuation delay; None takes that of the ensemble member.
        duration_s: length of generated workloads; of a trace, the length used of the evaluated part
            at most.
        decode_duration_s: for decode, the first part of each half used at most (a decode instance
            serves ten times the requests).
        tune_fraction: the first part of a trace, on which free parameters are tuned and which no
            table shows.
        fold: ``forward`` tunes on the first part of a trace and judges on the rest, ``backward``
            exchanges the two. Generated workloads know no order, so both are the same for them.
        seeds: how many workloads are judged.
        first_seed: seed of the first of them; ablations start high, so that no table shows what a
            preset was chosen on.
        members: ensemble members, -1 nominal.
    """

    name: str
    workload: str = ""
    trace: str | None = None
    reading: ReadingOptions | None = None
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

    _no_per_cent = field_validator("load")(checked_load)

    @property
    def workload_seeds(self) -> tuple[int, ...]:
        """Seeds of the workloads that are judged."""
        return tuple(range(self.first_seed, self.first_seed + self.seeds))

    @property
    def slo_name(self) -> str:
        """Name of the SLO as it stands in results, whether it was given by name or as a file."""
        return load_slo(self.slo).name

    def plant_settings(self, phase: str) -> PlantSettings:
        """Settings of the plant of a phase; runs go on until every request is served."""
        return PlantSettings.of(
            phase, instance=self.instance, actuation_delay_s=self.delay_s, drain=True
        )


@dataclass(frozen=True)
class Case:
    """A scenario resolved for one phase.

    Attributes:
        scenario: what was asked for.
        plant: the phase's plant (``drain`` on).
        capacity: capacity of one instance at max clock on the evaluated part.
        tune_capacity: the same on the tuning part.
        part: evaluated part of the trace; None for generated workloads.
        tune_part: the part for tuning; None for generated workloads.
    """

    scenario: Scenario
    plant: Plant
    capacity: Capacity
    tune_capacity: Capacity
    part: Trace | None
    tune_part: Trace | None

    @property
    def rate_rps(self) -> float:
        """Rate of the evaluated workloads: the load times the capacity of their part."""
        return self.scenario.load * self.capacity.rate_rps

    @property
    def tune_rate_rps(self) -> float:
        """Rate of the tuning workloads: the same load times the capacity of their own part."""
        return self.scenario.load * self.tune_capacity.rate_rps

    @property
    def phase(self) -> str:
        """``prefill`` or ``decode``."""
        return self.plant.phase

    def workload(self, seed: int) -> Trace:
        """Workload ``seed`` for tables, the same for every policy."""
        if self.part is not None:
            return self.part.scaled_to(self.rate_rps, seed)
        return self._generated(seed, self.rate_rps)

    def workloads(self) -> list[Trace]:
        """All workloads that are judged, in the order of their seeds."""
        return [self.workload(seed) for seed in self.scenario.workload_seeds]

    def tuning_workload(self, seed: int) -> Trace:
        """Workload ``seed`` for tuning free parameters; shares no request with those for tables."""
        if self.tune_part is not None:
            return self.tune_part.scaled_to(self.tune_rate_rps, seed)
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


class Parts(NamedTuple):
    """What loads of a scenario are shares of.

    Attributes:
        part: evaluated part of the trace; None for generated workloads.
        tune_part: the part for tuning; None for generated workloads.
        capacity: of the evaluated part.
        tune_capacity: of the tuning part.
    """

    part: Trace | None
    tune_part: Trace | None
    capacity: Capacity
    tune_capacity: Capacity


@lru_cache(maxsize=64)
def _parts(phase: str, scenario_key: str, slo: Slo, stamp: Stamp) -> Parts:
    scenario = Scenario.model_validate_json(scenario_key)
    plant = Plant(scenario.plant_settings(phase))
    if scenario.trace is None:
        found = profile_capacity(plant, scenario.profile)
        return Parts(None, None, found, found)
    read = _trace(scenario.trace, scenario.reading, _stamp(scenario.trace))
    first, rest = read.split(scenario.tune_fraction)
    tune, part = (first, rest) if scenario.fold == "forward" else (rest, first)
    if scenario.duration_s is not None and scenario.duration_s < part.duration_s:
        part = part.window(0.0, scenario.duration_s)
    if phase == "decode" and scenario.decode_duration_s is not None:
        part, tune = (
            p.window(0.0, min(scenario.decode_duration_s, p.duration_s)) for p in (part, tune)
        )
    # each half serves another load: the minimum of both would make "90 %" of one 49 % of the other
    return Parts(part, tune, find_capacity(plant, part), find_capacity(plant, tune))


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
    }
    spec = scenario.instance
    stamp = _stamp(scenario.trace, scenario.profile, spec.gpu, spec.llm, spec.family)
    key = scenario.model_copy(update=same).model_dump_json()
    parts = _parts(phase, key, slo, stamp)
    plant = Plant(scenario.plant_settings(phase))
    for capacity, part, which in (
        (parts.capacity, parts.part, "evaluated"),
        (parts.tune_capacity, parts.tune_part, "tuning"),
    ):
        if capacity.rate_rps <= 0:
            raise Infeasible(
                scenario, phase, _why_infeasible(plant, scenario, capacity, part, which)
            )
    return Case(scenario, plant, parts.capacity, parts.tune_capacity, parts.part, parts.tune_part)


def _why_infeasible(
    plant: Plant, scenario: Scenario, capacity: Capacity, part: Trace | None, which: str
) -> str:
    rate_rps, attainment = capacity.tried[-1]
    sample = capacity_sample(scenario.profile) if part is None else part
    where = "" if part is None else f" on the {which} part of the trace"
    return (
        f"even {rate_rps:.3g} req/s on one TP{scenario.tp} {scenario.dtype} instance misses "
        f"SLO '{scenario.slo}' at max clock{where} (attainment {attainment:.2%}; with the instance "
        f"to itself, the slowest request takes {1e3 * slowest_alone_s(plant, sample):.0f} of "
        f"{1e3 * plant.slo.bound_s(plant.phase):.0f} ms); use a wider SLO or a larger TP"
    )
