"""The report as a page: self-contained, complete, honest; tables on the console and in Markdown."""

import base64
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from evaluation_synthetic import plausible, requests_of, tiny
from rich.console import Console

from biscale_env.evaluation.report import page as report_page
from biscale_env.evaluation.report import tables
from biscale_env.evaluation.report.drawing import figure_style
from biscale_env.evaluation.report.overview import overviews
from biscale_env.evaluation.runs import results
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.evaluation.stats.metrics import results_row

GOOD = requests_of([0.0, 1.0, 2.0], [0.1, 1.1, 2.1], [0.1, 1.1, 2.1], [10, 20, 1])
SHOWN = {"prefill": ("max", "mpc", "oracle"), "decode": ("max", "slack")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "run"
    with RunDirectory(
        path, {"note": "</script><b>not markup</b>"}, seeds={"workload": [0]}
    ) as directory:
        for phase, policies in SHOWN.items():
            for policy in policies:
                directory.add(plausible(phase, policy, 0, duration_s=90.0))
        directory.add(tiny(policy="max", scenario="hopeless"))
        directory.add(tiny(policy="mpc", scenario="hopeless"))
        unserved = {
            "scenario": "code",
            "phase": "prefill",
            "slo": "biscale",
            "load": 0.5,
            "tp": 4,
            "dtype": "bf16",
        }
        directory.name_infeasible([unserved | {"reason": "even 0.1 req/s misses <it>"}])
    return load_run(path)


@pytest.fixture(scope="module")
def page(run):
    return report_page.write_report(run).read_text(encoding="utf-8")


def without_plotly(page):
    """The page without the library's own source."""
    parts = re.split(r"(<script>\s*/\*\*\s*\n\* plotly\.js.*?</script>)", page, flags=re.DOTALL)
    assert len(parts) == 3
    return parts[0] + parts[2]


def test_page_loads_nothing(page):
    own = without_plotly(page)
    assert not re.findall(r"""(?:src|href|action|data)\s*=\s*["']?(?!#)[^"'\s>]*//""", own)
    assert "http://" not in own
    assert "https://" not in own
    assert "@import" not in own
    assert not re.search(r"url\(", own)
    assert not re.search(r"<(link|img|iframe|object|embed|base)\b", own)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', own).group(1)
    assert policy.startswith("default-src 'none'")
    assert page.count("* plotly.js v") == 1
    assert len(page.encode()) < 8e6


def test_page_is_stable_against_markup_in_the_data(page):
    assert "<b>not markup</b>" not in page
    assert "&lt;b&gt;not markup&lt;/b&gt;" in page


def test_every_policy_point_and_figure_is_there(run, page):
    own = without_plotly(page)
    assert own.count("<section id=") == len(run.points()) == 3
    for policy in ("max", "mpc", "oracle", "slack"):
        assert re.search(rf'class="name">.*?</span>{policy}</span>', own)
    drawn = set(re.findall(r'<script type="application/json" id="(point-\d)-(\w+)"', own))
    shown = {
        (f"point-{i}", name)
        for i, point in enumerate(run.points())
        for name in figures_of(point["phase"])
    }
    assert drawn == shown
    assert set(re.findall(r'data-figure="(point-\d)-(\w+)"', own)) == shown


def test_an_overview_per_phase_has_the_controllers_of_that_phase_alone(run, page):
    prefill, decode = overviews(run)
    assert (prefill["title"], decode["title"]) == ("Prefill", "Decode")
    assert set(prefill["labels"]) == set(SHOWN["prefill"])
    assert set(decode["labels"]) == set(SHOWN["decode"])
    assert [len(table["rows"]) for table in (prefill, decode)] == [2, 1]
    assert all(cell is not None for row in decode["rows"] for cell in row["cells"])
    ids = [row["id"] for table in (prefill, decode) for row in table["rows"]]
    assert sorted(ids) == ["point-0", "point-1", "point-2"]
    for table in (prefill, decode):
        for row in table["rows"]:
            assert "SLO" not in row["title"]  # one SLO for all: the sections name it
            section = page.partition(f'<section id="{row["id"]}">')[2].partition("</h2>")[0]
            assert row["title"] in section
            assert section.strip().startswith(f"<h2>{table['title']}: ")


def figures_of(phase):
    return {"energy", "clocks", "timeline", "ttft" if phase == "prefill" else "tpot"}


def test_figures_in_the_page_hold_the_numbers_of_the_summary(run, page):
    places = [p["scenario"] + p["phase"] for p in run.points()]
    number = places.index("syntheticprefill")
    found = re.search(rf'id="point-{number}-energy">(.*?)</script>', page, re.DOTALL).group(1)
    traces = {t["name"]: t for t in json.loads(found)["data"]}
    summary = figure_style.at_point(run.summary(), run.points()[number]).set_index("label")
    for label in SHOWN["prefill"]:
        y = traces[label]["y"]
        value = (
            np.frombuffer(base64.b64decode(y["bdata"]), dtype=np.dtype(y["dtype"]))[0]
            if isinstance(y, dict)
            else y[0]
        )
        assert value == pytest.approx(summary.loc[label, "energy_ratio"])


def test_infeasible_scenarios_are_named(page):
    own = without_plotly(page)
    assert "Infeasible scenarios." in own
    assert "<li>Prefill: hopeless, SLO biscale</li>" in own
    assert "max clock itself reaches only 66.66 %" in own
    assert (
        "<li>Prefill: code at 50 % load, SLO biscale: no table, since even 0.1 req/s misses"
        " &lt;it&gt;</li>" in own
    )
    assert own.count('<span class="tag">infeasible</span>') == 1


def test_colours_of_the_page_have_dark_twins(page):
    twins = json.loads(re.search(r"const twins = (\{.*?\});", page).group(1))
    used = set(re.findall(r'"color":\s*"(#[0-9a-f]{6})"', without_plotly(page)))
    assert used
    assert used <= set(twins)


@pytest.mark.slow
def test_figures_beyond_the_size_budget_are_left_out_and_the_page_says_so(run, monkeypatch):
    monkeypatch.setattr(report_page, "FIGURE_BUDGET_BYTES", 120_000)
    views = report_page.point_views(run)
    assert [bool(v["figures"]) for v in views] != [True] * 3
    assert sum(len(f["json"]) for v in views for f in v["figures"]) <= 120_000
    assert "The figures of this operating point are left out" in report_page.render(run)


def test_rendering_never_leaves_half_a_page(run, tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("old")
    monkeypatch.setattr(report_page, "render", lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError):
        report_page.write_report(run, target)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def comparison():
    rows = [
        tiny(
            policy="max",
            requests=GOOD,
            totals={"decision_time_median_s": 9e-6, "decision_time_p99_s": 2.5e-3},
        ),
        tiny(policy="mpc", requests=GOOD, totals={"energy_j": 420.0, "solver_failures": 2.0}),
        tiny(policy="slack", totals={"energy_j": 300.0}),
        tiny(policy="oracle", requests=GOOD, totals={"energy_j": 360.0}),
    ]
    return results.results_frame(results_row(r) for r in rows)


def test_reading_order_is_reference_then_those_that_keep_the_slo_then_others_then_bounds():
    [(title, rows)] = tables.points_of(results.summarise(comparison()))
    assert title == "toy, prefill, TP4 bf16, SLO biscale"
    assert rows["policy"].tolist() == ["max", "mpc", "slack", "oracle"]


def test_verdict_passes_over_those_who_miss_and_over_the_bound():
    [(_, rows)] = tables.points_of(results.summarise(comparison()))
    assert (
        tables.verdict(rows)
        == "Least energy while meeting the SLO: mpc, 13.5 J per token, 30.0 % below max clock; "
        "with the future known 40.0 % below max clock."
    )
    lost = rows[rows["policy"].isin(["max", "slack"])]
    assert tables.verdict(lost).startswith("Only max clock meets the SLO here")
    alone = rows[rows["policy"] == "slack"]
    assert tables.verdict(alone) == "No controller meets the SLO here."


def test_markdown_is_a_table():
    text = tables.summary_markdown(comparison())
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 6
    assert len({line.count("|") for line in lines}) == 1
    assert "| mpc | 13.5 | 0.700 | 100.00 | 100 | 100 | 100 | – | – | 2 | met |" in lines
    assert "| slack | 9.68 | 0.500 | 66.66 | 600 | 680 | 698 | – | – | 0 | missed |" in lines
    assert tables.summary_markdown(results.results_frame([])) == ""


def test_a_plan_found_by_search_says_so_with_its_bound_beside_it():
    def rows_of(phase, bounds_j):
        runs = [
            tiny(phase=phase, policy="oracle", workload_seed=seed, totals={"energy_j": 800.0},
                 labels={"oracle_replay_j": 800.0, "oracle_lower_bound_any_delay_j": bound_j})
            for seed, bound_j in enumerate(bounds_j)
        ]  # fmt: skip
        runs += [tiny(phase=phase, policy="max", workload_seed=seed) for seed in range(len(runs))]
        return results.results_frame(results_row(run) for run in runs)

    decode = rows_of("decode", (780.0, 788.0))
    assert results.bound_below(decode[decode["policy"] == "oracle"]) == pytest.approx(0.02)
    text = tables.summary_markdown(decode)
    assert "| best plan found (hindsight), bound 2.0 % below |" in text
    assert "| max |" in text
    assert "| oracle (hindsight), bound 2.0 % below |" in tables.summary_markdown(
        rows_of("prefill", (780.0, 788.0))
    )
    assert "| best plan found (hindsight) |" in tables.summary_markdown(
        rows_of("decode", (780.0, float("nan")))
    )
    out = io.StringIO()
    tables.print_table(decode, Console(file=out, width=80, no_color=True))
    assert "best plan found*" in " ".join(out.getvalue().split())


def test_console_table_fits_eighty_columns():
    out = io.StringIO()
    tables.print_table(comparison(), Console(file=out, width=80, no_color=True))
    text = out.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    for word in ("max", "mpc", "slack", "oracle*", "0.700", "9.0 µs", "2.5 ms", "missed", "met"):
        assert word in text
    assert "…" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.0e-5, "20 µs"),
        (3.1e-3, "3.1 ms"),
        (1.5, "1.5 s"),
        (4e-8, "0.040 µs"),
        (float("nan"), "–"),
    ],
)
def test_durations_carry_their_unit(seconds, text):
    assert tables.duration(seconds) == text


