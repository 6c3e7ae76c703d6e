"""Metrics against answers worked out by hand, and properties that must hold for any run."""

import math

import numpy as np
import pytest
from evaluation_synthetic import SLO, plausible, requests_of, timeline_of, tiny
from hypothesis import given
from hypothesis import strategies as st

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.runs.record import run_id
from biscale_env.evaluation.stats import judging, metrics

NAN = math.nan


def test_latencies_by_hand():
    requests = requests_of(
        [0.0, 1.0, 2.0, 3.0], [0.5, 1.4, NAN, 3.1], [1.5, 1.4, NAN, NAN], [11, 1, 5, 3]
    )
    assert judging.ttft_s(requests) == pytest.approx([0.5, 0.4, NAN, 0.1], nan_ok=True)
    assert judging.tpot_s(requests) == pytest.approx([0.1, 0.0, NAN, NAN], nan_ok=True)


def test_prefill_row_by_hand():
    row = metrics.results_row(tiny(totals={"decision_time_median_s": 1e-3, "solver_failures": 2}))
    assert row["attainment"] == pytest.approx(
        2 / 3
    )  # 0.5 s and 0.6 s are within 0.6 s, 0.7 s is not
    assert row["attainment_ttft"] == row["attainment"]
    assert math.isnan(row["attainment_tpot"])
    assert not row["slo_met"]
    assert row["n_violations"] == 1
    assert row["energy_per_output_token_j"] == pytest.approx(600 / 31)
    assert row["energy_per_request_j"] == pytest.approx(200)
    assert row["goodput_rps"] == pytest.approx(2 / 3)
    assert row["ttft_p50_s"] == pytest.approx(0.6)
    assert row["ttft_p90_s"] == pytest.approx(0.68)
    assert math.isnan(row["tpot_p50_s"])
    assert row["utilisation"] == pytest.approx(1.8 / 3.0)
    assert row["mean_power_w"] == pytest.approx(50)
    assert (row["decision_time_median_s"], row["solver_failures"]) == (1e-3, 2)


def test_decode_leaves_single_tokens_out_of_quantiles_but_counts_them_as_met():
    requests = requests_of([0, 0, 0], [0.1, 0.1, 0.1], [1.1, 2.1, 0.1], [11, 11, 1])
    row = metrics.results_row(tiny("decode", requests=requests, totals={"output_tokens": 30.0}))
    assert row["tpot_p50_s"] == pytest.approx(
        0.15
    )  # of 0.1 and 0.2; the zero of the single token is no sample
    assert row["attainment"] == pytest.approx(2 / 3)
    assert row["energy_per_output_token_j"] == pytest.approx(20)
    assert math.isnan(row["ttft_p99_s"])


def test_unfinished_counts_only_when_its_deadline_has_passed():
    requests = requests_of([0.0, 2.3, 2.5], [NAN] * 3, [NAN] * 3, [5, 5, 5])
    verdict = judging.judge(requests, SLO, "prefill", end_s=2.9)
    assert verdict["counted"].tolist() == [True, True, False]  # deadlines 0.6, 2.9 and 3.1
    assert not verdict["met"].any()


def test_unfinished_decode_deadline_grows_with_its_tokens():
    requests = requests_of([0.0, 0.0], [1.0, 1.0], [NAN, NAN], [11, 31])
    verdict = judging.judge(requests, SLO, "decode", end_s=2.5)
    assert verdict["counted"].tolist() == [True, False]  # deadlines 1 + 1.0 and 1 + 3.0


def test_unfinished_violation_enters_quantiles_with_what_it_had_reached():
    requests = requests_of([0.0, 1.0, 8.0], [0.1, NAN, NAN], [0.1, NAN, NAN], [5, 5, 5])
    values = judging.judged_latency_s(requests, "ttft", np.array([True, True, False]), 8.2)
    assert values == pytest.approx([0.1, 7.2])
    decode = requests_of([0, 0], [0.0, 1.0], [1.0, NAN], [11, 11])
    assert judging.judged_latency_s(decode, "tpot", np.array([True, True]), 6.0) == pytest.approx(
        [0.1, 0.5]
    )


