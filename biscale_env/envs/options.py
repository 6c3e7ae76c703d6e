"""Constructor options of the environments, resolved into a plant and a source of workloads."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from biscale_env.config import Slo
from biscale_env.config.load_share import checked_load
from biscale_env.config.loader import nearest, validate
from biscale_env.core.errors import BiscaleError, OptionError
from biscale_env.envs.loads.capacity import find_capacity, profile_capacity
from biscale_env.envs.loads.prefix_hits import with_cache
from biscale_env.envs.loads.workloads import WorkloadSource, generated, trace_windows
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.traces import Trace
from biscale_env.traces.prompts.prompt_blocks import PromptBlocks
from biscale_env.traces.synthetic.profiles import WorkloadProfile, profile_names

DEFAULT_PROFILE = "azure-conv-like"
DEFAULT_LOAD = 0.75  # of the capacity at max clock: busy, yet served
DEFAULT_EPISODE_S = 120.0
MAX_PLAIN_REQUESTS = 200_000  # of a trace in memory that a spec writes out; about 10 MB of JSON
RESET_KEYS = ("workload", "member")


@dataclass(frozen=True)
class EnvOptions:
    """A plant, its workloads, and how an episode is chosen."""

    plant: Plant
    source: WorkloadSource
    n_workloads: int

    def choose(
        self, rng: np.random.Generator, fixed: Mapping[str, Any] | None = None
    ) -> tuple[int, int]:
        """Workload and ensemble member of the next episode, from the generator unless fixed.

        Raises:
            BiscaleError: a reset option that there is not, or a workload or member that does not
                exist.
        """
        if fixed is not None:
            fixed = reset_options(fixed)
            unknown = sorted(str(name) for name in set(fixed) - set(RESET_KEYS))
            if unknown:
                raise BiscaleError(
                    f"unknown reset option '{unknown[0]}'; known: {', '.join(RESET_KEYS)}"
                )
        workload = int(rng.integers(self.n_workloads))
        setting = self.plant.settings.ensemble_member
        member = (
            int(rng.integers(self.plant.model.n_members)) if setting == "random" else int(setting)
        )
        if not fixed:
            return workload, member
        workload = whole(fixed.get("workload", workload), "reset option 'workload'")
        member = whole(fixed.get("member", member), "reset option 'member'")
        if workload < 0:
            raise BiscaleError(f"reset option 'workload' must not be negative, got {workload}")
        return workload, member


def reset_options(given: Any) -> dict[str, Any]:
    """The options of a reset by name.

    Raises:
        BiscaleError: they are no mapping.
    """
    if given is not None and not isinstance(given, Mapping):
        raise BiscaleError(f"the options of reset() are a mapping by name, got {given!r}")
    return dict(given or {})


def real(value: Any, name: str) -> Any:
    """The value itself when it is a real number.

    Raises:
        BiscaleError: it is none.
    """
    if not isinstance(value, Real):
        raise BiscaleError(f"{name} must be a number, got {value!r}")
    return value


def whole(value: Any, name: str) -> int:
    """A value as a whole number.

    Raises:
        BiscaleError: it is none.
    """
    try:
        number = operator.index(value.item() if isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError):
        raise BiscaleError(f"{name} must be a whole number, got {value!r}") from None
    return number


def capacity_rps(plant: Plant, trace: Trace | None, profile: str) -> float:
    """Capacity at max clock of a trace or a generator profile, requests/s.

    Raises:
        BiscaleError: no load at all is served within the SLO.
    """
    found = find_capacity(plant, trace) if trace is not None else profile_capacity(plant, profile)
    if found.rate_rps <= 0:
        what = trace.name if trace is not None else profile
        raise BiscaleError(
            f"{what}: not even a small load meets SLO '{plant.slo.name}' at max clock; use a wider "
            "SLO or more GPUs"
        )
    return found.rate_rps


@dataclass(frozen=True)
class WorkloadOptions:
    """Which workloads the episodes run.

    Attributes:
        trace: a trace, its path, its name, or a mapping of its columns; episodes are random windows
            of it. The name of a generator profile is the same as ``profile``.
        profile: generator profile, used without a trace.
        load: fraction of the capacity at max clock; the default is 0.75.
        rate_rps: mean request rate instead of a load, requests/s.
        episode_s: length of an episode, s.
        workload_seed: root of the workloads.
        n_workloads: how many different workloads the episodes are chosen from.

    Raises:
        BiscaleError: an impossible value.
    """

    trace: Trace | str | Path | Mapping[str, Any] | None = None
    profile: str = DEFAULT_PROFILE
    load: float | None = None
    rate_rps: float | None = None
    episode_s: float = DEFAULT_EPISODE_S
    workload_seed: int = 0
    n_workloads: int = 256

    def __post_init__(self) -> None:
        if self.load is not None and self.rate_rps is not None:
            raise BiscaleError("give either load or rate_rps, not both")
        for name in ("load", "rate_rps"):
            if getattr(self, name) is not None:
                real(getattr(self, name), name)
        real(self.episode_s, "episode_s")
        if not isinstance(self.profile, str | WorkloadProfile):
            raise BiscaleError(f"profile must be the name of a profile, got {self.profile!r}")
        if self.load is not None and not 0 < self.load < np.inf:
            raise BiscaleError(f"load must be a positive fraction of the capacity, got {self.load}")
        if self.load is not None:
            checked_load(self.load)
        if whole(self.n_workloads, "n_workloads") < 1:
            raise BiscaleError(f"n_workloads must be at least 1, got {self.n_workloads}")

    def source(self, plant: Plant) -> WorkloadSource:
        """The source of workloads at the rate that these options mean for a plant.

        Raises:
            BiscaleError: an unknown trace or profile, or a request that can never fit.
        """
        trace, profile = self.loaded()
        if trace is not None:
            trace = with_cache(plant.settings.instance.prefix_cache, trace)
            plant.check_fits(trace)
        rate_rps = self.rate_rps
        if rate_rps is None:
            fraction = DEFAULT_LOAD if self.load is None else self.load
            rate_rps = fraction * capacity_rps(plant, trace, profile)
        make = trace_windows(trace) if trace is not None else generated(profile)
        return WorkloadSource(make, rate_rps, self.episode_s, self.workload_seed)

    def loaded(self) -> tuple[Trace | None, str]:
        """The trace, if there is one, and the generator profile that counts without one.

        Raises:
            BiscaleError: an unknown trace.
        """
        if self.trace is None or isinstance(self.trace, Trace):
            return self.trace, self.profile
        if isinstance(self.trace, Mapping):
            return trace_of_columns(self.trace), self.profile
        named = str(self.trace)
        if named in profile_names():
            return None, named
        from biscale_env.traces import load_named  # readers of files: half of the import's time

        return load_named(named), self.profile


def trace_of_columns(columns: Mapping[str, Any]) -> Trace:
    """A trace given as a mapping of its fields, as a spec holds it.

    Raises:
        BiscaleError: a field is missing or unknown, or a value is impossible.
    """
    known = [field.name for field in fields(Trace)]
    given = {"name": "trace", "source": "given as columns", **columns}
    for name in given:
        if name not in known:
            raise BiscaleError(f"a trace has no '{name}'; its columns are {', '.join(known)}")
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        if name not in given:
            raise BiscaleError(f"a trace given as a mapping needs '{name}'")
    if isinstance(given.get("blocks"), Mapping):
        given["blocks"] = _blocks_of(given["blocks"])
    return Trace(**given)


def _blocks_of(columns: Mapping[str, Any]) -> PromptBlocks:
    known = [field.name for field in fields(PromptBlocks)]
    if set(columns) != set(known):
        raise BiscaleError(f"blocks given as a mapping have the fields {', '.join(known)}")
    ids, starts, session = (np.asarray(columns[name]) for name in ("ids", "starts", "session"))
    size, n_ids, n_sessions = (int(columns[k]) for k in ("block_tokens", "n_ids", "n_sessions"))
    return PromptBlocks(ids, starts, session, size, n_ids, n_sessions)


WORKLOAD_KEYS = tuple(field.name for field in fields(WorkloadOptions))


def unknown_keyword(environment: str, name: str, known: Iterable[str]) -> OptionError:
    """The error for a keyword that an environment does not have."""
    near = nearest(name, known)
    hint = f"; the nearest option is '{near}'" if near else ""
    return OptionError(f"{environment} got an unexpected keyword argument '{name}'{hint}")


def check_render_mode(render_mode: str | None, modes: Sequence[str]) -> None:
    """Refuse a render mode that there is not.

    Raises:
        OptionError: names those that there are.
    """
    if render_mode is not None and render_mode not in modes:
        there = f"choose None or one of {', '.join(modes)}" if modes else "only None can be given"
        raise OptionError(f"there is no render_mode '{render_mode}': {there}")


def make_options(phase: str, **options: Any) -> EnvOptions:
    """Resolve the options of an environment.

    Args:
        phase: ``prefill`` or ``decode``.
        **options: fields of :class:`WorkloadOptions`; ``slo``: an SLO, its name, or a mapping of
            its fields; fields of :class:`biscale_env.envs.plant.PlantSettings` and of
            :class:`biscale_env.config.InstanceSpec`, e.g. ``tp``, ``gpu``, ``ensemble_member``.

    Raises:
        OptionError: an unknown option.
        BiscaleError: an impossible value.
    """
    settings_keys = [key for key in PlantSettings.known_keys() if key != "phase"]
    for name in options:
        if name not in WORKLOAD_KEYS and name not in settings_keys:
            environment = f"the {phase} environment"
            raise unknown_keyword(environment, name, [*WORKLOAD_KEYS, *settings_keys])
    workloads = WorkloadOptions(**{k: v for k, v in options.items() if k in WORKLOAD_KEYS})
    settings = {k: v for k, v in options.items() if k not in WORKLOAD_KEYS}
    slo = settings.get("slo")
    given = validate(slo, Slo, "slo") if isinstance(slo, Mapping) else slo
    own = given if isinstance(given, Slo) else None
    if own is not None:
        settings["slo"] = own.name
    plant = Plant(PlantSettings.of(phase, **settings), own)
    return EnvOptions(plant, workloads.source(plant), workloads.n_workloads)


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with plain values, so that a spec can be written as JSON and read again.

    Configuration objects become mappings, traces their columns, members of an enumeration their
    names, paths and numbers of NumPy those of Python. What is none of these stays what it is.
    """
    return {name: plain(value) for name, value in options.items()}


def plain(value: Any) -> Any:
    """A value of :func:`plain_options`."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, PromptBlocks) or (
        isinstance(value, Trace) and len(value) <= MAX_PLAIN_REQUESTS
    ):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, Mapping) and all(isinstance(key, tuple) for key in value):
        return [[*map(plain, key), plain(inner)] for key, inner in value.items()]
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value
