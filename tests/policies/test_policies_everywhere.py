"""A controller from outside, one file of twenty lines: in every command, environment and loop."""

import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest

import biscale_env  # noqa: F401 - registers the environments
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.evaluation.experiment.interactive import compare_policies
from biscale_env.evaluation.rollouts.rollout import rollout
from biscale_env.evaluation.rollouts.scenarios import Scenario
from biscale_env.hardware.loop.recorded_policy import load_policy
from biscale_env.hardware.replay.closed_loop import policies_by_phase
from biscale_env.policies import policy_settings, resolve_policy
from biscale_env.traces import generate

OUTSIDE = Path(__file__).resolve().parents[1] / "helpers" / "outside_rule.py"
NAMES = ("mine:QueueRule:low_mhz=600", "agent:margin=0.1", "outside-rule:low_mhz=600")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of packages with the rule installed in it, as pip leaves it."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "outside_rule-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-rule\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[biscale.policies]\noutside-rule = mine:QueueRule\n")
    (folder / "mine.py").write_text(OUTSIDE.read_text())
    return folder


@pytest.fixture
def importable(site, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop("mine", None)


def biscale(*arguments, site, cwd):
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "biscale_env.cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


SCENARIO = "name: tiny\nduration_s: 30\nload: 0.3\nseeds: 1\n"


@pytest.mark.slow
def test_compare_tunes_it_in_workers_beside_a_named_one(site, tmp_path):
    (tmp_path / "tiny.yaml").write_text(SCENARIO)
    options = ["--policies", "low=mine:QueueRule:low_mhz=600", "--policy", "outside-rule"]
    done = biscale(
        "compare", "--scenario", "tiny.yaml", "--phase", "prefill", "--tune", *options,
        "--jobs", 2, "--out", "run", site=site, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = pd.read_parquet(tmp_path / "run" / "results.parquet").set_index("policy")
    assert results["variant"].to_dict() == {
        "max": "",
        "static-hindsight": "",
        "low": "",
        "outside-rule": "tuned",
    }
    assert results.loc["low", "energy_ratio"] < 1.0
    tuning = pd.read_csv(tmp_path / "run" / "tuning.csv")
    assert tuning["setting"].tolist() == ["low_mhz=900.0", "low_mhz=1200.0", "low_mhz=1500.0"]
    assert tuning["chosen"].sum() == 1


@pytest.mark.slow
def test_evaluate_takes_it_by_its_name(site, tmp_path):
    (tmp_path / "tiny.yaml").write_text(SCENARIO)
    done = biscale(
        "evaluate",
        "mine:Plain:action=-0.5",
        "--scenario",
        "tiny.yaml",
        "--policy",
        "slack:0.1,fine=true",
        "--jobs",
        1,
        "--out",
        "run",
        site=site,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    results = pd.read_parquet(tmp_path / "run" / "results.parquet").set_index("policy")
    assert set(results.index) == {
        "max",
        "static-hindsight",
        "slack:0.1,fine=true",
        "mine:Plain:action=-0.5",
    }
    assert set(results["phase"]) == {"decode"}
    assert results.loc["mine:Plain:action=-0.5", "training_seed"] == -1


@pytest.mark.slow
@pytest.mark.parametrize("command", ["compare", "evaluate"])
def test_an_unknown_name_is_one_sentence_with_the_nearest(command, site, tmp_path):
    arguments = ["compare", "--quick", "--policy", "outside-rul"]
    if command == "evaluate":
        arguments = ["evaluate", "outside-rul"]
    done = biscale(*arguments, site=site, cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown policy 'outside-rul': did you mean 'outside-rule'?" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_name_on_hardware_in_a_rollout_and_in_an_environment(name, importable):
    plant = Plant(PlantSettings.of("prefill", drain=True))
    trace = generate("azure-conv-like", rate_rps=1.0, duration_s=20.0, seed=0)
    (run,) = rollout(resolve_policy(name, plant), plant, [trace], time_probe=False)
    assert run.totals["n_finished"] == len(trace)
    env = gym.make("BiScale/Prefill-v1", episode_s=5.0)
    observation, _ = env.reset(seed=0)
    here = env.unwrapped.plant
    one, _ = resolve_policy(name, here).predict(observation)
    two, _ = load_policy(name, here).predict(observation)
    assert env.action_space.contains(one)
    np.testing.assert_array_equal(one, two)
    assert policies_by_phase([name]) == {"prefill": name, "decode": name}


@pytest.mark.slow
def test_names_in_python(tmp_path, importable):
    scenario = Scenario(name="x", duration_s=20.0, load=0.3, seeds=1)
    run = compare_policies(["max", "mine:QueueRule"], "prefill", scenario, tmp_path / "a")
    assert set(run.results["policy"]) == {"max", "static-hindsight", "mine:QueueRule"}
    both = {"max": "max", "low": lambda plant: resolve_policy("static:900", plant)}
    again = compare_policies(both, "prefill", scenario, tmp_path / "b")
    assert set(again.results["policy"]) == {"max", "static-hindsight", "low"}


def test_the_rule_of_the_page_runs(tmp_path, monkeypatch):
    page = (OUTSIDE.parents[2] / "docs" / "policies.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    assert 15 < len(code.splitlines()) <= 22
    (tmp_path / "page_rule.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    for phase in ("prefill", "decode"):
        plant = Plant(PlantSettings.of(phase, drain=True))
        trace = generate("azure-conv-like", rate_rps=1.0, duration_s=10.0, seed=0)
        policy = resolve_policy("page_rule:Rule", plant, low_mhz=900.0)
        (run,) = rollout(policy, plant, [trace], time_probe=False)
        assert run.totals["n_finished"] == len(trace)
    assert len(policy_settings("page_rule:Rule", "decode")) == 3
