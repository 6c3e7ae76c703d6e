"""Tasks of the headline experiment: what is kept, what is infeasible, what must fail loudly."""

import json

import numpy as np
import pandas as pd
import pytest

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_settings import ClusterSettings
from biscale_env.reproduce import paper_jobs, systems
from biscale_env.reproduce.day import DayPlan, run_days
from biscale_env.reproduce.day_report import about_day, write_day
from biscale_env.reproduce.experiment import ReproductionJob, run_job
from biscale_env.reproduce.paper import PaperExperiment, Variation, arrivals_of, workload_a
from biscale_env.reproduce.paper_jobs import (
    Task,
    job_of,
    run_experiment,
    run_kept,
    run_task,
    task_key,
    tasks_of,
)
from biscale_env.reproduce.systems import SYSTEMS, Bench, TunedSystem, planner_of
from biscale_env.traces import Trace, describe, generate
from controllers.placement.ilp import CapacityEntry, CapacityTable, NoPlacementError

ARRIVALS = Trace("t", [0.0, 1.0], [10, 20], [5, 5], "here")


@pytest.fixture
def experiment():
    return PaperExperiment.model_validate(
        {
            "name": "small",
            "systems": ["distserve"],
            "member_systems": ["distserve"],
            "members": 0,
            "points": [
                {"name": "A-20", "workload": "A", "rate_rps": 20},
                {"name": "B-67", "workload": "B", "load": 0.67},
            ],
            "variations": [{"name": "fewer GPUs", "point": "A-20", "settings": {"gpus": 4}}],
        }
    )


def test_workload_a_is_poisson_with_the_lengths_of_the_authors(experiment):
    point = experiment.points[0]
    trace = workload_a(experiment, point, 0)
    assert trace.rate_rps == pytest.approx(20.0, rel=0.05)
    assert describe(trace).gap_cv == pytest.approx(1.0, abs=0.05)
    assert trace.prompt_tokens.mean() == pytest.approx(772, rel=0.03)
    assert trace.output_tokens.mean() == pytest.approx(195, rel=0.05)
    assert describe(workload_a(experiment, point, 0, gap_cv=2.0)).gap_cv > 1.8


def test_a_variation_exchanges_lengths_burstiness_and_tables(experiment):
    def job(**changes):
        varied = Variation.model_validate({"name": "v", "point": "A-20", **changes})
        return job_of(experiment, Task(experiment.points[0], -1, varied), ARRIVALS)

    assert job_of(experiment, Task(experiment.points[0], -1), ARRIVALS).tables == "window"
    assert job(tables="workload").tables == "workload"
    before = job(lengths="sharegpt-like")
    assert before.labels["lengths"] == "sharegpt-like"
    for workload in (*before.workloads, *before.tune_workloads):
        assert workload.prompt_tokens.mean() == pytest.approx(161, rel=0.1)
    assert describe(job(gap_cv=2.0).workloads[0]).gap_cv > 1.8


def test_arrivals_that_a_point_names_are_thinned_and_take_the_place_of_the_trace(
    experiment, monkeypatch
):
    seen = []

    def capacity(settings, first, second):
        seen.append((first, second))
        return 20.0

    monkeypatch.setattr(paper_jobs, "distserve_capacity_rps", capacity)
    named = {"arrivals": "azure-code-2024-mean", "name": "B-code"}
    point = experiment.points[1].model_copy(update=named)
    job = job_of(experiment, Task(point, -1), ARRIVALS)
    first, second = generate("azure-code-2024-mean").split(0.5)
    assert [len(part) for part in seen[0]] == [len(first), len(second)]
    assert job.labels["arrivals"] == "azure-code-2024-mean"
    for part, workloads in ((first, job.tune_workloads), (second, job.workloads)):
        for workload in workloads:
            assert workload.rate_rps == pytest.approx(0.67 * 20.0, rel=0.05)
            assert np.isin(workload.arrival_s, part.arrival_s).all()
            assert workload.prompt_tokens.mean() == pytest.approx(772, rel=0.03)
    ours, others = (
        task_key(experiment, Task(p, -1), ARRIVALS) for p in (point, experiment.points[1])
    )
    assert ours != others
    moved = experiment.model_copy(update={"tables": "workload"})
    assert task_key(moved, Task(point, -1), ARRIVALS) != ours


