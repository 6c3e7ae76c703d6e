"""Intervals of the summary: which windows are resampled together, what a policy is held to."""

import numpy as np
import pytest
from evaluation_synthetic import requests_of, timeline_of, tiny, windows_frame
from scipy import stats

from biscale_env.evaluation.runs.results import results_frame, summarise
from biscale_env.evaluation.stats.intervals import add_intervals
from biscale_env.evaluation.stats.judging import judged_latency_s
from biscale_env.evaluation.stats.metrics import results_row
from biscale_env.evaluation.stats.paired_windows import N_RESAMPLES, SEED, PairedWindows
from biscale_env.evaluation.stats.windows import (
    WINDOW_S,
    attainment_interval,
    quantile_interval,
    window_weights,
)

N_WINDOWS = 12
PER_WINDOW = 10


def workload(missed, seed=0, policy="max", energy_j=100.0, **changes):
    """A run with ``PER_WINDOW`` requests in each window, ``missed[b]`` of them late."""
    missed = np.asarray(missed)
    arrival = (WINDOW_S * np.arange(missed.size)[:, None] + np.arange(PER_WINDOW) + 0.5).ravel()
    late = (np.arange(PER_WINDOW)[None, :] < missed[:, None]).ravel()
    first = arrival + np.where(late, 2.0, 0.1)
    begin = WINDOW_S * np.arange(missed.size)
    energy = np.broadcast_to(np.asarray(energy_j, dtype=float), begin.shape)
    zeros = np.zeros(begin.size)
    return tiny(
        policy=policy,
        workload_seed=seed,
        requests=requests_of(arrival, first, first, np.full(arrival.size, 10)),
        timeline=timeline_of(begin, np.full(begin.size, WINDOW_S), zeros, energy),
        totals={"energy_j": float(energy.sum()), "duration_s": WINDOW_S * missed.size},
        workload_s=WINDOW_S * missed.size,
        **changes,
    )


def summary(records, with_requests=True):
    """Summary with intervals, by policy."""
    frame = results_frame([results_row(record) for record in records])
    windows = windows_frame(records)
    by_id = {record.run_id: record for record in records}

    def latencies(run_id, metric):
        record = by_id[run_id]
        if metric == "tpot":
            return None
        everyone = np.ones(record.requests["arrival_s"].size, dtype=bool)
        values = judged_latency_s(record.requests, "ttft", everyone, record.duration_s)
        return values, record.requests["arrival_s"]

    made = add_intervals(summarise(frame), frame, windows, latencies if with_requests else None)
    return made.set_index("policy")


def width(row, name="attainment"):
    return row[f"{name}_ci_high"] - row[f"{name}_ci_low"]


MISSED = np.array([0, 0, 5, 0, 8, 0, 0, 3, 0, 10, 0, 1])


def bursty(seed):
    """Late requests in a third of twelve windows."""
    rng = np.random.default_rng([seed, 7])
    return rng.binomial(PER_WINDOW, 0.5, N_WINDOWS) * (rng.random(N_WINDOWS) < 0.3)


def test_subsamples_of_one_trace_are_one_stretch_of_time():
    """Five subsamples of a trace see its bursts together: they tell no more than one does."""
    one = summary([workload(MISSED, labels={"one_trace": True})]).loc["max"]
    five = [workload(MISSED, seed, labels={"one_trace": True}) for seed in range(5)]
    together = summary(five).loc["max"]
    assert width(together) == pytest.approx(width(one), rel=1e-6)
    kept = [workload(0 * MISSED, seed, labels={"one_trace": True}) for seed in range(5)]
    expected = 0.025 ** (1 / (PER_WINDOW * N_WINDOWS))  # one run's requests
    assert summary(kept).loc["max", "attainment_ci_low"] == pytest.approx(expected)
    many = range(20)
    apart = [workload(bursty(seed), seed, labels={"one_trace": False}) for seed in many]
    shared = [workload(bursty(0), seed, labels={"one_trace": True}) for seed in many]
    assert width(summary(apart).loc["max"]) < 0.5 * width(summary(shared).loc["max"])
    mixed = [
        workload(bursty(seed), seed, labels={"one_trace": seed > 0}) for seed in many
    ]  # not all from one trace: independent
    assert width(summary(mixed).loc["max"]) == width(summary(apart).loc["max"])


