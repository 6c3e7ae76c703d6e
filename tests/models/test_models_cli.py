"""`biscale predict` and `biscale fit` from the outside."""

import json
import subprocess
import sys

import numpy as np
import pytest
from test_models_user import table
from typer.testing import CliRunner

from biscale_env.cli import build
from biscale_env.core.errors import BiscaleError
from biscale_env.models import load_model
from biscale_env.models.predict import predict_decode, predict_prefill

KEYS = {
    "latency_s",
    "power_w",
    "energy_j",
    "freq_effective_mhz",
    "freq_requested_mhz",
    "inside_box",
    "spread",
}


def run(*args):
    return CliRunner().invoke(build(), list(args))


def test_prefill_json():
    result = run(
        "predict",
        "prefill",
        "--tokens",
        "2048",
        "--requests",
        "1",
        "--tp",
        "4",
        "--clock",
        "1980",
        "--json",
    )
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert set(data) >= KEYS
    model = load_model("prefill", 4)
    w = (2048.0, 2048.0**2 / 2, 0.0, 1.0)
    assert data["latency_s"] == pytest.approx(float(model.latency_s(*w, 1980)), rel=1e-12)
    assert data["energy_j"] == pytest.approx(4 * data["power_w"] * data["latency_s"], rel=1e-9)
    assert data["freq_requested_mhz"] == 1980
    assert data["freq_effective_mhz"] < 1980
    assert data["power_w"] == pytest.approx(700, rel=1e-6)
    assert data["inside_box"] is True
    assert (
        data["spread"]["latency_s"]["p5"] < data["latency_s"] < data["spread"]["latency_s"]["p95"]
    )


def test_decode_json():
    args = ("--batch", "64", "--context", "1024", "--tp", "8", "--dtype", "fp8", "--clock", "1200")
    data = json.loads(run("predict", "decode", *args, "--json").stdout)
    model = load_model("decode", 8, "fp8")
    assert data["latency_s"] == pytest.approx(
        float(model.latency_s(64, 0, 65536, 64, 1200)), rel=1e-12
    )
    assert data["energy_per_token_j"] == pytest.approx(data["energy_j"] / 64)
    assert data["freq_effective_mhz"] == 1200
    latencies = [float(model.latency_s(64, 0, 65536, 64, 1200, k)) for k in range(model.n_members)]
    assert data["spread"]["latency_s"]["p95"] == pytest.approx(np.percentile(latencies, 95))


def test_text_names_units_and_box():
    inside = run("predict", "decode", "--batch", "64").stdout
    assert "inside the validity domain" in inside
    assert " ms" in inside
    assert "MHz" in inside
    outside = run("predict", "prefill", "--tokens", "40000", "--one-batch").stdout
    assert "OUTSIDE the validity domain" in outside


def test_prompts_run_in_batches_of_the_token_budget():
    args = ("predict", "prefill", "--tokens", "5000", "--requests", "2", "--clock", "1200")
    chunked = json.loads(run(*args, "--json").stdout)
    whole = json.loads(run(*args, "--one-batch", "--json").stdout)
    wide = json.loads(run(*args, "--token-budget", "8192", "--json").stdout)
    assert (chunked["iterations"], whole["iterations"], wide["iterations"]) == (3, 1, 1)
    assert wide == whole
    assert chunked["latency_s"] > whole["latency_s"]
    model = load_model("prefill", 4)
    works = [(2048, 2048**2 / 2, 0, 1), (2048, 452 * (226 + 2048) + 1596 * 798, 0, 2)]
    works.append((904, 904 * (452 + 1596), 0, 1))
    assert chunked["latency_s"] == pytest.approx(
        sum(float(model.latency_s(*w, 1200)) for w in works)
    )
    assert chunked["energy_j"] == pytest.approx(sum(float(model.energy_j(*w, 1200)) for w in works))
    assert "5000 tokens in 3 batches" in run(*args).stdout


def test_the_best_clock_of_several_batches_takes_the_least_energy():
    args = ("predict", "prefill", "--tokens", "9000", "--json")
    best = json.loads(run(*args).stdout)["freq_best_mhz"]
    model = load_model("prefill", 4)
    around = [best - model.gpu.freq_step_mhz, best, best + model.gpu.freq_step_mhz]
    joules = [json.loads(run(*args, "--clock", str(f)).stdout)["energy_j"] for f in around]
    assert min(joules) == joules[1]