def failing(error):
    def fail(*_):
        raise error

    return fail


def test_what_cannot_be_served_is_a_row_with_its_reason_and_is_kept(
    experiment, monkeypatch, tmp_path
):
    monkeypatch.setattr(paper_jobs, "run_job", failing(NoPlacementError("16 GPUs serve 3 req/s")))
    task = tasks_of(experiment)[2]
    expected = [
        {
            "point": "A-20",
            "variation": "fewer GPUs",
            "member": -1,
            "system": "none",
            "reason": "16 GPUs serve 3 req/s",
        }
    ]
    assert run_kept(experiment, task, ARRIVALS, tmp_path) == expected
    monkeypatch.setattr(paper_jobs, "run_job", failing(AssertionError("run again")))
    assert run_kept(experiment, task, ARRIVALS, tmp_path) == expected


@pytest.mark.parametrize(
    "error", [BiscaleError("model 'x' has no file"), ValueError("a fault of ours"), OSError(28, "")]
)
def test_any_other_failure_is_loud_and_leaves_nothing(experiment, monkeypatch, tmp_path, error):
    monkeypatch.setattr(paper_jobs, "run_job", failing(error))
    task = tasks_of(experiment)[2]
    with pytest.raises(type(error)) as told:
        run_kept(experiment, task, ARRIVALS, tmp_path)
    if isinstance(error, BiscaleError):
        assert str(told.value) == f"small, A-20 fewer GPUs: {error}"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(type(error)):
        run_experiment(experiment, ARRIVALS, 1)


def test_a_member_is_named_where_its_task_fails(experiment, monkeypatch):
    monkeypatch.setattr(paper_jobs, "run_job", failing(BiscaleError("bad")))
    with pytest.raises(BiscaleError, match=r"^small, A-20 3: bad$"):
        run_task(experiment, Task(experiment.points[0], 3), ARRIVALS)


@pytest.mark.parametrize("content", ["", '[{"point"', "null"])
def test_a_kept_file_that_was_cut_off_is_made_again(experiment, monkeypatch, tmp_path, content):
    calls = []
    monkeypatch.setattr(
        paper_jobs, "run_job", lambda job: calls.append(job) or [{"system": "distserve"}]
    )
    task = tasks_of(experiment)[0]
    assert run_kept(experiment, task, ARRIVALS, tmp_path) == [{"system": "distserve"}]
    (kept,) = tmp_path.iterdir()
    kept.write_text(content)
    assert run_kept(experiment, task, ARRIVALS, tmp_path) == [{"system": "distserve"}]
    assert json.loads(kept.read_text()) == [{"system": "distserve"}]
    assert run_kept(experiment, task, ARRIVALS, tmp_path) == [{"system": "distserve"}]
    assert len(calls) == 2


def test_the_experiment_is_all_rows_of_all_tasks_with_progress(experiment, tmp_path, monkeypatch):
    # invented rows must not stay in the user's cache
    monkeypatch.setattr(paper_jobs.user_cache, "writable_root", lambda: tmp_path)
    monkeypatch.setattr(
        paper_jobs,
        "run_kept",
        lambda experiment, task, arrivals, folder: [
            {"point": task.point.name, "changed": task.variation is not None}
        ],
    )
    told = []
    frame = run_experiment(experiment, ARRIVALS, 1, lambda *pair: told.append(pair))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert sorted(zip(frame["point"], frame["changed"], strict=True)) == [
        ("A-20", False),
        ("A-20", True),
        ("B-67", False),
    ]


def entry(phase, rate_rps):
    return CapacityEntry(phase, 4, 1980.0, rate_rps, 100.0)


