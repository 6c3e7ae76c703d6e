"""What a job leaves on disk besides its runs: tuning, curve, members."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from biscale_env.core.files import write_whole
from biscale_env.evaluation.experiment.compare import ComparisonJob, JobOutcome
from biscale_env.evaluation.rollouts.window_meter import WindowTotals
from biscale_env.evaluation.runs import run_files
from biscale_env.evaluation.runs.blocks import effective_copies, origin_of
from biscale_env.evaluation.runs.record import RunRecord
from biscale_env.evaluation.runs.rundir import RunDirectory

JOB_COLUMNS: Final = ("scenario", "slo", "load", "phase", "policy", "ensemble_member")
"""Columns of ``tuning.csv`` that name a job."""


def keep_outcome(run: RunDirectory, outcome: JobOutcome) -> None:
    """Put a finished job on disk; its runs last, since they say that it is finished.

    A job that is killed in between runs again and replaces what it left.
    """
    keep_tuning(run.path, outcome)
    tables = {run_files.CURVES: curve_frame(outcome), run_files.MEMBERS: member_frame(outcome)}
    first = outcome.job.seeds[0]
    for record in reversed(outcome.records):
        seed = record.workload_seed
        run.add(record, keep_timeline=seed == first, further=tables if seed == first else None)


def _job_key(job: ComparisonJob) -> dict[str, Any]:
    return {
        "scenario": job.scenario.name,
        "slo": job.scenario.slo_name,
        "load": job.scenario.load,
        "phase": job.phase,
        "policy": job.policy,
        "ensemble_member": job.member,
    }


def keep_tuning(folder: Path, outcome: JobOutcome) -> None:
    """Put what tuning tried into ``tuning.csv``.

    The energy-attainment curve of each controller on the tuning workloads. Rows that the same job
    left before are replaced.
    """
    if outcome.tuned is None or outcome.reference is None:
        return
    job, path = outcome.job, folder / run_files.TUNING
    found = {
        "target": outcome.tuned.target,
        "reached": outcome.tuned.reached,
        "reference_j": outcome.reference.energy_j,
        "training_seed": job.training_seed,
    }
    rows = [
        _job_key(job)
        | found
        | {
            "setting": s.words,
            "energy_j": s.energy_j,
            "attainment": s.attainment,
            "chosen": s is outcome.tuned.chosen,
        }
        for s in outcome.tuned.tried
    ]
    frame = pd.DataFrame(rows)
    if path.is_file():
        old = run_files.read_csv(path)
        names = [n for n in (*JOB_COLUMNS, "training_seed") if n in old]
        mine = np.all([old[name].eq(rows[0][name]) for name in names], axis=0)
        frame = pd.concat([old[~mine], frame], ignore_index=True)
    write_whole(path, frame.to_csv(index=False))


def curve_frame(outcome: JobOutcome) -> pd.DataFrame:
    """One row per setting and window of the judged workloads, the chosen setting first.

    Subsamples of one trace (or of one window of a day of it) share its windows, so their totals are
    added; those of several days and generated workloads have windows of their own, one after
    another, and ``day`` numbers the days, or the workloads. Windows are those of the original
    trace, also where a workload is several copies of it (``copies``).
    """
    stretches = [stretch_of(record) for record in outcome.records]
    days = list(dict.fromkeys(day for day, _ in stretches))
    day_of = {stretch: float(days.index(stretch[0])) for stretch in stretches}
    made_of = [(record.copies, record.workload_s) for record in outcome.records]
    copies = float(np.mean([effective_copies(each) for each, _ in made_of])) if made_of else 1.0
    frames = []
    for one in outcome.curve:
        of_trace = [
            WindowTotals(*(values @ origin_of(*made, values.size) for values in in_run))
            for in_run, made in zip(one.windows, made_of, strict=True)
        ]
        of_stretch = joined_windows(of_trace, stretches)
        totals = WindowTotals(*map(np.concatenate, zip(*of_stretch.values(), strict=True)))
        frame = pd.DataFrame(
            {"setting": one.words, "window": np.arange(totals.energy_j.size, dtype=np.float64)}
        )
        frame["day"] = np.concatenate(
            [np.full(each.energy_j.size, day_of[of]) for of, each in of_stretch.items()]
        )
        frames.append(frame.assign(**totals._asdict(), copies=copies))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


Stretch = tuple[str, float]
"""Day (or generated workload), and where the window starts in the trace, s."""


def stretch_of(record: RunRecord) -> Stretch:
    """Which piece of time a run saw; every subsample of it saw the same."""
    labels = record.labels
    own = "" if labels.get("one_trace") else str(record.workload_seed)
    return f"{labels.get('day', '')}/{own}", float(labels.get("window_start_s", 0.0))


def joined_windows(
    each: Sequence[WindowTotals], stretches: Sequence[Stretch]
) -> dict[Stretch, WindowTotals]:
    """Windows of all workloads of a setting, those of one stretch of time added up."""
    by_stretch: dict[Stretch, list[WindowTotals]] = {}
    for stretch, totals in zip(stretches, each, strict=True):
        by_stretch.setdefault(stretch, []).append(totals)
    return {
        stretch: WindowTotals(*(np.sum(column, axis=0) for column in zip(*found, strict=True)))
        for stretch, found in by_stretch.items()
    }


def member_frame(outcome: JobOutcome) -> pd.DataFrame:
    """One row per member of the ensemble that the chosen setting was run in."""
    frame = pd.DataFrame([run._asdict() for run in outcome.members])
    return frame.astype(np.float64) if len(frame) else frame