def test_share_is_never_rounded_up_to_a_promise():
    assert tables.share(0.989999) == "98.99"
    assert tables.share(0.99) == "99.00"
    assert tables.share(0.99999) == "99.99"
    assert tables.share(1.0) == "100.00"
    assert tables.number(0.0) == "0"
    assert tables.number(1234.5) == "1234"


def test_verdict_on_the_slo_says_when_the_sample_cannot_tell():
    row = {
        "slo_met": True,
        "slo_attainment": 0.99,
        "attainment_ci_low": 0.985,
        "attainment_ci_high": 0.995,
    }
    row |= {"target_met": True, "target": 0.99}
    assert tables.slo_words(row) == "met?"
    assert tables.slo_words(row | {"attainment_ci_low": 0.991}) == "met"
    missed = row | {"slo_met": False, "target_met": False, "attainment_ci_low": float("nan")}
    assert tables.slo_words(missed) == "missed?"  # too few windows for an interval
    assert tables.slo_words(missed | {"attainment_ci_low": 0.97, "attainment_ci_high": 0.98}) == (
        "missed"
    )
    without = {name: value for name, value in row.items() if "_ci_" not in name}
    assert tables.slo_words(without) == "met"  # a frame without any intervals
    beside = row | {"slo_met": False, "target": 0.98}
    assert tables.slo_words(beside) == "as max"
    assert tables.slo_words(beside | {"attainment_ci_low": 0.97}) == "as max?"


def test_the_report_says_what_the_prefix_cache_spared():
    rows = pd.DataFrame({"prefix_cache": ["lru:5000"] * 2, "cached_share": [0.25, 0.75]})
    assert report_page.cache_facts(rows) == [
        "prefix cache lru:5000, 50.00 % of prompt tokens cached"
    ]
    assert report_page.cache_facts(rows.assign(cached_share=np.nan)) == [
        "prefix cache lru:5000"
    ]  # decode
    assert report_page.cache_facts(rows.assign(prefix_cache="off")) == []
    assert (
        report_page.cache_facts(rows.drop(columns="prefix_cache")) == []
    )  # runs of older versions
