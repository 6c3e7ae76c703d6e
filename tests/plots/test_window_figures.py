"""Any window of a run: means by hand, one line per instance, bounds, and a replay as it goes."""

import numpy as np
import pandas as pd
import pytest
from evaluation_synthetic import plausible, requests_of, timeline_of, tiny

from biscale_env import plots
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.plots.window_figure import PointRuns, means_of, window_figures, window_within


def written(path, *records):
    with RunDirectory(path, {}) as directory:
        for record in records:
            directory.add(record)
    return load_run(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("window") / "run"
    return written(path, *(plausible("prefill", p, 0, duration_s=60.0) for p in ("max", "mpc")))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Two instances of 4 and 2 GPUs in one record; their iterations overlap."""
    timeline = timeline_of([0.0, 0.5, 1.0, 1.5], [1.0] * 4, [0.0] * 4, [400.0, 100.0] * 2)
    timeline["freq_effective_mhz"] = np.array([1000.0, 600.0, 1200.0, 800.0])
    timeline["power_w"] = np.array([100.0, 50.0] * 2)
    timeline["instance"] = np.array([0, 1, 0, 1])
    labels = {"instance_names": "left right", "instance_gpus": "4 2"}
    record = tiny("decode", timeline=timeline, labels=labels, n_gpus=6)
    return written(tmp_path_factory.mktemp("pool") / "run", record)


def test_a_window_shows_that_time_and_no_other(run):
    figure = plots.window(run, 20.0, 10.0, ["max", "mpc"])
    layout = figure.to_plotly_json()["layout"]
    assert [a["text"] for a in layout["annotations"][:2]] == ["<b>max</b>", "<b>mpc</b>"]
    assert tuple(layout["xaxis"]["range"]) == (20.0, 30.0)
    for trace in figure.data:
        x = np.asarray(trace.x)
        assert x.size
        assert ((x >= 20.0) & (x <= 30.0)).all()
    kept = run.timeline_of(run.results.set_index("policy").loc["mpc", "run_id"])
    busy = [t for t in figure.data if t.name == "mpc" and t.mode == "lines"]
    inside = (kept["time_s"] >= 20.0) & (kept["time_s"] < 30.0)
    power = np.asarray(busy[1].y, dtype=float)
    # energy is kept: mean power over bins times the time is what the iterations spent
    assert power.mean() * 4 * 10.0 == pytest.approx(kept["energy_j"][inside].sum(), rel=0.02)


def test_rows_have_one_range_in_every_column_and_hold_what_is_drawn(run):
    figure = plots.window(run, 0.0, 30.0, ["max", "mpc"])
    for row in range(1, 6):
        axes = list(figure.select_yaxes(row=row))
        assert len({tuple(a.range) for a in axes}) == 1
        low, high = axes[0].range
        for trace in figure.select_traces(row=row):
            y = np.asarray(trace.y, dtype=float)
            assert (y[np.isfinite(y)] <= high).all()
            assert (y[np.isfinite(y)] >= low).all()
    assert len(list(figure.select_shapes(row=5))) == 2  # the bound, in both columns


def test_late_requests_are_open_marks_and_counted(tmp_path):
    first = [0.5, 1.7, 2.5]  # the bound is 0.6 s
    requests = requests_of([0.0, 1.0, 2.0], first, first, [10, 10, 10])
    run = written(tmp_path / "run", tiny(requests=requests))
    marks = plots.window(run, 0.0, 3.0).data[-1]
    assert [s.endswith("-open") for s in marks.marker.symbol] == [False, True, False]
    data = PointRuns.of(run, run.points()[0])
    (row,) = window_figures(data, (), 0.0, 3.0).to_dict("records")
    assert (row["requests"], row["late"]) == (3, 1)
    assert row["energy_j"] == pytest.approx(600.0)
    (part,) = window_figures(data, (), 1.0, 1.0).to_dict("records")
    assert (part["requests"], part["late"]) == (1, 1)
    assert part["energy_j"] == pytest.approx(200.0)


def test_every_instance_is_a_line_with_the_power_of_its_own_gpus(pool):
    data = PointRuns.of(pool, pool.points()[0])
    left, right = means_of(data.runs["max"], (0.5, 1.0), 2)
    assert (left.name, right.name) == ("left", "right")
    assert left.table["freq_effective_mhz"].tolist() == [1000.0, 1000.0]
    assert right.table["freq_effective_mhz"].tolist() == [600.0, 600.0]
    assert left.table["power_w"].tolist() == pytest.approx([100.0, 100.0])
    assert right.table["power_w"].tolist() == pytest.approx([50.0, 50.0])
    figure = plots.window(pool, 0.0, 2.0)
    lines = [t for t in figure.data if t.name == "max, right" and t.mode == "lines"]
    assert {t.line.dash for t in lines} == {"dash"}
    assert {t.line.dash for t in figure.data if t.name == "max, left"} == {"solid"}
    (row,) = window_figures(data, (), 0.5, 0.5).to_dict("records")
    assert row["energy_j"] == pytest.approx(0.5 * (4 * 100.0 + 2 * 50.0))
    assert row["power_w"] == pytest.approx((4 * 100.0 + 2 * 50.0) / 6)


def test_the_whole_run_keeps_its_tokens(run):
    arriving, *clocks = plots.whole_run(run, ["max", "mpc"]).data
    kept = run.requests_of(run.results["run_id"].iloc[0])
    width = arriving.x[1] - arriving.x[0]
    assert np.sum(arriving.y) * width == pytest.approx(kept["prompt_tokens"].sum())
    assert [t.name for t in clocks] == ["max", "mpc"]
    assert np.nanmean(clocks[0].y) > np.nanmean(clocks[1].y)


def test_a_window_is_moved_into_the_run():
    assert window_within(100.0, 90.0, 30.0) == (70.0, 100.0)
    assert window_within(100.0, -5.0, 30.0) == (0.0, 30.0)
    assert window_within(10.0, 3.0, 30.0) == (0.0, 10.0)
    for start, width in ((np.nan, 1.0), (0.0, 0.0), (0.0, -1.0), (0.0, np.inf)):
        with pytest.raises(BiscaleError, match="the width is above 0"):
            window_within(10.0, start, width)


def test_a_label_without_a_timeline_is_a_sentence(run):
    with pytest.raises(BiscaleError, match="no timeline of 'agft' was kept; there are: max, mpc"):
        plots.window(run, policies=["agft"])
    with pytest.raises(BiscaleError, match="there is no number 3"):
        plots.whole_run(run, point=3)


def test_a_live_replay_shows_its_last_seconds():
    telemetry = pd.DataFrame(
        {"time_s": [0.0, 50.0, 99.0, 100.0], "group": ["b", "a", "a", "b"]}
    ).assign(freq_mhz=900.0, power_w=300.0)
    requests = pd.DataFrame({"time_s": [80.0], "ttft_ms": [120.0], "tpot_ms": [np.nan]})
    figure = plots.live_replay(
        {"telemetry": telemetry, "requests": requests}, {"ttft": 600.0}, width_s=60.0
    )
    assert list(figure.layout.xaxis.range) == [40.0, 100.0]
    clocks = [t for t in figure.data if t.yaxis == "y"]
    assert [(t.name, list(t.x)) for t in clocks] == [("a", [50.0, 99.0]), ("b", [100.0])]
    assert len({t.line.color for t in clocks}) == len({t.line.dash for t in clocks}) == 2
    assert [list(t.y) for t in figure.data if t.mode == "markers"] == [[120.0], []]
    assert [s.y0 for s in figure.layout.shapes] == [600.0]
    empty = plots.live_replay({})
    assert not empty.data
