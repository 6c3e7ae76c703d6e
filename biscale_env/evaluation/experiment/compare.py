"""Comparing policies on a scenario.

The jobs, run in parallel over cores, every finished run kept at once.
"""

import gc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import joblib

from biscale_env.contract import Policy
from biscale_env.envs.plant import Plant
from biscale_env.evaluation.experiment.rollout import Rollout, rollout
from biscale_env.evaluation.experiment.scenarios import Case, Scenario, resolve
from biscale_env.evaluation.experiment.tuning import (
    Setting,
    TunedPolicy,
    best_static,
    max_clock,
    tune,
)
from biscale_env.evaluation.runs.record import RunRecord
from biscale_env.evaluation.stats import targets
from biscale_env.traces import Trace

STATIC_BEST = "static-best"
ORACLE = "oracle"
IDLE_WORKER_S = 3600.0  # workers keep their compiled code for the whole comparison


class PolicyFactory(Protocol):
    """How the command line hands policies in.

    An object of a module-level class, so that worker processes can load it.
    """

    def build(self, name: str, plant: Plant, traces: Sequence[Trace], member: int) -> Policy:
        """Make a policy from its name; only an oracle may look at the traces it will meet."""
        ...

    def grid(self, name: str, phase: str) -> list[dict[str, Any]]:
        """Settings that tuning may try; empty when there is nothing to tune."""
        ...


@dataclass(frozen=True)
class ComparisonJob:
    """One policy on one phase of one scenario in one ensemble member, over all its workload seeds.

    Attributes:
        scenario: operating point.
        phase: ``prefill`` or ``decode``.
        policy: name shown in tables.
        build: what the factory is asked for, e.g. ``mpc:margin=0.1``.
        member: ensemble member.
        seeds: workload seeds.
        training_seed: -1 for policies that are not trained.
        variant: ``tuned`` when free parameters are chosen on tuning workloads first.
        labels: further columns of the results.
    """

    scenario: Scenario
    phase: str
    policy: str
    build: str
    member: int
    seeds: tuple[int, ...]
    training_seed: int = -1
    variant: str = ""
    labels: dict[str, Any] = field(default_factory=dict)

    def key(self, seed: int) -> dict[str, Any]:
        """Key columns of the run on one workload seed, as in :class:`RunRecord`."""
        s = self.scenario
        return {
            "phase": self.phase, "policy": self.policy, "variant": self.variant, "scenario": s.name, "slo": s.slo_name,
            "load": s.load, "workload_seed": seed, "ensemble_member": self.member, "training_seed": self.training_seed,
            "tp": s.tp, "dtype": s.dtype,
        }  # fmt: skip


def record_of(
    job: ComparisonJob, case: Case, seed: int, run: Rollout, trace: Trace, extra: Mapping[str, Any]
) -> RunRecord:
    """A rollout as a results record."""
    plant = case.plant
    labels = {
        "delay_s": plant.delay_s(job.member),
        "capacity_rps": case.capacity.rate_rps,
        "one_trace": case.part is not None,
        **job.labels,
        **extra,
    }
    return RunRecord(
        phase=job.phase,
        policy=job.policy,
        scenario=job.scenario.name,
        slo=plant.slo,
        rate_rps=trace.rate_rps,
        workload_seed=seed,
        ensemble_member=job.member,
        tp=plant.settings.tp,
        dtype=plant.settings.dtype,
        n_gpus=plant.settings.tp,
        requests=run.requests,
        timeline=run.timeline,
        totals=run.totals,
        load=job.scenario.load,
        training_seed=job.training_seed,
        variant=job.variant,
        labels=labels,
    )


@dataclass(frozen=True)
class JobOutcome:
    """What a job hands back.

    Attributes:
        job: the job.
        records: one per workload.
        tuned: what tuning tried; None without tuning.
        reference: what max clock does on the tuning workloads; None without tuning.
    """

    job: ComparisonJob
    records: list[RunRecord]
    tuned: TunedPolicy | None = None
    reference: Setting | None = None


def with_params(name: str, params: Mapping[str, Any]) -> str:
    """Build string of a policy with parameters added."""
    text = ",".join(f"{k}={v}" for k, v in params.items())
    return f"{name}{',' if ':' in name else ':'}{text}" if text else name


def settle(
    job: ComparisonJob, case: Case, factory: PolicyFactory
) -> tuple[str, str, TunedPolicy | None, Setting | None]:
    """Choose free parameters on tuning workloads.

    ``(build string, setting in words, what was tried, max clock there)``.
    """
    grid = factory.grid(job.build, job.phase) if job.variant == "tuned" else []
    if not grid and job.build != STATIC_BEST:
        return job.build, "", None, None
    top = max_clock(case, job.member)
    target = targets.tuning_target(case.plant.slo.attainment, top.attainment)
    if job.build == STATIC_BEST:
        tuned = best_static(case, job.member, target)
        freq = tuned.chosen.params["freq_mhz"]
        return f"static:{freq:g}", f"{freq:g} MHz{_reached(tuned)}", tuned, top

    def build(params: Mapping[str, Any], plant: Plant, traces: Sequence[Trace]) -> Policy:
        return factory.build(with_params(job.build, params), plant, traces, job.member)

    tuned = tune(build, case, grid, job.member, target)
    words = ", ".join(f"{k}={v}" for k, v in tuned.chosen.params.items()) + _reached(tuned)
    return with_params(job.build, tuned.chosen.params), words, tuned, top


def _reached(tuned: TunedPolicy) -> str:
    return "" if tuned.reached else " (no setting reaches the target on the tuning workloads)"


def run_job(job: ComparisonJob, factory: PolicyFactory) -> JobOutcome:
    """Run one job to its end in this process."""
    case = resolve(job.scenario, job.phase)
    made, words, tuned, top = settle(job, case, factory)
    traces = [case.workload(seed) for seed in job.seeds]
    groups = (
        [[t] for t in traces] if job.build.startswith(ORACLE) else [traces]
    )  # each workload has an optimum of its own
    records: list[RunRecord] = []
    for group in groups:
        policy = factory.build(made, case.plant, group, job.member)
        runs = rollout(policy, getattr(policy, "plant", None) or case.plant, group, job.member)
        for run, trace in zip(runs, group, strict=True):
            extra = {
                "setting": words,
                **{f"oracle_{k}": v for k, v in getattr(policy, "report", {}).items()},
            }
            records.append(record_of(job, case, job.seeds[len(records)], run, trace, extra))
    return JobOutcome(job, records, tuned, top)


def run_jobs(
    jobs: Sequence[ComparisonJob], factory: PolicyFactory, n_jobs: int
) -> Iterator[JobOutcome]:
    """Run jobs over cores and yield the outcome of each as it finishes."""
    if n_jobs == 1 or len(jobs) <= 1:
        for job in jobs:
            yield run_job(job, factory)
            gc.collect()
        return
    # an interruption is no surprise to whoever caused it
    warnings.filterwarnings(
        "ignore", message=".*tasks which were still being processed", category=UserWarning
    )
    with joblib.parallel_config("loky", inner_max_num_threads=1, idle_worker_timeout=IDLE_WORKER_S):
        parallel = joblib.Parallel(
            n_jobs=min(n_jobs, len(jobs)), return_as="generator_unordered", batch_size=1
        )
        yield from parallel(joblib.delayed(run_job)(job, factory) for job in jobs)
