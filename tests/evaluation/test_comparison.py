"""What is compared and evaluated, which run is resumed, what a run directory says was asked."""

import gc
import warnings
from contextlib import closing

import numpy as np
import pytest
import yaml

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.experiment.agent_jobs import candidates_of, label_of
from biscale_env.evaluation.experiment.compare import ComparisonJob, run_jobs
from biscale_env.evaluation.experiment.comparison import (
    Comparison,
    checked_phases,
    compare_experiment,
    compare_scenario,
    run_comparison,
    run_to_resume,
)
from biscale_env.evaluation.experiment.evaluation_request import (
    EvaluationRequest,
    phases_to_run,
    plan_evaluation,
    run_evaluation,
)
from biscale_env.evaluation.rollouts.scenarios import Scenario, resolve
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.policies.checkpoint_source import SHIPPED

TINY = {"duration_s": 30.0, "seeds": 1, "load": 0.3}


def test_a_scenario_is_what_the_options_say():
    asked = compare_scenario(None, {"load": 0.3, "tp": 8, "seeds": None}, ["static:900"], "decode")
    (point,) = asked.points
    assert (point.load, point.tp, point.seeds, point.duration_s) == (0.3, 8, 3, 600.0)
    assert asked.name == "synthetic-default"
    assert asked.phases == ("decode",)
    named = [(name, name) for name in ("max", "static-hindsight", "static:900")]
    assert asked.policies == {"decode": named}
    assert compare_scenario(None, {}, ["max"], quick=True).points[0].seeds == 1
    with pytest.raises(BiscaleError, match="choose prefill or decode"):
        checked_phases("prefil")


def test_an_experiment_is_frozen_but_for_a_few_keys():
    asked = compare_experiment("main", {"seeds": 2, "gpu": None}, phase="prefill")
    assert asked.experiment == asked.name == "main"
    assert {point.seeds for point in asked.points} == {2}
    assert asked.tuned
    assert asked.oracle_seeds["prefill"] > 0
    for key, value, words in (
        ("trace", "azure-conv-like", "--trace"),
        ("reading", {"start": "1h"}, "the options of reading a trace"),
    ):
        with pytest.raises(BiscaleError, match=f"frozen: leave out {words}"):
            compare_experiment("slo", {key: value})
    with pytest.raises(BiscaleError, match="--experiment is frozen: leave out --delay"):
        compare_experiment("main", {"delay_s": 0.1})


def keep(folder, comparison, time, **changes):
    """A run directory as an interrupted comparison leaves it."""
    with RunDirectory(folder, comparison.config | changes):
        pass
    path = folder / "provenance.json"
    text = path.read_text()
    now = text.partition('"time_utc": "')[2].partition('"')[0]
    path.write_text(text.replace(now, time))
    return folder


def test_resume_takes_the_newest_of_the_same_experiment_by_what_is_inside(tmp_path):
    main = Comparison("main", [Scenario(name="a")], ("prefill",), {}, experiment="main")
    slo = Comparison("slo", [Scenario(name="a")], ("prefill",), {}, experiment="slo")
    plain = Comparison("a", [Scenario(name="a")], ("prefill",), {})
    with pytest.raises(BiscaleError, match=r"no run of main .* to resume"):
        run_to_resume(main, tmp_path)
    keep(tmp_path / "tables-main", main, "2026-01-01T00:00:00+00:00")
    newest = keep(tmp_path / "20260301-000000-main", main, "2026-03-01T00:00:00+00:00")
    keep(tmp_path / "20260401-000000-main", slo, "2026-04-01T00:00:00+00:00")
    keep(tmp_path / "zzz-main", plain, "2026-05-01T00:00:00+00:00")
    (tmp_path / "noise-main").mkdir()
    (tmp_path / "file-main").write_text("")
    assert run_to_resume(main, tmp_path) == newest
    assert run_to_resume(slo, tmp_path).name == "20260401-000000-main"
    assert run_to_resume(plain, tmp_path).name == "zzz-main"
    # with other settings it is older, but the one that can be resumed
    other = keep(tmp_path / "b", main, "2026-02-01T00:00:00+00:00", tune=True)
    tuned = Comparison("main", main.points, main.phases, {}, tuned=True, experiment="main")
    assert run_to_resume(tuned, tmp_path) == other


