"""Engine hooks on stand-ins.

What they tell, that they never raise, never wait, and fall silent when they fail.
"""

import importlib
import importlib.util
import logging
import subprocess
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zmq

from biscale_env.hardware.engines.hook import engine_record, sglang_hook, vllm_hook, vllm_stats
from biscale_env.hardware.engines.hook.engine_record import EngineRecord
from biscale_env.hardware.engines.hook.guard import MAX_FAILURES, NOTHING, Guard, first_copy
from biscale_env.hardware.engines.hook.sender import Sender, alive_endpoint
from biscale_env.hardware.engines.hook.versions import version_note, version_tuple
from biscale_env.hardware.loop.builder import rows_of


class Keeper:
    """A sender that keeps what it is given."""

    active = True

    def __init__(self):
        self.kept = []
        self.closed = False

    def send(self, record):
        self.kept.append(engine_record.decode(engine_record.encode(record)))
        return True

    def close(self):
        self.closed = True


def request(name, prompt, arrival_ago=0.0, computed=0):
    return SimpleNamespace(
        request_id=name,
        num_prompt_tokens=prompt,
        num_tokens=prompt,
        num_computed_tokens=computed,
        arrival_time=time.time() - arrival_ago,
    )


def new(name, computed=0):
    return SimpleNamespace(req_id=name, num_computed_tokens=computed)


def cached(rows):
    return SimpleNamespace(
        req_ids=[r[0] for r in rows],
        num_computed_tokens=[r[1] for r in rows],
        num_output_tokens=[r[2] for r in rows],
    )


def output(new_reqs=(), rows=(), counts=None, finished=()):
    counts = counts or {}
    return SimpleNamespace(
        scheduled_new_reqs=list(new_reqs),
        scheduled_cached_reqs=cached(list(rows)),
        num_scheduled_tokens=counts,
        total_num_scheduled_tokens=sum(counts.values()),
        finished_req_ids=set(finished),
    )


def scheduler(requests=(), waiting=(), usage=0.5, deferred=()):
    return SimpleNamespace(
        requests={r.request_id: r for r in requests},
        waiting=list(waiting),
        kv_cache_manager=SimpleNamespace(usage=usage),
        deferred_waiting=list(deferred),
    )


def test_vllm_prefill_record_has_the_batch_first_and_then_the_queue():
    keeper = Keeper()
    watcher = vllm_hook.SchedulerWatcher(keeper)
    a, b, c, d = (
        request("a", 3000, 0.4),
        request("b", 500, 0.3),
        request("c", 700, 0.2),
        request("d", 900, 0.1),
    )
    for r in (a, b, c, d):
        watcher.arrives(r)
    # a: second chunk of a long prompt; b: new with a cached prefix of 100; c, d wait
    watcher.forms(
        scheduler([a, b, c, d], [c, d], deferred=[1, 2]),
        output([new("b", 100)], [("a", 2048, 0)], {"a": 952, "b": 400}),
    )
    (record,) = keeper.kept
    rows = rows_of(record.detail.waiting, 3)
    assert rows[:, 1].tolist() == [500, 3000, 700, 900]
    assert rows[:, 2].tolist() == [100, 2048, 0, 0]
    assert (record.detail.time_s - rows[:, 0]).tolist() == pytest.approx(
        [0.3, 0.4, 0.2, 0.1], abs=0.05
    )
    s, q = record.scheduled_requests, record.queued_requests
    assert (s.num_prefill_requests, s.sum_prefill_tokens, s.sum_prefill_kv_tokens) == (
        2,
        1352,
        2148,
    )
    assert (q.num_prefill_requests, q.sum_prefill_tokens) == (2, 1600)
    assert (record.detail.arrived, record.detail.arrived_tokens, record.detail.incoming) == (
        4,
        5100,
        2,
    )
    assert rows_of(record.detail.recent, 2)[:, 1].tolist() == [3000, 500, 700, 900]
    assert record.detail.kv_use == 0.5
    watcher.forms(scheduler([a], []), output([], [("a", 2048, 0)], {"a": 952}))
    assert rows_of(keeper.kept[1].detail.recent, 2).size == 0  # told once


