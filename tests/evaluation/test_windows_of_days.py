"""Comparisons on windows of several days: who tunes, what is judged, what intervals speak of."""

import math

import numpy as np
import pandas as pd
import pytest
from evaluation_synthetic import windows_frame
from scipy import stats
from test_evaluation_intervals import N_WINDOWS, workload
from week_of_days import LEVELS, days_of_traffic, write_days

from biscale_env.cli import main
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.loads.capacity import attainment_at, find_capacity
from biscale_env.evaluation.experiment.comparison import compare_scenario, run_comparison
from biscale_env.evaluation.experiment.experiments import Experiment
from biscale_env.evaluation.experiment.policy_jobs import plan
from biscale_env.evaluation.rollouts.scenarios import Scenario, resolve
from biscale_env.evaluation.rollouts.sides import early_and_late
from biscale_env.evaluation.runs.results import results_frame
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.stats.metrics import results_row
from biscale_env.evaluation.stats.paired_windows import N_RESAMPLES, PairedWindows
from biscale_env.evaluation.stats.windows import window_weights
from biscale_env.evaluation.tuning.tuning import tune_seeds
from biscale_env.traces import Trace, TraceWindow, WindowSpacing
from biscale_env.traces import window_cache as cache

DAYS = [f"2024-05-{10 + day}" for day in range(len(LEVELS))]


@pytest.fixture(scope="module")
def week(tmp_path_factory):
    return write_days(tmp_path_factory.mktemp("week") / "week.csv", days_of_traffic())


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path / "cache"))


def scenario(week, **changes):
    given = {"name": "week", "trace": str(week), "windows": "4min/1d", "load": 0.5, "seeds": 2}
    return Scenario.model_validate(given | changes)


# --- which days


@pytest.mark.parametrize("fold", ["forward", "backward"])
def test_early_days_tune_and_the_others_judge_and_the_other_way_round(week, fold):
    case = resolve(scenario(week, fold=fold), "prefill")
    sides = [case.tuning, case.judged]
    early, late = sides if fold == "forward" else sides[::-1]
    assert [w.label for w in early.windows] == DAYS[:3]
    assert [w.label for w in late.windows] == DAYS[3:]


@pytest.mark.parametrize(
    ("days", "fraction", "first"),
    [
        ([0, 1, 2, 3, 4, 5, 6], 0.5, 3),
        ([0, 0, 1, 1, 2], 0.5, 2),
        ([0, 1], 0.9, 1),
        ([3, 4, 5], 0.1, 1),
    ],
)
def test_no_day_is_on_both_sides(days, fraction, first):
    trace = Trace("t", [0.0], [1], [1], "test", duration_s=1.0)
    windows = [TraceWindow(trace, float(k), day, f"day {day}") for k, day in enumerate(days)]
    early, late = early_and_late(windows, fraction, "t")
    assert early + late == windows
    assert len(early) == first
    assert not {w.day for w in early} & {w.day for w in late}
    with pytest.raises(BiscaleError, match=r"all of one day \(day 7\)"):
        early_and_late([TraceWindow(trace, 0.0, 7, "day 7")] * 3, 0.5, "t")


def test_windows_need_a_trace_and_a_part_of_it_is_cut_too(week):
    with pytest.raises(ValueError, match="windows are cut out of a trace"):
        Scenario.model_validate({"name": "x", "windows": "1min/1d"})
    cut = resolve(scenario(week, duration_s=100.0, decode_duration_s=150.0), "decode")
    assert {t.duration_s for t in cut.judged.traces} == {100.0}
    assert {t.duration_s for t in cut.tuning.traces} == {150.0}


# --- which loads


