"""The replayer against a small engine of our own making.

What it sends, when, what it measures, and engines that misbehave.
"""

import asyncio
import contextlib
import json
import math
import threading
import time

import aiohttp
import numpy as np
import pytest
from aiohttp import web

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.replay.answers import RequestRefused
from biscale_env.hardware.replay.client import LoadSettings, Replayer, dispatch_errors_s
from biscale_env.hardware.replay.engine_health import (
    LOST_AFTER,
    EngineGone,
    EngineHealth,
    lost_connection,
)
from biscale_env.hardware.replay.request_record import GONE_ERROR, INTERRUPTED_ERROR
from biscale_env.traces import Trace


class Engine:
    """An OpenAI-compatible engine in a thread; the test says how it behaves."""

    def __init__(self):
        self.seen = []
        self.behaviour = "good"
        self.token_s = 0.002
        self.per_chunk = 1
        self.max_model_len = 4096
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait(5)

    def _run(self):
        asyncio.run(self._main())

    async def _main(self):
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.completions)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    def close(self):
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)

    async def models(self, request):
        return web.json_response(
            {"data": [{"id": "stand-in", "max_model_len": self.max_model_len}]}
        )

    async def completions(self, request):
        body = await request.json()
        self.seen.append((time.monotonic(), body, request.headers.get("X-Request-Id")))
        if self.behaviour == "overloaded":
            await asyncio.sleep(30)
        if self.behaviour == "error":
            return web.json_response({"error": "no"}, status=503)
        if not body.get("stream"):
            return web.json_response(
                {
                    "choices": [{}],
                    "kv_transfer_params": {"do_remote_prefill": True, "remote_block_ids": [7]},
                }
            )
        response = web.StreamResponse()
        await response.prepare(request)
        tokens = body["max_tokens"] - (1 if self.behaviour == "short" else 0)
        for first in range(0, tokens, self.per_chunk):
            await asyncio.sleep(self.token_s)
            text = "x" * min(self.per_chunk, tokens - first)
            await response.write(
                b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n"
            )
            if self.behaviour == "hang" and first > 1:
                await asyncio.sleep(30)
            if self.behaviour == "cut" and first > 1:
                request.transport.close()
                return response
        usage = {"choices": [], "usage": {"completion_tokens": tokens}}
        await response.write(b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n")
        return response


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.close()


def trace(n=6, gap=0.02, prompt=50, output=5):
    return Trace(
        "t", np.arange(n) * gap, np.full(n, prompt, np.int32), np.full(n, output, np.int32), "test"
    )


def replay(load, engine, prefill=None, **settings):
    replayer = Replayer(
        load, LoadSettings(engine.url, prefill.url if prefill else None, **settings)
    )
    return replayer, asyncio.run(replayer.run())


def test_requests_leave_on_time_with_exact_lengths(engine):
    replayer, records = replay(trace(), engine, vocabulary=100)
    assert [r.index for r in records] == list(range(6))
    assert not any(r.error for r in records)
    arrived = np.array([t for t, _, _ in engine.seen]) - replayer.started_s
    assert np.allclose(arrived, np.arange(6) * 0.02, atol=0.02)
    assert (dispatch_errors_s(records) >= 0).all()
    for _, body, _ in engine.seen:
        assert (len(body["prompt"]), body["max_tokens"], body["ignore_eos"]) == (50, 5, True)
        assert 10 <= min(body["prompt"]) <= max(body["prompt"]) < 100
    assert engine.seen[0][1]["prompt"] != engine.seen[1][1]["prompt"]  # no prefix hits
    assert engine.seen[0][1]["model"] == "stand-in"


@pytest.mark.slow
def test_open_loop_a_slow_engine_does_not_hold_requests_back(engine):
    engine.token_s = 0.2
    _, records = replay(trace(5, 0.02, output=3), engine)
    assert records[0].last_chunk_s > records[-1].dispatched_s
    assert np.diff([r.dispatched_s for r in records]).max() < 0.1


def test_tpot_counts_tokens_not_chunks(engine):
    engine.per_chunk, engine.token_s = 5, 0.05
    _, (record,) = replay(trace(1, output=20), engine)
    assert (record.chunks, record.completion_tokens) == (4, 20)
    assert record.tpot_s == pytest.approx((record.last_chunk_s - record.first_chunk_s) / 19)
    assert record.tpot_s == pytest.approx(3 * 0.05 / 19, rel=0.3)
    assert record.longest_gap_s == pytest.approx(0.05, rel=0.5)
    assert record.ttft_s == pytest.approx(record.first_chunk_s - record.scheduled_s)


def test_a_buffered_stream_has_no_tpot(engine):
    engine.per_chunk = 20
    _, (record,) = replay(trace(1, output=20), engine)
    assert (record.completion_tokens, record.error) == (20, "")
    assert record.in_one_piece
    assert math.isnan(record.tpot_s)


def test_the_hand_over_between_prefill_and_decode(engine):
    prefill = Engine()
    try:
        _, records = replay(trace(3), engine, prefill)
    finally:
        prefill.close()
    assert not any(r.error for r in records)
    for (_, p, p_id), (_, d, d_id) in zip(
        sorted(prefill.seen, key=lambda s: s[2]),
        sorted(engine.seen, key=lambda s: s[2]),
        strict=True,
    ):
        assert p_id == d_id
        assert (p["max_tokens"], p["stream"], p["kv_transfer_params"]["do_remote_decode"]) == (
            1,
            False,
            True,
        )
        assert "stream_options" not in p
        assert p["kv_transfer_params"]["remote_block_ids"] is None
        assert d["kv_transfer_params"] == {"do_remote_prefill": True, "remote_block_ids": [7]}
        assert d["prompt"] == p["prompt"]
        assert d["max_tokens"] == 5
    assert all(
        r.dispatched_s < r.prefill_done_s <= r.decode_sent_s < r.first_chunk_s <= r.last_chunk_s
        for r in records
    )


def test_a_wrong_number_of_tokens_is_an_error(engine):
    engine.behaviour = "short"
    _, records = replay(trace(2), engine)
    assert [r.error for r in records] == ["asked for 5 tokens, got 4"] * 2


def test_an_engine_that_refuses_is_on_record(engine):
    engine.behaviour = "error"
    _, records = replay(trace(3), engine)
    assert all("503" in r.error for r in records)
    assert all(math.isnan(r.first_chunk_s) for r in records)


def test_a_trace_beyond_the_context_is_refused_before_anything_is_sent(engine):
    engine.max_model_len = 52
    with pytest.raises(BiscaleError, match="do not fit into 52"):
        replay(trace(), engine)
    assert engine.seen == []


def test_a_vocabulary_of_special_tokens_only_is_refused():
    with pytest.raises(BiscaleError, match="too small"):
        LoadSettings("http://x", vocabulary=10)


def test_nobody_there_is_said_plainly(engine):
    url = engine.url
    engine.close()
    with pytest.raises(BiscaleError, match=f"no engine answers at {url}"):
        asyncio.run(Replayer(trace(), LoadSettings(url)).run())


@pytest.mark.slow
def test_an_engine_that_hangs_is_given_up_and_what_was_measured_is_kept(engine):
    engine.behaviour = "hang"
    replayer = Replayer(trace(4), LoadSettings(engine.url, stall_s=0.6))
    start = time.monotonic()
    with pytest.raises(EngineGone, match="stopped answering: 4 requests"):
        asyncio.run(replayer.run())
    assert time.monotonic() - start < 5
    assert len(replayer.records) == 4
    assert all(r.error == GONE_ERROR and r.failed and r.chunks > 1 for r in replayer.records)


def test_an_engine_that_dies_midway_is_given_up(engine):
    replayer = Replayer(trace(60, 0.02), LoadSettings(engine.url, stall_s=5))

    def die():
        time.sleep(0.3)
        engine.close()

    threading.Thread(target=die).start()
    with pytest.raises(EngineGone, match="requests in a row failed"):
        asyncio.run(replayer.run())
    answered = [r for r in replayer.records if not r.error]
    assert 3 < len(answered) < 40


def test_timeouts_in_a_row_are_an_overloaded_engine_not_a_lost_one(engine):
    """TimeoutError is an OSError: eight of them once were "the engine is gone"."""
    engine.behaviour = "overloaded"
    n = 2 * LOST_AFTER
    _, records = replay(trace(n, 0.01), engine, timeout_s=0.3, stall_s=30)
    assert len(records) == n
    assert all(r.failed and r.error.startswith("TimeoutError") for r in records)


def test_one_answer_among_lost_connections_says_that_the_engine_lives():
    health = EngineHealth(stall_s=30.0)
    for _ in range(LOST_AFTER - 1):
        health.failed(ConnectionRefusedError(), 0.0)
    health.served()
    for _ in range(LOST_AFTER - 1):
        health.failed(ConnectionResetError("x"), 0.0)
    assert health.gone is None
    health.failed(ConnectionResetError("x"), 0.0)
    assert "8 requests in a row failed" in str(health.gone)


def test_refusals_alone_for_the_stated_time_mean_that_the_engine_is_gone():
    """Not one refusal more or less, not while a stream goes on, and timeouts say nothing."""
    health, no = EngineHealth(stall_s=10.0), RequestRefused("decode answered 503: no upstream")
    for now in (100.0, 104.0, 109.9):
        health.failed(no, now)
    health.failed(TimeoutError(), 111.0)
    assert health.gone is None
    health.served()
    for now in (200.0, 205.0):
        health.failed(no, now)
    health.failed(no, 215.0, last_token_s=206.0)  # somebody's tokens still come
    assert health.gone is None
    health.failed(no, 216.0, last_token_s=206.0)
    assert str(health.gone) == (
        "the engine is gone: for 10 s it refused every request, 4 in all, "
        "the last with decode answered 503: no upstream"
    )
    rare = EngineHealth(stall_s=10.0)  # two refusals far apart are no row
    rare.failed(no, 0.0)
    rare.failed(no, 60.0)
    assert rare.gone is None


@pytest.mark.slow
def test_an_engine_that_refuses_midway_is_given_up_after_the_stated_time(engine):
    replayer = Replayer(trace(100, 0.05, output=2), LoadSettings(engine.url, stall_s=0.6))
    threading.Timer(0.5, setattr, (engine, "behaviour", "error")).start()
    with pytest.raises(EngineGone, match=r"refused every request.*decode answered 503: no"):
        asyncio.run(replayer.run())
    refused = [r for r in replayer.records if r.failed]
    assert 10 <= len(refused) <= 20  # 0.6 s of them, at twenty per second
    assert len(replayer.records) - len(refused) >= 5
    assert all(r.error.startswith("decode answered 503") for r in refused)


@pytest.mark.slow
def test_an_engine_that_refuses_while_it_serves_others_is_not_gone(engine):
    """A full engine: one long answer goes on for longer than the stated time of refusals."""
    n, seconds = 14, 0.1
    outputs = np.array([40, *[2] * (n - 1)])
    load = Trace("t", np.arange(n) * seconds, np.full(n, 8), outputs, "test")
    engine.token_s = 0.04
    replayer = Replayer(load, LoadSettings(engine.url, stall_s=0.5))
    threading.Timer(0.05, setattr, (engine, "behaviour", "error")).start()
    records = asyncio.run(replayer.run())
    assert [r.index for r in records if not r.failed] == [0]
    refused_s = records[-1].scheduled_s - records[1].scheduled_s
    assert refused_s > 2 * replayer.settings.stall_s
    assert replayer._active == {}


@pytest.mark.slow
def test_refusals_in_between_are_counted_and_nothing_else(engine):
    replayer = Replayer(trace(40, 0.05, output=2), LoadSettings(engine.url, stall_s=0.3))
    flips = [
        threading.Timer(t, setattr, (engine, "behaviour", b))
        for t, b in ((0.5, "error"), (0.7, "good"), (1.0, "error"), (1.2, "good"))
    ]
    for flip in flips:
        flip.start()
    records = asyncio.run(replayer.run())
    assert len(records) == 40
    assert 4 <= sum(r.failed for r in records) <= 14


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (TimeoutError(), False),
        (aiohttp.ServerTimeoutError("read"), False),
        (aiohttp.ConnectionTimeoutError("connect"), False),
        (ConnectionRefusedError(), True),
        (ConnectionResetError(), True),
        (aiohttp.ServerDisconnectedError(), True),
        (aiohttp.ClientPayloadError("cut"), False),
        (ValueError("503"), False),
    ],
)
def test_what_counts_towards_a_lost_engine(error, lost):
    assert lost_connection(error) is lost


def test_a_refused_prefill_has_no_prefill_time(engine):
    prefill = Engine()
    prefill.behaviour = "error"
    try:
        _, records = replay(trace(2), engine, prefill)
    finally:
        prefill.close()
    assert engine.seen == []
    for r in records:
        assert "prefill answered 503" in r.error
        assert math.isnan(r.prefill_done_s)
        assert math.isnan(r.decode_sent_s)


def test_requests_that_the_user_cut_off_did_not_fail(engine):
    engine.behaviour = "hang"
    replayer = Replayer(trace(2), LoadSettings(engine.url))

    async def interrupted():
        task = asyncio.create_task(replayer.run())
        await asyncio.sleep(0.5)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted())
    assert [(r.error, r.failed) for r in replayer.records] == [(INTERRUPTED_ERROR, False)] * 2


def test_every_request_is_written_as_it_ends(engine, tmp_path):
    with (tmp_path / "r.jsonl").open("wb") as out:
        told = []
        replayer = Replayer(trace(3), LoadSettings(engine.url), out, told.append)
        asyncio.run(replayer.run())
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert {r["index"] for r in rows} == {r.index for r in told} == {0, 1, 2}