def test_candidates_of_a_target(tmp_path):
    shipped = candidates_of("agent:margin=0.1")
    assert [one.phases for one in shipped] == [("prefill",), ("decode",)]
    assert [one.build for one in shipped] == [
        f"{SHIPPED / phase}.npz:margin=0.1" for phase in ("prefill", "decode")
    ]
    for seed in (1, 0):
        (tmp_path / f"seed-{seed}").mkdir()
        data = (SHIPPED / "decode.npz").read_bytes()
        (tmp_path / f"seed-{seed}" / "best.npz").write_bytes(data)
    both = candidates_of(str(tmp_path))
    assert [one.build.split("/")[-2] for one in both] == ["seed-0", "seed-1"]
    (rule,) = candidates_of("outside_rule:QueueRule")
    assert (rule.phases, rule.training_seed) == (("prefill", "decode"), -1)
    with pytest.raises(BiscaleError, match="unknown policy 'agnt': did you mean 'agent'"):
        candidates_of("agnt")
    plain = EvaluationRequest("outside_rule:Plain", phase="prefill")
    with pytest.raises(BiscaleError, match="outside_rule:Plain is for decode, not for prefill"):
        phases_to_run(plain, candidates_of(plain.target))


def test_a_target_of_evaluate_keeps_its_own_name(tmp_path):
    data = (SHIPPED / "decode.npz").read_bytes()
    for place in ("p/best.npz", "many/seed-0/best.npz", "net.onnx", "mine.zip"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(data)
    for target, label in {
        "agent": "agent",
        "agent:margin=0.1": "agent",
        "mine=agent": "mine",
        f"{tmp_path}/many": "agent",
        f"{tmp_path}/p": "p",
        f"{tmp_path}/p/best.npz": "p",
        f"{tmp_path}/p/best.npz:price=4": "p:price=4",
        f"{tmp_path}/net.onnx": "net",
        f"{tmp_path}/mine.zip": "mine",
        f"ours={tmp_path}/mine.zip": "ours",
        "outside_rule:Plain": "outside_rule:Plain",
        "outside_rule:Plain:gain=2": "outside_rule:Plain:gain=2",
        "mpc": "mpc (evaluated)",
        "mpc:margin=0.2": "mpc:margin=0.2",
    }.items():
        assert label_of(target) == label, target
    (found,) = candidates_of(f"ours={tmp_path}/p")
    assert found.build == f"{tmp_path}/p/best.npz"
    twice = EvaluationRequest("agent", policies=("max", "agent"), changes={"duration_s": 30.0})
    with pytest.raises(BiscaleError, match="two policies are called 'agent': give the one that"):
        plan_evaluation(twice)


@pytest.mark.slow
def test_everything_that_was_asked_of_evaluate_is_in_its_config(tmp_path):
    request = EvaluationRequest(
        "outside_rule:QueueRule",
        policies=("static:900",),
        loads=(0.3, 0.4),
        phase="prefill",
        changes={"duration_s": 30.0, "seeds": 1},
        tuned=True,
        oracle_seeds=1,
    )
    jobs, infeasible = plan_evaluation(request)
    assert not infeasible
    assert [job.policy for job in jobs] == 2 * [
        "max",
        "static-hindsight",
        "static:900",
        "outside_rule:QueueRule",
    ]
    assert [job.variant for job in jobs] == 2 * ["", "", "", "tuned"]
    out = run_evaluation(request, tmp_path / "run", n_jobs=1, table=tmp_path / "table.md")
    config = yaml.safe_load((out / "config.yaml").read_text())
    asked = {key: config[key] for key in ("loads", "phase", "oracle_seeds", "tuned", "policies")}
    assert asked == {
        "loads": [0.3, 0.4],
        "phase": "prefill",
        "oracle_seeds": 1,
        "tuned": True,
        "policies": ["static:900"],
    }
    assert len(load_run(out).results) == 8
    assert "no scores, since there is no point" in (tmp_path / "table.md").read_text()
    with pytest.raises(BiscaleError, match="'loads"):
        run_evaluation(
            EvaluationRequest(**{**vars(request), "loads": (0.3,)}), out, resume=True, n_jobs=1
        )


@pytest.mark.slow
def test_a_comparison_runs_and_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["outside_rule:QueueRule", "low=outside_rule:QueueRule:low_mhz=600"]
    asked = compare_scenario(None, TINY, names, "decode", tune=True)
    folder = run_comparison(asked, n_jobs=1)
    assert folder.parent.name == "runs"
    results = load_run(folder).results
    assert results.set_index("policy")["variant"].to_dict() == {
        "max": "",
        "static-hindsight": "",
        "outside_rule:QueueRule": "tuned",
        "low": "",
    }
    again = run_comparison(asked, resume=True, n_jobs=1)
    assert again == folder
    assert load_run(again).results.equals(results)


@pytest.mark.slow
def test_leaving_jobs_early_warns_of_nothing_and_leaves_the_filters_alone():
    jobs = [
        ComparisonJob(Scenario(name="x", **TINY), "prefill", f"s{k}", f"static:{k}", -1, (0,))
        for k in (600, 900, 1200, 1500)
    ]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        with closing(run_jobs(jobs, 2)) as outcomes:
            next(outcomes)
            assert warnings.filters == before
        assert warnings.filters == before
    assert [str(w.message) for w in told if "still being processed" in str(w.message)] == []


def arrays_of(objects):
    """Arrays that these hold, themselves or in what Python's collector does not track."""
    seen, found = set(), []
    while objects:
        one = objects.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if type(one) is np.ndarray:  # `isinstance` asks proxies, whose object may be gone
            found.append(one)
        objects += [
            held
            for held in gc.get_referents(one)
            if type(held) in (np.ndarray, dict, tuple) and not gc.is_tracked(held)
        ]
    return found


@pytest.mark.slow
def test_jobs_in_one_process_leave_no_arrays_to_the_collector():
    """What they built goes when they end: circles, which a collection has to find, hold none."""
    built = (("prefill", "max"), ("prefill", "mpc"), ("decode", "slack-plus"))
    jobs = [
        ComparisonJob(Scenario(name="x", **TINY), phase, name, name, -1, (0,))
        for phase, name in built
    ]
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for outcome in run_jobs(jobs, 1):
            assert outcome.records[0].totals["energy_j"] > 0
        del outcome
        gc.collect()
        left = list(gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert sum(array.nbytes for array in arrays_of(left)) < 10_000
    requests = {"arrival_s": np.zeros(2000)}  # Python does not track it, as it holds no circles
    assert sum(array.nbytes for array in arrays_of([[requests]])) == 16_000


def test_a_trace_that_changes_under_its_name_is_read_again(tmp_path):
    path = tmp_path / "t.csv"

    def write(tokens):
        rows = [f"{0.5 * k:.1f},{tokens},20" for k in range(200)]
        path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]) + "\n")

    write(300)
    scenario = Scenario(name="x", trace=str(path), load=0.5)
    first = resolve(scenario, "prefill")
    write(600)
    second = resolve(scenario, "prefill")
    assert np.unique(first.judged.traces[0].prompt_tokens).tolist() == [300]
    assert np.unique(second.judged.traces[0].prompt_tokens).tolist() == [600]
    assert second.capacity.rate_rps < first.capacity.rate_rps
