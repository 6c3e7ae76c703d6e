"""Pages of experiments: a run of one phase renews that phase, to the letter nothing else."""

from pathlib import Path

import pandas as pd
import pytest
from docs_modules import docs_module
from evaluation_synthetic import POLICIES as ALL
from evaluation_synthetic import plausible

from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.runs.rundir import RunDirectory

DOCS = Path(__file__).resolve().parents[2] / "docs"
POLICIES = [name for name in ALL if name != "oracle"]


def run_of(path, phases, seeds, blocked=()):
    with RunDirectory(path, {}) as directory:
        directory.name_infeasible(list(blocked))
        for phase in phases:
            for policy in POLICIES:
                for seed in seeds:
                    record = plausible(phase, policy, seed, duration_s=120.0)
                    directory.add(record, keep_timeline=False)
    return load_run(path)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("pages") / "both", ("prefill", "decode"), (0, 1))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("pages") / "one", ("prefill",), (2, 3))


def parts(text):
    at = text.index("<!-- begin:decode -->")
    return text[:at], text[at:]


def test_a_run_of_one_phase_leaves_the_other_as_it_was(both, one, tmp_path):
    page, table = tmp_path / "experiment-x.md", tmp_path / "experiment-x.csv"
    seen = []
    with docs_module("experiment_pages") as pages:
        for run in (both, one, both):
            pages.write_page(page, "x", run)
            pages.write_csv(table, run.summary())
            seen.append((page.read_text(), table.read_text().splitlines()))
    whole, renewed, back = seen
    assert whole == back
    assert parts(renewed[0])[1] == parts(whole[0])[1]
    assert parts(renewed[0])[0] != parts(whole[0])[0]
    decode = [line for line in whole[1] if line.startswith("decode")]
    assert len(decode) == len(POLICIES)
    assert renewed[1][-len(decode) :] == decode
    assert renewed[1][0] == whole[1][0]
    assert renewed[1] != whole[1]
    assert len(renewed[1]) == len(whole[1])


def test_a_phase_stands_in_its_own_part_alone(both, tmp_path):
    page = tmp_path / "experiment-x.md"
    with docs_module("experiment_pages") as pages:
        pages.write_page(page, "x", both)
        found = pages.blocks("x", both)
    prefill, decode = parts(page.read_text())
    assert "TTFT P99" in prefill
    assert "TPOT" not in prefill
    assert "TPOT P99" in decode
    assert "TTFT" not in decode
    assert list(found) == ["x-prefill", "x-decode"]
    assert found["x-prefill"].startswith("**prefill**")
    assert "**decode**" not in found["x-prefill"]
    for policy in POLICIES:
        assert f"| {policy} |" in found["x-decode"]


def test_a_phase_without_runs_says_why(one, tmp_path):
    page = tmp_path / "experiment-x.md"
    point = {"phase": "decode", "scenario": "synthetic", "slo": "biscale", "load": 0.75, "tp": 4}
    blocked = point | {"dtype": "bf16", "reason": "one prompt takes 2 s"}
    run = run_of(tmp_path / "run", ("prefill",), (2, 3), [blocked])
    with docs_module("experiment_pages") as pages:
        pages.write_page(page, "x", run)
        assert list(pages.blocks("x", run)) == ["x-prefill"]
    prefill, decode = parts(page.read_text())
    assert "infeasible, since one prompt takes 2 s." in decode
    assert "infeasible" not in prefill


def test_a_page_of_another_form_is_not_overwritten(one, tmp_path):
    page = tmp_path / "experiment-x.md"
    page.write_text("# Experiment `x`\n\n**decode**\n")
    with docs_module("experiment_pages") as pages, pytest.raises(SystemExit, match="no parts"):
        pages.write_page(page, "x", one)
    assert "**decode**" in page.read_text()


def test_the_page_of_results_has_a_place_for_every_block():
    text = (DOCS / "results.md").read_text()
    names = sorted(path.stem.removeprefix("experiment-") for path in DOCS.glob("experiment-*.csv"))
    assert {"main", "slo", "foresight"} <= set(names)
    for name in names:
        phases = pd.read_csv(DOCS / f"experiment-{name}.csv")["phase"].unique()
        page = (DOCS / f"experiment-{name}.md").read_text()
        for phase in phases:
            assert f"<!-- begin:{phase} -->\n## {phase}\n" in page
            for kind in [name, "ranges"] if name == "main" else [name]:
                place = f"<!-- begin:{kind}-{phase} -->"
                assert name == "foresight" or text.count(place) == 1, place
