"""Pages of experiments: a run of one phase renews that phase, to the letter nothing else."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from docs_modules import docs_module
from evaluation_synthetic import POLICIES as ALL
from evaluation_synthetic import plausible

from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.runs.rundir import RunDirectory

DOCS = Path(__file__).resolve().parents[2] / "docs"
SIDES = ("low", "high")
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


def tuned(phase, ratios):
    """Summary of a tuned run, both halves judged, as far as the main table looks at it."""
    point = {"phase": phase, "workload": "azure-x", "idle": "last-clock", "slo": "biscale"}
    point |= {"load": 0.5, "tp": 4, "dtype": "bf16", "one_trace": True}
    point |= {"target_met": True, "attainment": 0.99, "static_ratio": 1.0}
    return [
        point
        | {"policy": policy, "fold": fold, "energy_ratio": ratio, "equal_ratio": ratio + shift}
        | {f"{name}_ci_{side}": 1.0 for name in ("equal_ratio", "static_ratio") for side in SIDES}
        for fold, shift in (("forward", 0.0), ("backward", 0.02))
        for policy, ratio in ratios.items()
    ]


def test_the_main_table_has_a_range_and_a_matrix_per_phase():
    own = {"static-hindsight": 0.8, "agent": 0.6, "oracle": 0.5, "max": 1.0}
    frame = pd.DataFrame(
        tuned("prefill", own | {"mpc": 0.71, "mpc-plus": 0.65})
        + tuned("decode", own | {"slack": 0.75, "slack-plus": 0.55})
    ).assign(scenario="azure-x")
    run = SimpleNamespace(summary=lambda: frame, results=frame, infeasible=[])
    with docs_module("experiment_pages") as pages:
        found = pages.blocks("main", run)
    assert list(found) == ["ranges-prefill", "main-prefill", "ranges-decode", "main-decode"]
    head, _, *rows = found["ranges-prefill"].splitlines()
    assert "| mpc | mpc-plus | agent |" in head
    assert len(rows) == 1
    assert rows[0].startswith("| prefill, the last clock | 0.81–0.81 | 0.72–0.72 | 0.66–0.66 |")
    assert "| slack | slack-plus | agent |" in found["ranges-decode"].splitlines()[0]
    assert "**0.610**" in found["main-prefill"]  # the agent
    assert "**0.560**" in found["main-decode"]  # slack-plus
    assert "slack" not in found["main-prefill"]
    assert "mpc" not in found["main-decode"]


def test_points_are_told_apart_by_what_varies_within_the_phase():
    rows = [("prefill", 0.5), ("prefill", 0.75), ("decode", 0.5)]
    frame = pd.DataFrame([{"phase": p, "scenario": "x", "slo": "y", "load": n} for p, n in rows])
    run = SimpleNamespace(summary=lambda: frame, results=frame, infeasible=[])
    with docs_module("experiment_pages") as pages:
        found = pages.by_phase(run)
    assert [list(frames[0]["point"]) for frames in found.values()] == [["0.5", "0.75"], ["x"]]


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("agents.md", ["robustness"]),
        ("agents-table.md", [""]),
        ("offline.md", ["offline-data", "offline-scores"]),
    ],
)
def test_pages_have_a_place_for_the_tables_of_each_phase(page, names):
    text = (DOCS / page).read_text()
    for name in names:
        for phase in ("prefill", "decode"):
            block = f"{name}-{phase}".removeprefix("-")
            inner = text.split(f"<!-- begin:{block} -->\n")[1].split(f"<!-- end:{block} -->")[0]
            other = {"prefill": "| decode |", "decode": "| prefill |"}[phase]
            assert "|---" in inner
            assert other not in inner
