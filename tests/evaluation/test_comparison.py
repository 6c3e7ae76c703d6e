"""What is compared and evaluated, which run is resumed, what a run directory says was asked."""

import warnings
from contextlib import closing

import numpy as np
import pytest
import yaml

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.experiment.agent_jobs import candidates_of
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
from biscale_env.evaluation.experiment.scenarios import Scenario, resolve
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
    assert [job.policy for job in jobs] == 2 * ["max", "static-hindsight", "static:900", "agent"]
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
    assert np.unique(first.part.prompt_tokens).tolist() == [300]
    assert np.unique(second.part.prompt_tokens).tolist() == [600]
    assert second.capacity.rate_rps < first.capacity.rate_rps