def test_vllm_decode_record_has_start_and_tokens_of_every_running_request():
    keeper = Keeper()
    watcher = vllm_hook.SchedulerWatcher(keeper)
    watcher.forms(scheduler([request("a", 100)]), output([new("a", 99)], (), {"a": 1}))
    time.sleep(0.02)
    watcher.ends()
    watcher.forms(scheduler([request("a", 100)]), output((), [("a", 100, 1)], {"a": 1}))
    watcher.ends()
    time.sleep(0.02)
    watcher.forms(
        scheduler([request("a", 100), request("b", 50)]),
        output((), [("a", 101, 2), ("b", 50, 1)], {"a": 1, "b": 1}),
    )
    last = keeper.kept[-1]
    start, tokens = (
        rows_of(last.detail.running_start, 1)[:, 0],
        rows_of(last.detail.running_tokens, 1)[:, 0],
    )
    assert tokens.tolist() == [2, 1]
    assert 0.015 <= last.detail.time_s - start[0] < 2.0  # the last pause, however busy the machine
    assert start[1] == last.detail.time_s
    assert (
        last.scheduled_requests.num_decode_requests,
        last.scheduled_requests.sum_decode_kv_tokens,
    ) == (2, 151)
    assert last.detail.cached_tokens == 151
    assert 0.015 <= keeper.kept[1].wall_time < 2.0
    watcher.forms(
        scheduler([request("b", 50)]), output((), [("b", 51, 2)], {"b": 1}, finished={"a"})
    )
    assert list(watcher.starts) == ["b"]


def test_vllm_empty_steps_are_not_iterations():
    keeper = Keeper()
    watcher = vllm_hook.SchedulerWatcher(keeper)
    for _ in range(5):
        watcher.forms(scheduler(), output())
    assert keeper.kept == []


def test_vllm_a_long_queue_is_told_in_part_and_counted_in_full():
    keeper = Keeper()
    waiting = [request(f"w{k}", 100) for k in range(vllm_hook.MAX_ROWS + 40)]
    vllm_hook.SchedulerWatcher(keeper).forms(
        scheduler([request("a", 10)], waiting), output([new("a")], (), {"a": 10})
    )
    (record,) = keeper.kept
    assert record.detail.waiting_more == 40
    assert record.queued_requests.num_prefill_requests == len(waiting)
    assert record.queued_requests.sum_prefill_tokens == 100 * len(waiting)


class Base:
    """Stands for vLLM's AsyncScheduler."""

    def __init__(self, *args, **kwargs):
        self.args = args
        self.waiting = []

    def add_request(self, request):
        self.waiting.append(request)
        return "added"

    def schedule(self, throttle_prefills=False):
        return f"batch {throttle_prefills}"

    def update_from_output(self, scheduler_output, model_runner_output):
        return {0: model_runner_output}


def test_the_subclass_returns_what_vllm_returns_whatever_happens_inside(monkeypatch, tmp_path):
    monkeypatch.setenv("BISCALE_RECORDS", f"ipc://{tmp_path}/r.sock")
    made = vllm_hook.make_scheduler(Base)("config", log_stats=True)
    assert made.args == ("config",)
    for _ in range(
        MAX_FAILURES + 20
    ):  # our steps fail every time: 'batch ...' is no SchedulerOutput
        assert made.add_request("not a request") == "added"
        assert made.schedule(throttle_prefills=True) == "batch True"
        assert made.update_from_output(None, "x") == {0: "x"}
    assert made._biscale.guard.silent
    assert not made._biscale.sender.active


def test_without_addresses_the_hook_does_nothing(monkeypatch):
    monkeypatch.delenv("BISCALE_RECORDS", raising=False)
    monkeypatch.delenv("BISCALE_RECORDS_ALL", raising=False)
    made = vllm_hook.make_scheduler(Base)()
    assert not made._biscale.sender.active
    assert made.schedule() == "batch False"
    assert made._biscale.guard.failures == {}


def test_nobody_listens_and_the_engine_does_not_wait(tmp_path):
    sender = Sender(f"ipc://{tmp_path}/nobody.sock", f"ipc://{tmp_path}/all.sock")
    start = time.monotonic()
    for k in range(2000):
        sender.send(EngineRecord(counter_id=k))
    assert time.monotonic() - start < 1.0
    assert sender.failures == 0
    sender.close()
    assert not sender.send(EngineRecord())


def test_a_listener_gets_the_newest_record_and_heartbeats(tmp_path):
    endpoint = f"ipc://{tmp_path}/r.sock"
    sender = Sender(endpoint, heartbeat_s=0.02)
    for k in range(50):
        sender.send(EngineRecord(counter_id=k))
    context = zmq.Context()
    sockets = [context.socket(zmq.PULL) for _ in range(2)]
    for socket, address in zip(sockets, (endpoint, alive_endpoint(endpoint)), strict=True):
        socket.setsockopt(zmq.CONFLATE, 1)
        socket.bind(address)
    assert sockets[0].poll(2000)
    assert engine_record.decode(sockets[0].recv()).counter_id == 49
    assert sockets[1].poll(2000)
    assert abs(float(sockets[1].recv()) - time.monotonic()) < 1.0
    sender.close()
    context.destroy(0)


