"""Answers as engines, proxies and frameworks really give them.

Byte for byte through a real connection: split anywhere, any line ends, errors under status 200.
"""

import asyncio
import json
import math
import re

import numpy as np
import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.replay.answers import RequestRefused, StreamedAnswer, error_text
from biscale_env.hardware.replay.client import LoadSettings, Replayer
from biscale_env.hardware.replay.request_record import RequestRecord
from biscale_env.traces import Trace

TOKENS = 4
DONE = b"data: [DONE]\n\n"


def event(data, end="\n"):
    return f"data: {data if isinstance(data, str) else json.dumps(data)}{end}{end}".encode()


def token(text="a", finish=None, **more):
    return event(
        {"id": "c", "choices": [{"index": 0, "text": text, "finish_reason": finish}], **more}
    )


def usage(n):
    return event({"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": n}})


NORMAL = [*[token() for _ in range(TOKENS)], usage(TOKENS), DONE]


async def ask(parts, kind="text/event-stream", status=200, models=None, tokens=TOKENS, n=1, **more):
    """Records of ``n`` requests to a server that writes these parts; numbers are pauses, s."""

    async def completions(request):
        answer = web.StreamResponse(status=status, headers={"Content-Type": kind})
        await answer.prepare(request)
        for part in parts:
            if isinstance(part, float):
                await asyncio.sleep(part)
            elif part is None:
                request.transport.close()
                return answer
            else:
                await answer.write(part)
        return answer

    async def names(request):
        return web.json_response({"data": [{"id": "m", "max_model_len": 4096}]})

    app = web.Application()
    app.router.add_get("/v1/models", models or names)
    app.router.add_post("/v1/completions", completions)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        load = Trace("t", np.arange(n) * 0.01, np.full(n, 8), np.full(n, tokens), "test")
        return await Replayer(load, LoadSettings(url, **more)).run()
    finally:
        await runner.cleanup()


def answered(parts, **more):
    (record,) = asyncio.run(ask(parts, **more))
    return record


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), end=st.sampled_from(["\n", "\r\n", "\r"]))
def test_a_stream_may_be_split_anywhere_with_any_line_ends(data, end):
    """Also within a character, a line end, a key word."""
    texts = [event({"choices": [{"text": t}]}, end) for t in ("ä", "b", "€", "[DONE]")]
    last = {"choices": [], "usage": {"completion_tokens": 4}, "padding": "x" * 5000}
    body = b"".join([b": ping" + end.encode(), *texts, event(last, end), event("[DONE]", end)])
    cuts = data.draw(st.lists(st.integers(1, len(body) - 1), max_size=6, unique=True).map(sorted))
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    record = answered([x for piece in pieces for x in (piece, 0.002)])
    assert (record.completion_tokens, record.chunks, record.error) == (4, 4, "")


def test_pieces_of_one_byte():
    body = b"".join(NORMAL).replace(b"\n", b"\r\n")
    record = answered([bytes([b]) for b in body])
    assert (record.completion_tokens, record.chunks, record.error) == (TOKENS, TOKENS, "")


@pytest.mark.parametrize(
    "parts",
    [
        [*NORMAL[:-1]],  # no [DONE]
        [*[token() for _ in range(3)], token("a", "length", usage={"completion_tokens": 4}), DONE],
        [*[token(usage={"completion_tokens": k + 1}) for k in range(4)], DONE],  # continuous usage
        [*[token(usage=None) for _ in range(4)], usage(4.0), DONE],
        [b"event: message\nid: 7\n" + token(), *NORMAL[1:]],
        [b"\xef\xbb\xbf", *NORMAL],  # byte order mark
        [
            *NORMAL[:4],
            b'data: {"choices":[],"usage":{"completion_tokens":4}}',
        ],  # no last empty line
        [*NORMAL[:4], b'data: {"choices":[],\ndata: "usage":{"completion_tokens":"4"}}\n\n', DONE],
        [*NORMAL, b"data: {garbage after the end\n\n"],
    ],
)
def test_usual_variants_count_right(parts):
    record = answered(parts)
    assert (record.completion_tokens, record.error) == (TOKENS, "")


