"""Commands with a trace: the same options everywhere, and what was recognised is told."""

import json
import sys

import pytest
import typer

from biscale_env import cli
from biscale_env.evaluation.runs.run_files import read_config
from biscale_env.traces import read_trace

OPTIONS = {
    "--time-column",
    "--prompt-column",
    "--output-column",
    "--class-column",
    "--time-unit",
    "--block-tokens",
    "--sort",
    "--from",
    "--to",
    "--drop-failed",
}
BURST = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "500000,ChatGPT,300,20,320,API log\n500002,GPT-4,200,0,200,API log\n"
    "500005,GPT-4,100,30,130,API log\n"
)


@pytest.fixture
def biscale(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path / "cache"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["biscale", *(str(a) for a in arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run


def commands():
    """Every command by its words, and the names of its options and arguments."""
    found = {}

    def walk(command, words):
        if getattr(command, "commands", None):
            for name, inner in command.commands.items():
                walk(inner, (*words, name))
            return
        names = {opt for p in command.params for opt in p.opts if p.param_type_name == "option"}
        arguments = {p.name for p in command.params if p.param_type_name == "argument"}
        found[" ".join(words)] = (names, arguments)

    walk(typer.main.get_command(cli.build()), ())
    return found


def test_every_command_with_a_trace_has_the_same_options():
    reading = {
        name: options
        for name, (options, arguments) in commands().items()
        if "--trace" in options or "trace" in arguments
    }
    assert {"compare", "capacity", "place", "replay", "reproduce paper"} <= set(reading)
    assert {"traces describe", "traces convert"} <= set(reading)
    for name, options in reading.items():
        assert options >= OPTIONS, name


def test_what_was_recognised_is_told_beside_json_and_in_it(biscale, tmp_path):
    (tmp_path / "b.csv").write_text(BURST)
    code, out, err = biscale("traces", "describe", "b.csv", "--json")
    assert code == 0
    assert err.splitlines() == [
        "b.csv: BurstGPT, time in s (as documented), 3 requests, 0 rows dropped, 1 "
        "outputs of 0 tokens read as 1 (--drop-failed leaves them out), offset of 500000 s "
        "removed: times count from the first request"
    ]
    told = json.loads(out)["recognised"]
    assert (told["format"], told["offset_s"], told["zero_outputs"]) == ("BurstGPT", 500000.0, 1)
    code, out, _ = biscale("traces", "describe", "b.csv", "--json", "--drop-failed", "--from", "1")
    told = json.loads(out)
    assert (told["requests"], told["duration_s"]) == (1, 4.0)


def test_convert_writes_our_schema(biscale, tmp_path):
    (tmp_path / "b.csv").write_text(BURST)
    code, out, err = biscale("traces", "convert", "b.csv", "b.parquet", "--drop-failed", "--to", 4)
    told, written = out.splitlines()
    assert (code, err, "BurstGPT" in told, "part from 0 s to 4 s" in told) == (0, "", True, True)
    assert written == "b.parquet: 1 requests in 4 s, 0.25 requests/s"
    back = read_trace(tmp_path / "b.parquet")
    assert (back.arrival_s.tolist(), back.duration_s) == ([0.0], 4.0)
    code, _, err = biscale("traces", "convert", "b.csv", "b.csv")
    assert (code, "is the trace itself" in err) == (2, True)
    assert (tmp_path / "b.csv").read_text() == BURST
    code, out, _ = biscale("traces", "convert", "poisson-fixed", "p.csv", "--to", "1min")
    assert (code, read_trace(tmp_path / "p.csv").arrival_s.max() <= 60) == (0, True)
    code, _, err = biscale("traces", "convert", "poisson-fixed", "p.csv", "--sort")
    assert (code, "'poisson-fixed' is a generated trace" in err) == (2, True)


@pytest.mark.parametrize(
    "command",
    [
        ("capacity", "prefill", "--trace"),
        ("place", "--rate", "5", "--trace"),
        ("reproduce", "paper", "--quick", "--trace"),
        ("compare", "--quick", "--trace"),
        ("replay", "--decode", "http://127.0.0.1:1", "--trace"),
        ("traces", "describe"),
    ],
)
def test_a_fault_names_options_that_the_command_has(biscale, tmp_path, command):
    (tmp_path / "t.csv").write_text("when,prompt,output\n3,5,5\n1,5,5\n2,5,5\n")
    code, _, err = biscale(*command, "t.csv")
    assert (code, err.count("\n")) == (2, 1)
    assert "--time-column, --prompt-column and --output-column" in err
    named = ("--time-column", "when", "--prompt-column", "prompt", "--output-column", "output")
    code, _, err = biscale(*command, "t.csv", *named, "--time-unit", "s")
    assert (code, "line 3: when lies 2 s" in err, "--sort" in err) == (2, True, True)


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        (("compare", "--load", "75"), "0.75"),
        (("compare", "--experiment", "main", "--load", "50"), "0.5"),
        (("evaluate", "static:1200", "--loads", "0.5,90"), "0.9"),
    ],
)
def test_a_load_in_per_cent_is_asked_about(biscale, command, meant):
    code, _, err = biscale(*command)
    assert (code, err.count("\n")) == (2, 1)
    assert err.endswith(f"times the capacity: was {meant} meant?\n")


def test_loads_of_files_and_environments_are_asked_about_too(biscale, tmp_path):
    from biscale_env.core.errors import BiscaleError
    from biscale_env.envs.options import WorkloadOptions

    (tmp_path / "s.yaml").write_text("name: mine\nload: 75\n")
    code, _, err = biscale("compare", "--scenario", "s.yaml")
    assert (code, "was 0.75 meant?" in err) == (2, True)
    with pytest.raises(BiscaleError, match=r"was 0\.9 meant"):
        WorkloadOptions(load=90.0)
    assert WorkloadOptions(load=1.5).load == 1.5  # an overload is a load


def test_capacity_and_compare_read_a_part_with_named_columns(biscale, tmp_path):
    rows = "".join(f"{250 * k},{400 + k % 90},{5 + k % 40}\n" for k in range(2400))
    (tmp_path / "t.csv").write_text("when,prompt,output\n" + rows)
    named = ("--time-column", "when", "--prompt-column", "prompt", "--output-column", "output")
    options = (*named, "--time-unit", "ms", "--to", "2min")
    code, out, err = biscale("capacity", "prefill", "--trace", "t.csv", *options, "--json")
    assert (code, "480 requests" in err) == (0, True)
    assert json.loads(out)["capacity_rps"] > 4
    code, out, _ = biscale(
        "compare", "--trace", "t.csv", *options, "--quick", "--policies", "max", "--phase",
        "prefill", "--out", "run", "--jobs", 1,
    )  # fmt: skip
    assert (code, out.count("480 requests")) == (0, 1)
    config = read_config(tmp_path / "run")
    assert config["points"][0]["reading"]["stop"] == "2min"
