"""A comparison under an SLO with classes: judged, tuned, kept and shown per class."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from biscale_env.cli import main
from biscale_env.config import load_slo
from biscale_env.evaluation.experiment.comparison import compare_scenario, run_comparison
from biscale_env.evaluation.runs.class_columns import class_table
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.stats.class_metrics import judged_counts, slo_of, worst_class
from biscale_env.evaluation.stats.judging import judge
from biscale_env.traces import generate, write_trace
from biscale_env.traces.request_classes import RequestClasses

TWO = load_slo("interactive-batch")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    made = generate("azure-conv-like", rate_rps=5.0, duration_s=480.0, seed=5)
    names = np.where(np.random.default_rng(0).random(len(made)) < 0.4, "batch", "interactive")
    trace = replace(made, classes=RequestClasses.of(names.tolist()))
    return write_trace(trace, tmp_path_factory.mktemp("trace") / "mixed.parquet")


@pytest.fixture(scope="module")
def compared(mixed, tmp_path_factory):
    changes = {"trace": str(mixed), "slo": TWO.name, "load": 0.9, "seeds": 2}
    asked = compare_scenario(None, changes, ["static-best", "ecofreq"], "prefill", tune=True)
    folder = run_comparison(asked, tmp_path_factory.mktemp("run") / "run", n_jobs=1)
    return load_run(folder)


def missed_of(run, row):
    """Requests and misses per class of one run, from its kept requests alone."""
    kept = run.requests_of(row["run_id"])
    bound_s = np.array([0.6, 0.6, 10.0])[kept["slo_class"].astype(int)]
    late = kept["first_token_s"] - kept["arrival_s"] > bound_s + 1e-9
    numbers = kept["slo_class"].astype(int)
    return np.bincount(numbers, minlength=3), np.bincount(numbers[late], minlength=3)


def test_results_are_those_of_the_requests(compared):
    for row in compared.results.to_dict("records"):
        n, missed = missed_of(compared, row)
        assert (row["n_counted_interactive"], row["n_counted_batch"]) == (n[1], n[2])
        assert (row["n_missed_interactive"], row["n_missed_batch"]) == (missed[1], missed[2])
        worst = 1 - max(missed[1] / n[1], missed[2] / n[2] / 5)
        assert row["attainment"] == pytest.approx(worst)
        assert row["n_violations"] == missed.sum()
        assert slo_of(row).classes == TWO.classes
    assert compared.results["n_violations"].sum() > 0


def test_every_class_has_its_row(compared):
    table = class_table(compared.results)
    assert table["slo_class"].tolist()[:2] == ["interactive", "batch"]
    for (policy, _), rows in table.groupby(["policy", "variant"]):
        runs = compared.results[compared.results["policy"].eq(policy)].to_dict("records")
        found = sum(np.array(missed_of(compared, row)) for row in runs)
        for k, row in enumerate(rows.to_dict("records"), start=1):
            assert row["attainment"] == pytest.approx(1 - found[1][k] / found[0][k])
            assert row["asked"] == TWO.of_class(k).attainment
            assert row["ttft_bound_s"] == TWO.of_class(k).ttft_s
        summary = compared.summary().set_index("policy").loc[policy]
        worst = 1 - max(found[1][1] / found[0][1], found[1][2] / found[0][2] / 5)
        assert summary["attainment"] == pytest.approx(worst)
        assert summary["target_met"] == (worst >= summary["target"] * (1 - 1e-12))
    written = pd.read_csv(compared.path / "classes.csv")
    assert written["n_counted"].tolist() == table["n_counted"].tolist()


def test_windows_add_up_to_the_class_that_is_worst_off(compared):
    for row in compared.results.to_dict("records"):
        mine = compared.windows[compared.windows["run_id"].eq(row["run_id"])]
        assert mine["n_met"].sum() / mine["n_counted"].sum() == pytest.approx(row["attainment"])
    (top,) = compared.results[compared.results["policy"].eq("max")]["run_id"][:1]
    curve = compared.curves[compared.curves["run_id"].eq(top)]
    runs = compared.results[compared.results["policy"].eq("max")].to_dict("records")
    judged = [(compared.requests_of(run["run_id"]), run["duration_s"]) for run in runs]
    worst, _ = worst_class(judged, TWO, "prefill")
    assert curve["n_met"].sum() / curve["n_counted"].sum() == pytest.approx(worst)


def test_tuning_holds_every_class(compared):
    tuned = compared.tuning
    assert set(tuned["policy"]) == {"static-best", "ecofreq"}
    assert tuned.groupby("policy")["attainment"].nunique().min() > 1
    clocks = tuned[tuned["policy"].eq("static-best") & tuned["chosen"]]
    assert clocks["reached"].all()


def test_one_class_asked_for_is_the_one_that_counts(compared):
    row = compared.results.iloc[0].to_dict()
    kept = compared.requests_of(row["run_id"])
    verdict = judge(kept, TWO, "prefill", row["duration_s"])
    n, missed = missed_of(compared, row)
    for k, allowed in ((1, 1.0), (2, 5.0)):
        found = judged_counts(kept, verdict, TWO, k)
        assert found.counted.sum() == n[k]
        assert found.met.sum() == pytest.approx(n[k] - missed[k] / allowed)


def test_report_and_console_show_every_class(compared, mixed, tmp_path, monkeypatch, capsys):
    page = (compared.path / "report.html").read_text()
    assert "By SLO class" in page
    assert "batch TTFT ≤ 10000 ms for 95 %" in page
    other = shutil.copy(mixed, tmp_path / "other.parquet")  # read anew, so that it is told
    given = ["compare", "--trace", str(other), "--slo", TWO.name, "--phase", "prefill"]
    rest = ["--policies", "max", "--seeds", "1", "--load", "0.3", "--out", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["biscale", *given, *rest, "--jobs", "1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    told = capsys.readouterr().out
    assert "SLO classes interactive, batch" in " ".join(told.split())
    assert "by SLO class" in told


def test_an_slo_of_one_bound_has_no_columns_of_classes(mixed, tmp_path):
    asked = compare_scenario(
        None, {"trace": str(mixed), "load": 0.3, "seeds": 1}, ["max"], "prefill"
    )
    run = load_run(run_comparison(asked, tmp_path / "run", n_jobs=1))
    assert not [name for name in run.results if "class" in name or "interactive" in name]
    assert "slo_class" not in run.requests
    assert not (run.path / "classes.csv").is_file()


@pytest.mark.slow
def test_the_oracle_holds_every_class_at_less_energy(mixed, tmp_path):
    changes = {"trace": str(mixed), "slo": TWO.name, "load": 0.03, "seeds": 1}
    asked = compare_scenario(None, changes, ["max", "oracle"], "prefill")
    run = load_run(run_comparison(asked, tmp_path / "run", n_jobs=1))
    table = class_table(run.results).set_index(["policy", "slo_class"])
    planned = table.loc["oracle"]
    assert len(planned) == 2
    assert (planned["attainment"] >= planned["asked"] - 1e-9).all()
    spent = run.results.set_index("policy")["energy_j"]
    assert spent["oracle"] < spent["max"]
