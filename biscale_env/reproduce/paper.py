"""The headline experiment as a frozen configuration.

Operating points, plants, systems, what is varied.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from biscale_env.config.hardware import Dtype
from biscale_env.config.instance import IdleRule, PrefixCacheRule
from biscale_env.config.loader import Config, load_named
from biscale_env.envs.loads.prefix_hits import with_cache
from biscale_env.traces import Trace, generate, load_lengths, with_lengths
from biscale_env.traces import load_named as load_trace
from biscale_env.traces.download import cached_path, load_downloads
from biscale_env.traces.reading.reading_options import ReadingOptions
from biscale_env.traces.synthetic.profiles import load_workload, profile_names

TUNE_SEED = 1_000_003  # workloads for tuning are made from here on, those for tables from 0
OWN_LENGTHS = "own"
PAPER_LENGTHS = "sharegpt-pd"
"""Lengths of the authors' own ShareGPT sample; see ``configs/traces/lengths-sharegpt-pd.yaml``."""


TablesOf = Literal["window", "workload"]


class OperatingPoint(Config):
    """One operating point.

    Attributes:
        name: short name used in tables.
        workload: ``A`` (Poisson arrivals at a rate) or ``B`` (Azure arrivals at a fraction of the
            capacity).
        rate_rps: rate of workload A.
        load: fraction of the capacity of DistServe's placement at max clock, workload B.
        lengths: length profile; ``own`` keeps the trace's, workload B.
        arrivals: workload profile that workload B's arrivals are generated from; None: those of
            the experiment's trace.
        dtype: ``bf16`` or ``fp8``.
    """

    name: str
    workload: Literal["A", "B"]
    rate_rps: float | None = Field(default=None, gt=0)
    load: float | None = Field(default=None, gt=0)
    lengths: str = PAPER_LENGTHS
    arrivals: str | None = None
    dtype: Dtype = "bf16"

    @model_validator(mode="after")
    def _load_is_given(self) -> "OperatingPoint":
        if (self.rate_rps is None) == (self.workload == "A") or (self.load is None) == (
            self.workload == "B"
        ):
            raise ValueError("workload A needs rate_rps, workload B needs load")
        if self.workload == "A" and (self.lengths == OWN_LENGTHS or self.arrivals is not None):
            raise ValueError(
                "workload A has Poisson arrivals and a length profile: arrivals and "
                f"lengths: {OWN_LENGTHS} are workload B's"
            )
        return self


class Variation(Config):
    """One assumption changed on one operating point.

    Attributes:
        name: short name used in tables.
        point: operating point it is changed on.
        settings: cluster settings that differ.
        spare_w: power that BiScale's ILP takes an unused GPU to draw, W.
        gap_cv: burstiness of workload A's arrivals, which are Gamma then.
        lengths: length profile in place of the point's.
        load: fraction of capacity in place of the point's, workload B.
        alpha: headroom of tier 1, fixed instead of chosen on the tuning workloads.
        tables: capacity table of every window, or one per workload, in place of the experiment's.
    """

    name: str
    point: str
    settings: dict[str, Any] = Field(default_factory=dict)
    spare_w: float = Field(default=0.0, ge=0)
    gap_cv: float | None = Field(default=None, gt=0)
    lengths: str | None = None
    load: float | None = Field(default=None, gt=0)
    alpha: float | None = Field(default=None, gt=-1)
    tables: TablesOf | None = None


