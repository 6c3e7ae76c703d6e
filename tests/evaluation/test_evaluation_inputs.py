"""What a comparison is made from is known to its run directory; SLOs by path are one key."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from agents.policy.numpy_policy import load_network
from biscale_env.cli import build
from biscale_env.config import configs_dir
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.experiment.compare import ComparisonJob, JobOutcome, TunedPolicy
from biscale_env.evaluation.experiment.input_digests import (
    case_inputs,
    inputs_of,
    policy_inputs,
)
from biscale_env.evaluation.experiment.outcome_tables import keep_tuning
from biscale_env.evaluation.rollouts.scenarios import Infeasible, Scenario, resolve
from biscale_env.evaluation.runs import run_files
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.tuning.tuning import Setting

SHIPPED = "agents/checkpoints/prefill.npz"


def trace(path, n=240, shift=0):
    """A trace of one request in half a second."""
    frame = pd.DataFrame(
        {
            "arrival_s": 0.5 * np.arange(n),
            "prompt_tokens": 200 + (np.arange(n) * 37 + shift) % 300,
            "output_tokens": 20 + np.arange(n) % 30,
        }
    )
    frame.to_csv(path, index=False)
    return str(path)


def slo(path, **changes):
    content = yaml.safe_load((configs_dir() / "slos" / "biscale.yaml").read_text())
    path.write_text(yaml.safe_dump(content | {"name": "mine"} | changes))
    return str(path)


def job(scenario, policy="max"):
    return ComparisonJob(scenario, "prefill", policy, policy, -1, (0,))


def test_an_slo_given_as_a_file_has_its_name_in_every_key(tmp_path):
    point = Scenario(name="s", slo=slo(tmp_path / "file.yaml"))
    assert job(point).key(0)["slo"] == "mine"
    assert Infeasible(point, "prefill", "why").point["slo"] == "mine"
    tried = Setting({"freq_mhz": 900.0}, 1.0, 1.0)
    outcome = JobOutcome(job(point), [], TunedPolicy(tried, True, (tried,), 0.99), tried)
    keep_tuning(tmp_path, outcome)
    other = ComparisonJob(point, "prefill", "other", "max", -1, (0,))
    keep_tuning(tmp_path, replace(outcome, job=other))
    keep_tuning(tmp_path, outcome)  # a job that runs again replaces its own rows only
    kept = run_files.read_csv(tmp_path / run_files.TUNING)
    assert kept["slo"].tolist() == ["mine", "mine"]
    assert kept["policy"].tolist() == ["other", "max"]


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Run ``biscale compare`` in this process on a short trace of its own."""
    monkeypatch.chdir(tmp_path)
    trace(tmp_path / "t.csv")
    slo(tmp_path / "slo.yaml")

    def run(*options, policies="max"):
        words = ["compare", "--trace", "t.csv", "--phase", "prefill", "--seeds", "1"]
        words += ["--policies", policies, "--jobs", "1", "--out", "run", *options]
        return CliRunner().invoke(build(), words, catch_exceptions=True)

    return run


@pytest.mark.slow
def test_resume_with_an_slo_file_runs_nothing_again(compare, monkeypatch):
    assert compare("--slo", "slo.yaml").exception is None
    before = load_run("run").results
    assert set(before["slo"]) == {"mine"}

    def fail(*_):
        raise AssertionError("a finished run is run again")

    monkeypatch.setattr("biscale_env.evaluation.experiment.compare.run_job", fail)
    assert compare("--slo", "slo.yaml", "--resume").exception is None
    pd.testing.assert_frame_equal(load_run("run").results, before)


@pytest.mark.slow
def test_resume_on_a_changed_trace_or_slo_of_the_same_name_is_refused(compare, tmp_path):
    assert compare("--slo", "slo.yaml").exception is None
    trace(tmp_path / "t.csv", shift=1)
    refused = compare("--slo", "slo.yaml", "--resume", policies="max,static:1200")
    assert isinstance(refused.exception, BiscaleError)
    assert "cannot resume run: trace t.csv (prefill) has changed since" in str(refused.exception)
    trace(tmp_path / "t.csv")
    slo(tmp_path / "slo.yaml", ttft_s=0.7)
    refused = compare("--slo", "slo.yaml", "--resume")
    assert "cannot resume run: SLO mine has changed since" in str(refused.exception)
    assert load_run("run").results["policy"].tolist() == ["max", "static-hindsight"]


