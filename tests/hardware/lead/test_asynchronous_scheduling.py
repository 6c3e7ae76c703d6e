"""Records that come an iteration early: the hook counts, the controller looks ahead."""

import asyncio
import contextlib
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from virtual_engine import run_virtually, virtual_time

from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.hardware.clocks.fake_gpus import FakeState, create_state
from biscale_env.hardware.emulation.emulator import Instance, Ticket
from biscale_env.hardware.engines.hook import vllm_hook
from biscale_env.hardware.engines.hook.engine_record import Detail, EngineRecord, Scheduled
from biscale_env.hardware.loop.builder import ObservationBuilder
from biscale_env.hardware.loop.clockview import ClockView
from biscale_env.hardware.loop.lead import LeadPredictor
from biscale_env.hardware.replay.assemble import iteration_times
from biscale_env.hardware.replay.recorder import row_of
from biscale_env.policies import resolve_policy
from biscale_env.traces import Trace


class Kept:
    """Keeps every record that an engine sends."""

    active = True

    def __init__(self):
        self.records = []

    def send(self, record):
        self.records.append(record)
        return True

    def close(self):
        pass


class Steps:
    """A vLLM engine's calls of the hook, at times that the test says."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(vllm_hook.time, "monotonic", lambda: self.now)
        self.kept = Kept()
        self.watcher = vllm_hook.SchedulerWatcher(self.kept)

    def form(self, at_s, tokens=1):
        self.now = at_s
        cached = type("Cached", (), {})()
        cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens = [], [], []
        output = type("Output", (), {"finished_req_ids": set(), "num_scheduled_tokens": {}})()
        output.total_num_scheduled_tokens = tokens
        output.scheduled_new_reqs, output.scheduled_cached_reqs = [], cached
        usage = type("Usage", (), {"usage": 0.0})()
        engine = type("Engine", (), {"waiting": (), "requests": {}, "kv_cache_manager": usage})()
        return self.watcher.forms(engine, output)

    def end(self, at_s):
        self.now = at_s
        self.watcher.ends()

    def told(self):
        return [
            (r.counter_id, r.detail.ahead, r.detail.running_since_s, round(r.wall_time, 6))
            for r in self.kept.records
        ]


def test_the_hook_counts_how_far_ahead_a_record_is(monkeypatch):
    """vLLM with a queue of two batches: form, form, then a result and a batch in turn."""
    steps = Steps(monkeypatch)
    steps.form(100.0)
    steps.form(100.001)
    steps.end(100.5)
    steps.form(100.501)
    steps.end(100.8)
    steps.form(100.801)
    steps.end(101.0)
    steps.end(101.3)  # nothing to form: the last two end
    steps.form(105.0)
    assert steps.told() == [
        (1, 0, 0.0, 0.0),
        (2, 1, 100.0, 0.0),
        (3, 1, 100.5, 0.5),
        (4, 1, 100.8, 0.3),
        (5, 0, 0.0, 0.3),
    ]


def test_without_asynchronous_scheduling_no_record_is_ahead(monkeypatch):
    steps = Steps(monkeypatch)
    for k in range(4):
        steps.form(100.0 + k)
        steps.end(100.4 + k)
    assert steps.told() == [(k + 1, 0, 0.0, 0.4 if k else 0.0) for k in range(4)]


def test_empty_steps_are_passed_over_in_the_count(monkeypatch):
    """A decode engine that waits for KV: its empty steps end too."""
    steps = Steps(monkeypatch)
    steps.form(100.0)
    steps.form(100.1, tokens=0)
    steps.end(100.5)
    steps.form(100.6)
    steps.end(100.7)  # the empty step
    steps.form(100.8)
    assert [(c, ahead) for c, ahead, _, _ in steps.told()] == [(1, 0), (2, 0), (3, 1)]
    assert steps.told()[-1][2:] == (100.6, 0.5)


def test_results_that_never_come_do_not_pile_up(monkeypatch):
    steps = Steps(monkeypatch)
    for k in range(100):
        steps.form(100.0 + k)
    assert steps.kept.records[-1].detail.ahead <= vllm_hook.FLYING


def plant_of(phase, **settings):
    return Plant(PlantSettings.of(phase, actuation_delay_s=0.05, **settings))


def batch_record(counter, time_s, wall_s, ahead=1, decoding=64, cached=50_000, since_s=None):
    detail = Detail(time_s, 1.0, ahead=ahead, running_since_s=(since_s or time_s) if ahead else 0.0)
    work = Scheduled(num_decode_requests=decoding, sum_decode_kv_tokens=cached)
    return EngineRecord(
        counter_id=counter, wall_time=wall_s, scheduled_requests=work, detail=detail
    )


def test_the_lead_is_what_is_left_of_the_iteration_that_runs():
    plant = plant_of("decode")
    expected_s = float(plant.model.latency_s(64, 0.0, 50_000, 64, 1200.0))
    predictor = LeadPredictor(plant)
    assert predictor.lead_s(batch_record(1, 10.0, 0.0, ahead=0), 1200.0) == 0.0
    assert predictor.lead_s(batch_record(2, 10.0, 0.0), 1200.0) == pytest.approx(expected_s)
    late = batch_record(3, 10.5, 0.0, since_s=10.5 - 0.4 * expected_s)
    assert predictor.lead_s(late, 1200.0) == pytest.approx(0.6 * expected_s)
    overdue = batch_record(4, 11.0, 0.0, since_s=9.0)
    assert predictor.lead_s(overdue, 1200.0) == 0.0
    lost = batch_record(9, 12.0, 0.123)  # the record of number 8 was never heard
    assert predictor.lead_s(lost, 1200.0) == pytest.approx(0.123)


def test_a_machine_that_is_slower_than_its_model_is_learned():
    plant = plant_of("decode")
    expected_s = float(plant.model.latency_s(64, 0.0, 50_000, 64, 1980.0))
    predictor = LeadPredictor(plant)
    told = (batch_record(k, 10.0 + k, 1.7 * expected_s) for k in range(80))
    leads = [predictor.lead_s(record, 1980.0) for record in told]
    assert predictor.ratio == pytest.approx(1.7, rel=0.02)
    assert leads[-1] == pytest.approx(1.7 * expected_s, rel=0.02)


def state_of(plant, time_s, lead_s):
    """A record of the state at ``time_s + lead_s``, taken at ``time_s``."""
    rng, at_s = np.random.default_rng(3), time_s + lead_s
    waiting = np.column_stack(
        [at_s - rng.uniform(0, 0.4, 5), rng.integers(50, 900, 5), np.zeros(5)]
    )
    start, made = at_s - rng.uniform(1.0, 2.0, 20), rng.integers(10, 40, 20).astype(float)
    decode = plant.phase == "decode"
    return EngineRecord(
        counter_id=7,
        wall_time=0.03,
        scheduled_requests=Scheduled(num_decode_requests=20 if decode else 0),
        detail=Detail(
            time_s,
            1.0,
            waiting=b"" if decode else waiting.tobytes(),
            running_start=start.tobytes() if decode else b"",
            running_tokens=made.tobytes() if decode else b"",
            cached_tokens=30_000,
            arrived=1,
            arrived_tokens=100,
            recent=np.array([at_s - 0.5, 100.0]).tobytes(),
            ahead=int(lead_s > 0),
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("lead_s", [0.01, 0.03, 0.2])
def test_looking_ahead_sees_what_a_record_at_the_begin_would_show(phase, lead_s):
    """All but the delay, which is shorter by the lead; and the clock's view is left as it was."""
    plant = plant_of(phase)
    names = [feature.name for feature in plant.spec.features]

    def seen(record, lead):
        view = ClockView(plant.clocks, 0.05)
        view.request(1200.0, 49.97)
        kept = view.queue
        out = ObservationBuilder(plant, 0.05).observe(record, view, 300.0, lead_s=lead)
        assert view.queue == kept
        return out

    early = seen(state_of(plant, 50.0 - lead_s, lead_s), lead_s)
    at_begin = seen(state_of(plant, 50.0, 0.0), 0.0)
    differ = {names[k] for k in np.flatnonzero(~np.isclose(early, at_begin, atol=1e-6))}
    assert differ == {"actuation_delay"}
    blind = seen(state_of(plant, 50.0 - lead_s, lead_s), 0.0)
    assert len(np.flatnonzero(~np.isclose(blind, at_begin, atol=1e-6))) > 1


