"""``biscale compare`` end to end, as a user runs it: in a process, from an empty folder."""

import html
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import yaml
from cli_in_process import caller

from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.models import load_model
from biscale_env.traces import load_named as load_trace

BISCALE = [sys.executable, "-m", "biscale_env.cli"]
TINY = ["--policies", "static:1200", "--seeds", "2", "--jobs", "1", "--scenario"]


def run(*arguments, cwd, timeout=120):
    return subprocess.run(
        [*BISCALE, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Run the command in this process from an empty folder: (exit code, stdout, stderr)."""
    return caller(capsys, monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def scenario(tmp_path_factory):
    path = tmp_path_factory.mktemp("scenario") / "tiny.yaml"
    path.write_text("name: tiny\nprofile: azure-conv-like\nduration_s: 40\nload: 0.5\nseeds: 2\n")
    return path


@pytest.fixture(scope="module")
def finished(scenario, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    done = run("compare", *TINY, scenario, "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run", done


def test_table_and_files(finished):
    folder, done = finished
    assert "static:1200" in done.stdout
    assert "prefill" in done.stdout
    assert "decode" in done.stdout
    for name in (
        "results.parquet",
        "summary.csv",
        "decomposition.csv",
        "config.yaml",
        "provenance.json",
        "report.html",
        "requests.parquet",
        "timelines.parquet",
    ):
        assert (folder / name).stat().st_size > 100, name
    assert not list((folder / "parts").glob("*"))


def test_savings_are_taken_apart(finished):
    """Parts add up to what the table says, on real runs."""
    parts = pd.read_csv(finished[0] / "decomposition.csv")
    assert {"max", "static:1200"} <= set(parts.policy)
    assert set(parts.phase) == {"prefill", "decode"}
    frame = pd.read_parquet(finished[0] / "results.parquet")
    spent_j = frame.groupby(["phase", "policy"]).energy_j.sum()
    for row in parts.itertuples():
        change = spent_j[row.phase, row.policy] / spent_j[row.phase, "max"] - 1.0
        assert row.total == pytest.approx(row.clock + row.batches + row.idle, abs=1e-12)
        assert row.total == pytest.approx(change, abs=1e-9)


def test_one_row_per_policy_phase_and_seed(finished):
    frame = pd.read_parquet(finished[0] / "results.parquet")
    assert len(frame) == 2 * 3 * 2
    assert set(frame.policy) == {"max", "static-hindsight", "static:1200"}
    assert not frame.duplicated(["phase", "policy", "workload_seed"]).any()
    top = frame[frame.policy == "max"]
    assert (top.energy_ratio == 1.0).all()
    low = frame[frame.policy == "static:1200"]
    assert (low.energy_ratio < 1.0).all()
    assert (low.energy_ratio > 0.3).all()


def test_run_directory_explains_itself(finished):
    folder, _ = finished
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["points"][0]["duration_s"] == 40
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["sha256"]
    assert all(len(digest) == 64 for digest in provenance["sha256"].values())
    assert provenance["packages"]["numba"]


@pytest.mark.slow
def test_a_second_run_does_not_overwrite_and_resume_finds_it_done(finished, scenario):
    folder, _ = finished
    before = (folder / "results.parquet").read_bytes()
    again = run("compare", *TINY, scenario, "--out", folder, cwd=folder.parent)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    start = time.monotonic()
    resumed = run("compare", *TINY, scenario, "--out", folder, "--resume", cwd=folder.parent)
    assert resumed.returncode == 0, resumed.stderr
    assert time.monotonic() - start < 60
    assert pd.read_parquet(folder / "results.parquet").equals(pd.read_parquet(io.BytesIO(before)))


@pytest.mark.slow
def test_resume_with_other_settings_is_refused(finished, scenario):
    folder, _ = finished
    done = run(
        "compare", *TINY, scenario, "--load", "0.4", "--out", folder, "--resume", cwd=folder.parent
    )
    assert done.returncode == 2
    assert "load" in done.stderr


@pytest.mark.slow
def test_interrupted_run_keeps_rows_and_resumes(scenario, tmp_path):
    asked = [f"static:{600 + 15 * k}" for k in range(30)]
    policies, n_jobs = ",".join(asked), len(asked) + 2  # max and static-hindsight in every table
    command = [
        *BISCALE,
        "compare",
        "--phase",
        "prefill",
        "--scenario",
        str(scenario),
        "--policies",
        policies,
        "--jobs",
        "1",
        "--out",
        "run",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    parts = tmp_path / "run" / "parts"
    deadline = time.monotonic() + 120
    while not (parts.is_dir() and len(list(parts.glob("[0-9a-f]*"))) >= 4):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    said = process.stderr.read()
    assert f"of {n_jobs} are finished and kept in run" in said
    assert "--resume" in said
    assert "Traceback" not in said
    kept = pd.read_parquet(tmp_path / "run" / "results.parquet")
    assert 4 <= len(kept) < n_jobs * 2
    done = run(*command[3:], "--resume", cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    whole = pd.read_parquet(tmp_path / "run" / "results.parquet")
    assert len(whole) == n_jobs * 2
    merged = whole.merge(kept, on="run_id", suffixes=("", "_before"))
    assert len(merged) == len(kept)
    assert (merged.energy_j == merged.energy_j_before).all()


MISTAKES = {
    "unknown policy": (["--policies", "mpx"], "mpx"),
    "unknown slo": (["--slo", "biscal"], "biscal"),
    "unknown phase": (["--phase", "prefil"], "prefill or decode"),
    "zero load": (["--load", "0"], "load"),
    "no seeds": (["--seeds", "0"], "seeds"),
    "no such trace": (["--trace", "nowhere.csv"], "nowhere.csv"),
    "model does not fit": (["--tp", "3"], "TP 3"),
    "unknown dtype": (["--dtype", "int4"], "int4"),
    "impossible clock": (["--policies", "static:99"], "99"),
    "unknown scenario": (["--scenario", "azure-con"], "azure-con"),
    "the reference renamed": (["--policies", "max=static:1200"], "'max'"),
    "two of one name": (["--policies", "a=static:900,a=static:1200"], "'a'"),
    "unknown idle rule": (["--idle", "off"], "'last-clock' or 'parked'"),
    "resume of nothing": (["--resume"], "resume"),
}


def assert_refused(result, words, folder):
    code, _, err = result
    assert code == 2, err
    for word in words:
        assert word in err
    assert "Traceback" not in err
    assert err.count("\n") == 1
    assert not list(folder.rglob("*.parquet")), "something was written"
    assert not list(folder.rglob("config.yaml"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(mistake, call, tmp_path):
    arguments, words = MISTAKES[mistake]
    assert_refused(call("compare", "--quick", *arguments), [words], tmp_path)


@pytest.mark.slow
def test_a_mistake_in_a_real_process(tmp_path):
    done = run("compare", "--quick", "--slo", "biscal", cwd=tmp_path)
    assert_refused(
        (done.returncode, done.stdout, done.stderr), ["biscal", "mlperf-server"], tmp_path
    )


def test_zero_slo_is_refused(call, tmp_path):
    slo = tmp_path / "zero.yaml"
    slo.write_text("name: zero\nttft_s: 0\ntpot_s: 0.1\nattainment: 0.99\n")
    assert_refused(call("compare", "--quick", "--slo", slo), ["ttft_s", "zero.yaml"], tmp_path)


def test_unknown_key_names_the_nearest(call, tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text("name: typo\nlaod: 0.5\n")
    assert_refused(call("compare", "--scenario", path), ["laod", "'load'"], tmp_path)


def test_bad_trace_row_names_file_line_and_field(call, tmp_path):
    trace = tmp_path / "bad.csv"
    rows = [
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.68,374,44",
        "2023-11-16 18:15:47.68,-5,44",
    ]
    trace.write_text("\n".join(rows) + "\n")
    assert_refused(
        call("compare", "--quick", "--trace", trace),
        ["bad.csv", "line 3", "ContextTokens"],
        tmp_path,
    )


@pytest.mark.parametrize(
    "command",
    [("compare", "--phase", "decode"), ("compare", "--load", "0.3"), ("capacity", "prefill")],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_prompt_longer_than_the_kv_room(command, kind, call, tmp_path):
    """Named by file, line and field, although the workload is a choice of requests from a part of
    the file.
    """
    prompts = [374 if k != 250 else 900_000 for k in range(300)]
    trace = tmp_path / f"long.{kind}"
    if kind == "csv":
        rows = [
            f"2023-11-16 18:{15 + k // 60:02d}:{k % 60:02d}.0,{n},44" for k, n in enumerate(prompts)
        ]
        rows.insert(0, "TIMESTAMP,ContextTokens,GeneratedTokens")
    else:
        rows = [
            f'{{"timestamp": {1000 * k}, "input_length": {n}, "output_length": 44}}'
            for k, n in enumerate(prompts)
        ]
    trace.write_text("\n".join(rows) + "\n")
    words = [f"long.{kind}, line {252 if kind == 'csv' else 251}: prompt_tokens 900000", "KV room"]
    assert_refused(call(*command, "--trace", trace), words, tmp_path)


def test_capacity_command(call):
    code, out, err = call("capacity", "decode", "--json")
    assert code == 0, err
    found = json.loads(out)
    by_rate = sorted((t["rate_rps"], t["attainment"]) for t in found["tried"])
    assert found["capacity_rps"] == max(rate for rate, attainment in by_rate if attainment >= 0.99)


def test_capacity_of_both_halves_as_comparisons_take_them(call, tmp_path):
    trace = tmp_path / "halves.csv"
    rows = (f"{0.5 * i},{3000 if i < 300 else 300},20" for i in range(600))
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(rows))
    code, out, err = call("capacity", "prefill", "--trace", trace, "--parts", "--json")
    assert code == 0, err
    hard, easy = json.loads(out)
    assert easy["capacity_rps"] > 2 * hard["capacity_rps"]
    assert hard["trace"] != easy["trace"]
    code, out, err = call("capacity", "prefill", "--parts")
    assert code == 2
    assert "--parts are those of a trace" in err


@pytest.mark.slow
def test_an_idle_rule_is_an_option(call, tmp_path, scenario):
    """Parked, max clock uses less; the run says so; both rules stand in one results table."""
    spent = {}
    for rule in ("last-clock", "parked"):
        code, _, err = call("compare", *TINY, scenario, "--phase", "prefill", "--idle", rule,
                            "--out", rule)  # fmt: skip
        assert code == 0, err
        frame = pd.read_parquet(tmp_path / rule / "results.parquet")
        assert set(frame.idle) == {rule}
        spent[rule] = frame[frame.policy == "max"].energy_idle_j.sum()
        config = yaml.safe_load((tmp_path / rule / "config.yaml").read_text())
        assert config["points"][0]["instance"]["idle"] == rule
    assert spent["parked"] < 0.9 * spent["last-clock"]
    code, out, err = call("capacity", "prefill", "--idle", "parked", "--json")
    assert code == 0, err
    assert json.loads(out)["capacity_rps"] > 0


def test_a_trace_without_capacity_is_named_infeasible(call, tmp_path):
    trace = tmp_path / "long.csv"
    rows = [f"{20 * k},9000,10" for k in range(400)]
    trace.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]) + "\n")
    code, out, _ = call("capacity", "prefill", "--trace", trace)
    assert code == 0
    assert "infeasible: no load meets SLO 'biscale'" in out
    assert "of 600 ms" in out
    refused = call("compare", "--phase", "prefill", "--trace", trace)
    assert_refused(refused, ["infeasible", "of 600 ms", "wider SLO"], tmp_path)


INFEASIBLE = {
    "conv": (),
    "code": ("prefill",),
}  # at TP4 the longest code prompts leave hardly any room even alone


def alone_ms(trace, token_budget=2048):
    """Time that the longest prompt of each half takes by itself at max clock, ms: its chunks."""
    model = load_model("prefill", 4)
    halves = load_trace(str(trace)).split(0.5)
    found = []
    for half in halves:
        left, seconds = int(half.prompt_tokens.max()), 0.0
        done = 0
        while left > 0:
            n = min(left, token_budget)
            seconds += float(model.latency_s(n, n * (n / 2 + done), 0, 1, 1980))
            left, done = left - n, done + n
        found.append(f"{1e3 * seconds:.0f}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", INFEASIBLE)
def test_real_traces(name, shared_data, tmp_path):
    trace = shared_data / "traces" / f"AzureLLMInferenceTrace_{name}_2023.csv"
    command = [
        "compare",
        "--trace",
        trace,
        "--policies",
        "static-best,slack",
        "--seeds",
        "1",
        "--out",
        "run",
    ]
    for again in ((), ("--resume",)):
        done = run(*command, *again, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        opened = load_run(tmp_path / "run")
        assert set(opened.results.phase) == {"prefill", "decode"} - set(INFEASIBLE[name])
        assert [point["phase"] for point in opened.infeasible] == list(INFEASIBLE[name])
        report = (tmp_path / "run" / "report.html").read_text()
        for point in opened.infeasible:
            assert (
                f"infeasible, so without a table: {trace.stem}, {point['phase']}, 50 % of capacity"
                in done.stdout
            )
            assert point["reason"] in done.stdout.replace("\n", " ")
            said = [f"the slowest request takes {ms} of 600 ms" for ms in alone_ms(trace)]
            assert any(text in point["reason"] for text in said), (said, point["reason"])
            assert f"<li>{point['phase'].capitalize()}: {trace.stem} at 50 % load" in report
            assert html.escape(point["reason"], quote=False).replace("'", "&#39;") in report
        assert ("infeasible, so without" in done.stdout) == bool(INFEASIBLE[name])
        assert ("Infeasible scenarios." in report) == bool(INFEASIBLE[name])


@pytest.mark.parametrize(
    ("policy", "phase", "words"),
    [
        ("mpc:member=abc", "prefill", "member should be a valid integer, got abc"),
        ("mpc:member=1.5", "prefill", "member should be a valid integer, got 1.5"),
        ("mpc:margin=nan", "prefill", "margin should be a finite number, got nan"),
        ("mpc:margin=5", "prefill", "margin should be less than 1, got 5"),
        ("mpc:forecast=-3", "prefill", "forecast should be greater than or equal to 0, got -3"),
        ("throttllem:margin=-2", "decode", "margin should be greater than or equal to 0, got -2"),
        (
            "ecofreq:bin_requests=0",
            "decode",
            "bin_requests should be greater than or equal to 1, got 0",
        ),
        ("slack:fine=maybe", "decode", "fine should be a valid boolean, got maybe"),
    ],
)
def test_nonsense_in_a_policys_name_is_refused(call, policy, phase, words):
    code, _, error = call(
        "compare", "--quick", "--phase", phase, "--policies", policy, "--out", "run"
    )
    assert code == 2
    assert error.strip() == f"biscale: policy '{policy}': {words}"


@pytest.mark.parametrize(
    "arguments",
    [
        "traces generate file/x.csv --duration 60",
        "compare --quick --policies static:1200 --out file/run",
        "train prefill --out file/run",
        "place --rate 10 --out file/x.yaml",
        "hw clock-latency --out file/x.csv",
    ],
)
def test_a_folder_that_is_a_file_is_one_sentence(call, tmp_path, arguments):
    if arguments.startswith("train"):
        pytest.importorskip("stable_baselines3")
    (tmp_path / "file").write_text("")
    code, _, error = call(*arguments.split())
    assert code == 2
    assert re.fullmatch(
        r"biscale: cannot [^\n]+ file/[^\n]*: [^\n]*directory[^\n]*",
        error.strip().splitlines()[-1].lower(),
    )
    assert "Traceback" not in error