def test_joint_statistic_needs_both_in_one_request():
    slo = SLO.model_copy(update={"statistic": "joint", "attainment": 0.5})
    requests = requests_of([0, 0, 0], [0.5, 0.7, 0.5], [1.5, 1.7, 3.5], [11, 11, 11])
    row = metrics.results_row(
        tiny("cluster", requests=requests, slo=slo, totals={"duration_s": 5.0})
    )
    assert row["attainment"] == row["attainment_joint"] == pytest.approx(1 / 3)
    each = metrics.results_row(tiny("cluster", requests=requests, totals={"duration_s": 5.0}))
    assert each["attainment"] == pytest.approx(2 / 3)
    assert (each["attainment_ttft"], each["attainment_tpot"]) == pytest.approx((2 / 3, 2 / 3))


def test_cluster_request_that_never_started_counts_once_its_ttft_is_lost():
    requests = requests_of([0.0, 9.8], [NAN, NAN], [NAN, NAN], [11, 11])
    verdict = judging.judge(requests, SLO, "cluster", end_s=10.0)
    assert verdict["counted"].tolist() == [True, False]
    assert not verdict["met_ttft"][0]
    assert not verdict["met_tpot"][0]


def test_warmup_leaves_out_early_requests_and_their_energy():
    row = metrics.results_row(tiny(), warmup_s=1.0)
    assert row["n_counted"] == 2
    assert row["energy_j"] == pytest.approx(500)
    assert row["energy_per_output_token_j"] == pytest.approx(500 / 21)
    assert row["goodput_rps"] == pytest.approx(1 / 2)


def test_energy_between_splits_an_entry_by_its_overlap():
    timeline = timeline_of([0.0, 2.0, 4.0], [1.0, 2.0, 0.0], [1.0, 0.0, 0.0], [10.0, 20.0, 5.0])
    assert metrics.energy_between(timeline, 0.0) == pytest.approx(35)
    assert metrics.energy_between(timeline, 1.5, 3.0) == pytest.approx(2.5 + 10)


def test_served_without_a_known_latency_attains_nothing_that_is_known():
    row = metrics.results_row(tiny("decode", requests=requests_of([0.0], [NAN], [1.0], [5])))
    assert (row["n_finished"], row["n_counted"]) == (1, 0)
    assert math.isnan(row["attainment"])
    assert not row["slo_met"]


def test_nothing_asked_is_nothing_missed():
    empty = requests_of([], [], [], [])
    row = metrics.results_row(
        tiny(requests=empty, timeline=timeline_of([], [], [], []), totals={"energy_j": 0.0})
    )
    assert row["attainment"] == 1.0
    assert math.isnan(row["energy_per_output_token_j"])
    assert math.isnan(row["ttft_p99_s"])


LATENCY = st.one_of(st.floats(0, 5), st.just(NAN))


@given(st.lists(st.tuples(st.floats(0, 10), LATENCY), min_size=1, max_size=30), st.floats(10, 20))
def test_attainment_is_a_share_and_a_longer_run_never_uncounts(pairs, end_s):
    arrival = np.array([a for a, _ in pairs])
    first = arrival + np.array([lat for _, lat in pairs])
    requests = requests_of(arrival, first, first, np.full(arrival.size, 7))
    early, late = (judging.judge(requests, SLO, "prefill", end) for end in (end_s, end_s + 5))
    assert 0 <= judging.attainments(early, SLO, "prefill")["attainment"] <= 1
    assert not (early["counted"] & ~late["counted"]).any()
    assert not (early["met"] & ~early["counted"]).any()


@given(st.floats(0.05, 2.0), st.floats(0.05, 2.0))
def test_looser_bound_never_attains_less(bound_a, bound_b):
    requests = plausible("prefill", "mpc", 1, duration_s=60.0).requests
    low, high = sorted((bound_a, bound_b))
    shares = [
        judging.attainments(
            judging.judge(requests, SLO.model_copy(update={"ttft_s": bound}), "prefill", 200.0),
            SLO,
            "prefill",
        )["attainment"]
        for bound in (low, high)
    ]
    assert shares[0] <= shares[1]


