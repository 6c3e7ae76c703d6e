"""From raw logs to metrics, on logs written by hand: every number by closed form."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.report.page import write_report
from biscale_env.evaluation.report.words import slo_words
from biscale_env.evaluation.runs.run_view import load_run
from biscale_env.evaluation.runs.rundir import RunDirectory
from biscale_env.evaluation.stats.metrics import results_row
from biscale_env.hardware.loop.control import Decision
from biscale_env.hardware.loop.wire import ClockChange
from biscale_env.hardware.replay.assemble import (
    at_step,
    clock_steps,
    delays_s,
    request_columns,
    run_record,
    timeline_columns,
)
from biscale_env.hardware.replay.raw_log import Raw
from biscale_env.hardware.replay.recorder import TELEMETRY_COLUMNS, EnergyCurve, IterationRow
from biscale_env.hardware.replay.request_record import (
    GONE_ERROR,
    INTERRUPTED_ERROR,
    RequestRecord,
)
from biscale_env.hardware.replay.validate import (
    Agreement,
    compare,
    load_of,
    plant_of,
    simulated_record,
)

START = 1000.0  # CLOCK_MONOTONIC at the trace's time 0
REFUSED = "ValueError: prefill answered 503: no healthy upstream"


def request(index, at, **times):
    """A request scheduled ``at`` seconds; times from the start of the trace."""
    plain = {k: v for k, v in times.items() if not k.endswith("_s")}
    named = {k: START + v for k, v in times.items() if k.endswith("_s")}
    plain = {"prompt_tokens": 100, "output_tokens": 11, **plain}
    return RequestRecord(index=index, scheduled_s=START + at, **plain, **named)


def served(index, at, lag=0.0, ttft=0.1, tpot=0.02, output=11, **more):
    """A request that left ``lag`` late, answered after ``ttft`` and then at ``tpot``."""
    first = at + lag + ttft
    times = {
        "dispatched_s": at + lag,
        "prefill_done_s": first,
        "decode_sent_s": first,
        "first_chunk_s": first,
        "last_chunk_s": first + tpot * (output - 1),
    }
    made = {"output_tokens": output, "completion_tokens": output}
    return request(index, at, **made | times | more)


def refused(index, at, **times):
    """A request whose prefill was answered 503, as the client of version 0.1 logged it too."""
    return request(index, at, dispatched_s=at, error=REFUSED, **times)


def telemetry(power_w=500.0, end_s=100.0):
    """Eight GPUs at a constant power from the start on."""
    rows = [
        (START + t, phase, f"{phase}-{k}", 1200.0, power_w, power_w * t, 0, 50.0)
        for phase in ("prefill", "decode")
        for k in range(4)
        for t in np.arange(0.0, end_s, 0.5)
    ]
    return pd.DataFrame(rows, columns=list(TELEMETRY_COLUMNS))


def iteration(phase, counter, time_s, wall_s=0.0, **more):
    names = ("prefill_requests", "prefill_tokens", "prefill_kv_tokens", "decode_requests")
    zeros = dict.fromkeys((*names, "decode_kv_tokens", "queued_requests"), 0) | {"kv_use": 0.0}
    return IterationRow(
        phase=phase,
        counter=counter,
        heard_s=START + time_s,
        time_s=START + time_s,
        wall_time_s=wall_s,
        **zeros | more,
    )


def decision(sequence, time_s, freq_mhz, late_s=0.001):
    heard = START + time_s
    return Decision(
        sequence, sequence, heard, heard, heard + late_s, heard + 2 * late_s, 0.0, freq_mhz, []
    )


def change(group, decided_s, freq_mhz, seen_s=math.nan, cause="command"):
    return ClockChange(
        group=group,
        freq_mhz=freq_mhz,
        cause=cause,
        decided_s=START + decided_s,
        set_s=START + decided_s + 0.01,
        seen_s=START + seen_s,
    )


def raw_of(requests, iterations=(), decisions=(), changes=(), prefill_url="http://p", **instance):
    phases = ("prefill", "decode") if prefill_url else ("decode",)
    settings = {
        "policies": dict.fromkeys(phases, "static:1200"),
        "prefill_url": prefill_url,
        "engine": "vllm",
        "delay_s": 0.05,
        "instance": instance,
    }
    return Raw(
        {"settings": settings, "trace": "t", "started_s": START},
        list(requests),
        {p: [r for r in iterations if r.phase == p] for p in ("prefill", "decode")},
        {p: list(decisions) for p in ("prefill", "decode")},
        list(changes),
        telemetry(),
    )


def row_of(raw, phase):
    return results_row(run_record(raw, phase, 1980.0))


def test_refused_prefills_violate_the_slo_and_have_not_finished():
    """Fault of 0.1: 100 of 100 answers 503 gave an attainment of 1.0."""
    with pytest.raises(BiscaleError, match=r"no request was answered in prefill: .*503"):
        run_record(
            raw_of([refused(k, k, prefill_done_s=k + 0.01) for k in range(100)]), "prefill", 1
        )
    requests = [served(0, 0.0), *(refused(k, k, prefill_done_s=k + 0.01) for k in range(1, 4))]
    row = row_of(raw_of(requests), "prefill")
    assert row["attainment"] == 0.25
    assert (row["n_finished"], row["n_counted"], row["n_violations"]) == (1, 4, 3)
    assert row["failed_requests"] == 3
    assert row["goodput_rps"] == pytest.approx(1 / row["duration_s"])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("error", ["ValueError: asked for 11 tokens, got 4", GONE_ERROR, "x"])
def test_a_request_that_failed_late_is_lost_in_both_phases(phase, error):
    requests = [served(0, 0.0), served(1, 1.0, error=error, completion_tokens=4)]
    raw = raw_of(requests)
    columns = request_columns(raw, phase)
    assert np.isfinite(columns["finish_s"]).tolist() == [True, False]
    assert columns["failed"].tolist() == [False, True]
    row = row_of(raw, phase)
    assert (row["attainment"], row["n_finished"], row["n_counted"]) == (0.5, 1, 2)
    assert row["output_tokens"] == 11


def test_a_decode_that_failed_without_a_token_is_judged_though_its_deadline_lies_ahead():
    """It is the last request: by its deadline alone nobody could know."""
    broken = request(1, 2.0, dispatched_s=2.0, prefill_done_s=2.1, decode_sent_s=2.1, error="x")
    row = row_of(raw_of([served(0, 0.0), broken]), "decode")
    assert (row["attainment"], row["n_counted"]) == (0.5, 2)


def test_what_the_user_interrupted_is_not_the_fault_of_the_engine():
    cut = served(1, 1.0, error=INTERRUPTED_ERROR, completion_tokens=-1)
    early = request(2, 1.05, dispatched_s=1.05, error=INTERRUPTED_ERROR)
    raw = raw_of([served(0, 0.0), cut, early])
    prefill, decode = row_of(raw, "prefill"), row_of(raw, "decode")
    assert (prefill["n_finished"], prefill["n_counted"], prefill["attainment"]) == (2, 2, 1.0)
    assert (decode["n_finished"], decode["attainment"]) == (1, 1.0)
    assert prefill["failed_requests"] == 0


@given(lag=st.floats(0, 3), ttft=st.floats(0.01, 1))
def test_ttft_counts_from_the_trace_not_from_the_client(lag, ttft):
    """A client that lags must not make the engine look fast (coordinated omission)."""
    record = served(0, 5.0, lag=lag, ttft=ttft)
    raw = raw_of([record])
    columns = request_columns(raw, "prefill")
    assert columns["arrival_s"][0] == pytest.approx(5.0)
    assert columns["sent_s"][0] == pytest.approx(5.0 + lag)
    row = row_of(raw, "prefill")
    assert row["ttft_p99_s"] == pytest.approx(lag + ttft)
    assert row["ttft_p99_s"] == pytest.approx(record.ttft_s)
    assert row["attainment"] == float(record.ttft_s <= row["slo_ttft_s"] + 1e-9)


def test_without_a_prefill_engine_the_first_chunk_is_the_first_token():
    raw = raw_of([served(0, 1.0, prefill_done_s=math.nan, first_chunk_s=1.4)], prefill_url=None)
    assert request_columns(raw, "prefill")["first_token_s"].tolist() == pytest.approx([1.4])


def test_decode_has_the_requests_that_were_sent_to_it():
    requests = [
        served(0, 3.0, tpot=0.05),
        served(1, 1.0, output=1),  # no interval between tokens
        refused(2, 0.5),  # never got there
        request(3, 2.0, dispatched_s=2.0, prefill_done_s=2.5, decode_sent_s=2.6, error="x"),
    ]
    columns = request_columns(raw_of(requests), "decode")
    assert columns["arrival_s"].tolist() == pytest.approx([2.6, 3.1])
    assert columns["first_token_s"].tolist() == pytest.approx([2.6, 3.1])
    assert columns["finish_s"][1] == pytest.approx(3.1 + 0.05 * 10)
    assert columns["answered"].tolist() == [False, True]
    assert load_of(columns).tolist() == [False, True]
    row = row_of(raw_of(requests), "decode")
    assert row["tpot_p50_s"] == pytest.approx((0.05 + (row["duration_s"] - 2.6) / 10) / 2)


def test_what_never_got_to_decode_has_missed_there_too():
    """8 of 11 prefills answered 503: neither phase may show an attainment of 1."""
    requests = [served(k, 0.5 * k) for k in range(3)]
    requests += [refused(k, 0.5 * k) for k in range(3, 11)]
    raw = raw_of([*requests, refused(11, 6.0, output_tokens=1)])
    row = row_of(raw, "decode")
    assert (row["attainment"], row["n_counted"]) == (pytest.approx(3 / 11), 11)
    assert (row["n_finished"], row["n_violations"], row["failed_requests"]) == (3, 8, 9)
    assert row["tpot_p99_s"] == pytest.approx(0.02)  # of those that have one
    assert row["duration_s"] == pytest.approx(5.0)  # the last that counts was due then
    assert row_of(raw, "prefill")["attainment"] == 3 / 12
    columns = run_record(raw, "decode", 1980.0).requests
    assert columns["arrival_s"].tolist() == sorted(columns["arrival_s"].tolist())
    assert load_of(columns).sum() == 3  # the twin does not serve them


@pytest.mark.parametrize("tpot", [0.0, 5e-5])  # in one read, or in a few at once
def test_a_stream_in_one_piece_has_no_tpot(tpot):
    known, unknown = served(0, 0.0), served(1, 1.0, tpot=tpot)
    assert known.tpot_s == pytest.approx(0.02)
    assert math.isnan(unknown.tpot_s)
    assert not served(2, 0.0, output=1).in_one_piece  # has no interval anyway
    row = row_of(raw_of([known, unknown]), "decode")
    assert (row["unknown_tpot_requests"], row["n_requests"], row["n_counted"]) == (1, 2, 1)
    assert (row["attainment"], row["n_finished"], row["n_violations"]) == (1.0, 2, 0)
    assert row["tpot_p50_s"] == row["tpot_p99_s"] == pytest.approx(0.02)
    assert row["output_tokens"] == 22  # delivered they were
    alone = row_of(raw_of([unknown]), "decode")
    assert math.isnan(alone["attainment"])
    assert math.isnan(alone["tpot_p50_s"])
    assert (alone["slo_met"], alone["unknown_tpot_requests"]) == (False, 1)
    failed = served(1, 1.0, tpot=tpot, error="x")
    row = row_of(raw_of([known, failed]), "decode")
    assert (row["attainment"], row["unknown_tpot_requests"]) == (0.5, 0)


def test_a_run_of_unknown_tpots_is_no_success_in_its_report(tmp_path):
    raw = raw_of([served(k, 0.5 * k, tpot=0.0) for k in range(4)])
    with RunDirectory(tmp_path, {}) as run:
        run.add(run_record(raw, "decode", 1980.0))
    (row,) = load_run(tmp_path).summary().to_dict("records")
    assert math.isnan(row["attainment"])
    assert not row["slo_met"]
    assert slo_words(row) == "unknown"
    text = write_report(load_run(tmp_path)).read_text()
    assert "unknown" in text
    assert "100.00" not in text


def test_the_twin_judges_the_requests_that_the_measurement_judges():
    requests = [served(0, 0.0), served(1, 1.0, tpot=0.0), refused(2, 1.5), served(3, 2.0)]
    raw = raw_of(requests, decisions=[decision(1, 0.0, 1980.0)])
    rows = {a.quantity: a for a in compare(raw, 1980.0) if a.phase == "decode"}
    assert rows["attainment"].measured == rows["attainment"].simulated == pytest.approx(2 / 3)
    twin = simulated_record(raw, run_record(raw, "decode", 1980.0))
    assert results_row(twin)["n_counted"] == 3


def test_energy_and_duration_reach_to_the_last_answer():
    row = row_of(raw_of([served(0, 0.0), served(1, 9.0, ttft=1.0)]), "prefill")
    assert row["duration_s"] == pytest.approx(10.0)
    assert row["energy_j"] == pytest.approx(4 * 500.0 * 10.0)
    assert (row["n_gpus"], row["mean_power_w"]) == (4, pytest.approx(500.0))
    assert row["rate_rps"] == pytest.approx(0.2)
    late = row_of(raw_of([served(0, 0.0), refused(1, 20.0)]), "prefill")
    assert late["duration_s"] == pytest.approx(20.0)  # a run does not end before its last request


def test_timeline_of_iterations():
    iterations = [
        iteration("prefill", 7, -0.5),
        iteration("prefill", 8, 1.0, 0.2, prefill_requests=3, prefill_tokens=900, kv_use=0.25),
        iteration("prefill", 9, 2.0, 0.4, decode_requests=5, queued_requests=6),
        iteration("prefill", 10, 30.0, 0.1),
    ]
    decisions = [decision(1, 1.0, 1200.0), decision(2, 2.0, 900.0)]
    changes = [change("prefill", 1.0, 1200.0, 1.5), change("decode", 0.0, 300.0, 0.1)]
    raw = raw_of([served(0, 0.0)], iterations, decisions, changes)
    found = timeline_columns(raw, "prefill", 10.0, 1980.0)
    assert found["time_s"].tolist() == [1.0, 2.0]
    assert found["duration_s"].tolist() == pytest.approx([0.4, 8.0])
    assert found["idle_s"].tolist() == pytest.approx([0.6, 0.0])
    assert found["energy_j"].tolist() == pytest.approx([2000.0, 16000.0])
    assert found["power_w"].tolist() == pytest.approx([500.0, 500.0])
    assert found["freq_requested_mhz"].tolist() == [1200.0, 900.0]
    assert found["freq_applied_mhz"].tolist() == [1980.0, 1200.0]
    assert found["freq_effective_mhz"].tolist() == [1200.0, 1200.0]
    assert found["batch_requests"].tolist() == [3, 0]
    assert found["batch_tokens"].tolist() == [900, 0]
    assert found["queue_requests"].tolist() == [0, 6]
    assert found["kv_use"].tolist() == [0.25, 0.0]
    record = run_record(raw, "prefill", 1980.0)
    assert (record.totals["iterations"], record.totals["records_lost"]) == (4, 0)
    assert (record.totals["clock_switches"], record.labels["actuation_delay_median_s"]) == (1, 0.5)
    assert record.totals["decision_time_median_s"] == pytest.approx(0.001)
    assert record.labels["record_to_command_p99_s"] == pytest.approx(0.002)
    as_decode = [iteration("decode", 4, 1.0, decode_requests=5), iteration("decode", 7, 2.0)]
    other = raw_of([served(0, 0.0)], as_decode, decisions)
    assert timeline_columns(other, "decode", 10.0, 1980.0)["batch_tokens"].tolist() == [5, 0]
    assert run_record(other, "decode", 1980.0).totals["records_lost"] == 2


def test_clocks_and_delays_come_from_the_read_backs():
    changes = [
        change("prefill", 4.0, 900.0),  # never seen: it takes the usual time
        change("prefill", 1.0, 1200.0, 1.06),
        change("prefill", 2.0, 0.0, 2.06, cause="lease"),  # the driver's own
        change("prefill", 3.0, 600.0, 3.06, cause="guard"),  # refused, nothing changed
        change("decode", 1.0, 300.0, 1.5),
    ]
    raw = raw_of([served(0, 0.0)], changes=changes)
    times, freqs = clock_steps(raw, "prefill", 1980.0)
    assert times.tolist() == pytest.approx([1.06, 2.06, 4.06])
    assert freqs.tolist() == [1200.0, 1980.0, 900.0]
    assert delays_s(raw, "prefill").tolist() == pytest.approx([0.06])
    assert at_step(times, freqs, np.array([1.0, 1.06, 3.0, 9.0]), 5.0).tolist() == [
        5.0,
        1200.0,
        1980.0,
        900.0,
    ]


def test_the_instance_of_old_and_new_recordings():
    raw = raw_of([], tp=2, dtype="fp8")
    assert (raw.instance.tp, raw.instance.dtype) == (2, "fp8")
    old = raw.facts["settings"]
    del old["instance"]
    old |= {
        "tp": 8,
        "dtype": "bf16",
        "slo": "biscale",
        "max_seqs": 99,
        "model": "h100-sxm/llama-3.3-70b",
    }
    assert (raw.instance.tp, raw.instance.max_seqs) == (8, 99)


def test_validation_takes_the_measured_delay_and_else_the_expected_one():
    changes = [change("prefill", k, 1200.0 - 15 * k, k + 0.08) for k in range(3)]
    measured = raw_of([served(0, 0.0)], changes=changes, tp=4)
    assert plant_of(measured, "prefill").delay_s(-1) == pytest.approx(0.08)
    assert plant_of(measured, "decode").delay_s(-1) == 0.05
    with pytest.raises(BiscaleError, match="no decision was recorded for prefill"):
        simulated_record(measured, run_record(measured, "prefill", 1980.0))


def test_the_twin_gets_requests_when_the_engine_did_and_counts_as_the_measurement_does():
    requests = [
        served(0, 0.0, lag=2.0, ttft=0.05),
        refused(1, 3.0, prefill_done_s=3.01),
        served(2, 6.0, ttft=0.05),
        served(3, 9.0, ttft=0.05, error="x"),
    ]
    raw = raw_of(requests, decisions=[decision(1, 0.0, 1980.0)])
    measured = run_record(raw, "prefill", 1980.0)
    twin = simulated_record(raw, measured)
    alone_s = twin.requests["first_token_s"][2] - 6.0  # one prompt of 100 tokens, nothing beside
    assert 0.005 < alone_s < 0.2
    found = twin.requests["first_token_s"]
    assert found[0] == pytest.approx(2.0 + alone_s, rel=0.2)  # not served before it was sent
    assert np.isnan(found[[1, 3]]).all()
    assert twin.totals["duration_s"] == pytest.approx(9.0 + alone_s, rel=0.01)
    rows = {a.quantity: a for a in compare(raw, 1980.0) if a.phase == "prefill"}
    assert rows["attainment"].measured == rows["attainment"].simulated == 0.25
    assert rows["ttft_p50_s"].tolerance != rows["ttft_p99_s"].tolerance == 0.05
    assert rows["energy_j"].tolerance == 0.02
    asked = {name for name, row in rows.items() if not math.isnan(row.tolerance)}
    assert asked == {"ttft_p99_s", "energy_j"}


def test_energy_of_a_group_is_the_sum_of_its_counters():
    curve = EnergyCurve(telemetry(power_w=500.0), "prefill")
    at = curve.at(START + np.array([-5.0, 0.0, 10.25, 500.0]))
    assert at.tolist() == pytest.approx([0.0, 0.0, 4 * 500.0 * 10.25, 4 * 500.0 * 99.5])
    assert EnergyCurve(telemetry(), "other").at(3.0) == 0.0


@pytest.mark.parametrize(
    ("simulated", "tolerance", "agrees"),
    [
        (1.04, 0.05, True),
        (0.96, 0.05, True),
        (1.06, 0.05, False),
        (0.9, 0.05, False),
        (9, math.nan, True),
    ],
)
def test_agreement_is_relative_to_the_measurement(simulated, tolerance, agrees):
    row = Agreement("decode", "x", 1.0, simulated, tolerance)
    assert row.agrees is agrees
    assert row.deviation == pytest.approx(simulated - 1.0)
    assert math.isnan(Agreement("decode", "x", 0.0, 1.0).deviation)