def test_every_record_reaches_the_recorder_even_where_the_controller_skips(tmp_path):
    sender = Sender(None, f"ipc://{tmp_path}/all.sock")
    context = zmq.Context()
    listener = context.socket(zmq.SUB)
    listener.setsockopt(zmq.SUBSCRIBE, b"")
    listener.connect(f"ipc://{tmp_path}/all.sock")
    time.sleep(0.2)
    for k in range(500):
        sender.send(EngineRecord(counter_id=k))
    got = []
    while listener.poll(200):
        got.append(engine_record.decode(listener.recv_multipart()[-1]).counter_id)
    assert got == list(range(500))
    sender.close()
    context.destroy(0)


def test_an_address_that_cannot_be_used_makes_the_hook_silent_not_the_engine_sick():
    sender = Sender("nonsense://", None)
    assert sender.dead
    assert not sender.send(EngineRecord())


def test_vllm_stat_logger():
    logger = vllm_stats.make_logger(object)(None, 0)
    keeper = Keeper()
    logger._recorder.sender = keeper
    details = SimpleNamespace(
        num_ctx_requests=2, num_ctx_tokens=500, num_generation_requests=3, elapsed_ms=41.0
    )
    stats = SimpleNamespace(iteration_details=details, num_waiting_reqs=4)
    logger.record(
        stats,
        SimpleNamespace(finished_requests=[SimpleNamespace(num_prompt_tokens=100)]),
        mm_cache_stats=None,
        engine_idx=0,
    )
    logger.record(None, None)
    logger.record(SimpleNamespace(), None)  # another version's statistics
    logger.log_engine_initialized()
    (record,) = keeper.kept
    s, q = record.scheduled_requests, record.queued_requests
    assert (
        s.num_prefill_requests,
        s.sum_prefill_tokens,
        s.num_decode_requests,
        record.wall_time,
    ) == (2, 500, 3, 0.041)
    assert (q.num_prefill_requests, q.sum_prefill_tokens) == (4, 400)
    assert logger._recorder.guard.failures == {"send": 1}


class Mode:
    def __init__(self, extend):
        self.extend = extend

    def is_extend(self):
        return self.extend


def sglang_request(name, prompt, made=0):
    return SimpleNamespace(rid=name, origin_input_ids=[0] * prompt, output_ids=[0] * made)


def test_sglang_prefill_and_decode_records():
    keeper = Keeper()
    watcher = sglang_hook.SglangWatcher(keeper)
    a, b, c = sglang_request("a", 300), sglang_request("b", 200), sglang_request("c", 50)
    batch = SimpleNamespace(
        forward_mode=Mode(True), reqs=[a, b], extend_lens=[300, 150], prefix_lens=[0, 50]
    )
    assert watcher.before_run_batch(SimpleNamespace(waiting_queue=[c]), batch) is None
    first = keeper.kept[0]
    assert rows_of(first.detail.waiting, 3)[:, 1:].tolist() == [[300, 0], [200, 50], [50, 0]]
    assert (
        first.scheduled_requests.sum_prefill_tokens,
        first.queued_requests.sum_prefill_tokens,
        first.detail.arrived,
    ) == (450, 50, 3)
    a.output_ids, b.output_ids = [1], [1, 2]
    batch = SimpleNamespace(forward_mode=Mode(False), reqs=[a, b], seq_lens_sum=503)
    watcher.before_run_batch(SimpleNamespace(waiting_queue=[]), batch)
    second = keeper.kept[1]
    assert rows_of(second.detail.running_tokens, 1)[:, 0].tolist() == [1, 2]
    assert (second.detail.cached_tokens, second.detail.arrived) == (503, 3)
    watcher._forget(SimpleNamespace(waiting_queue=[]), SimpleNamespace(reqs=[b]))
    assert set(watcher.seen) == set(watcher.starts) == {"b"}