def test_run_id_depends_on_every_key_column_and_nothing_else():
    record = tiny(load=0.75)
    row = record.key
    changed = {
        "phase": "decode",
        "policy": "mpc",
        "variant": "margin=0.1",
        "scenario": "other",
        "slo": "distserve",
        "load": 0.5,
        "workload_seed": 1,
        "ensemble_member": 3,
        "training_seed": 2,
        "tp": 8,
        "dtype": "fp8",
    }
    names = {run_id(row), *(run_id(row | {name: value}) for name, value in changed.items())}
    assert len(names) == len(changed) + 1
    assert set(row) == set(changed)
    fields = changed | {"slo": SLO.model_copy(update={"name": "distserve"})}
    others = {tiny(**({"load": 0.75} | {name: fields[name]})).run_id for name in fields}
    assert others == names - {record.run_id}
    assert tiny(load=0.75, labels={"delay_s": 0.1}, rate_rps=9.0).run_id == record.run_id
    assert (
        run_id({k: np.float64(v) if isinstance(v, float) else v for k, v in row.items()})
        == record.run_id
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phase": "train"}, "unknown phase 'train'"),
        ({"totals": {"energy_j": NAN}}, "'energy_j' must be a finite number"),
        ({"totals": {"duration_s": -1.0}}, "'duration_s' must be a finite number"),
        ({"totals": {"energy_j": math.inf}}, "'energy_j' must be a finite number"),
        ({"timeline": {n: np.zeros((4, 1)) for n in tiny().timeline}}, "arrays of one length"),
        ({"requests": {n: np.zeros(()) for n in tiny().requests}}, "arrays of one length"),
        ({"requests": {"arrival_s": np.zeros(2)}}, "'start_s' is missing"),
        (
            {"timeline": timeline_of([0.0], [1.0], [0.0], [1.0]) | {"kv_use": np.zeros(4)}},
            "arrays of one length",
        ),
    ],
)
def test_malformed_record_is_one_sentence(change, message):
    with pytest.raises(BiscaleError, match=message):
        tiny(**change)


def test_decision_times_and_counts_are_those_of_the_totals():
    totals = {"decision_time_median_s": 1e-5, "decision_time_p99_s": 3e-4, "solver_failures": 2}
    row = metrics.results_row(tiny(totals=totals | {"preemptions": 4, "energy_idle_j": 7.0}))
    assert {name: row[name] for name in totals} == totals
    assert (row["preemptions"], row["energy_idle_j"]) == (4, 7.0)
    bare = metrics.results_row(tiny())
    assert math.isnan(bare["decision_time_median_s"])
    assert math.isnan(bare["decision_time_p99_s"])
    assert math.isnan(bare["energy_idle_j"])
    assert (bare["solver_failures"], bare["preemptions"]) == (0.0, 0)


def test_attaining_exactly_what_the_slo_asks_meets_it():
    """One of three requests is late."""
    exact = SLO.model_copy(update={"attainment": 2 / 3})
    row = metrics.results_row(tiny(slo=exact))
    assert row["attainment"] == pytest.approx(2 / 3)
    assert row["slo_met"]


def test_a_decode_request_that_was_cut_off_counts_from_its_deadline_on():
    """Five tokens have four intervals of 0.1 s: the deadline is 1.4 s."""
    requests = requests_of([1.0], [1.0], [NAN], [5])
    for end_s, counted in ((1.39, False), (1.4, True)):
        judged = judging.judge(requests, SLO, "decode", end_s)
        assert judged["counted"].tolist() == [counted]
        assert not judged["met_tpot"][0]


def test_a_load_that_is_not_given_is_one_key_whether_none_or_nan():
    row = tiny().key
    assert math.isnan(row["load"])
    assert run_id(row | {"load": None}) == run_id(row) != run_id(row | {"load": 0.5})
    assert len(run_id(row)) == 12
    assert (row["training_seed"], row["variant"]) == (-1, "")