class PaperExperiment(Config):
    """The whole experiment.

    Attributes:
        name: name of the configuration.
        gpus: GPUs of the cluster.
        gpu: GPU, name or YAML file; None: that of the fitted model.
        llm: LLM, likewise.
        ep: groups that experts are spread over; None: 1.
        model: fitted model; None: the default one.
        idle: what an instance that waits draws, ``last-clock`` or ``parked``.
        prefix_cache: of prefill instances, where the trace says what its prompts share and keeps
            its own lengths.
        slo: name of the SLO.
        profile: generator of workload A.
        trace: trace of workload B's arrivals, used when it is at hand.
        fallback: generator that stands in for the trace otherwise.
        duration_s: length of a workload A run.
        trace_s: length of a generated stand-in for the trace.
        window_s: period of tier 1.
        tables: capacity table of every window from the requests of the window before, as in the
            paper, or one per ``workload``.
        seeds: workload seeds in the nominal plant.
        tune_seeds: workloads that free parameters are chosen on.
        members: members of the model ensemble, spread evenly over it.
        member_seeds: workload seeds in each member.
        systems: systems in the nominal plant.
        member_systems: systems in each member.
        points: operating points.
        variations: sensitivities, in the nominal plant.
        variation_systems: systems of the sensitivities.
        oracle: operating points of workload A whose prefill stage is also solved in hindsight.
    """

    name: str
    gpus: int = Field(default=16, gt=0)
    gpu: str | None = None
    llm: str | None = None
    ep: int | None = Field(default=None, gt=0)
    model: str | None = None
    idle: IdleRule = "last-clock"
    prefix_cache: PrefixCacheRule = "lru"
    slo: str = "biscale"
    profile: str = "poisson-sharegpt-pd"
    trace: str = "azure-conv-2023"
    fallback: str = "azure-conv-like"
    duration_s: float = Field(default=600.0, gt=0)
    trace_s: float = Field(default=3600.0, gt=0)
    window_s: float = Field(default=300.0, gt=0)
    tables: TablesOf = "window"
    seeds: int = Field(default=5, gt=0)
    tune_seeds: int = Field(default=3, gt=0)
    members: int = Field(default=16, ge=0)
    member_seeds: int = Field(default=2, gt=0)
    systems: tuple[str, ...]
    member_systems: tuple[str, ...]
    points: tuple[OperatingPoint, ...] = Field(min_length=1)
    variations: tuple[Variation, ...] = ()
    variation_systems: tuple[str, ...] = ("distserve", "placeonly", "biscale")
    oracle: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_exist(self) -> "PaperExperiment":
        names = {p.name for p in self.points}
        for asked in [v.point for v in self.variations] + list(self.oracle):
            if asked not in names:
                raise ValueError(f"there is no operating point '{asked}'")
        for systems in (self.systems, self.member_systems, self.variation_systems):
            if "distserve" not in systems:
                raise ValueError("every list of systems needs 'distserve', the reference")
        return self

    def cluster(self) -> dict[str, Any]:
        """Cluster settings that the experiment gives."""
        named = {"gpu": self.gpu, "llm": self.llm, "model": self.model, "ep": self.ep}
        given = {key: value for key, value in named.items() if value is not None}
        fixed = {"gpus": self.gpus, "slo": self.slo, "idle": self.idle}
        return {**fixed, "prefix_cache": self.prefix_cache, **given}

    def point(self, name: str) -> OperatingPoint:
        """An operating point by name."""
        return next(p for p in self.points if p.name == name)


def load_paper(name: str) -> PaperExperiment:
    """Load a shipped experiment (``paper``, ``paper-quick``) or a YAML file."""
    return load_named("reproductions", name, PaperExperiment)


def member_indices(count: int, available: int) -> list[int]:
    """``count`` members spread evenly over an ensemble."""
    if count == 0 or available == 0:
        return []
    return sorted({int(i) for i in np.linspace(0, available - 1, min(count, available))})


def arrivals_of(
    experiment: PaperExperiment,
    trace: str | Path | None = None,
    reading: ReadingOptions | None = None,
) -> tuple[Trace, str]:
    """Trace behind workload B, and a sentence that says what it is.

    Args:
        experiment: the experiment.
        trace: a trace file or name to use instead.
        reading: how it is read.

    Raises:
        BiscaleError: a trace that is at hand, or given here, cannot be read.
    """
    if trace is not None:
        loaded = _with_cache(experiment, load_trace(str(trace), reading))
        return loaded, f"arrivals of {loaded.name}"
    if not _at_hand(experiment.trace):
        made = generate(experiment.fallback, duration_s=experiment.trace_s, seed=0)
        return _with_cache(experiment, made), (
            f"generated arrivals {experiment.fallback} in place of {experiment.trace}, which was "
            "not at hand "
            f"(biscale traces fetch {experiment.trace})"
        )
    loaded = _with_cache(experiment, load_trace(experiment.trace, reading))
    return loaded, f"arrivals of {experiment.trace}"


def _with_cache(experiment: PaperExperiment, trace: Trace) -> Trace:
    """The trace as prefix caches see it: other lengths share nothing that is known."""
    keeps = any(p.workload == "B" and p.lengths == OWN_LENGTHS for p in experiment.points)
    keeps |= any(v.lengths == OWN_LENGTHS for v in experiment.variations)
    return with_cache(experiment.prefix_cache, trace if keeps else trace.without_blocks())


def _at_hand(name: str) -> bool:
    """Whether a trace is there to be read; what is there and cannot be read is an error."""
    if name in load_downloads().files:
        return cached_path(name) is not None
    return name in profile_names() or Path(name).is_file()


def workload_a(
    experiment: PaperExperiment, point: OperatingPoint, seed: int, gap_cv: float | None = None
) -> Trace:
    """Workload A: Poisson arrivals (Gamma where a CV is given) at a rate, the point's lengths."""
    profile = load_workload(experiment.profile)
    if gap_cv is not None:
        profile = profile.model_copy(
            update={"arrivals": profile.arrivals.model_copy(update={"gap_cv": gap_cv})}
        )
    return generate(
        profile,
        rate_rps=point.rate_rps,
        duration_s=experiment.duration_s,
        seed=seed,
        lengths=load_lengths(point.lengths),
    )


@lru_cache
def generated_arrivals(profile: str) -> Trace:
    """Arrivals that an operating point of workload B names, as their profile describes them."""
    return generate(profile)


def workload_b(part: Trace, point: OperatingPoint, rate_rps: float, seed: int) -> Trace:
    """Workload B: a part of the trace with the point's lengths.

    The rate is made by thinning and superposing requests.
    """
    if point.lengths == OWN_LENGTHS:
        return part.scaled_to(rate_rps, seed)
    return with_lengths(part.without_blocks().scaled_to(rate_rps, seed), point.lengths, seed)