def test_sglang_hook_never_raises_and_registers_where_it_should(monkeypatch):
    watcher = sglang_hook.SglangWatcher(Keeper())
    for _ in range(MAX_FAILURES + 5):
        watcher.before_run_batch(None, None)
    assert watcher.failures == MAX_FAILURES
    assert watcher.sender.closed
    registered = []
    module = types.ModuleType("sglang.srt.plugins.hook_registry")
    module.HookType = SimpleNamespace(BEFORE="before", AFTER="after")
    module.HookRegistry = SimpleNamespace(register=lambda *a: registered.append(a))
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", module)
    sglang_hook.register()
    sglang_hook.register()
    copy = copy_of_the_hook("sglang_hook", monkeypatch)
    copy.register()
    assert copy.__name__ == "biscale_hook.sglang_hook"
    (target, hook, kind), (ended, results, when) = registered
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    assert (target, kind) == (f"{scheduler}.run_batch", "before")
    assert (ended, when) == (f"{scheduler}.process_batch_result", "after")
    assert results("kept", None, None) is None  # before the first batch too
    assert hook(None, None) is None
    assert results("kept", None, None) is None


def empty_batches(monkeypatch):
    """A watcher of SGLang, the time it sees, and what launches a batch of nothing."""
    now, watcher = [100.0], sglang_hook.SglangWatcher(Keeper())
    monkeypatch.setattr(sglang_hook.time, "monotonic", lambda: now[0])
    batch = SimpleNamespace(forward_mode=Mode(False), reqs=[], seq_lens_sum=0)
    return (
        watcher,
        now,
        lambda: watcher.before_run_batch(SimpleNamespace(waiting_queue=[]), batch),
    )


def test_sglang_counts_batches_that_overlap(monkeypatch):
    """Its overlapped schedule launches a batch, then takes the results of the one before."""
    watcher, now, launch = empty_batches(monkeypatch)

    def at(time_s, call):
        now[0] = time_s
        call()

    def result():
        assert watcher.after_results("kept") is None

    at(100.0, launch)
    at(100.1, launch)  # no result was seen yet: whether they overlap is not known
    at(100.3, result)
    at(100.3, launch)
    at(100.6, result)
    at(100.7, launch)
    at(100.8, result)
    at(100.9, result)
    at(105.0, launch)
    kept = watcher.sender.kept
    told = [(r.detail.ahead, r.detail.running_since_s, r.wall_time) for r in kept]
    assert [ahead for ahead, _, _ in told] == [0, 0, 1, 1, 0]
    assert [since_s for _, since_s, _ in told[2:]] == pytest.approx([100.3, 100.6, 0.0])
    assert [wall_s for _, _, wall_s in told[2:]] == pytest.approx([0.3, 0.3, 0.1])


def test_sglang_without_overlap_is_never_ahead(monkeypatch):
    watcher, now, launch = empty_batches(monkeypatch)
    for _ in range(5):
        launch()
        now[0] += 0.4
        watcher.after_results("kept")
        now[0] += 0.1
    kept = watcher.sender.kept
    assert [r.detail.ahead for r in kept] == [0] * 5
    assert [r.wall_time for r in kept] == pytest.approx([0.0, 0.4, 0.4, 0.4, 0.4])


def copy_of_the_hook(name, monkeypatch):
    """A module of the hook as the separate distribution has it: under the package biscale_hook."""
    folder = Path(vllm_hook.__file__).parent
    spec = importlib.util.spec_from_file_location(
        "biscale_hook", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "biscale_hook", package)
    spec.loader.exec_module(package)
    module = importlib.import_module(f"biscale_hook.{name}")
    for loaded in [m for m in sys.modules if m.startswith("biscale_hook.")]:
        monkeypatch.setitem(sys.modules, loaded, sys.modules[loaded])
    return module


def test_two_installed_copies_of_the_stat_logger_send_each_record_once(monkeypatch, tmp_path):
    monkeypatch.setenv("BISCALE_STATS_ALL", f"ipc://{tmp_path}/stats.sock")
    base = type("StatLoggerBase", (), {})
    copy = copy_of_the_hook("vllm_stats", monkeypatch)
    loggers = [m.make_logger(base)(None, 0) for m in (copy, vllm_stats)]
    assert [logger._recorder.sender.active for logger in loggers] == [True, False]
    second_engine = copy.make_logger(base)(None, 1)
    assert second_engine._recorder.sender.active
    for logger in (*loggers, second_engine):
        logger._recorder.sender.close()
    assert first_copy(object(), "x")  # takes no mark: nothing to share


