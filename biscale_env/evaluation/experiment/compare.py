"""Comparing policies on a scenario.

The jobs, run in parallel over cores, every finished run kept at once.
"""

import gc
import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import joblib

from biscale_env.evaluation.experiment.hindsight import (
    Hindsight,
    build_policy,
    settings_of,
)
from biscale_env.evaluation.experiment.judged_curves import (
    builder,
    hindsight_static,
    policy_curve,
    static_curve,
)
from biscale_env.evaluation.experiment.member_spread import MemberRun, member_runs
from biscale_env.evaluation.experiment.rollout import Rollout, rollout
from biscale_env.evaluation.experiment.scenarios import Case, Scenario, resolve
from biscale_env.evaluation.experiment.settings_search import Setting, setting_of
from biscale_env.evaluation.experiment.tuning import (
    TunedPolicy,
    best_static,
    max_clock,
    tune,
)
from biscale_env.evaluation.runs.record import RunRecord
from biscale_env.evaluation.stats import targets
from biscale_env.policies import with_parameters
from biscale_env.policies.policy_source import ORACLE, STATIC_BEST, STATIC_HINDSIGHT
from biscale_env.traces import Trace

IDLE_WORKER_S = 3600.0  # workers keep their compiled code for the whole comparison


@dataclass(frozen=True)
class ComparisonJob:
    """One policy on one phase of one scenario in one ensemble member, over all its workload seeds.

    Attributes:
        scenario: operating point.
        phase: ``prefill`` or ``decode``.
        policy: name shown in tables.
        build: ``static-best``, ``static-hindsight``, ``oracle`` or a name in the syntax of
            :mod:`biscale_env.policies`, e.g. ``mpc:margin=0.1``.
        member: ensemble member.
        seeds: workload seeds.
        training_seed: -1 for policies that are not trained.
        variant: ``tuned`` when free parameters are chosen on tuning workloads first.
        labels: further columns of the results.
        curve: run the policy's settings on the judged workloads too.
        spread: number of ensemble members that the chosen setting is run in besides.
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
    curve: bool = False
    spread: int = 0

    def key(self, seed: int) -> dict[str, Any]:
        """Key columns of the run on one workload seed, as in :class:`RunRecord`."""
        s = self.scenario
        return {
            "phase": self.phase,
            "policy": self.policy,
            "variant": self.variant,
            "scenario": s.name,
            "slo": s.slo_name,
            "load": s.load,
            "workload_seed": seed,
            "ensemble_member": self.member,
            "training_seed": self.training_seed,
            "tp": s.tp,
            "dtype": s.dtype,
        }


def record_of(
    job: ComparisonJob, case: Case, seed: int, run: Rollout, trace: Trace, extra: Mapping[str, Any]
) -> RunRecord:
    """A rollout as a results record."""
    plant = case.plant
    labels = {
        "delay_s": plant.delay_s(job.member),
        "capacity_rps": case.capacity.rate_rps,
        "tune_capacity_rps": case.tune_capacity.rate_rps,
        "workload": job.scenario.workload or job.scenario.name,
        "fold": job.scenario.fold,
        "one_trace": case.part is not None,
        "idle": plant.settings.idle,
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
        workload_s=trace.duration_s,
        copies=((0.0, 1.0),) if case.part is None else case.part.copies_at(case.rate_rps, seed),
    )


@dataclass(frozen=True)
class JobOutcome:
    """Results of a job.

    Attributes:
        job: the job.
        records: one per workload.
        tuned: what tuning tried; None without tuning.
        reference: what max clock does on the tuning workloads; None without tuning.
        curve: settings on the judged workloads with their totals per window.
        members: the chosen setting in members of the ensemble.
    """

    job: ComparisonJob
    records: list[RunRecord]
    tuned: TunedPolicy | None = None
    reference: Setting | None = None
    curve: tuple[Setting, ...] = ()
    members: tuple[MemberRun, ...] = ()


class Settled(NamedTuple):
    """A job's policy with its free parameters chosen.

    Attributes:
        build: name with the parameters.
        setting: the parameters in words.
        tuned: what was tried; None without tuning.
        reference: what max clock does on the tuning workloads; None without tuning.
    """

    build: str
    setting: str = ""
    tuned: TunedPolicy | None = None
    reference: Setting | None = None


def settle(job: ComparisonJob, case: Case, workloads: Sequence[Trace]) -> Settled:
    """Choose free parameters on tuning workloads, where there is anything to choose.

    Only the best static clock in hindsight is chosen on the judged workloads.
    """
    if job.build == STATIC_HINDSIGHT:
        found = hindsight_static(case, workloads, job.member)
        freq = found.chosen.params["freq_mhz"]
        return Settled(f"static:{freq:g}", f"{freq:g} MHz{_reached(found, 'judged')}")
    grid = settings_of(job.build, job.phase) if job.variant == "tuned" else []
    if not grid and job.build != STATIC_BEST:
        return Settled(job.build)
    top = max_clock(case, job.member)
    target = targets.tuning_target(case.plant.slo.attainment, top.attainment)
    if job.build == STATIC_BEST:
        tuned = best_static(case, job.member, target)
        freq = tuned.chosen.params["freq_mhz"]
        return Settled(f"static:{freq:g}", f"{freq:g} MHz{_reached(tuned)}", tuned, top)
    tuned = tune(builder(job.build, job.member), case, grid, job.member, target)
    build = with_parameters(job.build, tuned.chosen.params)
    return Settled(build, tuned.chosen.words + _reached(tuned), tuned, top)


def _reached(tuned: TunedPolicy, which: str = "tuning") -> str:
    return "" if tuned.reached else f" (no setting reaches the target on the {which} workloads)"


def run_job(job: ComparisonJob) -> JobOutcome:
    """Run one job to its end in this process."""
    case = resolve(job.scenario, job.phase)
    workloads = [case.workload(seed) for seed in job.seeds]
    made = settle(job, case, workloads)
    # each workload has an optimum of its own
    groups = [[w] for w in workloads] if job.build == ORACLE else [workloads]
    records: list[RunRecord] = []
    runs: list[Rollout] = []
    for group in groups:
        policy = build_policy(made.build, case.plant, group, job.member)
        plant = policy.plant if isinstance(policy, Hindsight) else case.plant
        report = policy.report if isinstance(policy, Hindsight) else {}
        extra = {"setting": made.setting, **{f"oracle_{k}": v for k, v in report.items()}}
        runs += rollout(policy, plant, group, job.member, keep_windows=job.curve)
        for seed, run, trace in zip(
            job.seeds[len(records) :], runs[len(records) :], group, strict=False
        ):
            records.append(record_of(job, case, seed, run, trace, extra))
    curve = _curve(job, case, made, workloads, runs) if job.curve else []
    members = member_runs(made.build, case.plant, workloads[:1], job.spread)
    return JobOutcome(job, records, made.tuned, made.reference, tuple(curve), tuple(members))


def _curve(
    job: ComparisonJob, case: Case, made: Settled, workloads: Sequence[Trace], runs: list[Rollout]
) -> list[Setting]:
    """Settings on the judged workloads, the chosen one first; none for the optimum.

    The best static clock of the tuning workloads has the curve of the one in hindsight.
    """
    if job.build in (ORACLE, STATIC_BEST):
        return []
    params = made.tuned.chosen.params if made.tuned else {}
    if job.build == STATIC_HINDSIGHT:
        freq_mhz = float(made.build.partition(":")[2])
        return static_curve(case, workloads, job.member, freq_mhz)
    chosen = [setting_of(params, runs)]
    if made.tuned is None:
        return chosen
    grid = settings_of(job.build, job.phase)
    return chosen + policy_curve(job.build, grid, case, workloads, job.member)


def run_jobs(jobs: Sequence[ComparisonJob], n_jobs: int) -> Generator[JobOutcome]:
    """Run jobs over cores and yield the outcome of each as it finishes.

    Close the iterator when it is left early (``contextlib.closing``): that ends the workers.
    """
    if n_jobs == 1 or len(jobs) <= 1:
        for job in jobs:
            yield run_job(job)
            gc.collect()
        return
    with joblib.parallel_config("loky", inner_max_num_threads=1, idle_worker_timeout=IDLE_WORKER_S):
        parallel = joblib.Parallel(
            n_jobs=min(n_jobs, len(jobs)), return_as="generator_unordered", batch_size=1
        )
        outcomes = parallel(joblib.delayed(run_job)(job) for job in jobs)
        try:
            # not `yield from`, which would close joblib's generator outside of the filter
            for outcome in outcomes:  # noqa: UP028
                yield outcome
        finally:
            _close_quietly(outcomes)


def _close_quietly(outcomes: Any) -> None:
    """Close joblib's generator; its warning is no news to whoever interrupted."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*tasks which were still being processed", category=UserWarning
        )
        outcomes.close()
