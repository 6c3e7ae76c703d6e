"""The headline experiment: configuration, systems and their tuning, tables by hand, the whole
command on a small case.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from cluster_support import random_trace
from typer.testing import CliRunner

from biscale_env.cli import build
from biscale_env.config import configs_dir
from biscale_env.config.cluster_layout import load_placement
from biscale_env.config.loader import list_names
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_settings import ClusterSettings
from biscale_env.envs.cluster.stream import daily_windows, envelope_factors
from biscale_env.reproduce import systems
from biscale_env.reproduce.day import run_day
from biscale_env.reproduce.paper import PaperExperiment, load_paper, member_indices
from biscale_env.reproduce.paper_tables import (
    headline,
    percent,
    span,
    summarise,
    tier2_gain,
    with_ratios,
)
from biscale_env.reproduce.paper_verdict import gap, verdict
from biscale_env.reproduce.systems import SYSTEMS, Bench, TunedSystem, planner_of, run_system, tune
from controllers.placement.capacity_table import TableRequest, capacity_table

SETTINGS = ClusterSettings.of(actuation_delay_s=0.0)
WORK = [
    random_trace(2000, rate_rps=16.0, seed=s, prompt_max=400, output_max=500) for s in (11, 12, 13)
]


@pytest.fixture(scope="module")
def bench():
    table = capacity_table(
        TableRequest(SETTINGS, (810.0, 1200.0, 1605.0, 1980.0)), WORK[0], use_cache=False
    )
    return Bench(SETTINGS, table, 16.0, 60.0)


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_every_system_serves_the_slo_and_none_beats_it_by_missing(name, bench):
    system = SYSTEMS[name]
    tuned = tune(system, bench, WORK[:1])
    assert tuned.met
    run, windows = run_system(system, tuned, bench, WORK[1])
    assert run.meets_slo
    assert len(run.requests) == len(WORK[1])
    assert sum(w.arrived for w in windows) == len(WORK[1])
    reference, _ = run_system(SYSTEMS["distserve"], TunedSystem(), bench, WORK[1])
    if name not in ("distserve", "colocated"):
        assert run.energy.total_j < reference.energy.total_j


def test_tuning_takes_what_meets_the_slo(bench):
    """A tight bound needs a margin or headroom that a wide one does not."""
    tight = replace(bench, settings=SETTINGS.changed(slo="mlperf-interactive"))
    wide = tune(SYSTEMS["tier2-only"], bench, WORK[:1])
    narrow = tune(SYSTEMS["tier2-only"], tight, WORK[:1])
    assert (wide.prefill_margin, wide.decode_margin) <= (
        narrow.prefill_margin,
        narrow.decode_margin,
    )
    clocks = [tune(SYSTEMS["static-best"], b, WORK[:1]).freq_mhz for b in (bench, tight)]
    assert clocks[0]["prefill"] <= clocks[1]["prefill"]


@pytest.fixture
def pretend(monkeypatch):
    """Tuning on a rule for what meets the SLO instead of runs."""

    def install(rule):
        monkeypatch.setattr(systems, "_runs", lambda system, tuned, bench, workloads: tuned)
        monkeypatch.setattr(systems, "meets", rule)

    return install


def test_tuning_takes_the_smallest_that_meets_the_slo(pretend, bench):
    need = {"prefill": 0.2, "decode": 0.4}

    pretend(lambda tuned, phase: tuned.alpha >= 0.3)
    assert tune(SYSTEMS["placeonly"], bench, WORK[:1]) == TunedSystem(alpha=0.3)
    pretend(lambda tuned, phase: getattr(tuned, f"{phase}_margin") >= need[phase])
    found = tune(SYSTEMS["tier2-only"], bench, WORK[:1])
    assert (found.prefill_margin, found.decode_margin, found.met) == (0.2, 0.4, True)


def test_where_nothing_meets_the_slo_the_safest_is_taken_and_said(pretend, bench):
    pretend(lambda tuned, phase: False)
    found = tune(SYSTEMS["placeonly"], bench, WORK[:1])
    assert (found.alpha, found.met) == (max(systems.ALPHAS), False)
    found = tune(SYSTEMS["ecofreq"], bench, WORK[:1])
    assert (found.prefill_margin, found.decode_margin, found.met) == (0.6, 0.6, False)


def test_a_fixed_head_room_is_not_tuned(bench):
    assert tune(SYSTEMS["placeonly"], bench, WORK[:1]).alpha < 0.6
    fixed = replace(bench, alpha=0.6)
    assert (
        tune(SYSTEMS["placeonly"], fixed, WORK[:1]).alpha
        == tune(SYSTEMS["biscale"], fixed, WORK[:1]).alpha
        == 0.6
    )


def test_planner_follows_the_load_and_survives_the_impossible(bench):
    plan = planner_of(SYSTEMS["biscale"], TunedSystem(alpha=0.1), bench)
    quiet, busy = random_trace(300, rate_rps=2.0), random_trace(3000, rate_rps=40.0)
    assert plan(1, quiet).gpus <= plan(2, busy).gpus
    impossible = random_trace(3000, rate_rps=2000.0)
    assert plan(3, impossible) == planner_of(SYSTEMS["distserve"], TunedSystem(), bench)(0, None)
    before = plan(4, quiet)
    empty = quiet.window(quiet.duration_s - 1e-6, quiet.duration_s - 1e-7)
    assert len(empty) == 0
    assert plan(5, empty) == before


def same_arrivals(trace, prompt_tokens, output_tokens):
    """Its arrivals, every request of the same lengths."""
    lengths = [np.full(len(trace), n, dtype=np.int32) for n in (prompt_tokens, output_tokens)]
    return replace(trace, prompt_tokens=lengths[0], output_tokens=lengths[1])


def test_a_table_of_the_window_sees_what_one_of_the_workload_cannot(bench):
    """The load is the same in both windows, the prompts are eight times longer in one."""
    window = random_trace(2000, rate_rps=8.0)
    short, long = same_arrivals(window, 200, 60), same_arrivals(window, 1600, 60)
    kept = planner_of(SYSTEMS["placeonly"], TunedSystem(), bench)
    assert kept(1, short) == kept(2, long)
    own = planner_of(SYSTEMS["placeonly"], TunedSystem(), replace(bench, per_window=True))
    before, after = (
        sum(i.tp * i.freq_mhz for i in own(k, w).instances("prefill"))
        for k, w in ((1, short), (2, long))
    )
    assert after > 1.5 * before


def test_a_window_is_measured_once_and_a_scarce_one_not_at_all(bench, monkeypatch):
    measured = []

    def count(request, trace):
        measured.append((request.freqs_mhz, trace.sha256))
        return bench.table

    monkeypatch.setattr(systems, "capacity_table", count)
    every = replace(bench, per_window=True, measured={})
    first, second = random_trace(300, rate_rps=8.0), random_trace(400, rate_rps=8.0, seed=2)
    for name in ("placeonly", "biscale"):
        for alpha in (0.1, 0.3):
            plan = planner_of(SYSTEMS[name], TunedSystem(alpha=alpha), every)
            for k, window in enumerate((None, first, second, first)):
                plan(k, window)
    clocks = (810.0, 1200.0, 1605.0, 1980.0)
    assert measured == [(clocks, first.sha256), (clocks, second.sha256)]
    assert every.table_after(random_trace(99, rate_rps=8.0)) is bench.table
    assert len(measured) == 2


def rows(values):
    """Rows of one point: {(system, member, seed): (prefill, decode)} in J per token."""
    made = []
    for (system, member, seed), (prefill, decode) in values.items():
        made.append(
            {
                "point": "A-1",
                "variation": "",
                "member": member,
                "seed": seed,
                "system": system,
                "workload": "A",
                "dtype": "bf16",
                "load": None,
                "lengths": "sharegpt-pd",
                "arrivals": "",
                "rate_rps": 1.0,
                "placement": "x",
                "alpha": 0.1,
                "gpus_mean": 8.0,
                "prefill_j_per_token": prefill,
                "decode_j_per_token": decode,
                "total_j_per_token": prefill + decode + 0.5,
                "spare_j_per_token": 0.5,
                "prefill_busy_j_per_token": 0.9 * prefill,
                "decode_busy_j_per_token": decode,
                "requests_per_prefill_batch": 2.0,
                "ttft_p99_s": 0.1,
                "tpot_p99_s": 0.01,
                "attainment_ttft": 0.995,
                "attainment_tpot": 0.995 if system != "bad" else 0.98,
                "requests": 100.0,
            }
        )
    return pd.DataFrame(made)


def test_tables_by_hand():
    frame = rows(
        {
            ("distserve", -1, 0): (1.0, 4.0),
            ("distserve", -1, 1): (2.0, 4.0),
            ("distserve", 3, 0): (1.0, 1.0),
            ("placeonly", -1, 0): (0.8, 2.0),
            ("placeonly", -1, 1): (1.6, 2.0),
            ("placeonly", 3, 0): (0.9, 0.7),
            ("biscale", -1, 0): (0.6, 2.0),
            ("biscale", -1, 1): (1.4, 2.4),
            ("biscale", 3, 0): (0.5, 0.5),
            ("bad", -1, 0): (0.1, 0.1),
        }
    )
    summary = summarise(with_ratios(frame)).set_index("system")
    assert summary.loc["biscale", "prefill"] == pytest.approx((0.6 + 0.7) / 2)
    assert summary.loc["biscale", "decode"] == pytest.approx((0.5 + 0.6) / 2)
    assert (
        summary.loc["biscale", "prefill_member_low"]
        == summary.loc["biscale", "prefill_member_high"]
        == 0.5
    )
    assert summary.loc["biscale", "feasible"]
    assert not summary.loc["bad", "feasible"]
    half = 12.706 * 0.05  # two independently generated workloads, 0.6 and 0.7
    assert summary.loc["biscale", "prefill_low"] == pytest.approx(0.65 - half, rel=1e-3)
    assert summary.loc["biscale", "prefill_high"] == pytest.approx(0.65 + half, rel=1e-3)
    of_b = summarise(with_ratios(frame.assign(workload="B"))).set_index("system")
    assert of_b.loc["biscale", "prefill"] == summary.loc["biscale", "prefill"]
    assert np.isnan(of_b.loc["biscale", "prefill_low"])  # subsamples are no further evidence
    gains = tier2_gain(with_ratios(frame), summary.reset_index())
    assert gains["prefill"][0] == pytest.approx(100 * (0.65 / 0.8 - 1))
    lines = headline(summary.reset_index())
    assert lines[0] == ["A prefill", "PlaceOnly", "−20..−31 %", "−20 % [−10 %]", "–", "–", "–"]
    assert lines[1][3] == "−35 % [−50 %]"


def test_points_of_generated_arrivals_have_a_column_and_a_verdict_of_their_own():
    of_trace = b67({"": (0.7, 0.6)})
    generated = b67({"": (0.65, 0.55)}, point="B-67-code").assign(arrivals="azure-code-2024-mean")
    own = b67({"": (0.9, 0.8)}, point="B-67-own").assign(lengths="own")
    frame = with_ratios(pd.concat([of_trace, generated, own]))
    summary = summarise(frame)
    cells = {(line[0], line[1]): line[3:] for line in headline(summary)}
    assert cells["B 67 % prefill", "BiScale"] == ["−30 %", "–", "−35 %", "−10 %"]
    assert cells["B 67 % decode", "BiScale"] == ["−40 %", "–", "−45 %", "−20 %"]
    said = verdict(summary, frame)
    assert "bf16, Azure 2024 code-like arrivals: −45 % overlaps" in said
    assert "bf16: −40 % saves 4.0 points less" in said
    assert "−20 %" not in said  # the trace's own lengths are not the paper's


def b67(cases, system="biscale", point="B-67"):
    """Rows of operating point B-67: {variation: (prefill, decode)} as ratios to DistServe."""
    both = []
    for variation, (prefill, decode) in cases.items():
        frame = rows({("distserve", -1, 0): (1.0, 1.0), (system, -1, 0): (prefill, decode)})
        both.append(frame.assign(point=point, variation=variation, workload="B", load=0.67))
    return pd.concat(both)


def test_verdict_names_the_assumption_that_closes_a_gap():
    """Decode saves 40 % where the paper says 44 to 48.

    Of two changed assumptions one reaches the range.
    """
    frame = b67({"": (0.7, 0.6), "batch of 9": (0.7, 0.55), "delay 1 s": (0.7, 0.61)})
    said = verdict(summarise(with_ratios(frame)), with_ratios(frame)).splitlines()
    prefill, decode = (
        next(line for line in said if f"67 %, {stage}" in line) for stage in ("prefill", "decode")
    )
    assert "−30 % overlaps" in prefill
    assert "saves 4.0 points less" in decode
    assert "changing one assumption closes it: batch of 9 (−45 %)" in decode
    assert "the others that were run (1) do not (−39 %)" in decode
    far = b67({"": (0.7, 0.6), "batch of 9": (0.7, 0.55), "batch of 99": (0.7, 0.3)})
    said = verdict(summarise(with_ratios(far)), with_ratios(far))
    assert "closes it: batch of 9 (−45 %); changing one goes past the range: batch of 99" in said
    nothing = b67({"": (0.7, 0.6), "delay 1 s": (0.7, 0.61)})
    said = verdict(summarise(with_ratios(nothing)), with_ratios(nothing))
    assert "of the changed assumptions that were run there (1) none closes it (−39 %)" in said


def test_a_system_that_misses_the_slo_is_no_saving():
    """All points missed: it does not compare; one of two: the other is compared."""
    missed = b67({"": (0.5, 0.5)}, "bad").replace({"system": {"bad": "biscale"}})
    said = verdict(summarise(with_ratios(missed)), with_ratios(missed))
    assert "bf16: misses the SLO at every point, so it does not compare (−50 %)." in said
    both = pd.concat([missed, b67({"": (0.7, 0.55)}, point="B-67-two")])
    said = verdict(summarise(with_ratios(both)), with_ratios(both))
    assert "prefill, BiScale (tier 1 + 2), bf16: −30 % overlaps" in said
    assert said.count("It misses the SLO at 1 of 2 points.") == 2


@pytest.mark.parametrize(("decode", "carries"), [(0.8, True), (0.45, False)])
def test_whether_the_load_carries_decode_is_read_from_the_rows(decode, carries):
    of_rates = [
        rows({("distserve", -1, 0): (1.0, 1.0), ("biscale", -1, 0): (0.9, ratio)}).assign(
            point=f"A-{rate:g}", rate_rps=rate
        )
        for rate, ratio in ((10.0, 0.4), (20.0, 0.3), (30.0, decode))
    ]
    frame = pd.concat(of_rates)
    said = verdict(summarise(with_ratios(frame)), with_ratios(frame))
    assert ("capacity carries the decode figure" in said) is carries
    assert ("capacity does not carry the decode figure" in said) is not carries
    assert "−60 % at 10 requests/s" in said
    assert f"(bf16, lowest and highest −{round(100 * (1 - decode))}..−70 %)" in said or (
        "lowest and highest −55..−70 %" in said
    )


def test_verdict_on_missed_rates_rules_and_head_room():
    slow = [
        rows({("distserve", -1, 0): (1.0, 1.0), ("biscale", -1, 0): (0.9, 0.9)}).assign(
            point=f"A-9{d}", rate_rps=9.0, dtype=d, attainment_tpot=met
        )
        for d, met in (("bf16", 0.5), ("fp8", 1.0))
    ]
    frame = pd.concat(slow)
    said = verdict(summarise(with_ratios(frame)), with_ratios(frame))
    assert (
        "9 requests/s are beyond the cluster in bf16, even at the highest clock; in fp8 they are "
        "served" in said
    )
    mpc, eco = b67({"": (0.75, 0.6)}, "tier2-only"), b67({"": (0.65, 0.6)}, "ecofreq").iloc[1:]
    eco = eco.assign(requests_per_prefill_batch=5.0)
    frame = pd.concat([mpc, eco])
    said = verdict(summarise(with_ratios(frame)), with_ratios(frame))
    assert "at B-67 MPC −25 % (2.0), EcoFreq −35 % (5.0)" in said
    same = pd.concat([mpc, eco.assign(requests_per_prefill_batch=2.0)])
    assert "(2.0)" not in verdict(
        summarise(with_ratios(same)), with_ratios(same)
    )  # batches do not explain it: nothing is said
    free, fixed = (pd.concat([b67({v: p}), b67({v: q}, "placeonly").iloc[1:]]) for v, p, q in (
        ("", (0.7, 0.6), (0.7, 0.6)), ("headroom fixed at 30 %", (0.7, 0.6), (0.875, 0.8))
    ))  # fmt: skip
    frame = pd.concat([free, fixed])
    said = verdict(summarise(with_ratios(frame)), with_ratios(frame))
    assert "headroom fixed at 30 % at B-67: −20 / −25 % instead of +0 / +0 %" in said


def test_energy_without_waiting_and_without_spare_gpus():
    """By hand: totals 5.5 and 3.1, half a joule of each in spare GPUs.

    A tenth of prefill is waiting.
    """
    frame = rows({("distserve", -1, 0): (1.0, 4.0), ("biscale", -1, 0): (0.6, 2.0)})
    frame.loc[1, "prefill_busy_j_per_token"] = 0.45
    row = summarise(with_ratios(frame)).set_index("system").loc["biscale"]
    assert row["total"] == pytest.approx(3.1 / 5.5)
    assert row["in_service"] == pytest.approx(2.6 / 5.0)
    assert row["prefill_busy"] == pytest.approx(0.45 / 0.9)


def test_formatting():
    assert percent(0.72) == "−28"
    assert percent(float("nan")) == "–"
    assert span([0.7, 0.6, float("nan")]) == "−30..−40 %"
    assert gap((-30, -25), (-36, -27)) == 0
    assert gap((-20, -10), (-36, -27)) == 7
    assert gap((-60, -50), (-36, -27)) == -14


def test_shipped_configurations_load():
    assert {"paper", "paper-quick"} <= set(list_names("reproductions"))
    for name in list_names("reproductions"):
        experiment = load_paper(name)
        assert set(experiment.systems) | set(experiment.member_systems) <= set(SYSTEMS)
        for variation in experiment.variations:
            ClusterSettings.of(**variation.settings)
    for file in (configs_dir() / "placements").glob("*.yaml"):
        assert load_placement(file.stem).gpus <= 16


def test_wrong_experiments_are_explained():
    good = load_paper("paper-quick").model_dump()
    with pytest.raises(ValueError, match="no operating point 'nowhere'"):
        PaperExperiment(**{**good, "oracle": ("nowhere",)})
    with pytest.raises(ValueError, match="needs 'distserve'"):
        PaperExperiment(**{**good, "systems": ("biscale",)})
    for wrong in ({"lengths": "own"}, {"arrivals": "azure-code-2024-mean"}):
        point = {"name": "A", "workload": "A", "rate_rps": 3.0, **wrong}
        with pytest.raises(ValueError, match="are workload B's"):
            PaperExperiment(**{**good, "points": (point,)})
    with pytest.raises(ValueError, match="workload A needs rate_rps"):
        PaperExperiment(**{**good, "points": ({"name": "A", "workload": "A"},)})
    assert member_indices(3, 64) == [0, 31, 63]
    assert member_indices(3, 0) == []


def test_days_are_streamed_and_follow_the_envelope():
    times = (np.arange(288) + 0.5) * 300.0
    factors = envelope_factors("azure-conv-week", 86_400.0, times)
    assert factors.mean() == pytest.approx(1.0)
    pieces = daily_windows(
        rate_rps=5.0, duration_s=86_400.0, window_s=3600.0, lengths="sharegpt-like"
    )
    assert iter(pieces) is pieces  # a generator: nothing is made before it is asked for
    rates = np.array([p.rate_rps for p in pieces])
    want = 5.0 * envelope_factors("azure-conv-week", 86_400.0, (np.arange(24) + 0.5) * 3600.0)
    np.testing.assert_allclose(rates, want, rtol=0.08)
    with pytest.raises(BiscaleError, match="shorter than one window"):
        next(daily_windows(duration_s=10.0))
    with pytest.raises(BiscaleError, match="has no envelope"):
        next(daily_windows(profile="azure-conv-like"))


def test_memory_of_a_stream_does_not_grow(bench):
    """Queues after 30 windows are no longer than after 10, and every request is served."""
    sizes, served = [], []
    for count in (10, 30):
        pieces = list(
            daily_windows(
                rate_rps=12.0, duration_s=count * 60.0, window_s=60.0, lengths="sharegpt-like"
            )
        )
        day = run_day(SYSTEMS["biscale"], TunedSystem(alpha=0.3), bench, iter(pieces))
        served.append(sum(w["requests"] for w in day.windows) == sum(len(p) for p in pieces))
        from biscale_env.envs.cluster.whole_run import WindowedRun

        planner = planner_of(SYSTEMS["biscale"], TunedSystem(), bench)
        loop = WindowedRun(bench.plant(SYSTEMS["biscale"], TunedSystem()), planner(0, None))
        for _ in loop.over(iter(pieces), planner):
            pass
        sizes.append(loop.cluster.prefills.queue.prompt.shape[1])
    assert all(served)
    assert sizes[1] <= 2 * sizes[0]


def command(*args):
    from biscale_env.core.errors import BiscaleError as Mistake

    result = CliRunner().invoke(build(), list(args))
    if isinstance(result.exception, Mistake):
        return 2, str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["place", "--rate", "3000", "--window", "60"], "at most"),
        (["place", "--rate", "30", "--gpus", "7"], "7 GPUs cannot be divided"),
        (["place", "--rate", "30", "--gpus", "4"], "need 8 GPUs"),
        (["place", "--rate", "30", "--slo", "fast"], "unknown slo 'fast'"),
        (["place", "--rate", "0"], "positive number"),
        (["place", "--rate", "30", "--window", "-5"], "--window must be"),
        (["place", "--rate", "30", "--trace", "nowhere.csv"], "nowhere.csv"),
        (
            ["place", "--rate", "30", "--trace", "gamma-sharegpt-like", "--window", "1e6"],
            "less than the window",
        ),
        (["place", "--rate", "30", "--jobs", "0"], "--jobs"),
        (["place", "--rate", "30", "--dtype", "int4"], "dtype"),
        (["reproduce", "paper", "--config", "nothing"], "unknown reproduction 'nothing'"),
        (["reproduce", "paper", "--quick", "--trace", "nowhere.csv"], "nowhere.csv"),
        (["reproduce", "paper", "--members", "-1"], "--members"),
        (["reproduce", "day", "--hours", "0"], "--hours"),
        (["reproduce", "day", "--hours", "1", "--rate", "-3"], "positive number"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(args, says):
    code, output = command(*args)
    assert code == 2
    assert says in output
    assert "\n" not in output.strip()


def test_a_trace_with_too_few_requests_for_the_experiment(tmp_path):
    file = tmp_path / "sparse.csv"
    rows = [f"{500.0 + k},10,10" for k in range(300)]
    file.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]))
    code, output = command(
        "reproduce", "paper", "--quick", "--trace", str(file), "--out", str(tmp_path)
    )
    assert code == 2
    assert "0 requests in one of its halves" in output
    file.write_text("arrival_s,prompt_tokens,output_tokens\n1,10,10\n2,10,10\n")
    code, output = command(
        "reproduce", "paper", "--quick", "--trace", str(file), "--out", str(tmp_path)
    )
    assert code == 2
    assert "need a window" in output


def test_a_window_without_requests(tmp_path):
    file = tmp_path / "late.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens\n500,10,10\n501,10,10\n")
    code, output = command("place", "--rate", "3", "--trace", str(file), "--window", "100")
    assert code == 2
    assert "no requests" in output


def test_place_prints_both_and_writes_yaml(tmp_path):
    out = tmp_path / "plan.yaml"
    code, output = command(
        "place", "--rate", "20", "--jobs", "1", "--window", "60", "--table", "--out", str(out)
    )
    assert code == 0
    assert "distserve" in output
    assert "biscale" in output
    assert load_placement(str(out)).name == "biscale"


@pytest.mark.slow
def test_the_whole_command_on_a_small_case(tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text(
        "name: small\nduration_s: 60\nwindow_s: 30\ntrace: none-such\ntrace_s: 300\nseeds: "
        "2\ntune_seeds: 1\nmembers: 1\n"
        "member_seeds: 1\nsystems: [distserve, placeonly, biscale, colocated]\nmember_systems: "
        "[distserve, biscale]\n"
        "points:\n  - {name: A-10, workload: A, rate_rps: 10}\n  - {name: B-67, workload: B, load: "
        "0.67}\n"
        "variations:\n  - {name: spare off, point: A-10, settings: {spare: 'off'}}\noracle: "
        "[A-10]\n"
    )
    code, _ = command(
        "reproduce", "paper", "--config", str(config), "--out", str(tmp_path / "out"), "--jobs", "1"
    )
    assert code == 0
    page = (tmp_path / "out" / "paper.md").read_text()
    assert "none-such, which was not at hand" in page
    for text in (
        "A prefill",
        "−27..−36 %",
        "B-67",
        "Sensitivity",
        "Hindsight optimum",
        "co-located",
    ):
        assert text in page
    found = pd.read_parquet(tmp_path / "out" / "paper" / "rows.parquet")
    assert set(found["system"]) == {
        "distserve",
        "placeonly",
        "biscale",
        "colocated",
        "oracle-prefill",
    }
    oracle = found[found["system"] == "oracle-prefill"].iloc[0]
    reference = found[
        (found["system"] == "distserve") & (found["point"] == "A-10") & (found["member"] == -1)
    ]
    assert oracle["prefill_j_per_token"] < reference["prefill_j_per_token"].mean()
