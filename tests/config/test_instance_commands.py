"""A second GPU and LLM go through every command: memory, cap, clocks and levels follow."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
import yaml
from toy_hardware import TOY_GPU, TOY_LLM, TOY_MODEL, follows_toy, on_toy_grid, toy_family, toy_spec

from biscale_env.config import load_gpu, load_llm
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.evaluation.experiment.experiments import Experiment
from biscale_env.evaluation.rollouts.scenarios import Scenario, resolve
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.models import load_model

GPU, LLM = load_gpu(TOY_GPU), load_llm(TOY_LLM)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return toy_family(tmp_path_factory.mktemp("toy") / "family", tps=(2,))


@pytest.fixture
def biscale(capsys, monkeypatch, tmp_path):
    """Run a command in this process from an empty folder; its standard output."""

    def call(*arguments):
        from biscale_env.cli import main

        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("BISCALE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(sys, "argv", ["biscale", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        assert not code, said.err
        return said.out

    return call


WAYS = ("family", "under the shipped model", "instance file")


@pytest.fixture(params=WAYS)
def options(request, family, tmp_path):
    """The ways to say it, as options of a command."""
    if request.param == "family":
        return ["--model", family]
    if request.param == "instance file":
        return ["--instance", toy_spec().to_yaml(tmp_path / "instance.yaml")]
    return ["--gpu", TOY_GPU, "--llm", TOY_LLM, "--model", TOY_MODEL]


def test_a_family_names_its_own_hardware(family):
    for phase in ("prefill", "decode"):
        plant = Plant(PlantSettings.of(phase, model=str(family), tp=2))
        follows_toy(plant)
        assert plant.model.fitted_on == ""
        moved = Plant(PlantSettings.of(phase, instance=toy_spec()))
        follows_toy(moved)
        assert plant.model.coefficients == pytest.approx(moved.model.coefficients, rel=1e-12)


def test_predict(biscale, options):
    said = json.loads(
        biscale("predict", "prefill", "--tokens", 2048, "--tp", 2, "--json", *options)
    )
    assert said["freq_requested_mhz"] == 1200
    assert said["power_w"] <= 250 * (1 + 1e-9)
    assert on_toy_grid(said["freq_best_mhz"])


@pytest.mark.slow
def test_capacity(biscale, options):
    said = json.loads(biscale("capacity", "decode", "--tp", 2, "--json", *options))
    assert said["freq_mhz"] == 1200
    assert said["capacity_rps"] > 0
    with pytest.raises(AssertionError, match="impossible on toy-40gb"):
        biscale("capacity", "decode", "--tp", 2, "--clock", 1980, *options)


MIXTURE = ["--llm", "qwen3-30b-a3b", "--tp", 2]


@pytest.mark.slow
def test_spread_experts_reach_the_model_of_predict_and_capacity(biscale):
    """Experts in one group or in two: other files, other numbers; what has none is refused."""
    for phase, work in (("prefill", ["--tokens", 512]), ("decode", ["--batch", 8])):
        said = [
            json.loads(biscale("predict", phase, *work, *MIXTURE, "--ep", ep, "--json"))
            for ep in (1, 2)
        ]
        for ep, one in zip((1, 2), said, strict=True):
            model = load_model(phase, 2, name="h100-sxm/qwen3-30b-a3b", ep=ep)
            n = float(work[1])
            rows = (n, n * n / 2, 0.0, 1.0) if phase == "prefill" else (n, 0.0, n * 1024.0, n)
            assert one["latency_s"] == pytest.approx(float(model.latency_s(*rows, 1980.0)))
        assert said[0]["latency_s"] != said[1]["latency_s"]
    told = [
        json.loads(biscale("capacity", "decode", *MIXTURE, "--ep", ep, "--json")) for ep in (1, 2)
    ]
    assert told[0]["capacity_rps"] != told[1]["capacity_rps"]
    with pytest.raises(AssertionError, match=r"EP 2|ep2"):
        biscale("predict", "decode", "--batch", 8, "--ep", 2)


@pytest.mark.parametrize(
    "command",
    [
        ("predict", "prefill"), ("predict", "decode"), ("capacity",), ("compare",), ("place",),
        ("train",), ("evaluate",), ("hw", "emulate"), ("hw", "control"), ("replay",),
        ("reproduce", "paper"), ("reproduce", "day"),
    ],
)  # fmt: skip
def test_every_command_with_an_instance_takes_ep(command):
    import typer

    from biscale_env.cli import build

    found = typer.main.get_command(build())
    for name in command:
        found = found.commands[name]
    assert "--ep" in {o for p in found.params for o in p.opts}


@pytest.mark.slow
def test_compare(biscale, options, tmp_path):
    biscale(
        "compare", "--quick", "--tp", 2, "--jobs", 1, "--out", "run", "--policies",
        "max,mpc,slack,ecofreq,static:700", *options,
    )  # fmt: skip
    run = load_run(tmp_path / "run")
    assert set(run.results["phase"]) == {"prefill", "decode"}
    for point in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["points"]:
        follows_toy(Plant(Scenario.model_validate(point).plant_settings("decode")))
    lines = pd.concat([pd.read_parquet(p) for p in (tmp_path / "run").rglob("*timeline*.parquet")])
    assert on_toy_grid(lines[["freq_requested_mhz", "freq_applied_mhz"]])
    assert lines["freq_effective_mhz"].between(300, 1200).all()
    assert lines["power_w"].max() <= 250 * (1 + 1e-6)


def test_an_experiment_carries_them(family):
    data = {"name": "x", "workloads": ["synthetic"], "model": str(family), "seeds": 1}
    for scenario in Experiment.model_validate(data).scenarios():
        assert (scenario.instance.model, scenario.slo) == (str(family), "biscale")
        case = resolve(scenario.changed(tp=2, duration_s=120.0), "prefill")
        follows_toy(case.plant)


@pytest.mark.slow
def test_train_and_evaluate(biscale, options, tmp_path):
    pytest.importorskip("sb3_contrib")
    config = {
        "phase": "decode", "n_envs": 4, "total_timesteps": 128, "net_arch": [8],
        "hyper": {"n_steps": 16, "batch_size": 32, "n_epochs": 1}, "tp": 2,
        "mixture": [{"rates_rps": [2.0], "workloads": 2, "episode_s": 20.0}],
        "evaluation": {"every_steps": 64, "workloads": 1, "prices": 1},
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    biscale("train", "decode", "--config", "tiny.yaml", "--out", "agent", *options)
    kept = yaml.safe_load((tmp_path / "agent" / "config.yaml").read_text())
    follows_toy(Plant(PlantSettings.of("decode", instance=kept["instance"])))
    scenario = {"name": "tiny", "duration_s": 40, "load": 0.5, "seeds": 1, "tp": 2}
    (tmp_path / "tiny-scenario.yaml").write_text(yaml.safe_dump(scenario))
    biscale(
        "evaluate", "agent", "--scenario", "tiny-scenario.yaml", "--policies", "max", "--jobs", 1,
        "--out", "run", *options,
    )  # fmt: skip
    run = load_run(tmp_path / "run")
    assert {"agent", "max"} <= set(run.results["policy"])


@pytest.mark.slow
def test_place(biscale, options, tmp_path):
    said = biscale(
        "place", "--rate", 2, "--gpus", 4, "--window", 120, "--jobs", 1, "--table", "--out",
        "placement.yaml", *options,
    )  # fmt: skip
    assert "1980" not in said
    groups = yaml.safe_load((tmp_path / "placement.yaml").read_text())["groups"]
    assert {g["freq_mhz"] for g in groups} <= set(GPU.control_levels_mhz)


@pytest.mark.slow
def test_fit_keeps_neither_gpu_nor_llm_of_the_base(biscale, tmp_path):
    rows = []
    model = load_model("decode", 2, name=TOY_MODEL, gpu=TOY_GPU, llm=TOY_LLM)
    for batch in (1, 8, 32, 128):
        for clock in (300.0, 600.0, 900.0, 1200.0):
            work = (float(batch), 0.0, batch * 512.0, float(batch))
            rows.append(
                {"phase": "decode", "tp": 2, "dtype": "bf16", "batch": batch, "new_tokens": 0,
                 "prefix": 0, "context": 512, "freq_mhz": clock,
                 "latency_s": float(model.latency_s(*work, clock)),
                 "power_w": float(model.power_w(*work, clock))}
            )  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "mine.csv", index=False)
    biscale("fit", "--profile", "mine.csv", "--out", "fitted", "--gpu", TOY_GPU, "--llm", TOY_LLM)
    plant = Plant(PlantSettings.of("decode", model=str(tmp_path / "fitted"), tp=2))
    follows_toy(plant)
    assert plant.model.fitted_on == ""
    fitted, wanted = plant.model.coefficients, model.coefficients
    assert fitted.flops_per_token == pytest.approx(wanted.flops_per_token, rel=1e-5)
    assert np.array([plant.model.member(k).p_cap_w for k in range(8)]) == pytest.approx(250.0)
    with pytest.raises(AssertionError, match="--llm and --out need --profile"):
        biscale("fit", "--llm", TOY_LLM, "--check")
    with pytest.raises(AssertionError, match=r"no evidence about GPU .*toy-40gb"):
        biscale("fit", "--gpu", TOY_GPU, "--check")


@pytest.mark.parametrize(
    "command",
    [
        ("predict", "prefill", "--tokens", "10"),
        ("capacity", "prefill"),
        ("compare", "--quick"),
        ("place", "--rate", "1"),
        ("train", "prefill"),
        ("reproduce", "paper", "--quick"),
        ("reproduce", "day"),
    ],
)
def test_unknown_names_are_one_sentence_with_the_nearest(biscale, command):
    if command[0] == "train":
        pytest.importorskip("sb3_contrib")
    for option, wrong, near in (
        ("gpu", "h100-sxn", "h100-sxm"),
        ("llm", "llama-3.3-70", "llama-3.3-70b"),
        ("model", "h100-sxm/llama-3.3-70", "h100-sxm/llama-3.3-70b"),
    ):
        with pytest.raises(AssertionError) as caught:
            biscale(*command, f"--{option}", wrong)
        said = str(caught.value).splitlines()[0]
        assert said.startswith(f"biscale: unknown {option} '{wrong}'")
        assert f"the nearest name is '{near}'" in said