def test_a_table_that_serves_nothing_is_no_placement(monkeypatch):
    table = CapacityTable((entry("prefill", 0.0), entry("decode", 5.0)), "biscale", "t")
    monkeypatch.setattr("biscale_env.reproduce.experiment.table_for", lambda *_: table)
    job = ReproductionJob({}, ClusterSettings.of(), ("distserve",), (ARRIVALS,), (), 3.0, 60.0)
    with pytest.raises(NoPlacementError):
        run_job(job)


def test_tier_1_keeps_distserves_placement_only_where_no_other_is_feasible(monkeypatch):
    table = CapacityTable((entry("prefill", 5.0), entry("decode", 5.0)), "biscale", "t")
    bench = Bench(ClusterSettings.of(), table, 3.0, 60.0)
    plan = planner_of(SYSTEMS["placeonly"], TunedSystem(), bench)
    assert plan(0, None).name == "biscale"
    monkeypatch.setattr(systems, "biscale_plan", failing(NoPlacementError("too much")))
    assert plan(0, None).name == "distserve"
    monkeypatch.setattr(systems, "biscale_plan", failing(BiscaleError("a mistake")))
    with pytest.raises(BiscaleError, match="a mistake"):
        plan(0, None)


def test_a_trace_that_is_there_but_cannot_be_read_is_not_replaced(experiment, tmp_path):
    path = tmp_path / "t.csv"
    quick = {"trace": str(path), "trace_s": 60.0}
    made, about = arrivals_of(experiment.model_copy(update=quick))
    assert f"in place of {path}, which was not at hand" in about
    assert made.duration_s <= 60.0
    path.write_text("no,such,columns\n1,2,3\n")
    with pytest.raises(BiscaleError):
        arrivals_of(experiment.model_copy(update=quick))
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n9,10,5\n")
    loaded, about = arrivals_of(experiment.model_copy(update=quick))
    assert len(loaded) == 2
    assert about == f"arrivals of {path}"
    named, about = arrivals_of(experiment.model_copy(update={"trace": "poisson-fixed"}))
    assert about == "arrivals of poisson-fixed"
    assert len(named)


def test_the_page_of_a_day_compares_with_its_first_system(tmp_path):
    totals = {
        name: {
            "energy_j": 3.6e6 * factor,
            "j_per_token": 0.5 * factor,
            "attainment_ttft": 0.995,
            "attainment_tpot": 0.999,
            "changes": 3.0,
            "seconds": 2.0,
            "memory_mb": 300.0,
        }
        for name, factor in (("DistServe", 1.0), ("tier 1", 0.6))
    }
    window = {"index": 0, "duration_s": 300.0, "rate_rps": 3.0, "power_w": 2000.0, "gpus": 8}
    days = {name: [window, window | {"index": 1}] for name in totals}
    plan = DayPlan(
        {"gpus": 16, "dtype": "fp8", "slo": "biscale"}, 3.0, 7200.0, "sharegpt-like", 0.1
    )
    page = write_day(days, totals, about_day(plan, 21600.0), tmp_path).read_text()
    assert "| DistServe | 1.0 | 0.500 | +0 % | 99.50 / 99.90 % | 3 | 2 s | 300 MB |" in page
    assert "| tier 1 | 0.6 | 0.300 | −40 % |" in page
    assert "21,600 requests in 2 h on 16 x" in page
    assert "headroom 10 %" in page
    assert (tmp_path / "day" / "day.svg").is_file()


def test_a_day_with_an_impossible_load_is_refused_before_any_work():
    plan = DayPlan({"gpus": 16}, 0.0, 300.0, "sharegpt-like", 0.1)
    with pytest.raises(BiscaleError, match="positive number of requests/s"):
        next(run_days(plan))


def test_rows_without_any_system_are_not_compared(tmp_path):
    """A point that cannot be served stands in the table of points with its reason."""
    from biscale_env.reproduce.paper_report import _points

    failed = pd.DataFrame(
        [{"point": "B-67", "variation": "", "member": -1, "system": "none", "reason": "too much"}]
    )
    summary = pd.DataFrame(columns=["variation", "point", "system"])
    assert "| B-67 | – | – | – | – | **infeasible: too much** |" in _points(summary, failed)