def test_without_usage_the_length_or_the_events_tell_the_count():
    told = answered([token("ab"), 0.01, token("cd", "length"), DONE])  # two tokens per event
    assert (told.completion_tokens, told.error) == (TOKENS, "")
    counted = answered([x for _ in range(4) for x in (token(), 0.005)] + [DONE])
    assert (counted.completion_tokens, counted.error) == (TOKENS, "")
    assert counted.tpot_s > 0.0045


def test_an_answer_that_nobody_counts_is_no_failure_but_has_no_tpot():
    record = answered([token("ab"), 0.01, token("cd"), 0.01, token("e"), DONE])
    assert (record.completion_tokens, record.error, record.uncounted) == (-1, "", True)
    assert math.isnan(record.tpot_s)
    assert math.isfinite(record.ttft_s)


def test_an_empty_first_event_is_no_token():
    record = answered([token(""), 0.2, *NORMAL])
    assert record.error == ""
    assert record.ttft_s > 0.19
    coalesced = answered([token(""), 0.2, token("abc"), 0.01, token("d"), usage(4), DONE])
    assert coalesced.ttft_s > 0.19


@pytest.mark.slow
def test_a_token_whose_text_is_held_back_is_one():
    record = answered([token(""), 0.6, token("ä"), token(), token(), usage(4), DONE])
    assert (record.chunks, record.error) == (4, "")
    assert record.ttft_s < 0.5
    assert record.longest_gap_s > 0.5
    silent = answered([*[x for _ in range(4) for x in (token(""), 0.01)], usage(4), DONE])
    assert (silent.chunks, silent.error) == (4, "")
    assert silent.tpot_s > 0.009
    one = answered([token("", "length"), usage(1), DONE], tokens=1)
    assert (one.completion_tokens, one.error) == (1, "")
    assert math.isfinite(one.ttft_s)


@pytest.mark.slow
@pytest.mark.parametrize("end", [[usage(4), DONE], [DONE]])
def test_an_empty_last_event_is_no_token(end):
    """SGLang, llama.cpp and others say in an event of its own why they ended."""
    tokens = [x for _ in range(4) for x in (token(), 0.01)]
    record = answered([*tokens, 0.6, token("", "length"), *end])
    assert (record.completion_tokens, record.chunks, record.error) == (4, 4, "")
    assert record.last_chunk_s - record.first_chunk_s < 0.5
    assert record.longest_gap_s < 0.5
    both = answered([token(""), 0.2, *tokens, 0.6, token("", "length"), *end])
    assert (both.completion_tokens, both.chunks, both.error) == (4, 4, "")
    assert both.ttft_s > 0.19
    assert both.last_chunk_s - both.first_chunk_s < 0.5


def test_a_last_token_without_text_is_one():
    """The end-of-sequence token, which ``ignore_eos`` lets be made, has no text."""
    record = answered([*[token()] * 2, 0.1, token(""), 0.1, token("", "length"), usage(4), DONE])
    assert (record.completion_tokens, record.chunks, record.error) == (4, 4, "")
    assert record.last_chunk_s - record.first_chunk_s > 0.19
    assert record.longest_gap_s > 0.09


@pytest.mark.parametrize(
    "parts",
    [
        [b"".join(NORMAL)],
        [0.1, b"".join(NORMAL)],
        [b"".join(NORMAL)[:99], b"".join(NORMAL)[99:]],
        [token("aaaa"), usage(4), DONE],
        [b"".join(NORMAL[:3]), 0.05, b"".join(NORMAL[3:])],  # most of it at once
    ],
)
def test_a_buffered_stream_has_a_count_and_no_tpot(parts):
    record = answered(parts)
    assert (record.completion_tokens, record.error) == (TOKENS, "")
    assert record.in_one_piece
    assert math.isnan(record.tpot_s)