def test_days_are_clusters_and_their_subsamples_one_stretch_each():
    """Five days with three subsamples each are five units, as one subsample of each day is."""

    def days(seeds):
        return [
            workload(
                bursty(day),
                10 * day + seed,
                labels={"one_trace": True, "day": f"2024-05-1{day}"},
            )
            for day in range(5)
            for seed in range(seeds)
        ]

    one, three = (summary(days(seeds)).loc["max"] for seeds in (1, 3))
    assert width(three) == pytest.approx(width(one), rel=1e-6)
    frame = results_frame([results_row(run) for run in days(2)])
    point = PairedWindows(frame, windows_frame(days(2)))
    assert point.days.size == 5 * N_WINDOWS
    of_days = point.weights.reshape(N_RESAMPLES, 5, N_WINDOWS)
    assert (np.ptp(of_days, axis=2) == 0).all()


def test_subsamples_of_different_length_share_the_windows_they_have():
    runs = [
        workload(MISSED, 0, labels={"one_trace": True}),
        workload(MISSED[:8], 1, labels={"one_trace": True}),
    ]
    row = summary(runs).loc["max"]
    total = MISSED.sum() + MISSED[:8].sum()
    assert row["attainment"] == pytest.approx(1 - total / (PER_WINDOW * 20))
    assert row["attainment_ci_low"] < row["attainment"] < row["attainment_ci_high"]


def test_attainment_interval_of_many_independent_windows_is_binomial():
    rng = np.random.default_rng(0)
    missed = rng.binomial(PER_WINDOW, 0.2, 200)
    row = summary([workload(missed)]).loc["max"]
    exact = stats.binomtest(int((PER_WINDOW - missed).sum()), 200 * PER_WINDOW).proportion_ci()
    assert row["attainment"] == pytest.approx(1 - missed.mean() / PER_WINDOW)
    assert width(row) == pytest.approx(exact.high - exact.low, rel=0.25)
    assert N_RESAMPLES >= 1000


def test_energy_is_paired_with_max_clock_window_by_window():
    """A policy that spends 0.7 of what max clock spends in every window has no uncertainty."""
    rng = np.random.default_rng(1)
    base = rng.gamma(2.0, 50.0, N_WINDOWS)
    runs = [
        workload(np.zeros(N_WINDOWS), policy=policy, energy_j=factor * base)
        for policy, factor in (("max", 1.0), ("mpc", 0.7))
    ]
    found = summary(runs)
    assert found.loc["mpc", ["energy_ratio_ci_low", "energy_ratio_ci_high"]].tolist() == (
        pytest.approx([0.7, 0.7])
    )
    runs[1] = workload(np.zeros(N_WINDOWS), policy="mpc", energy_j=0.7 * base[::-1])
    assert width(summary(runs).loc["mpc"], "energy_ratio") > 0.1


def test_energy_is_compared_with_the_reference_on_the_same_workload_only():
    """Workload 1 has no reference: it takes no part in the ratio; variants are no reference."""
    flat = np.zeros(N_WINDOWS)
    runs = [
        workload(flat, 0, "max", 100.0),
        workload(flat, 0, "max", 10.0, variant="tuned"),
        workload(flat, 0, "mpc", 50.0),
        workload(flat, 1, "mpc", 900.0),
    ]
    frame = summary(runs)
    row = frame.loc["mpc"]
    assert (row["energy_ratio_ci_low"], row["energy_ratio_ci_high"]) == pytest.approx((0.5, 0.5))


def test_energy_is_per_output_token():
    """Half the tokens at half the energy is no saving."""
    flat = np.zeros(N_WINDOWS)
    half = workload(flat, policy="mpc", energy_j=50.0)
    half.requests["output_tokens"][:] = 5
    row = summary([workload(flat), half]).loc["mpc"]
    assert (row["energy_ratio_ci_low"], row["energy_ratio_ci_high"]) == pytest.approx((1.0, 1.0))


