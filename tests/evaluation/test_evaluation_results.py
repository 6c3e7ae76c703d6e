"""The results frame: ratios, feasibility, summaries, intervals."""

import math

import numpy as np
import pandas as pd
import pytest
from evaluation_synthetic import POLICIES, SLO, plausible, requests_of, tiny

from biscale_env.evaluation.runs import results, run_files
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.evaluation.stats.metrics import results_row

GOOD = requests_of([0.0, 1.0, 2.0], [0.1, 1.1, 2.1], [0.1, 1.1, 2.1], [10, 20, 1])


def rows(*records):
    return results.results_frame(results_row(r) for r in records)


def test_energy_ratio_is_to_max_on_the_same_workload_and_member():
    frame = rows(
        tiny(policy="mpc", totals={"energy_j": 300.0}),
        tiny(policy="mpc", workload_seed=1, totals={"energy_j": 450.0}),
        tiny(policy="max"),
        tiny(policy="max", workload_seed=1, totals={"energy_j": 900.0}),
        tiny(policy="mpc", ensemble_member=4, totals={"energy_j": 1.0}),
    )
    assert frame["policy"].tolist() == ["max", "max", "mpc", "mpc", "mpc"]
    ratio = frame.set_index(["policy", "workload_seed", "ensemble_member"])["energy_ratio"]
    assert ratio["mpc", 0, -1] == pytest.approx(0.5)
    assert ratio["mpc", 1, -1] == pytest.approx(0.5)
    assert ratio["max", 1, -1] == 1.0
    assert math.isnan(ratio["mpc", 0, 4])


def test_ratio_needs_the_same_load_slo_and_placement():
    base = tiny(policy="max", load=0.5)
    other_slo = SLO.model_copy(update={"name": "other"})
    frame = rows(
        base,
        tiny(policy="mpc", load=0.75),
        tiny(policy="mpc", load=0.5, tp=8),
        tiny(policy="mpc", load=0.5, slo=other_slo),
        tiny(policy="mpc", load=0.5, phase="decode"),
        tiny(policy="mpc", load=0.5),
    )
    known = (
        frame[frame["policy"] == "mpc"]
        .set_index(["load", "tp", "slo", "phase"])["energy_ratio"]
        .notna()
    )
    assert known.sum() == 1
    assert known[0.5, 4, "biscale", "prefill"]


def test_scenario_that_max_cannot_serve_is_infeasible_for_everybody():
    frame = rows(tiny(policy="max"), tiny(policy="mpc", requests=GOOD))
    assert frame["feasible"].tolist() == [False, False]
    assert frame["slo_met"].tolist() == [False, True]


def test_feasibility_is_pooled_over_workloads_and_unknown_without_max():
    good = [tiny(policy="max", requests=GOOD, workload_seed=seed) for seed in range(3)]
    frame = rows(*good, tiny(policy="max", workload_seed=9), tiny(policy="mpc", load=0.5))
    by_load = frame.drop_duplicates("load").set_index("load")["feasible"]
    assert not by_load[by_load.index.isna()].iloc[0]  # 11 of 12 met, 99 % needed
    assert pd.isna(by_load[0.5])


def test_completing_twice_changes_nothing():
    frame = rows(tiny(policy="max"), tiny(policy="mpc"), tiny(policy="mpc", variant="margin=0.1"))
    pd.testing.assert_frame_equal(results.complete(frame), frame)
    assert results.results_frame([]).empty


def test_variant_of_max_is_not_the_reference():
    frame = rows(tiny(policy="max", variant="tp8"), tiny(policy="mpc"))
    assert frame["energy_ratio"].isna().all()


def test_summary_pools_attainment_over_requests():
    many = requests_of(np.arange(9.0), np.arange(9) + 0.1, np.arange(9) + 0.1, np.full(9, 5))
    frame = rows(
        tiny(policy="mpc"),
        tiny(policy="mpc", workload_seed=1, requests=many, totals={"duration_s": 10.0}),
    )
    summary = results.summarise(frame).iloc[0]
    assert summary["attainment"] == pytest.approx(11 / 12)  # not the mean of 2/3 and 1
    assert (summary["attainment_low"], summary["attainment_high"]) == pytest.approx((2 / 3, 1))
    assert summary["runs"] == 2
    assert summary["n_requests"] == 12
    assert summary["n_violations"] == 1
    assert not summary["slo_met"]