def test_a_long_buffered_stream_is_read_in_many_parts_and_is_one_piece_all_the_same():
    n = 3000
    record = answered([b"".join([token("word " * 20)] * n), usage(n), DONE], tokens=n)
    assert (record.completion_tokens, record.error) == (n, "")
    assert record.in_one_piece


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([event({"error": {"message": "EngineCore died", "code": 500}}), DONE], "EngineCore died"),
        ([event({"object": "error", "message": "KV is full", "code": 400})], "KV is full"),
        ([event({"error": "out of memory"}), DONE], "out of memory"),
        ([b"event: error\n" + event("worker lost")], "worker lost"),
        ([b'event: error\r\ndata: {"message": "rank 3"}\r\n\r\n'], "rank 3"),
        ([event({"message": "Service overloaded"})], "Service overloaded"),
        ([token("", "abort"), usage(0), DONE], "gave the request up .'abort'"),
    ],
)
def test_an_error_within_a_stream_is_shown(parts, words):
    for before in ([], [token()]):
        record = answered([*before, *parts])
        assert record.failed
        assert re.search(words, record.error)
        assert math.isfinite(record.first_chunk_s) == bool(before)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([token(), usage(1), DONE], "asked for 4 tokens, got 1"),
        ([token(), token()], "got a stream that ended after 2 events"),
        ([token(), event("{broken"), usage(3), DONE], "got 3; it said: {broken"),
        ([token(), 0.02, None], "cut in the middle of the answer"),
        ([DONE], "after 0 events"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_says_what_it_was(parts, words):
    record = answered(parts)
    assert words in record.error
    assert record.failed


def test_a_server_that_does_not_stream_answers_in_one_piece():
    body = {"choices": [{"text": "aaaa"}], "usage": {"completion_tokens": 4}}
    record = answered([json.dumps(body).encode()], kind="application/json")
    assert (record.completion_tokens, record.error, record.in_one_piece) == (4, "", True)
    refused = answered([b'{"error": {"message": "no such model"}}'], kind="application/json")
    assert refused.error == "the engine refused under status 200: no such model"
    other = answered([b'{"status": "ok"}'], kind="application/json")
    assert "no completion" in other.error
    page = answered([b"<html>sign in</html>"], kind="text/html")
    assert page.failed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/octet-stream"])
@pytest.mark.parametrize("before", [b"", b": ping\n\n", b"\r\n", b"id: 7\n"])
def test_a_stream_is_one_whatever_it_is_called(kind, before):
    times = [x for _ in range(4) for x in (token(), 0.02)]
    record = answered([before, *times, usage(4), DONE] if before else [*times, usage(4)], kind=kind)
    assert (record.completion_tokens, record.chunks, record.error) == (4, 4, "")
    assert record.tpot_s > 0.015


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"choices": [{"text": "aaaa"}], "usage": {"completion_tokens": 4}}', ""),
        (b'\n{"error": "no such model"}', "refused under status 200: no such model"),
        (b"<html>sign in</html>", "no completion: <html>sign in</html>"),
        (b'{"response": "a", "done": false}\n{"done": true}\n', 'completion: {"response": "a"'),
    ],
)
@pytest.mark.parametrize("kind", ["text/event-stream", "text/html"])
def test_what_is_no_stream_is_shown_whatever_it_is_called(kind, body, words):
    record = answered([body[:9], 0.01, body[9:]], kind=kind)
    assert words in record.error
    assert record.failed == bool(words)
    assert record.completion_tokens == (-1 if words else 4)


def test_a_count_without_one_event_that_can_be_read_is_no_answer():
    """A bare NaN is what Python's json makes of a missing log-probability."""
    broken = b'data: {"choices": [{"text": "a", "logprobs": NaN}]}\n\n'
    record = answered([*[broken] * 4, usage(4), DONE])
    assert "it said: {" in record.error
    assert math.isnan(record.ttft_s)


def listing(body):
    async def models(request):
        return web.Response(body=body, content_type="application/json")

    return models


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"data": [{"id": "mod\xe8le"}]}'.encode("latin1"), "does not answer JSON"),
        (b'{"data": [{"id": "m", "max_model_len": NaN}]}', "does not answer JSON"),
        (b'{"data": [{"id": "m", "max_model_len": 1e400}]}', "does not answer JSON"),
        (b'{"data": [{"id": "m", "max_model_len": "long"}]}', "names no model"),
        (b'{"data": [{"id": null}]}', "names no model"),
        (b'{"data": [{"id": ""}]}', "names no model"),
        (b'{"data": [{"id": ["m"]}]}', "names no model"),
        (b'{"data": {"id": "m"}}', "names no model"),
    ],
)
def test_a_listing_that_names_no_model_is_refused_in_one_sentence(body, words):
    with pytest.raises(BiscaleError, match=words):
        answered(NORMAL, models=listing(body))