def test_begins_and_durations_of_iterations_whose_records_come_early():
    """Numbers 1 to 4 without a gap, an idle second, then 5 and 6."""
    begin = [10.0, 10.1, 10.3, 10.6, 12.0, 12.5]
    took = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    told = [(10.0, 0, 0.0), (10.0, 1, 0.0), (10.1, 1, 0.1), (10.3, 1, 0.2)]
    told += [(12.0, 0, 0.4), (12.0, 1, 0.4)]
    rows = [
        row_of("decode", batch_record(k + 1, t, wall, ahead=ahead), t)
        for k, (t, ahead, wall) in enumerate(told)
    ]
    begin_s, ran_s = iteration_times(rows)
    assert begin_s[[0, 1, 2, 4]] == pytest.approx(np.array(begin)[[0, 1, 2, 4]])
    assert ran_s[[0, 1, 3]] == pytest.approx(np.array(took)[[0, 1, 3]])
    plain = [row_of("decode", batch_record(k, t, 0.1, ahead=0), t) for k, t in enumerate(begin)]
    begin_s, ran_s = iteration_times(plain)
    assert begin_s.tolist() == begin
    assert ran_s.tolist() == [0.1] * 5 + [np.inf]


async def served(engine, n, output, gap_s=0.03):
    ended = [asyncio.Event() for _ in range(n)]
    task = asyncio.create_task(engine.run())
    try:
        for k in range(n):
            engine.submit(Ticket(300 + 50 * k, output, lambda: None, ended[k].set))
            await asyncio.sleep(gap_s)
        await asyncio.wait_for(asyncio.gather(*(e.wait() for e in ended)), 60)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_an_emulated_engine_that_schedules_asynchronously(tmp_path, phase):
    """Every iteration is announced once, and when it begins is predicted."""
    plant, kept = plant_of(phase, drain=True), Kept()
    n, gap_s = (8, 0.03) if phase == "decode" else (60, 0.005)
    with virtual_time() as loop:
        state = FakeState(create_state(tmp_path / "gpus", 4, delay_s=0.03))
        engine = Instance(plant, state, [0, 1, 2, 3], kept, asynchronous=True)
        kept.records.clear()
        loop.run_until_complete(served(engine, n, 40, gap_s))
    records = kept.records
    assert int(engine.st["finished"]) == n
    assert [r.counter_id for r in records] == list(
        range(records[0].counter_id, records[0].counter_id + len(records))
    )
    assert len(records) == int(engine.st["iterations"])
    ahead = np.array([r.detail.ahead for r in records])
    assert ahead[0] == 0
    assert ahead.mean() > (0.9 if phase == "decode" else 0.2)
    predictor = LeadPredictor(plant)
    errors = []
    for record, after in zip(records, [*records[1:], None], strict=True):
        lead_s = predictor.lead_s(record, 1980.0)
        assert (lead_s > 0) == bool(record.detail.ahead)
        if after is not None and record.detail.ahead and after.detail.ahead:
            # the next early record is taken when this iteration begins
            errors.append(record.detail.time_s + lead_s - after.detail.time_s)
    # prompts of a batch are taken to be alike, which is the error that is left in prefill
    assert np.abs(errors).max() < (1e-3 if phase == "decode" else 5e-3)