class Warnings(logging.Handler):
    """Counts what the hook says."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.lines = []
        log = logging.getLogger("biscale_hook")
        log.addHandler(self)
        monkeypatch.setattr(log, "propagate", False)

    def emit(self, record):
        self.lines.append(record.getMessage())


def iterate(made, n, batch):
    for _ in range(n):
        made.batch = batch
        made.schedule()
        made.update_from_output(None, None)


class Newer(Base):
    """A scheduler of a version that lacks an attribute the hook reads."""

    def schedule(self, throttle_prefills=False):
        return self.batch


def test_a_hook_that_fails_in_every_iteration_says_so_twice_and_falls_silent(monkeypatch, tmp_path):
    """A step that works (the end of an iteration) does not excuse one that fails (its record)."""
    endpoint = f"ipc://{tmp_path}/r.sock"
    monkeypatch.setenv("BISCALE_RECORDS", endpoint)
    told = Warnings(monkeypatch)
    made = vllm_hook.make_scheduler(Newer)()
    said = len(told.lines)
    incomplete = SimpleNamespace(finished_req_ids=set(), total_num_scheduled_tokens=5)
    empty = SimpleNamespace(finished_req_ids=set(), total_num_scheduled_tokens=0)
    for _ in range(MAX_FAILURES - 1):
        iterate(made, 1, incomplete)
        iterate(made, 2, empty)  # nothing to do is no success
    assert len(told.lines) == said + 1
    assert made._biscale.sender.active
    iterate(made, 50, incomplete)
    assert len(told.lines) == said + 2
    assert "silent after 100 failures" in told.lines[-1]
    assert made._biscale.guard.silent
    assert not made._biscale.sender.active
    assert made._biscale.counter == made._biscale.failures == MAX_FAILURES
    beats = zmq.Context()  # a silent hook must not keep the lease of the clock alive
    socket = beats.socket(zmq.PULL)
    socket.bind(alive_endpoint(endpoint))
    while socket.poll(500):
        last = float(socket.recv())
        assert time.monotonic() - last < 5
        assert not socket.poll(600)
    beats.destroy(0)


def test_failures_now_and_then_are_told_once_and_serving_goes_on(monkeypatch):
    told = Warnings(monkeypatch)
    guard = Guard("x")

    def step(good):
        if not good:
            raise KeyError("y")

    for k in range(5 * MAX_FAILURES):
        guard.run(step, k % MAX_FAILURES == 0)
    assert guard.failures == {"step": MAX_FAILURES - 1}
    assert not guard.silent
    assert len(told.lines) == 1
    guard.run(lambda: NOTHING)
    guard.run(step, False)
    assert guard.silent


def test_a_guard_whose_silence_fails_too_does_not_raise(monkeypatch):
    told = Warnings(monkeypatch)

    def bad():
        raise OSError("z")

    guard = Guard("x", bad)
    for _ in range(MAX_FAILURES + 3):
        guard.run(bad)
    assert guard.failures == {"bad": MAX_FAILURES}
    assert len(told.lines) == 3


def test_a_sender_that_cannot_send_stops_its_heartbeats_too(tmp_path):
    sender = Sender(f"ipc://{tmp_path}/r.sock")
    for _ in range(MAX_FAILURES + 1):
        assert not sender.send(object())
    assert (sender.dead, sender.failures) == (True, MAX_FAILURES)
    assert sender._stop.is_set()


@pytest.mark.parametrize(
    ("version", "parts"),
    [("0.33.0", (0, 33, 0)), ("0.33.1rc2", (0, 33, 1)), ("1.0+cpu", (1, 0)), ("dev", ())],
)
def test_versions_are_read(version, parts):
    assert version_tuple(version) == parts


@pytest.mark.parametrize(
    ("engine", "version", "silent"),
    [
        ("vllm", "0.31.2", True),
        ("vllm", "0.33.0", True),
        ("vllm", "0.34.0", False),
        ("vllm", "0.9", False),
        ("sglang", "0.5.23", True),
        ("other", "9", True),
    ],
)
def test_unknown_engine_versions_get_a_note(engine, version, silent):
    note = version_note(engine, version)
    assert (note == "") == silent
    if note:
        assert engine in note


def test_the_hooks_import_nothing_heavy():
    """Inside an engine's environment there need be no numba, casadi, pandas ..."""
    heavy = {
        "numba",
        "scipy",
        "pandas",
        "casadi",
        "pydantic",
        "platformdirs",
        "yaml",
        "torch",
        "aiohttp",
        "pynvml",
    }
    hooks = ", ".join(
        f"biscale_env.hardware.engines.hook.{name}"
        for name in ("vllm_hook", "vllm_stats", "sglang_hook")
    )
    code = (
        f"import sys; import {hooks}; print(sorted({{m.split('.')[0] for m in sys.modules}} &"
        f" {heavy}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tables_are_float64_rows():
    assert np.frombuffer(engine_record.table([1, 2.5]), dtype=np.float64).tolist() == [1.0, 2.5]