def test_requests_and_prefix_change_the_attention_work():
    model = load_model("prefill", 4)
    one = predict_prefill(model, 8192, 1, 0, 1200.0)
    eight = predict_prefill(model, 8192, 8, 0, 1200.0)
    cached = predict_prefill(model, 8192, 1, 4096, 1200.0)
    assert eight.latency_s < one.latency_s < cached.latency_s
    c = model.coefficients
    stretch = c.freq_profile_ghz / 1.2
    expected = c.attn_prefill_s * 8192 * 4096 * stretch
    assert cached.latency_s - one.latency_s == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("prefill", "--tokens", "2048", "--clock", "3000"),
            "clock 3000 MHz is impossible on h100-sxm",
        ),
        (("prefill", "--tokens", "2048", "--clock", "nan"), "clock nan MHz is impossible"),
        (("prefill", "--tokens", "2048", "--clock", "-5"), "clock -5 MHz is impossible"),
        (("prefill", "--tokens", "2048", "--tp", "2"), "has no prefill model for bf16 at TP 2"),
        (("prefill", "--tokens", "2048", "--tp", "5"), "no prefill model for bf16 at TP 5"),
        (("prefill", "--tokens", "-5"), "the number of tokens is -5, but must be at least 1"),
        (
            ("prefill", "--tokens", "4", "--requests", "8"),
            "the number of tokens is 4, but must be at least 8",
        ),
        (("prefill", "--tokens", "4", "--requests", "0"), "the number of requests is 0"),
        (("prefill", "--tokens", "4", "--prefix", "-1"), "the prefix is -1"),
        (("prefill", "--tokens", "500000"), "do not fit into the KV cache"),
        (("decode", "--batch", "0"), "the batch is 0, but must be at least 1"),
        (("decode", "--batch", "8", "--context", "-1"), "the context is -1"),
        (("decode", "--batch", "8", "--dtype", "int4"), "bf16"),
        (
            ("decode", "--batch", "512", "--context", "4096"),
            "2097152 tokens do not fit into the KV cache of bf16 at TP 4",
        ),
    ],
)
def test_impossible_requests_are_one_sentence(args, message):
    result = run("predict", *args)
    assert isinstance(result.exception, BiscaleError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.slow
def test_exit_code_two_and_no_traceback():
    command = [
        sys.executable,
        "-m",
        "biscale_env.cli",
        "predict",
        "decode",
        "--batch",
        "8",
        "--clock",
        "9",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("biscale: clock 9 MHz is impossible")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_model_without_members_has_no_spread(tmp_path):
    model = load_model("decode", 4)
    content = model.content
    from biscale_env.models.coefficient import dump_fitted

    path = tmp_path / "bare.yaml"
    path.write_text(dump_fitted(content))
    p = predict_decode(load_model("decode", 4, "bf16", str(path)), 64, 512, 1200.0)
    assert p.spread == {}
    assert p.latency_s == predict_decode(model, 64, 512, 1200.0).latency_s
    assert "ensemble" not in run("predict", "decode", "--batch", "64", "--model", str(path)).stdout


def test_fit_of_a_users_table(tmp_path, monkeypatch):
    monkeypatch.setattr("biscale_env.models.fit.user_profile.BOOTSTRAPS", 3)
    source, out = tmp_path / "t.csv", tmp_path / "new" / "mine.yaml"
    table().to_csv(source, index=False)
    result = run("fit", "--profile", str(source), "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "held-out error, latency 0." in result.stdout
    assert sorted(p.name for p in out.parent.iterdir()) == ["mine.ensemble.csv", "mine.yaml"]
    shown = json.loads(
        run("predict", "decode", "--batch", "64", "--model", str(out), "--json").stdout
    )
    assert shown["model"] == "t"


def test_fit_of_several_configurations_wants_a_folder(tmp_path, monkeypatch):
    import pandas as pd

    monkeypatch.setattr("biscale_env.models.fit.user_profile.BOOTSTRAPS", 2)
    source = tmp_path / "t.csv"
    pd.concat([table("prefill"), table("decode")]).to_csv(source, index=False)
    result = run("fit", "--profile", str(source), "--out", str(tmp_path / "one.yaml"))
    assert "holds 2 configurations: give --out a folder" in str(result.exception)
    assert not (tmp_path / "one.yaml").exists()
    assert run("fit", "--profile", str(source), "--out", str(tmp_path / "both")).exit_code == 0
    assert load_model("prefill", 4, "bf16", str(tmp_path / "both")).name == "t"


@pytest.mark.slow
def test_a_gpu_is_fitted_over_processes():
    result = run("fit", "--gpu", "l40s", "--check", "--jobs", "2")
    assert result.exit_code == 0, result.output
    assert "are what the kernel tables and the evidence give" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--profile", "t.csv"), "--profile needs --out"),
        (("--power", "t.csv"), "--power needs --profile"),
        (("--profile", "absent.csv", "--out", "x.yaml"), "cannot read absent.csv"),
        (("--gpu", "b100"), "there is no evidence about GPU 'b100'; there is about: "),
        (("--llm", "qwen3-8b"), "--llm and --out need --profile"),
        (("--jobs", "0"), "--jobs must be at least 1"),
        (("--report", "--jobs", "2"), "--jobs and --ray belong to the shipped models"),
        (("--profile", "t.csv", "--out", "x.yaml", "--ray", "auto"), "other fits take seconds"),
    ],
)
def test_fit_mistakes(args, message):
    result = run("fit", *args)
    assert isinstance(result.exception, BiscaleError)
    assert message in str(result.exception)