def test_what_is_formed_ahead_is_what_then_runs(tmp_path):
    """The announcement of an iteration and the state at its real begin agree, number by number."""
    kept, begun = Kept(), []
    plant = plant_of("decode", drain=True)

    def noted(table, n):
        if begun and begun[-1][0] == int(engine.st["iterations"]):
            begun.pop()
        begun.append(
            (int(engine.st["iterations"]), int(engine.st["batch"]), int(engine.st["cached"]))
        )
        work(table, n)

    with virtual_time() as loop:
        state = FakeState(create_state(tmp_path / "gpus", 4, delay_s=0.03))
        engine = Instance(plant, state, [0, 1, 2, 3], kept, asynchronous=True)
        kept.records.clear()
        work, engine._phase.work = engine._phase.work, noted
        loop.run_until_complete(served(engine, 6, output=25))
    real = {k: (batch, cached) for k, batch, cached in begun}
    assert len(real) >= len(kept.records)
    for k, record in enumerate(kept.records):
        s = record.scheduled_requests
        assert real[k] == (s.num_decode_requests, s.sum_decode_kv_tokens)


@pytest.mark.slow
def test_the_begin_is_predicted_within_a_tenth_of_what_is_off_without():
    """A decode instance under the slack rule, whose clock moves all the time, in virtual time."""
    rng = np.random.default_rng(5)
    n = 60
    load = Trace(
        "t",
        np.cumsum(rng.exponential(0.2, n)),
        rng.integers(100, 1500, n).astype(np.int32),
        rng.integers(20, 120, n).astype(np.int32),
        "test",
    )
    plant = plant_of("decode", drain=True)
    runs = {}
    for look_ahead in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            runs[look_ahead] = run_virtually(
                Path(folder), plant, resolve_policy("slack", plant), load, True, look_ahead
            )
    for run in runs.values():
        assert len(run.lead_error_s) > 0.8 * run.iterations
        off, naive = np.abs(run.lead_error_s), np.abs(run.naive_error_s)
        assert np.quantile(off, 0.5) < 0.1 * np.quantile(naive, 0.5)
        assert (run.latency_s <= plant.slo.tpot_s).mean() > 0.98
    assert runs[True].energy_j < 1.02 * runs[False].energy_j


def test_the_lead_costs_little():
    """Under a tenth of what a decision may take, and nothing where nothing comes early."""
    predictor = LeadPredictor(plant_of("decode"))
    early = [batch_record(k, 10.0 + 0.02 * k, 0.02) for k in range(2000)]
    plain = [
        msgspec.structs.replace(r, detail=msgspec.structs.replace(r.detail, ahead=0)) for r in early
    ]
    for records, limit_s in ((early, 1e-4), (plain, 2e-5)):
        start = time.process_time()
        for record in records:
            predictor.lead_s(record, 1200.0)
        assert (time.process_time() - start) / len(records) < limit_s