def test_all_windows_of_a_side_run_at_one_multiple_of_their_own_rates(week):
    """So a busy day stays busy, and the load is a share of the capacity of all days together."""
    case = resolve(scenario(week, load=0.8), "prefill")
    for side, rate_rps in ((case.judged, case.rate_rps), (case.tuning, case.tune_rate_rps)):
        own = np.array([t.rate_rps for t in side.traces])
        asked = np.array([side.rate_rps(0.8, k) for k in range(side.n_windows)])
        assert np.ptp(asked / own) < 1e-9
        assert asked.mean() == pytest.approx(rate_rps)  # windows are of one length
        assert rate_rps == pytest.approx(0.8 * find_capacity(case.plant, side.traces).rate_rps)
    made = case.workloads()
    busy = LEVELS[3] / LEVELS[5]
    assert made[0].rate_rps / made[2].rate_rps == pytest.approx(busy, rel=0.25)


def test_the_capacity_of_days_is_that_of_all_their_requests_together(week):
    case = resolve(scenario(week), "prefill")
    plant, windows = case.plant, case.judged.traces
    found, target = case.capacity, case.plant.slo.attainment
    tried = (1980.0, (0, 1, 2), -1)
    assert attainment_at(plant, windows, found.rate_rps, *tried) == found.attainment >= target
    assert attainment_at(plant, windows, 1.05 * found.rate_rps, *tried) < target
    own = [find_capacity(plant, window).rate_rps / window.rate_rps for window in windows]
    multiple = found.rate_rps / np.mean([window.rate_rps for window in windows])
    assert min(own) * 0.9 <= multiple <= max(own) * 1.1
    assert find_capacity(plant, windows[:1]) == find_capacity(plant, windows[0])


def test_workloads_are_every_window_with_every_choice(week):
    case = resolve(scenario(week), "prefill")
    assert case.workload_seeds() == tuple(range(6))
    assert case.workload_seeds(1) == (0, 1, 2)
    days = [case.judged.labels(seed)["day"] for seed in case.workload_seeds()]
    assert days == DAYS[3:] * 2
    more = resolve(scenario(week, seeds=4), "prefill")
    assert more.workloads()[:6] == case.workloads()
    assert len({w.sha256 for w in more.workloads()}) == 12
    assert list(tune_seeds(case)) == list(range(6))
    assert list(tune_seeds(resolve(scenario(week, seeds=1), "prefill"))) == [0, 1, 2]
    seeds = {
        job.build: job.seeds for job in plan(case.scenario, case, [("max", "max")], False, 1)
    } | {
        job.build: job.seeds for job in plan(case.scenario, case, [("oracle", "oracle")], False, 1)
    }
    assert seeds == {"max": (0, 1, 2, 3, 4, 5), "oracle": (0, 1, 2)}


# --- a whole comparison


@pytest.fixture(scope="module")
def compared(week, tmp_path_factory):
    """A tuned comparison of two policies on three judged days of three windows of 120 s."""
    asked = compare_scenario(
        None,
        {"trace": str(week), "windows": "4min/1d", "load": 0.6, "seeds": 2},
        ["ecofreq"],
        "prefill",
        tune=True,
    )
    folder = run_comparison(asked, tmp_path_factory.mktemp("run") / "run", n_jobs=1)
    return asked, folder


def test_every_record_says_its_day(compared):
    _, folder = compared
    results = load_run(folder).results
    for _, rows in results.groupby("policy"):
        assert rows.sort_values("workload_seed")["day"].tolist() == DAYS[3:] * 2
        assert rows["one_trace"].all()
        assert sorted(set(rows["window_start_s"])) == [86400.0 * k for k in (3, 4, 5)]


def test_curves_have_the_windows_of_every_day_and_their_totals(compared):
    run = load_run(compared[1])
    names = dict(zip(run.results["run_id"], run.results["policy"], strict=True))
    for run_id, rows in run.curves.groupby("run_id"):
        first = rows.head(6)  # three days of two windows of two minutes, choices added
        assert first["day"].tolist() == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
        mine = run.results[run.results["policy"].eq(names[run_id])]
        if names[run_id] == "max":
            assert first["energy_j"].sum() == pytest.approx(mine["energy_j"].sum())
            assert first["n_counted"].sum() == mine["n_counted"].sum()
    summary = run.summary().set_index("policy")
    assert (summary["days"] == 3).all()
    assert np.isfinite(
        summary.loc["ecofreq", ["equal_ratio", "energy_ratio_ci_low"]].astype(float)
    ).all()


