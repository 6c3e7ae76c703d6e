"""What a job leaves on disk, and that a job cut off in between runs again as a whole."""

import numpy as np
import pandas as pd
import pytest

from biscale_env.evaluation.experiment.compare import ComparisonJob, run_job
from biscale_env.evaluation.experiment.outcome_tables import (
    curve_frame,
    joined_windows,
    keep_outcome,
    member_frame,
)
from biscale_env.evaluation.experiment.run_comparison import run_all
from biscale_env.evaluation.rollouts.scenarios import Scenario
from biscale_env.evaluation.rollouts.window_meter import WindowTotals
from biscale_env.evaluation.runs import run_files
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.runs.rundir import RunDirectory

TINY = Scenario(name="tiny", duration_s=240.0, load=0.4, seeds=2)


def job(policy, build=None, variant=""):
    named = build or policy
    return ComparisonJob(
        TINY, "prefill", policy, named, -1, (0, 1), variant=variant, curve=True, spread=2
    )


@pytest.fixture(scope="module")
def outcome():
    """A tuned policy with a curve, in two members."""
    return run_job(job("rule", "ecofreq", "tuned"))


def test_a_tuned_job_has_its_chosen_setting_first_and_every_window(outcome):
    frame = curve_frame(outcome)
    words = outcome.tuned.chosen.words
    assert frame["setting"].iloc[0] == words
    settings = len(outcome.curve)
    assert len(frame) == settings * 4  # two workloads of two windows each
    assert frame["window"].tolist() == list(range(4)) * settings
    assert frame["day"].tolist()[:4] == [0.0, 0.0, 1.0, 1.0]
    chosen = frame.head(4)
    total = sum(record.totals["energy_j"] for record in outcome.records)
    assert chosen["energy_j"].sum() == pytest.approx(total)
    assert chosen["n_counted"].sum() == sum(len(r.requests["arrival_s"]) for r in outcome.records)
    assert len({float(e) for e in frame.groupby("setting")["energy_j"].sum()}) > 2


def test_members_are_one_row_each(outcome):
    frame = member_frame(outcome)
    assert frame["member"].tolist() == [0.0, 1.0]
    assert frame["energy_j"].nunique() == 2


def test_constant_policies_have_curves_too_but_the_tuned_static_clock_has_none():
    assert len(run_job(job("max")).curve) == 1
    static = run_job(job("static-hindsight"))
    assert len(static.curve) > 5
    assert "MHz" in static.records[0].labels["setting"]
    assert run_job(job("static-best")).curve == ()


def totals(value):
    return WindowTotals(*(np.array([value, 2.0 * value]) for _ in range(4)))


def test_subsamples_of_one_trace_are_added_and_generated_workloads_are_not():
    one = [totals(1.0), totals(2.0)]
    same, apart = [("/", 0.0)] * 2, [("/0", 0.0), ("/1", 0.0)]
    assert [t.energy_j.tolist() for t in joined_windows(one, same).values()] == [[3.0, 6.0]]
    each = [t.energy_j.tolist() for t in joined_windows(one, apart).values()]
    assert each == [[1.0, 2.0], [2.0, 4.0]]


def test_a_job_cut_off_between_its_runs_starts_over_and_leaves_everything_once(
    tmp_path, outcome, monkeypatch
):
    done = []

    def once(self, record, **further):
        if done:
            raise KeyboardInterrupt
        done.append(record)
        return add(self, record, **further)

    add = RunDirectory.add
    monkeypatch.setattr(RunDirectory, "add", once)
    with pytest.raises(KeyboardInterrupt), RunDirectory(tmp_path, {}) as run:
        keep_outcome(run, outcome)
    monkeypatch.undo()
    ran = []
    monkeypatch.setattr(
        "biscale_env.evaluation.experiment.compare.run_job", lambda j: ran.append(j) or outcome
    )
    with RunDirectory(tmp_path, {}, resume=True) as run:
        run_all(run, [outcome.job], 1)
        run_all(run, [outcome.job], 1)
    assert len(ran) == 1
    kept = load_run(tmp_path)
    assert kept.results["workload_seed"].tolist() == [0, 1]
    assert len(kept.curves) == len(curve_frame(outcome))
    assert len(kept.member_runs) == 2
    tuning = pd.read_csv(tmp_path / run_files.TUNING)
    assert len(tuning) == len(outcome.tuned.tried)
    assert tuning["chosen"].sum() == 1
