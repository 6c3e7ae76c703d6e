"""Comparing policies on a scenario.

The jobs, run in parallel over cores, every finished run kept at once.
"""

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from biscale_env.envs.loads.prefix_hits import cache_label
from biscale_env.evaluation.rollouts.rollout import Rollout, rollout
from biscale_env.evaluation.rollouts.scenarios import Case, Scenario, resolve
from biscale_env.evaluation.runs.record import RunRecord
from biscale_env.evaluation.stats import targets
from biscale_env.evaluation.tuning.hindsight import (
    Hindsight,
    build_policy,
    settings_of,
)
from biscale_env.evaluation.tuning.judged_curves import (
    builder,
    hindsight_static,
    policy_curve,
    static_curve,
)
from biscale_env.evaluation.tuning.member_spread import MemberRun, member_runs
from biscale_env.evaluation.tuning.settings_search import Setting, setting_of
from biscale_env.evaluation.tuning.tuning import (
    TunedPolicy,
    best_static,
    max_clock,
    tune,
)
from biscale_env.jobs.workers import Workers, run_each
from biscale_env.policies import with_parameters
from biscale_env.policies.policy_source import STATIC_BEST, STATIC_HINDSIGHT, is_planned_each
from biscale_env.traces import Trace


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
        "one_trace": case.of_trace,
        "idle": plant.settings.idle,
        **case.judged.labels(seed),
        "prefix_cache": cache_label(plant.settings.instance.prefix_cache, trace),
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
        copies=case.copies(seed),
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
        cpu_s: processor time of the process that ran it, tuning included, s.
    """

    job: ComparisonJob
    records: list[RunRecord]
    tuned: TunedPolicy | None = None
    reference: Setting | None = None
    curve: tuple[Setting, ...] = ()
    members: tuple[MemberRun, ...] = ()
    cpu_s: float = 0.0


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
    begin_s = time.process_time()
    case = resolve(job.scenario, job.phase)
    workloads = [case.workload(seed) for seed in job.seeds]
    made = settle(job, case, workloads)
    # each workload has an optimum of its own
    groups = [[w] for w in workloads] if is_planned_each(job.build) else [workloads]
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
    cpu_s = time.process_time() - begin_s
    return JobOutcome(job, records, made.tuned, made.reference, tuple(curve), tuple(members), cpu_s)


def _curve(
    job: ComparisonJob, case: Case, made: Settled, workloads: Sequence[Trace], runs: list[Rollout]
) -> list[Setting]:
    """Settings on the judged workloads, the chosen one first; none for the optimum.

    The best static clock of the tuning workloads has the curve of the one in hindsight.
    """
    if is_planned_each(job.build) or job.build == STATIC_BEST:
        return []
    params = made.tuned.chosen.params if made.tuned else {}
    if job.build == STATIC_HINDSIGHT:
        freq_mhz = float(made.build.partition(":")[2])
        return static_curve(case, workloads, job.member, freq_mhz)
    chosen = [setting_of(params, runs, case.plant)]
    if made.tuned is None:
        return chosen
    grid = settings_of(job.build, job.phase)
    return chosen + policy_curve(job.build, grid, case, workloads, job.member)


def run_jobs(jobs: Sequence[ComparisonJob], n_jobs: int | Workers) -> Generator[JobOutcome]:
    """Run jobs over cores or a cluster and yield the outcome of each as it finishes.

    Close the iterator when it is left early (``contextlib.closing``): that ends the workers.
    """
    with closing(run_each(run_job, [(job,) for job in jobs], Workers.of(n_jobs))) as found:
        for _, outcome in found:
            yield outcome