def test_a_rerun_does_not_stream_and_a_resumed_run_is_the_same(compared, monkeypatch):
    asked, folder = compared
    before = load_run(folder).results
    assert len(before) == 18
    monkeypatch.setattr(cache, "read_windows", lambda *_, **__: pytest.fail("streamed again"))
    for remembered in (resolve.__globals__["_windows"], resolve.__globals__["_sides"]):
        remembered.cache_clear()
    run_comparison(asked, folder, resume=True, n_jobs=1)
    pd.testing.assert_frame_equal(load_run(folder).results, before)


def test_the_report_says_what_the_load_is_of(compared):
    page = (compared[1] / "report.html").read_text()
    assert "on 3 judged days, all windows at one multiple of their own rates" in page


@pytest.mark.slow
def test_one_trace_as_one_stretch_of_time_has_no_day(week, tmp_path):
    changes = {"trace": str(week), "reading": {"stop": "4min"}, "load": 0.3, "seeds": 1}
    asked = compare_scenario(None, changes, ["max"], "prefill")
    run = load_run(run_comparison(asked, tmp_path / "run", n_jobs=1))
    assert not {"day", "window_start_s"} & set(run.results)
    assert "days" not in run.summary()


@pytest.mark.slow
def test_the_command_takes_windows_and_refuses_what_is_none(week, tmp_path, monkeypatch, capsys):
    def called(*words):
        given = ["compare", "--trace", str(week), "--phase", "prefill", "--policies", "max", *words]
        out = ["--jobs", "1", "--out", str(tmp_path / "run")]
        monkeypatch.setattr("sys.argv", ["biscale", *given, *out])
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0, capsys.readouterr()
        return 0, capsys.readouterr()

    code, told = called("--windows", "4min/1d", "--seeds", "1", "--load", "0.3")
    assert code == 0, told.err
    assert "on 3 judged days" in " ".join(told.out.split())
    assert load_run(tmp_path / "run").results["day"].tolist()[:3] == DAYS[3:]
    for text, words in (
        ("4min", "LENGTH/EVERY"),
        ("2d/1d", "that far apart"),
        ("20d/20d", "not one whole window"),
    ):
        code, told = called("--windows", text)
        assert (code, words in told.err, told.err.count("\n")) == (2, True, 1), told.err


def test_an_experiment_cuts_its_traces_and_only_them():
    made = Experiment(
        name="days", workloads=("synthetic", "azure-conv"), loads=(0.5,), windows="30min/1d"
    )
    points = {point.workload: point for point in made.scenarios()}
    assert points["azure-conv"].windows == WindowSpacing(length_s=1800.0, every_s=86400.0)
    assert points["synthetic"].windows is None


# --- what intervals speak of


def paired(levels, per_day=1, with_days=True, copies=((0.0, 1.0),)):
    """Max clock and a rule on days (of ``per_day`` stretches) whose energy ratios are given."""
    records = []
    for k, level in enumerate(np.repeat(levels, per_day)):
        labels = {"one_trace": True}
        if with_days:
            labels |= {"day": f"2024-05-{10 + k // per_day}", "window_start_s": 600.0 * k}
        for policy, energy_j in (("max", 100.0), ("rule", 100.0 * level)):
            records.append(
                workload(
                    np.zeros(N_WINDOWS), k, policy, energy_j, labels=dict(labels), copies=copies
                )
            )
    frame = results_frame([results_row(record) for record in records])
    return PairedWindows(frame, windows_frame(records)), frame[frame["policy"].eq("rule")]


