"""What an engine's answer says: tokens and their times, usage, and errors under whatever status.

Events are parsed by ``httpx-sse``, so it makes no difference where a read ends or which line ends
the server uses. What is counted as a token: an event with text. An event without text may be a
token whose text is held back (half a character), or nothing (some servers and proxies open or close
the stream so); the server's count decides, see :meth:`StreamedAnswer.end`.
"""

import asyncio
import codecs
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar, cast

import aiohttp
import httpx
import msgspec
from httpx_sse import EventSource

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.engines.http_access import KEY_HINT
from biscale_env.hardware.replay.request_record import RequestRecord

DONE = "[DONE]"
TEXT_LENGTH = 200  # of a foreign error that is passed on
DRAIN_S = 1.0  # how long the end of the connection is waited for after the end of the stream
BROKEN_FINISHES = ("error", "abort", "cancelled")
STREAM_BEGINS = ":deir"  # a comment, data, event, id or retry: the fields of an event stream


class RequestRefused(BiscaleError):
    """The engine answered something else than the tokens that were asked for."""


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: float | None = None


class _Event(msgspec.Struct):
    """Keys of a completion or of one event of its stream, as far as they matter here."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None
    object: str | None = None
    message: str | None = None


_events = msgspec.json.Decoder(_Event, strict=False)


def error_text(body: str) -> str:
    """What an error body says, in one line, whoever wrote it (engine, proxy, framework)."""
    try:
        data: Any = msgspec.json.decode(body)
    except msgspec.DecodeError:
        data = body
    for _ in range(3):
        if not isinstance(data, dict):
            break
        found = next((data[k] for k in ("error", "message", "detail") if data.get(k)), None)
        if found is None:
            break
        data = found
    text = data if isinstance(data, str) else msgspec.json.encode(data).decode()
    return " ".join(text.split())[:TEXT_LENGTH]


def refusal(phase: str, status: int, body: str) -> RequestRefused:
    """The refusal behind an HTTP status, in one sentence."""
    hint = f": {KEY_HINT}" if status in (401, 403) else ""
    return RequestRefused(f"{phase} answered {status}: {error_text(body)}{hint}")


def error_of(event: _Event) -> str:
    """Error that an event or a body reports under status 200; empty when it reports none."""
    if event.error:
        return error_text(msgspec.json.encode(event.error).decode())
    if event.object == "error" or (event.choices is None and event.message):
        return error_text(event.message or event.object or "")
    return ""


class StreamedAnswer:
    """Puts what the events of one stream say into the record of its request."""

    def __init__(self, record: RequestRecord) -> None:
        """Begin with nothing heard."""
        self.record = record
        self.done = False
        self._blank_s: list[float] = []  # events without text ahead of the first text
        self._tail_s: list[float] = []  # and behind the newest text
        self._usage = -1
        self._finish = ""
        self._broken = ""

    def take(self, kind: str, data: str, now: float) -> None:
        """Take one event.

        Args:
            kind: the event's own name; ``error`` makes it an error whatever it holds.
            data: its data.
            now: when the read that completed it returned, s.

        Raises:
            RequestRefused: the event reports an error.
        """
        if data.strip() == DONE:
            self.done = True
        if self.done or not data:
            return
        if kind == "error":
            raise RequestRefused(f"the engine broke the stream off: {error_text(data)}")
        try:
            event = _events.decode(data)
        except (msgspec.DecodeError, UnicodeError):
            self._broken = self._broken or error_text(data)
            return
        if reported := error_of(event):
            raise RequestRefused(f"the engine broke the stream off: {reported}")
        self._count(event, now)

    def _count(self, event: _Event, now: float) -> None:
        if event.usage is not None and event.usage.completion_tokens is not None:
            self._usage = int(event.usage.completion_tokens)
        if not event.choices:
            return
        choice = event.choices[0]
        self._finish = choice.finish_reason or self._finish
        if not choice.text:
            (self._tail_s if self.record.chunks else self._blank_s).append(now)
            return
        for at_s in (*self._tail_s, now):
            self._token(at_s)
        self._tail_s.clear()

    def _token(self, now: float) -> None:
        record = self.record
        if record.chunks == 0:
            record.first_chunk_s = now
        else:
            record.longest_gap_s = max(record.longest_gap_s, now - record.last_chunk_s)
        record.first_piece_chunks += now == record.first_chunk_s
        record.chunks += 1
        record.last_chunk_s = now

    def end(self) -> None:
        """The stream has ended: settle count and first token.

        Without a usage the count is known where the server says that the length was reached, and
        where there were as many events with tokens as tokens were asked for. Events without text
        ahead of the first text, and those behind the last one, were tokens as far as the count
        needs them; where events hold several tokens nothing can be said, and the first text counts
        as the first token.

        Raises:
            RequestRefused: the engine gave the request up, or made another number of tokens.
        """
        record = self.record
        made, later = self._usage, record.chunks + len(self._tail_s)
        counted = record.output_tokens in (len(self._blank_s) + later, later, record.chunks)
        if made < 0 and (self._finish == "length" or counted):
            made = record.output_tokens
        record.completion_tokens = made
        self._settle_blanks(made if made >= 0 else record.output_tokens)
        if self._finish in BROKEN_FINISHES:
            raise RequestRefused(f"the engine gave the request up ('{self._finish}')")
        if made < 0 and (self.done or self._finish) and record.chunks and not self._broken:
            return  # answered, by an engine that does not count
        if made != record.output_tokens or (self._broken and not record.chunks):
            got = f"{made}" if made >= 0 else f"a stream that ended after {record.chunks} events"
            why = f"; it said: {self._broken}" if self._broken else ""
            raise RequestRefused(f"asked for {record.output_tokens} tokens, got {got}{why}")

    def _settle_blanks(self, made: int) -> None:
        record, blanks, tail = self.record, self._blank_s, self._tail_s
        events = len(blanks) + record.chunks + len(tail)
        excess = max(events - made, 0)
        empty = min(excess, len(blanks))
        if events < made and record.chunks:
            empty = len(blanks)
        for at_s in tail[: max(len(tail) - max(excess - len(blanks), 0), 0)]:
            self._token(at_s)
        counted = blanks[empty:]
        if not counted:
            return
        times = [*counted, record.first_chunk_s] if record.chunks else counted
        gaps = [b - a for a, b in itertools.pairwise(times)]
        record.longest_gap_s = max(record.longest_gap_s, *gaps, 0.0)
        if not record.chunks:
            record.last_chunk_s = counted[-1]
        elif record.first_chunk_s != counted[0]:
            record.first_piece_chunks = 0
        record.first_chunk_s = counted[0]
        record.first_piece_chunks += sum(t == counted[0] for t in counted)
        record.chunks += len(counted)

    def whole(self, body: str, now: float) -> None:
        """Take an answer that is no stream though one was asked for: all tokens came at once.

        Raises:
            RequestRefused: it is an error, or no completion.
        """
        try:
            event = _events.decode(body)
        except (msgspec.DecodeError, UnicodeError):
            event = _Event()
        if reported := error_of(event):
            raise RequestRefused(f"the engine refused under status 200: {reported}")
        if not event.choices:
            raise RequestRefused(f"the engine answered no completion: {error_text(body)}")
        self._count(event, now)
        self.end()


class _Pieces:
    """An aiohttp answer as the event source of httpx-sse reads one: text, piece by piece."""

    headers: ClassVar = {"content-type": "text/event-stream"}  # whatever the server calls it

    def __init__(self, answer: aiohttp.ClientResponse, heard: Callable[[float], None]) -> None:
        self._content, self._heard = answer.content, heard
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self._ahead = ""
        self.read_s = time.monotonic()

    async def _read(self) -> str:
        """Text of the next read; empty at the end."""
        while data := await self._content.readany():
            self.read_s = time.monotonic()
            self._heard(self.read_s)
            if text := self._decoder.decode(data):
                return text
        return ""

    async def begin(self) -> str:
        """First character that is no white space; it stays to be read. Empty: there is none."""
        while not self._ahead.strip() and (text := await self._read()):
            self._ahead += text
        return self._ahead.lstrip()[:1]

    async def aiter_text(self) -> AsyncIterator[str]:
        """Text of every read; an empty line at the end completes an event that has none."""
        if self._ahead:
            yield self._ahead
        while text := await self._read():
            yield text
        yield "\n\n"


async def read_stream(
    answer: aiohttp.ClientResponse, record: RequestRecord, heard: Callable[[float], None]
) -> None:
    """Read an answer to its end, into the record of its request.

    Whether it is a stream is told by how it begins: servers and proxies name it as they like.

    Args:
        answer: with status 200, nothing read yet.
        record: of its request.
        heard: told the time of every read, s.

    Raises:
        RequestRefused: it holds an error, or something else than the tokens asked for.
    """
    taken = StreamedAnswer(record)
    pieces = _Pieces(answer, heard)
    if await pieces.begin() not in STREAM_BEGINS:
        body = "".join([text async for text in pieces.aiter_text()])
        taken.whole(body, pieces.read_s)
        return
    async with contextlib.aclosing(EventSource(cast(httpx.Response, pieces)).aiter_sse()) as events:
        async for event in events:
            taken.take(event.event, event.data, pieces.read_s)
            if taken.done:
                break
    taken.end()
    with contextlib.suppress(TimeoutError, aiohttp.ClientError):  # for the next request's sake
        async with asyncio.timeout(DRAIN_S):
            await answer.content.read()
