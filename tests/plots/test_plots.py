"""Public figures: the numbers in them, their units, looks that can be told apart, files."""

import sys
from itertools import combinations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from evaluation_synthetic import POLICIES, plausible

from agents.training.progress.curves import COLUMNS
from biscale_env import plots
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.report.drawing import figures
from biscale_env.evaluation.report.drawing.palette import styles
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.evaluation.stats.decomposition import PARTS, decompose

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("plots") / "run"
    with RunDirectory(path, {}) as directory:
        for policy in POLICIES:
            for seed in SEEDS:
                record = plausible("prefill", policy, seed, duration_s=120.0)
                busy_j = record.totals["energy_j"] - record.totals["energy_idle_j"]
                extra = {"busy_at_max_clock_j": busy_j * (1.4 + 0.1 * seed), "iterations": 1000.0}
                record.totals.update(extra)
                directory.add(record, keep_timeline=seed == 0)
    return load_run(path)


@pytest.fixture(scope="module")
def curves():
    scores = {0: [1.0, 0.8], 1: [1.2, 0.9], 2: [1.1, 0.7]}
    rows = [
        (seed, step, score, score / 2, 0.99)
        for seed, values in scores.items()
        for step, score in zip((0, 2_000_000), values, strict=True)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def all_figures(run, curves):
    return {
        "energy": plots.energy(run),
        "latency": plots.latency(run),
        "timeline": plots.timeline(run),
        "clocks": plots.clocks(run),
        "savings": plots.savings(run),
        "burst": plots.burst(run),
        "learning_curves": plots.learning_curves(curves),
        "window": plots.window(run, 30.0, 20.0),
        "whole_run": plots.whole_run(run),
        "live_replay": plots.live_replay({}),
    }


@pytest.mark.slow
def test_every_figure_has_axes_with_titles_and_is_a_figure(run, curves):
    made = all_figures(run, curves)
    assert set(plots.__all__) == {*made, "save", "energy_by_attainment"}
    for name, figure in made.items():
        assert isinstance(figure, go.Figure)
        assert len(figure.data) or name == "live_replay"
        layout = figure.to_plotly_json()["layout"]
        titles = [v["title"].get("text") for k, v in layout.items() if k.startswith("xaxis")]
        assert any(titles), name


def test_the_reports_figures_are_these(run):
    for ours, name in ((plots.energy, "energy"), (plots.timeline, "timeline")):
        assert ours(run.path).to_json() == figures.figure(run, name).to_json()
    assert plots.energy(run.summary()).to_json() == plots.energy(run).to_json()


def test_savings_add_up_and_the_range_holds_every_workload(run):
    figure = plots.savings(run)
    *bars, total = figure.data
    assert len(bars) == len(PARTS)
    stacked = sum(np.asarray(bar.x, dtype=float) for bar in bars)
    np.testing.assert_allclose(stacked, total.x, atol=1e-9)
    assert list(total.y) == list(bars[0].y)
    assert "max" not in total.y
    for label, x, up, down in zip(
        total.y, total.x, total.error_x.array, total.error_x.arrayminus, strict=True
    ):
        singles = [
            100 * decompose(rows).set_index("policy").loc[label, "total"]
            for _, rows in run.results.groupby("workload_seed")
        ]
        assert (x - down, x + up) == (pytest.approx(min(singles)), pytest.approx(max(singles)))
    assert len({bar.marker.pattern.shape for bar in bars}) == len(bars)
    assert {bar.marker.pattern.fillmode for bar in bars} == {"overlay"}  # else nothing is seen


def test_a_burst_has_a_column_per_controller_on_the_same_scales(run):
    figure = plots.burst(run, ["max", "mpc", "slack"], width_s=30.0)
    layout = figure.to_plotly_json()["layout"]
    assert [a["text"] for a in layout["annotations"][:3]] == [
        "<b>max</b>",
        "<b>mpc</b>",
        "<b>slack</b>",
    ]
    axes = ["yaxis", *(f"yaxis{i}" for i in range(2, 13))]
    for row in range(4):
        assert len({tuple(layout[axes[4 * column + row]]["range"]) for column in range(3)}) == 1
    start, end = layout["xaxis"]["range"]
    assert end - start == pytest.approx(30.0)
    for trace in figure.data:
        x = np.asarray(trace.x)
        assert ((x >= start - 0.1) & (x <= end + 0.1)).all()
        row = (int(trace.yaxis[1:] or 1) - 1) % 4
        low, high = layout[axes[row]]["range"]
        assert (np.asarray(trace.y) <= high).all()
        assert (np.asarray(trace.y) >= low).all()
    assert {t.line.color for t in figure.data if t.name == "mpc" and t.line.color} == {
        styles(list(POLICIES))["mpc"].color
    }


def test_learning_curves_by_hand(curves):
    whole, quartiles, median = plots.learning_curves(curves).data
    assert list(median.x) == [0.0, 2.0]
    assert list(median.y) == [1.1, 0.8]
    assert list(whole.y) == [1.2, 0.9, 0.7, 1.0]
    assert list(quartiles.y) == pytest.approx([1.15, 0.85, 0.75, 1.05])
    assert median.name == "median of 3 seeds"


def test_controllers_are_told_apart_without_colour(run):
    known = [*POLICIES, "ecofreq", "throttllem", "greenllm", "dynamollm", "agft", "mpc-fast"]
    look = styles(known)
    for one, other in combinations(known, 2):
        assert look[one] != look[other]
        same = (look[one].dash, look[one].symbol) == (look[other].dash, look[other].symbol)
        assert not same or brightness(look[one].color) != pytest.approx(
            brightness(look[other].color), abs=0.02
        ), (one, other)
    for trace in plots.latency(run).data:
        assert trace.mode == "lines+markers"
        assert trace.marker.symbol == look[trace.name].symbol


def brightness(color):
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(
    ("draw", "told"),
    [
        (lambda run: plots.latency(run, "ttl"), "there are ttft and tpot"),
        (lambda run: plots.energy(run, 7), "there is no number 7"),
        (lambda run: plots.burst(run, ["agft"]), "no timeline of 'agft'"),
        (lambda run: plots.savings(run.results.drop(columns="iterations")), "no savings"),
        (lambda run: plots.energy_by_attainment(run), "no controller was tuned"),
        (lambda run: plots.learning_curves(run.path), "train with --seeds"),
    ],
)
def test_mistakes_are_a_sentence(run, draw, told):
    with pytest.raises(BiscaleError, match=told) as error:
        draw(run)
    assert "\n" not in str(error.value)


def test_files(run, tmp_path, monkeypatch):
    figure = plots.energy(run)
    page = plots.save(figure, tmp_path / "energy.html")
    assert "Plotly.newPlot" in page.read_text()
    with pytest.raises(BiscaleError, match=r"written as \.html, \.svg"):
        plots.save(figure, tmp_path / "energy.docx")
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(BiscaleError, match=r"biscale-env\[print\]"):
        plots.save(figure, tmp_path / "energy.svg")
    assert [p.name for p in tmp_path.iterdir()] == ["energy.html"]