@pytest.mark.parametrize("context", [b"-1", b"0", b"null", b"4096.0", b'"4096"'])
def test_a_context_that_is_no_bound_bounds_nothing(context):
    models = listing(b'{"data": [{"id": "m", "max_model_len": %s}]}' % context)
    assert answered(NORMAL, models=models).error == ""


@pytest.mark.parametrize(
    ("status", "body", "text"),
    [
        (503, b"no healthy upstream", "decode answered 503: no healthy upstream"),
        (429, b'{"error":{"message":"rate\\n limit"}}', "decode answered 429: rate limit"),
        (404, b'{"detail":"Not Found"}', "decode answered 404: Not Found"),
        (401, b'{"error":"Unauthorized"}', "decode answered 401: Unauthorized: give its key with "),
        (500, b"", "decode answered 500: "),
    ],
)
def test_refusals_are_one_sentence_each(status, body, text):
    records = asyncio.run(ask([body], kind="application/json", status=status, n=3))
    assert len(records) == 3
    assert all(r.error.startswith(text.strip()) and "\n" not in r.error for r in records)


@pytest.mark.slow
def test_a_connection_that_stays_open_after_the_end_holds_nothing_up():
    record = answered([*NORMAL, 5.0])
    assert record.error == ""
    assert record.last_chunk_s - record.first_chunk_s < 1.0


def test_the_key_goes_with_every_request_and_its_lack_is_said():
    async def models(request):
        if request.headers.get("Authorization") != "Bearer secret":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response({"data": [{"id": "m"}]})

    with pytest.raises(
        BiscaleError, match=r"answers 401: give its key with --api-key or in OPENAI"
    ):
        answered(NORMAL, models=models)
    assert answered(NORMAL, models=models, api_key="secret").error == ""
    assert "secret" not in repr(LoadSettings("http://x", api_key="secret"))
    with pytest.raises(BiscaleError, match="no HTTP header"):
        LoadSettings("http://x", api_key="two\nlines")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ('{"error": {"message": "a", "code": 1}}', "a"),
        ('{"error": {"error": {"message": "deep"}}}', "deep"),
        ('{"detail": [{"msg": "field"}]}', '[{"msg":"field"}]'),
        ("<b>\n x </b>", "<b> x </b>"),
        ("y" * 999, "y" * 200),
        ("", ""),
    ],
)
def test_the_text_of_an_error_whoever_wrote_it(body, text):
    assert error_text(body) == text


@settings(max_examples=200, deadline=None)
@given(
    blanks=st.integers(0, 3),
    texts=st.integers(0, 5),
    made=st.integers(1, 8),
)
def test_blanks_count_as_far_as_the_count_needs_them(blanks, texts, made):
    """First token: never before the excess of blanks, never after the first text."""
    record = RequestRecord(0, 0.0, 8, made)
    answer = StreamedAnswer(record)
    data = [""] * blanks + ["x"] * texts
    for k, text in enumerate(data):
        answer.take("", json.dumps({"choices": [{"text": text}]}), 1.0 + k)
    answer.take("", json.dumps({"choices": [], "usage": {"completion_tokens": made}}), 50.0)
    try:
        answer.end()
    except RequestRefused:
        pytest.fail("usage tells that all were made")
    if not data:
        assert math.isnan(record.first_chunk_s)
        return
    first = record.first_chunk_s - 1.0
    assert 0 <= first <= min(blanks, len(data) - 1)
    if len(data) >= made:  # one event per token: the first made of them, at the end
        assert first == min(blanks, len(data) - made)
    elif texts:
        assert first == blanks
    assert record.last_chunk_s == 1.0 + len(data) - 1
    assert record.chunks == len(data) - first