def test_without_a_reference_the_ratio_is_unknown():
    row = summary([workload(np.zeros(N_WINDOWS), policy="mpc")]).loc["mpc"]
    assert np.isnan(row["energy_ratio_ci_low"])
    assert row["attainment_ci_high"] == 1.0
    n = N_WINDOWS * PER_WINDOW
    assert row["attainment_ci_low"] == pytest.approx(0.025 ** (1 / n))


def test_quantiles_are_those_of_all_requests_together():
    """One workload late throughout, three never.

    The P50 of all is early, unlike the mean of P50s.
    """
    runs = [workload(np.zeros(N_WINDOWS), seed) for seed in range(3)]
    runs.append(workload(np.full(N_WINDOWS, PER_WINDOW), 3))
    row = summary(runs).loc["max"]
    assert row["ttft_p50_s"] == pytest.approx(0.1)
    assert row["ttft_p90_s"] == row["ttft_p99_s"] == pytest.approx(2.0)
    assert (row["ttft_p99_s_ci_low"], row["ttft_p99_s_ci_high"]) == pytest.approx((2.0, 2.0))
    assert np.isnan(row["tpot_p99_s_ci_low"])
    unknown = summary(runs, with_requests=False).loc["max"]
    assert np.isnan(unknown["ttft_p99_s_ci_low"])
    assert unknown["ttft_p50_s"] == pytest.approx((3 * 0.1 + 2.0) / 4)  # the mean of each run's


def test_requests_belong_to_the_window_they_arrive_in():
    """All late requests in one window of one workload: the P99 interval spans both latencies."""
    missed = np.zeros(N_WINDOWS)
    missed[4] = 2
    row = summary([workload(missed)]).loc["max"]
    assert row["ttft_p99_s_ci_low"] == pytest.approx(0.1)
    assert row["ttft_p99_s_ci_high"] == pytest.approx(2.0)
    # a request that arrives after the last window's start belongs to it, and none is lost
    everyone = summary([workload(np.full(N_WINDOWS, 1))]).loc["max"]
    everything = N_WINDOWS * PER_WINDOW
    exact = stats.binomtest(round(0.9 * everything), everything).proportion_ci(method="exact")
    assert everyone["attainment_ci_low"] == pytest.approx(exact.low)
    assert everyone["attainment_ci_high"] == pytest.approx(exact.high)


def test_ensemble_members_of_a_workload_share_its_windows():
    """A workload in three plants is one sample of the workload, not three."""
    one = summary([workload(MISSED)]).loc["max"]
    three = summary([workload(MISSED, ensemble_member=member) for member in range(3)]).loc["max"]
    assert three["attainment_ci_low"] == one["attainment_ci_low"]
    assert three["attainment_ci_high"] == one["attainment_ci_high"]


def test_points_with_and_without_a_load_have_their_own_intervals():
    runs = [workload(MISSED, load=load) for load in (None, 0.5)]
    runs.append(workload(np.zeros(N_WINDOWS), load=0.75))
    frame = results_frame([results_row(record) for record in runs])
    windows = windows_frame(runs)
    made = add_intervals(summarise(frame), frame, windows)
    lows = dict(zip(made["load"].fillna(-1.0), made["attainment_ci_low"], strict=True))
    assert lows[-1.0] == lows[0.5] < lows[0.75]
    assert made["attainment_ci_low"].notna().all()


def test_intervals_are_those_of_the_windows_of_each_workload_and_no_others():
    """Two workloads of 12 and 8 windows are 20 units in two strata."""
    runs = [workload(MISSED, 0), workload(MISSED[:8], 1)]
    row = summary(runs).loc["max"]
    strata = np.repeat([0, 1], [12, 8])
    counted = np.full(20, PER_WINDOW)
    weights = window_weights(
        20, np.random.default_rng(SEED), N_RESAMPLES, days=strata, load=counted
    )
    missed = np.concatenate([MISSED, MISSED[:8]])
    expected = attainment_interval(counted - missed, counted, weights)
    assert (row["attainment_ci_low"], row["attainment_ci_high"]) == pytest.approx(expected[1:])
    values = np.concatenate([run.requests["first_token_s"] for run in runs])
    values = values - np.concatenate([run.requests["arrival_s"] for run in runs])
    units = np.repeat(np.arange(20), PER_WINDOW)
    expected = quantile_interval(values, units, 0.99, weights)
    assert (row["ttft_p99_s_ci_low"], row["ttft_p99_s_ci_high"]) == pytest.approx(expected[1:])