@pytest.mark.slow
def test_every_input_is_digested_and_a_change_of_each_shows(tmp_path):
    family = tmp_path / "family"
    shutil.copytree(configs_dir() / "models" / "h100-sxm/llama-3.3-70b", family)
    point = Scenario(name="s", duration_s=20.0, model=str(family), seeds=1)
    before = inputs_of([job(point), job(point, "static:1200")])
    kinds = [name.split()[0] for name in before]
    assert kinds == ["GPU", "LLM", "SLO", "model", "workload"]
    assert all(len(digest) == 64 for digest in before.values())
    assert case_inputs(resolve(point, "prefill")) == before
    files = sorted(family.glob("prefill-bf16-tp4*"))
    assert [file.name for file in files] == [
        "prefill-bf16-tp4.ensemble.csv",
        "prefill-bf16-tp4.yaml",
    ]
    for file in files:
        text = file.read_text()
        file.write_text(text + "# changed\n")
        changed = inputs_of([job(point)])
        assert [n for n in before if changed[n] != before[n]] == [
            f"model {family} (prefill-bf16-tp4)"
        ]
        file.write_text(text)
    assert inputs_of([job(point)]) == before
    other = inputs_of([job(point.model_copy(update={"profile": "poisson-fixed"}))])
    assert set(other) - set(before) == {"workload poisson-fixed of s at load 0.75 (prefill)"}


def test_a_change_of_the_gpus_layer_shows_in_the_model(tmp_path):
    gpu = tmp_path / "mine.yaml"
    gpu.write_text((configs_dir() / "gpus" / "h100-sxm.yaml").read_text())
    layer = tmp_path / "fitted" / "mine.yaml"
    layer.parent.mkdir()
    layer.write_text((configs_dir() / "gpus" / "fitted" / "h100-sxm.yaml").read_text())
    point = Scenario(name="s", duration_s=20.0, gpu=str(gpu), seeds=1)
    before = inputs_of([job(point)])
    content = yaml.safe_load(layer.read_text())
    content["coefficients"]["p_static_w"]["value"] += 1.0
    layer.write_text(yaml.safe_dump(content))
    changed = inputs_of([job(point)])
    assert [n.split()[0] for n in before if changed[n] != before[n]] == ["model"]


def test_models_of_one_family_have_digests_of_their_own():
    point = Scenario(name="s", duration_s=20.0, seeds=1)
    others = [{"tp": 8}, {"dtype": "fp8"}, {"gpu": "h200-sxm", "model": "h100-sxm/llama-3.3-70b"}]
    points = [point, *(Scenario(name="s", duration_s=20.0, seeds=1, **o) for o in others)]
    models = [n for n in inputs_of([job(p) for p in points]) if n.startswith("model ")]
    assert models == [
        "model h100-sxm/llama-3.3-70b (prefill-bf16-tp4)",
        "model h100-sxm/llama-3.3-70b (prefill-bf16-tp8)",
        "model h100-sxm/llama-3.3-70b (prefill-fp8-tp4)",
        "model h100-sxm/llama-3.3-70b (prefill-bf16-tp4) on h200-sxm with llama-3.3-70b",
    ]


def test_checkpoints_are_digested_with_the_configuration_of_a_zip(tmp_path):
    assert set(policy_inputs("agent:margin=0.1", "prefill")) == {"checkpoint agent (prefill.npz)"}
    network = load_network(configs_dir().parent / SHIPPED)
    network.save(tmp_path / "mine.npz")
    (first,) = policy_inputs(f"{tmp_path / 'mine.npz'}", "prefill").values()
    network.biases[-1][:] += 1.0
    network.save(tmp_path / "mine.npz")
    (second,) = policy_inputs(f"{tmp_path / 'mine.npz'}", "prefill").values()
    assert first != second
    (tmp_path / "best.zip").write_bytes(b"weights")
    (tmp_path / "config.yaml").write_text("phase: prefill\n")
    assert len(policy_inputs(str(tmp_path / "best.zip"), "prefill")) == 2


def test_classes_from_outside_are_digested_by_their_file(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text("class Rule:\n    pass\n")
    (first,) = policy_inputs(f"{path}:Rule", "prefill").values()
    path.write_text("class Rule:\n    gain = 2\n")
    (second,) = policy_inputs(f"{path}:Rule", "prefill").values()
    assert first != second
    assert policy_inputs("mpc", "prefill") == {}


def test_a_class_from_outside_is_digested_by_its_source(tmp_path, monkeypatch):
    module = tmp_path / "outside_of_digests.py"
    module.write_text(
        "from biscale_env.contract import Policy\n\n\nclass Rule(Policy):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (first,) = policy_inputs("outside_of_digests:Rule", "prefill").values()
    module.write_text(module.read_text() + "# changed\n")
    (second,) = policy_inputs("outside_of_digests:Rule", "prefill").values()
    assert first != second
    assert policy_inputs("mpc:margin=0.1", "prefill") == {}
