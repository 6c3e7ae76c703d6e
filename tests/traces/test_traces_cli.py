"""``biscale traces`` from end to end."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

import biscale_env
from biscale_env import cli
from biscale_env.traces import (
    generate,
    load_envelope,
    load_lengths,
    load_workload,
    read_trace,
    write_trace,
)


@pytest.fixture
def biscale(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["biscale", "traces", *(str(a) for a in arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        code = stop.value.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_list_names_every_trace(biscale):
    code, out, _ = biscale("list")
    assert code == 0
    for name in (
        "azure-conv-like",
        "azure-code-like",
        "poisson-fixed",
        "azure-conv-2023",
        "azure-code-2024",
        "mooncake-conversation",
    ):
        assert name in out
    assert out.count("│ fetch ") == 7
    assert "cache" in out


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_generated_file_holds_the_generated_workload(biscale, suffix, tmp_path):
    code, out, _ = biscale("generate", f"w.{suffix}", "--duration", 300, "--rate", 3, "--seed", 4)
    assert code == 0
    expected = generate("azure-conv-like", rate_rps=3.0, duration_s=300.0, seed=4)
    assert f"w.{suffix}: {len(expected)} requests in 300 s" in out
    found = read_trace(tmp_path / f"w.{suffix}")
    np.testing.assert_allclose(found.arrival_s, expected.arrival_s, rtol=0, atol=1e-9)
    assert found.prompt_tokens.tolist() == expected.prompt_tokens.tolist()
    assert found.output_tokens.tolist() == expected.output_tokens.tolist()
    assert [p.name for p in tmp_path.iterdir()] == [f"w.{suffix}"]


@pytest.mark.parametrize(
    ("options", "cv"),
    [
        (("--arrivals", "poisson"), 1.0),
        (("--arrivals", "gamma", "--cv", 1.5), 1.5),
        (("--arrivals", "gamma"), 2.0),
        (("--arrivals", "mmpp", "--high-factor", 4, "--high-s", 10, "--low-s", 30), None),
        (("--arrivals", "diurnal", "--envelope", "azure-code-week", "--start-hour", 12), None),
    ],
)
def test_kinds_of_arrivals(biscale, options, cv):
    code, _, err = biscale(
        "generate", "w.csv", "--duration", 4000, "--rate", 5, "--lengths", "fixed", *options
    )
    assert (code, err) == (0, "")
    code, out, _ = biscale("describe", "w.csv", "--json")
    figures = json.loads(out)
    if cv:
        assert figures["gap_cv"] == pytest.approx(cv, rel=0.1)
    elif "mmpp" in options:
        assert figures["dispersion"]["60s"] > 10
    assert figures["prompt_tokens"]["mean"] == 1024


def test_fixed_lengths_by_option(biscale, tmp_path):
    code, _, _ = biscale(
        "generate", "w.csv", "--duration", 50, "--prompt-tokens", 700, "--output-tokens", 3
    )
    trace = read_trace(tmp_path / "w.csv")
    assert (code, set(trace.prompt_tokens.tolist()), set(trace.output_tokens.tolist())) == (
        0,
        {700},
        {3},
    )


def test_describe_shows_the_figures(biscale, tmp_path):
    write_trace(generate("azure-conv-like", duration_s=400.0), tmp_path / "w.parquet")
    code, out, _ = biscale("describe", "w.parquet")
    assert code == 0
    for words in (
        "rate [requests/s]",
        "CV of inter-arrival times",
        "variance/mean of arrivals per 10s",
        "p99",
    ):
        assert words in out
    code, named, _ = biscale("describe", "poisson-fixed", "--json")
    figures = json.loads(named)
    assert (code, figures["duration_s"], figures["name"]) == (0, 600.0, "poisson-fixed")
    assert figures["rank_correlation"] is None


def test_describe_reads_named_columns(biscale, tmp_path):
    (tmp_path / "own.csv").write_text("when,question,answer\n0,5,1\n2000,6,2\n1000,7,3\n")
    names = (
        "--time-column",
        "when",
        "--prompt-column",
        "question",
        "--output-column",
        "answer",
        "--time-unit",
        "ms",
    )
    code, _, err = biscale("describe", "own.csv", "--json", *names)
    assert (code, err.count("\n")) == (2, 1)
    assert "own.csv, line 4: when lies 1 s before" in err
    code, out, _ = biscale("describe", "own.csv", "--json", "--sort", *names)
    assert (code, json.loads(out)["rate_rps"]) == (0, 1.5)


def test_profiles_made_by_describe_can_be_used_to_generate(biscale, tmp_path):
    write_trace(generate("azure-code-like", seed=3), tmp_path / "w.parquet")
    _, lengths, _ = biscale(
        "describe", "w.parquet", "--as-profile", "lengths", "--name", "mine", "--source", "me"
    )
    (tmp_path / "lengths.yaml").write_text(lengths)
    assert load_lengths("lengths.yaml").source == "me"
    _, workload, _ = biscale(
        "describe", "w.parquet", "--as-profile", "workload", "--lengths", "lengths.yaml"
    )
    (tmp_path / "mine.yaml").write_text(workload)
    assert yaml.safe_load(workload)["lengths"] == "lengths.yaml"
    code, _, err = biscale("generate", "again.csv", "--workload", "mine.yaml")
    assert (code, err) == (0, "")
    assert read_trace(tmp_path / "again.csv").rate_rps == pytest.approx(
        load_workload("mine.yaml").rate_rps, rel=0.4
    )


def test_rate_profiles_from_traces_and_tables(biscale, tmp_path):
    write_trace(
        generate("poisson-fixed", rate_rps=1.0, duration_s=4 * 3600.0), tmp_path / "w.parquet"
    )
    _, rates, _ = biscale("describe", "w.parquet", "--as-profile", "rates")
    (tmp_path / "rates.yaml").write_text(rates)
    assert len(load_envelope("rates.yaml").factors) == 4
    table = "t_seconds,r,m\n" + "".join(f"{t * 1800},{1 + t % 4},a\n" for t in range(16))
    (tmp_path / "t.csv").write_text(table)
    command = (
        "envelope",
        "t.csv",
        "--rate-column",
        "r",
        "--where",
        "m=a",
        "--period-hours",
        4,
        "--name",
        "x",
    )
    code, out, _ = biscale(*command)
    assert code == 0
    assert yaml.safe_load(out)["factors"] == [0.6, 1.4, 0.6, 1.4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("describe", "nothing"), "there is no trace 'nothing'"),
        (("describe", "nothing.csv"), "there is no trace file nothing.csv"),
        (("describe", "azure-conv-2023"), "run 'biscale traces fetch azure-conv-2023' first"),
        (("fetch", "other"), "no public trace 'other'"),
        (("fetch", "azure-conv-2023", "--base-url", "ftp://x"), "must start with https"),
        (("generate", "w.csv", "--rate", -3), "must be positive, got -3 requests/s"),
        (("generate", "w.csv", "--rate", 0.001, "--duration", 1), "no request"),
        (("generate", "w.txt"), "must end in .csv"),
        (("generate", "no/such/folder/w.csv"), "cannot write no/such/folder/w.csv"),
        (("generate", "w.csv", "--workload", "none"), "unknown workload profile 'none'"),
        (("generate", "w.csv", "--lengths", "none"), "unknown length profile 'none'"),
        (("generate", "w.csv", "--cv", 2), "need --arrivals"),
        (
            ("generate", "w.csv", "--arrivals", "poisson", "--cv", 2),
            "--cv does not apply to --arrivals poisson",
        ),
        (("generate", "w.csv", "--arrivals", "gamma", "--cv", -1), "gap_cv"),
        (
            ("generate", "w.csv", "--arrivals", "mmpp", "--high-factor", 9),
            "high_factor must not exceed",
        ),
        (
            ("generate", "w.csv", "--arrivals", "diurnal", "--envelope", "none"),
            "unknown rate profile 'none'",
        ),
        (("generate", "w.csv", "--prompt-tokens", 5), "both --prompt-tokens and --output-tokens"),
        (
            ("generate", "w.csv", "--prompt-tokens", 0, "--output-tokens", 5),
            "tokens must not fall and start at 1",
        ),
        (("generate", "w.csv", "--seed", -1), "seed"),
    ],
)
def test_mistakes_are_one_sentence_exit_code_two_and_no_file(biscale, arguments, words, tmp_path):
    code, out, err = biscale(*arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("biscale: ")
    assert words in err
    assert "Traceback" not in out + err
    assert not list(tmp_path.glob("w.*"))


def test_installed_command_describes_a_real_trace(shared_data):
    path = shared_data / "traces" / "AzureLLMInferenceTrace_code_2023.csv"
    command = [
        sys.executable,
        "-c",
        "from biscale_env.cli import main; main()",
        "traces",
        "describe",
        str(path),
        "--json",
    ]
    figures = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert figures["requests"] == 8819
    assert figures["gap_cv"] == pytest.approx(13.15, abs=0.01)
    assert figures["busiest_second_requests"] == 67


def test_importing_the_trace_alone_is_light():
    code = "import sys; sys.modules['biscale_env'] = type(sys)('biscale_env')\n"
    code += "sys.modules['biscale_env'].__path__ = {path!r}\n"
    code += "from biscale_env.traces import Trace, describe; import numpy\n"
    code += "print(sorted({{'pandas', 'pyarrow', 'scipy', 'torch'}} & set(sys.modules)))"
    code = code.format(path=list(biscale_env.__path__))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert result.stdout.strip() == "[]"