def test_the_interval_of_days_is_students_over_days():
    levels = np.array([0.6, 0.7, 0.65, 0.8, 0.72])
    point, rule = paired(levels)
    interval = point.energy_ratio(rule)
    half = stats.t.ppf(0.975, 4) * levels.std(ddof=1) / math.sqrt(5)
    assert interval.estimate == pytest.approx(levels.mean())
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.1)


def test_two_windows_of_a_day_are_two_stretches_and_one_day():
    levels = np.array([0.6, 0.7, 0.65, 0.8, 0.72])
    once, twice = paired(levels), paired(levels, per_day=2)
    assert twice[0].days.size == 2 * once[0].days.size
    assert len(set(twice[0].days)) == 5
    whole = twice[0].weights.reshape(N_RESAMPLES, 5, 2 * N_WINDOWS)
    assert (np.ptp(whole, axis=2) == 0).all()
    widths = [p.energy_ratio(rule).high - p.energy_ratio(rule).low for p, rule in (once, twice)]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)


def test_the_order_of_runs_does_not_matter():
    levels = [0.6, 0.7, 0.65, 0.8, 0.72]
    records = []
    for k in (4, 0, 3, 1, 2, 9, 5, 8, 6, 7):  # window k of day k // 2
        labels = {"one_trace": True, "day": f"d{k // 2}", "window_start_s": 100.0 * k}
        for policy, level in (("max", 1.0), ("rule", levels[k // 2])):
            energy_j = 100.0 * level * (1 + 0.01 * k)
            records.append(workload(np.zeros(3), k, policy, energy_j, labels=labels))
    rows = [results_row(record) for record in records]
    frame = pd.DataFrame(rows)
    point = PairedWindows(frame, windows_frame(records))
    runs = frame[frame["policy"].eq("max")]
    within = [point._sum({run: 1.0}, "energy_j").nonzero()[0][0] for run in runs["run_id"]]
    by_day = dict(zip(runs["workload_seed"], within, strict=True))
    assert all(by_day[2 * day] + 3 == by_day[2 * day + 1] for day in range(5))


@pytest.mark.slow
@pytest.mark.parametrize("n_copies", [1, 4])
def test_coverage_where_days_differ(n_copies):
    """Days drawn from a population: an interval over days is Student's, and holds its mean at 95 %.

    Several copies of a day's requests are of that day alone, so they make it no wider. The same
    runs without their days are subsamples of one stretch of time, and do not hold it.
    """
    rng = np.random.default_rng(3)
    copies = tuple((300.0 * k, 1 / n_copies) for k in range(n_copies))
    hits, widths = {True: 0, False: 0}, []
    for _ in range(60):
        levels = 0.7 + 0.1 * rng.standard_normal(5)
        for with_days in hits:
            point, rule = paired(levels, with_days=with_days, copies=copies)
            interval = point.energy_ratio(rule)
            hits[with_days] += interval.low <= 0.7 <= interval.high
            if with_days:
                student = 2 * stats.t.ppf(0.975, 4) * levels.std(ddof=1) / math.sqrt(5)
                widths.append((interval.high - interval.low) / student)
    assert hits[True] >= 51  # fewer of 60: a chance of 0.2 % at 95 %
    assert np.mean(widths) == pytest.approx(1.0, abs=0.1)
    if n_copies == 1:
        assert hits[False] < 10


def test_few_days_of_several_copies_keep_the_load_of_each():
    """Two days are strata: that one minute has more load than another moves no interval."""
    rng = np.random.default_rng(4)
    load = rng.uniform(50, 150, 30)
    days = np.repeat(["a", "b"], 15)
    weights = window_weights(30, rng, 500, days=days, copies=4.0, load=load, keep_load=True)
    for day in ("a", "b"):
        mine = days == day
        np.testing.assert_allclose(weights[:, mine] @ load[mine], load[mine].sum())
    free = window_weights(30, rng, 500, days=days, copies=4.0, load=load)
    assert np.ptp(free @ load) > 10.0
