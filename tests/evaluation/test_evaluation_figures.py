"""The numbers behind each figure, and the figures made from them."""

import numpy as np
import pandas as pd
import pytest
from evaluation_synthetic import POLICIES, plausible, requests_of, timeline_of, tiny
from hypothesis import given
from hypothesis import strategies as st

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.report.drawing import (
    figdata,
    figure_style,
    figures,
    figures_energy,
    figures_time,
    palette,
)
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.evaluation.stats.metrics import energy_between


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small comparison: both phases, a variant of mpc, timelines of the first workload only."""
    path = tmp_path_factory.mktemp("figures") / "run"
    with RunDirectory(path, {"gpu": {"power_cap_w": 700.0}}) as directory:
        for phase in ("prefill", "decode"):
            for policy in POLICIES:
                for seed in (0, 1):
                    directory.add(
                        plausible(phase, policy, seed, duration_s=480.0), keep_timeline=seed == 0
                    )
        directory.add(plausible("prefill", "mpc", 0, duration_s=480.0, variant="margin=0.1"))
    return load_run(path)


def test_nines_is_monotone_with_even_steps_and_a_finite_end():
    values = figdata.nines([0.0, 0.9, 0.99, 0.999, 1.0])
    assert values[0] == pytest.approx(0.0)
    assert np.isfinite(values).all()
    steps = np.diff(values)
    assert (steps > 0).all()
    assert steps[1] == pytest.approx(steps[0], rel=0.05)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=300))
def test_tail_cdf_is_the_empirical_distribution_at_its_points(values):
    x, share = figdata.tail_cdf(values, points=50)
    for at, expected in zip(x, share, strict=True):
        assert np.mean(np.asarray(values) <= at) >= expected - 1e-12
        assert np.mean(np.asarray(values) < at) < expected + 1e-12
    assert (x[-1], share[-1]) == (max(values), 1.0)
    assert (np.diff(share) > 0).all()


def test_tail_cdf_keeps_the_p99_of_many_requests():
    values = np.random.default_rng(0).gamma(3.0, 0.1, 50_000)
    x, share = figdata.tail_cdf(values)
    assert x.size <= 241
    assert np.interp(0.99, share, x) == pytest.approx(np.quantile(values, 0.99), rel=2e-3)
    assert [part.size for part in figdata.tail_cdf([])] == [0, 0]


def test_window_holds_the_burst_and_lies_within_the_run():
    time_s = np.concatenate([np.arange(0, 600, 2.0), np.linspace(400, 408, 200)])
    start, end = figdata.busiest_window(time_s, np.ones(time_s.size), 600.0)
    assert end - start == pytest.approx(60)
    assert start < 400 < 408 < end
    late = figdata.busiest_window([595.0], [1.0], 600.0)
    assert late == (540.0, 600.0)
    assert figdata.busiest_window([1.0], [1.0], 20.0) == (0.0, 20.0)


def test_binned_power_holds_all_the_energy():
    record = plausible("prefill", "mpc", 0, duration_s=60.0)
    binned = figdata.binned_timeline(record.timeline, 0.0, 70.0, 700, 4)
    assert binned["power_w"].sum() * 0.1 * 4 == pytest.approx(record.totals["energy_j"])
    part = figdata.binned_timeline(record.timeline, 10.0, 20.0, 100, 4)
    expected = energy_between(record.timeline, 10.0, 20.0)
    assert part["power_w"].sum() * 0.1 * 4 == pytest.approx(
        expected, rel=2e-3
    )  # that one spreads busy and idle alike


def test_binned_means_by_hand():
    timeline = timeline_of([0.0, 2.0], [1.0, 2.0], [1.0, 0.0], [40.0, 160.0], n_gpus=1)
    timeline["power_w"] = np.array([30.0, 80.0])
    timeline["freq_effective_mhz"] = np.array([1000.0, 1800.0])
    timeline["queue_requests"] = np.array([1.0, 3.0])
    binned = figdata.binned_timeline(timeline, 0.0, 6.0, 6, 1)
    assert binned["power_w"].to_numpy() == pytest.approx([30, 10, 80, 80, 0, 0])
    expected = [1000, 1000, 1800, 1800, np.nan, np.nan]
    assert binned["freq_effective_mhz"].to_numpy() == pytest.approx(expected, nan_ok=True)
    wide = figdata.binned_timeline(timeline, 1.0, 3.0, 1, 1)
    assert wide["queue_requests"].iloc[0] == pytest.approx(1.5)  # nobody waits in the idle second
    assert wide["power_w"].iloc[0] == pytest.approx((10 + 80) / 2)


def test_overlapping_instances_have_no_single_clock():
    assert (
        figdata.binned_timeline(timeline_of([0.0, 0.5], [1.0, 1.0], [0, 0], [1, 1]), 0, 2, 4, 1)
        is None
    )


def test_thinning_keeps_every_violation():
    time = np.arange(5000.0)
    late = np.zeros(5000, dtype=bool)
    late[[3, 1234, 4999]] = True
    x, _ = figdata.thin(time, time, late)
    assert {3.0, 1234.0, 4999.0} <= set(x)
    assert x.size <= 703
    assert figdata.thin(time[:10], time[:10], late[:10])[0].size == 10


def test_labels_do_not_cover_one_another():
    x, y, names = np.array([0.5, 0.5, 0.52]), np.array([0.5, 0.53, 0.5]), [10, 10, 10]
    places = figdata.label_positions(x, y, names, 480.0, 340.0)
    boxes = [figdata._box(x[i], y[i], places[i], names[i], 480.0, 340.0) for i in range(3)]
    assert sum(figdata._overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i]) == 0
    assert figdata.label_positions(np.array([0.99]), np.array([0.99]), [12], 480.0, 340.0) == [
        "bottom left"
    ]


def test_markers_on_one_another_share_a_label():
    x, y = np.array([0.5, 0.5, 0.51, 0.9]), np.array([0.5, 0.51, 0.5, 0.5])
    assert figdata.heaps(x, y, 480.0, 340.0).tolist() == [0, 0, 0, 3]
    summary = pd.DataFrame(
        {
            "label": list("abcd"),
            "attainment": [0.99, 0.99, 0.99, 0.9],
            "energy_ratio": [0.8, 0.8, 0.8, 0.5],
        }
    )
    summary = summary.assign(
        attainment_ci_low=summary.attainment, attainment_ci_high=summary.attainment
    )
    placed = figures_energy._label_places(summary, "energy_ratio", [0.0, 3.0], [0.0, 1.0])
    assert {label: text for label, (_, text) in placed.items()} == {
        "a": "a, b, c",
        "b": "",
        "c": "",
        "d": "d",
    }


def test_energy_figure_shows_the_summary(run):
    fig = figures.figure(run, "energy", 0)
    summary = figure_style.at_point(run.summary(), run.points()[0]).set_index("label")
    drawn = {}
    for trace in fig.data:
        for label, x, y in zip(trace.hovertext, trace.x, trace.y, strict=True):
            drawn[label] = (x, y)
    assert set(drawn) == set(summary.index) == {*POLICIES, "mpc (margin=0.1)"}
    for label, (x, y) in drawn.items():
        assert x == pytest.approx(figdata.nines(summary.loc[label, "attainment"]))
        assert y == pytest.approx(summary.loc[label, "energy_ratio"])
    mpc = next(trace for trace in fig.data if trace.name == "mpc")
    assert sorted(mpc.text) == ["", "mpc"]  # variants speak only when pointed at
    named = list(mpc.text).index("mpc")
    width = mpc.error_y.array[named] + mpc.error_y.arrayminus[named]
    assert width == pytest.approx(
        summary.loc["mpc", "energy_ratio_ci_high"] - summary.loc["mpc", "energy_ratio_ci_low"]
    )
    line = fig.layout.shapes[1]
    assert line.x0 == line.x1 == pytest.approx(figdata.nines(0.99))


def test_names_of_many_policies_stand_in_a_legend_not_on_one_another(run):
    few = run.summary()[run.summary()["phase"] == "prefill"]
    many = pd.concat(
        [few.assign(policy=few["policy"] + str(k), label=few["label"] + str(k)) for k in range(3)]
    )
    assert many["policy"].nunique() > figures_energy.MOST_LABELS >= few["policy"].nunique()
    plain, crowded = (figures_energy.energy_attainment(rows) for rows in (few, many))
    assert not plain.layout.showlegend
    assert crowded.layout.showlegend
    assert any(text for trace in plain.data for text in trace.text)
    assert not any(text for trace in crowded.data for text in trace.text)
    assert {trace.name for trace in crowded.data} == set(many["policy"])
    spread = [trace.error_x.array for trace in crowded.data]
    assert any(np.max(widths) > 0 for widths in spread)  # intervals stay


@pytest.mark.parametrize(("metric", "number"), [("ttft", 0), ("tpot", 1)])
def test_cdf_pools_the_workloads_and_marks_the_bound(run, metric, number):
    point = run.points()[number]
    fig = figures.figure(run, metric, point)
    assert fig.data[0].name == "max"
    rows = figure_style.at_point(run.results, point)
    for trace in fig.data:
        mine = rows[(rows["policy"] == trace.name) & (rows["variant"] == "")]
        pooled = np.concatenate([run.latencies(r, metric)[0] for r in mine["run_id"]])
        assert max(trace.x) == pytest.approx(1e3 * pooled.max(), rel=1e-5)
        at_99 = np.interp(figdata.nines(0.99), trace.y, trace.x)
        assert at_99 == pytest.approx(1e3 * np.quantile(pooled, 0.99), rel=0.02)
    corner = fig.layout.shapes[0]
    assert corner.x0 == pytest.approx(1e3 * rows[f"slo_{metric}_s"].iloc[0])
    assert corner.y1 == pytest.approx(figdata.nines(0.99))


def test_cdf_of_the_other_metric_is_refused(run):
    with pytest.raises(BiscaleError, match="no TPOT"):
        figures.figure(run, "tpot", 0)
    with pytest.raises(BiscaleError, match="unknown figure 'pie'"):
        figures.figure(run, "pie", 0)


def test_clock_strips_show_every_policy_in_reading_order(run):
    fig = figures.figure(run, "clocks", 0)
    strips, arrivals = fig.data
    assert strips.y[0] == "max"
    assert strips.y[-1] == "oracle"
    assert set(strips.y) == set(POLICIES)
    assert np.asarray(strips.z).shape == (len(POLICIES), figures_time.STRIP_BINS)
    static = list(strips.y).index("static-best")
    assert np.asarray(strips.z)[static] == pytest.approx(1410.0)
    record = plausible("prefill", "max", 0, duration_s=480.0)
    low, high = fig.layout.xaxis.range
    inside = (record.requests["arrival_s"] >= low) & (record.requests["arrival_s"] < high)
    assert sum(arrivals.y[:-1]) == pytest.approx(
        record.requests["prompt_tokens"][inside].sum(), rel=0.02
    )


@pytest.mark.parametrize("number", [0, 1])
def test_timeline_members_the_clock_and_the_energy_of_the_window(run, number):
    fig = figures.figure(run, "timeline", number)
    start, end = fig.layout.xaxis.range
    assert end - start == pytest.approx(60)
    phase = run.points()[number]["phase"]
    record = plausible(phase, "max", 0, duration_s=480.0)
    power = next(t for t in fig.data if t.name == "max" and t.yaxis == "y2")
    expected = energy_between(record.timeline, start, end)
    assert np.sum(power.y) * 60 / figures_time.TIMELINE_BINS * 4 == pytest.approx(
        expected, rel=0.01
    )
    shown = {t.name for t in fig.data if t.visible is True}
    assert "max" in shown
    assert "oracle" not in shown
    assert len(shown) == 2
    assert {t.name for t in fig.data} == set(POLICIES)
    limits = {shape.y0 for shape in fig.layout.shapes}
    assert 700.0 in limits
    assert (600.0 if phase == "prefill" else 100.0) in limits


def test_timeline_needs_a_kept_timeline(tmp_path):
    with RunDirectory(tmp_path, {}) as directory:
        directory.add(tiny(), keep_timeline=False)
    with pytest.raises(BiscaleError, match="no timeline was kept"):
        figures.figure(load_run(tmp_path), "timeline")


def test_energy_figure_without_max_clock_is_in_joules(tmp_path):
    with RunDirectory(tmp_path, {}) as directory:
        directory.add(tiny(policy="mpc", requests=requests_of([0.0], [0.1], [0.1], [10])))
    fig = figures.figure(load_run(tmp_path), "energy")
    assert "J per output token" in fig.layout.yaxis.title.text
    assert fig.data[0].y[0] == pytest.approx(60.0)


def test_styles_are_stable_and_never_shared():
    names = [
        *POLICIES,
        "mpc-fast",
        "ecofreq",
        "throttllem",
        "greenllm",
        "dynamollm",
        "agft",
        "random",
        "ppo",
        "sac",
        "td3",
    ]
    look = palette.styles(names)
    assert palette.styles(names[::-1]) == look
    drawn = {(style.color, style.dash) for style in look.values()}
    assert len(drawn) == len(names)
    assert look["mpc"].color == look["mpc-fast"].color
    assert palette.styles(["mpc"])["mpc"] == look["mpc"]
    assert palette.family("mpcx") == "mpcx"


def _luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_stand_out_on_their_ground():
    names = [*palette._FAMILIES, "ppo", "sac", "td3", "bc"]
    for style in palette.styles(names).values():
        light = (1.0 + 0.05) / (_luminance(style.color) + 0.05)
        dark = (_luminance(style.dark) + 0.05) / (_luminance("#12151b") + 0.05)
        assert light >= 2.5, style
        assert dark >= 5, style


def tuning_rows(policy, settings, chosen):
    point = {
        "scenario": "toy",
        "slo": "biscale",
        "load": 0.75,
        "phase": "prefill",
        "ensemble_member": -1,
    }
    found = {"target": 0.992, "reached": True, "reference_j": 1000.0}
    return [
        point
        | found
        | {
            "policy": policy,
            "setting": f"margin={k}",
            "energy_j": e,
            "attainment": a,
            "chosen": k == chosen,
        }
        for k, (e, a) in enumerate(settings)
    ]


def test_tuning_curve_is_the_frontier_relative_to_max_clock(tmp_path):
    rows = tuning_rows(
        "mpc", [(700.0, 0.985), (760.0, 0.991), (755.0, 0.993), (800.0, 0.993), (900.0, 0.995)], 2
    )
    rows += tuning_rows("static-best", [(800.0, 0.98), (1000.0, 0.996)], 1)
    with RunDirectory(tmp_path / "run", {}) as directory:
        for policy in ("max", "mpc", "static-best"):
            directory.add(tiny(policy=policy, load=0.75))
    pd.DataFrame(rows).to_csv(tmp_path / "run" / "tuning.csv", index=False)
    run = load_run(tmp_path / "run")
    drawn = figures.figure(run, "tuning", run.points()[0])
    curve, mark = (t for t in drawn.data if t.name == "mpc")
    assert np.asarray(curve.y).tolist() == pytest.approx(
        [0.7, 0.755, 0.9]
    )  # beaten settings are left out
    np.testing.assert_allclose(np.asarray(curve.customdata), [98.5, 99.3, 99.5], rtol=1e-6)
    assert (list(mark.y), list(mark.text)) == ([pytest.approx(0.755)], ["margin=2"])
    assert "99.20 %" in drawn.layout.annotations[0].text
    with pytest.raises(BiscaleError, match="no controller was tuned"):
        figures.figure(run, "tuning", dict(run.points()[0]) | {"load": 0.5})


def test_the_busiest_window_itself_with_a_core_as_wide():
    times = np.concatenate([np.arange(0.0, 100.0, 5.0), np.linspace(40.1, 41.0, 10)])
    weight = np.where(times % 5 == 0, 100, 1000)
    start, end = figdata.busiest_window(times, weight, 100.0, width_s=2.0, core_s=2.0)
    assert 39.0 <= start <= 40.1
    assert end - start == 2.0