def test_difference_of_two_policies_is_paired():
    """Always three points less than another: no uncertainty, however much both vary."""
    rng = np.random.default_rng(4)
    base = rng.gamma(2.0, 50.0, N_WINDOWS)
    factor = rng.uniform(0.5, 0.9, N_WINDOWS)
    flat = np.zeros(N_WINDOWS)
    runs = [
        workload(flat, policy="max", energy_j=base),
        workload(flat, policy="mpc", energy_j=factor * base),
        workload(flat, policy="agent", energy_j=(factor - 0.03) * base),
        workload(flat, 1, policy="agent", energy_j=base),  # the other policy did not run this one
    ]
    frame = results_frame([results_row(record) for record in runs])
    point = PairedWindows(frame, windows_frame(runs))
    rows = {policy: mine for policy, mine in frame.groupby("policy")}
    difference = point.energy_difference(rows["agent"], rows["mpc"])
    assert difference == pytest.approx((-0.03, -0.03, -0.03))
    less = point.uses_less(rows["agent"], rows["mpc"])
    assert less[:N_WINDOWS].tolist() == [1.0] * N_WINDOWS
    nothing = point.energy_difference(rows["agent"].iloc[:0], rows["mpc"])
    assert np.isnan(nothing).all()


def test_curve_of_a_policy_holds_its_settings_on_the_units():
    runs = [
        workload(MISSED * share, policy="mpc", energy_j=energy, variant=f"margin={share}")
        for share, energy in ((0, 90.0), (1, 70.0))
    ]
    frame = results_frame([results_row(record) for record in runs])
    point = PairedWindows(frame, windows_frame(runs))
    curve = point.curve([mine for _, mine in frame.groupby("variant")])
    assert curve.attainments() == pytest.approx([1.0, 1 - MISSED.mean() / PER_WINDOW])
    assert curve.energies() == pytest.approx([90.0 / (10 * PER_WINDOW), 70.0 / (10 * PER_WINDOW)])


def test_rows_of_an_older_session_without_the_label_are_not_from_one_trace():
    four = [workload(bursty(seed), seed, labels={"one_trace": True}) for seed in range(4)]
    unlabelled = [*four, workload(bursty(4), 4)]
    apart = [workload(bursty(seed), seed, labels={"one_trace": False}) for seed in range(5)]
    assert width(summary(unlabelled).loc["max"]) == width(summary(apart).loc["max"])


def test_a_run_without_output_takes_no_part_in_the_energy_ratio():
    flat = np.zeros(N_WINDOWS)
    runs = [workload(flat, seed, policy) for seed in (0, 1) for policy in ("max", "mpc")]
    for run in runs[2:]:
        run.requests["output_tokens"][:] = 0
    row = summary(runs).loc["mpc"]
    assert (row["energy_ratio_ci_low"], row["energy_ratio_ci_high"]) == pytest.approx((1.0, 1.0))
    for run in runs[:2]:  # one token in all counts
        run.requests["output_tokens"][:] = 0
        run.requests["output_tokens"][0] = 1
    assert summary(runs[:2]).loc["mpc", "energy_ratio_ci_low"] == pytest.approx(1.0)


def test_a_request_at_the_very_end_belongs_to_the_last_window():
    run = workload(MISSED)
    run.requests["arrival_s"][-1] = run.duration_s
    run.requests["first_token_s"][-1] = run.duration_s + 2.0
    row = summary([run]).loc["max"]
    assert row["ttft_p99_s"] == pytest.approx(2.0)
    assert np.isfinite(row["ttft_p99_s_ci_high"])