def test_summary_ratio_and_labels():
    frame = rows(
        tiny(policy="max"),
        tiny(policy="max", workload_seed=1, totals={"energy_j": 1200.0}),
        tiny(policy="mpc", totals={"energy_j": 300.0}),
        tiny(policy="mpc", workload_seed=1, totals={"energy_j": 900.0}),
        tiny(policy="mpc", variant="margin=0.2", totals={"energy_j": 500.0}),
    )
    summary = results.summarise(frame).set_index("label")
    assert summary.loc["mpc", "energy_ratio"] == pytest.approx(1200 / 1800)
    assert summary.loc["mpc", "energy_ratio_low"] == pytest.approx(0.5)
    assert summary.loc["mpc", "energy_ratio_high"] == pytest.approx(0.75)
    assert summary.loc["mpc (margin=0.2)", "energy_ratio"] == pytest.approx(500 / 600)


def test_scenario_label_names_load():
    row = tiny(load=0.75).key
    assert results.scenario_label(row) == "toy, prefill, 75 % of capacity, TP4 bf16, SLO biscale"


def test_intervals_hold_the_estimates_and_the_reference_is_exact(tmp_path):
    with RunDirectory(tmp_path, {}) as run:
        for policy in POLICIES:
            for seed in (0, 1):
                run.add(plausible("prefill", policy, seed, duration_s=900.0))
    opened = load_run(tmp_path)
    summary = opened.summary()
    assert (summary["attainment_ci_low"] <= summary["attainment"]).all()
    assert (summary["attainment_ci_high"] >= summary["attainment"]).all()
    for name in ("energy_ratio", "ttft_p99_s"):
        inside = summary[f"{name}_ci_low"].le(summary[name] + 1e-9) & summary[f"{name}_ci_high"].ge(
            summary[name] - 1e-9
        )
        assert inside.all(), name
    assert summary["tpot_p99_s_ci_low"].isna().all()
    reference = summary[summary["policy"] == "max"].iloc[0]
    assert (
        reference["energy_ratio_ci_low"] == reference["energy_ratio_ci_high"] == pytest.approx(1.0)
    )
    mpc = summary[summary["policy"] == "mpc"].iloc[0]
    assert 0 < mpc["energy_ratio_ci_high"] - mpc["energy_ratio_ci_low"] < 0.05
    pooled = np.concatenate(
        [opened.latencies(plausible("prefill", "mpc", s).run_id, "ttft")[0] for s in (0, 1)]
    )
    assert mpc["ttft_p99_s"] == pytest.approx(np.quantile(pooled, 0.99))
    again = load_run(tmp_path).summary()
    pd.testing.assert_frame_equal(again, summary)
    stored = pd.read_csv(tmp_path / run_files.SUMMARY)
    assert stored["energy_ratio_ci_low"].to_numpy() == pytest.approx(
        summary["energy_ratio_ci_low"].to_numpy()
    )


def test_latencies_of_a_run_agree_with_its_row(tmp_path):
    with RunDirectory(tmp_path, {}) as run:
        for phase in ("prefill", "decode"):
            run.add(plausible(phase, "slack", 2))
    opened = load_run(tmp_path)
    for phase, metric in (("prefill", "ttft"), ("decode", "tpot")):
        row = opened.results.set_index("phase").loc[phase]
        values, arrival_s = opened.latencies(row["run_id"], metric)
        assert np.quantile(values, 0.99) == pytest.approx(row[f"{metric}_p99_s"], rel=1e-6)
        assert values.size == arrival_s.size
        other = {"ttft": "tpot", "tpot": "ttft"}[metric]
        assert opened.latencies(row["run_id"], other) is None
