"""Open-loop replay of a trace against OpenAI-compatible engines, prefill and decode apart or not.

Requests leave when the trace says so, whether earlier ones are answered or not. Prompts are random
token ids of exact length (no tokenizer, no prefix hits), outputs have exact length
(``ignore_eos``). Tokens are counted by the server's ``usage``, because one chunk of a stream may
hold several tokens.

When the engine counts as gone. Either :data:`LOST_AFTER` requests in a row found no connection or
lost it, or requests are under way and no byte came from any of them for ``stall_s``. A request that
times out fails, but says nothing about the engine: under overload an engine that lives is slow.
"""

import asyncio
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import aiohttp
import msgspec
import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.traces import Trace

FIRST_ID = 10  # ids below are special tokens in most vocabularies
USAGE_TAIL = 4096  # bytes kept of the end of a stream: usage comes last
SPIN_S = 0.002
LOST_AFTER = 8  # requests in a row without a connection: the engine is gone
INTERRUPTED_ERROR = "cut off: the replay ended before the answer"
GONE_ERROR = "cut off: the engine is gone"
# Reads of one piece lie microseconds apart; the fastest decode iterations take some milliseconds
# (assumed: no engine makes two tokens within this)
PIECE_S = 1e-3
KEEP_ALIVE_S = 2.0
"""How long an idle connection is used again: uvicorn, under vLLM and SGLang, closes it after 5 s,
and a request written into a connection that is just being closed is lost."""


@dataclass(frozen=True)
class LoadSettings:
    """How to send.

    Attributes:
        decode_url: engine that streams the answer (decode pool, a router, or an engine that does
            both phases).
        prefill_url: prefill engine; None sends everything to ``decode_url``.
        model: model name; None asks the engine.
        vocabulary: token ids are drawn below this.
        seed: of the token ids.
        timeout_s: longest life of one request.
        stall_s: with requests under way and no byte from any of them for so long, the engine is
            gone.
    """

    decode_url: str
    prefill_url: str | None = None
    model: str | None = None
    vocabulary: int = 32_000
    seed: int = 0
    timeout_s: float = 600.0
    stall_s: float = 30.0

    def __post_init__(self) -> None:
        if self.vocabulary <= FIRST_ID:
            raise BiscaleError(
                f"a vocabulary of {self.vocabulary} token ids is too small: "
                f"{FIRST_ID} are left to special tokens"
            )


class RequestRecord(msgspec.Struct):
    """One request, as the client saw it.

    Times are CLOCK_MONOTONIC seconds, NaN (null) where something did not happen.

    Attributes:
        index: row of the trace.
        scheduled_s: when the trace wanted it to leave.
        dispatched_s: when it left.
        prefill_done_s: prefill engine had answered, and not with an error.
        decode_sent_s: the decode request left.
        first_chunk_s: first token of the stream.
        last_chunk_s: last token of the stream.
        prompt_tokens: asked for.
        output_tokens: asked for.
        completion_tokens: made, by the server's usage; -1 unknown.
        chunks: pieces of the stream that held tokens.
        longest_gap_s: longest time between two of them.
        error: why it failed; empty when it did not.
    """

    index: int
    scheduled_s: float
    prompt_tokens: int
    output_tokens: int
    dispatched_s: float = math.nan
    prefill_done_s: float = math.nan
    decode_sent_s: float = math.nan
    first_chunk_s: float = math.nan
    last_chunk_s: float = math.nan
    completion_tokens: int = -1
    chunks: int = 0
    longest_gap_s: float = 0.0
    error: str = ""

    @property
    def failed(self) -> bool:
        """Whether the engine failed it; the user ending the replay early is no failure."""
        return bool(self.error) and self.error != INTERRUPTED_ERROR

    @property
    def ttft_s(self) -> float:
        """From the time it should have left to its first token, s."""
        return self.first_chunk_s - self.scheduled_s

    @property
    def in_one_piece(self) -> bool:
        """Whether all tokens came at once, so that nothing is known about the time between them.

        Something on the way has buffered the stream. Its piece may be read in several parts, an
        instant apart.
        """
        came = math.isfinite(self.first_chunk_s) and self.completion_tokens > 1
        return came and self.last_chunk_s - self.first_chunk_s < PIECE_S

    @property
    def tpot_s(self) -> float:
        """Time per output token by the server's count, s.

        NaN for fewer than two tokens, and for a stream that came in one piece.
        """
        made = self.completion_tokens
        if made < 2 or self.in_one_piece:
            return math.nan
        return (self.last_chunk_s - self.first_chunk_s) / (made - 1)


class EngineGone(BiscaleError):
    """The engine stopped answering midway."""


async def _get_json(session: aiohttp.ClientSession, url: str) -> Any:
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=10)) as answer:
            if answer.status != 200:
                raise BiscaleError(
                    f"{url} answers {answer.status}: is it an OpenAI-compatible engine?"
                )
            return msgspec.json.decode(await answer.read())
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise BiscaleError(
            f"no engine answers at {url} ({error or type(error).__name__})"
        ) from None
    except msgspec.DecodeError:
        raise BiscaleError(
            f"{url} does not answer JSON: is it an OpenAI-compatible engine?"
        ) from None


async def inspect_engine(session: aiohttp.ClientSession, url: str) -> tuple[str, int]:
    """Model name and context length (0: not told) of an engine.

    Raises:
        BiscaleError: nobody answers, or something that is no engine.
    """
    listing = await _get_json(session, f"{_base(url)}/v1/models")
    try:
        entry = listing["data"][0]
        return str(entry["id"]), int(entry.get("max_model_len") or 0)
    except (KeyError, IndexError, TypeError, ValueError):
        raise BiscaleError(
            f"{url}/v1/models names no model: is it an OpenAI-compatible engine?"
        ) from None


def _base(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


async def until(due_s: float) -> None:
    """Sleep until an instant of CLOCK_MONOTONIC. The loop's timer is good to a millisecond or two.

    The rest is spent asking the time.
    """
    while (wait_s := due_s - time.monotonic()) > 0:
        await asyncio.sleep(wait_s - SPIN_S if wait_s > SPIN_S else 0)


class Replayer:
    """Replays one trace."""

    def __init__(
        self,
        trace: Trace,
        settings: LoadSettings,
        out: IO[bytes] | None = None,
        tell: Callable[[RequestRecord], None] = lambda record: None,
    ) -> None:
        """Prepare.

        Args:
            trace: what to send and when.
            settings: where and how.
            out: JSON lines, one per request as it ends.
            tell: called with every record as it ends.
        """
        self.trace, self.settings, self.out, self.tell = trace, settings, out, tell
        self.records: list[RequestRecord] = []
        self.started_s = math.nan
        self._model = settings.model or ""
        self._under_way: set[asyncio.Task[None]] = set()
        self._heard_s = 0.0
        self._failing = 0
        self._gone: EngineGone | None = None

    async def run(self) -> list[RequestRecord]:
        """Send everything, wait for everything.

        Returns:
            One record per request that left, in the order of the trace.

        Raises:
            BiscaleError: an engine does not answer at the start, or the trace does not fit its
                context.
            EngineGone: it stopped answering midway; :attr:`records` keeps what was measured.
        """
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        timeout = aiohttp.ClientTimeout(total=self.settings.timeout_s, sock_connect=10)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, read_bufsize=1 << 18
        ) as session:
            await self._check(session)
            watchdog = asyncio.create_task(self._watch())
            try:
                await self._send_all(session)
                while self._under_way and self._gone is None:
                    await asyncio.wait(self._under_way, timeout=0.2)
            finally:
                watchdog.cancel()
                for task in self._under_way:
                    task.cancel()
                await asyncio.gather(*self._under_way, return_exceptions=True)
        self.records.sort(key=lambda r: r.index)
        if self._gone is not None:
            raise self._gone
        return self.records

    async def _check(self, session: aiohttp.ClientSession) -> None:
        for url in filter(None, (self.settings.prefill_url, self.settings.decode_url)):
            name, context = await inspect_engine(session, url)
            self._model = self._model or name
            if context:
                self.trace.check_fits(context)

    async def _send_all(self, session: aiohttp.ClientSession) -> None:
        rng = np.random.default_rng(self.settings.seed)
        self.started_s = self._heard_s = time.monotonic()
        for index in range(len(self.trace)):
            prompt = rng.integers(
                FIRST_ID, self.settings.vocabulary, self.trace.prompt_tokens[index]
            ).tolist()
            due_s = self.started_s + float(self.trace.arrival_s[index])
            record = RequestRecord(index, due_s, len(prompt), int(self.trace.output_tokens[index]))
            bodies = self._bodies(prompt, record.output_tokens)
            await until(due_s)
            if self._gone is not None:
                return
            task = asyncio.create_task(self._one(session, record, *bodies))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    def _bodies(self, prompt: list[int], output_tokens: int) -> tuple[bytes | None, bytes]:
        """Encoded requests for prefill (without the hand-over) and decode.

        Encoded before they are due.
        """
        common = {"model": self._model, "prompt": prompt, "temperature": 0.0, "ignore_eos": True}
        decode = {
            **common,
            "max_tokens": output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.settings.prefill_url is None:
            return None, msgspec.json.encode(decode)
        remote = {"do_remote_decode": True, "do_remote_prefill": False}
        nothing = dict.fromkeys(
            ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
        )
        prefill = {
            **common,
            "max_tokens": 1,
            "stream": False,
            "kv_transfer_params": {**remote, **nothing},
        }
        return msgspec.json.encode(prefill), msgspec.json.encode(decode)

    async def _one(
        self,
        session: aiohttp.ClientSession,
        record: RequestRecord,
        prefill: bytes | None,
        decode: bytes,
    ) -> None:
        headers = {"Content-Type": "application/json", "X-Request-Id": uuid.uuid4().hex}
        # here and not where the task was made: answers that had come may have been served first
        record.dispatched_s = time.monotonic()
        try:
            if prefill is not None:
                params = await self._prefill(session, record, prefill, headers)
                if params is not None:  # appended, instead of encoding the prompt again
                    added = msgspec.json.encode(params)
                    decode = decode[:-1] + b',"kv_transfer_params":' + added + b"}"
            record.decode_sent_s = time.monotonic()
            await self._stream(session, record, decode, headers)
            self._failing = 0
        except asyncio.CancelledError:
            record.error = INTERRUPTED_ERROR if self._gone is None else GONE_ERROR
            self._keep(record)
            raise
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            record.error = described(error)
            self._count(error)
        self._keep(record)

    def _count(self, error: Exception) -> None:
        """Give the engine up when too many requests in a row had no connection."""
        if not lost_connection(error):
            return
        self._failing += 1
        if self._failing >= LOST_AFTER and self._gone is None:
            self._gone = EngineGone(
                f"the engine is gone: {self._failing} requests in a row failed, "
                f"the last with {described(error)}"
            )

    def _keep(self, record: RequestRecord) -> None:
        self.records.append(record)
        if self.out is not None:
            self.out.write(msgspec.json.encode(record) + b"\n")
        self.tell(record)

    async def _prefill(
        self,
        session: aiohttp.ClientSession,
        record: RequestRecord,
        body: bytes,
        headers: dict[str, str],
    ) -> dict[str, Any] | None:
        async with session.post(
            f"{_base(self.settings.prefill_url or '')}/v1/completions", data=body, headers=headers
        ) as answer:
            text = await answer.read()
            done_s = self._heard_s = time.monotonic()
            if answer.status != 200:
                raise ValueError(
                    f"prefill answered {answer.status}: {text[:200].decode(errors='replace')}"
                )
            record.prefill_done_s = done_s
            params = msgspec.json.decode(text).get("kv_transfer_params")
            return params if isinstance(params, dict) else None

    async def _stream(
        self,
        session: aiohttp.ClientSession,
        record: RequestRecord,
        body: bytes,
        headers: dict[str, str],
    ) -> None:
        async with session.post(
            f"{_base(self.settings.decode_url)}/v1/completions", data=body, headers=headers
        ) as answer:
            if answer.status != 200:
                text = await answer.read()
                raise ValueError(
                    f"decode answered {answer.status}: {text[:200].decode(errors='replace')}"
                )
            tail, last_s = b"", math.nan
            async for data in answer.content.iter_any():
                now = self._heard_s = time.monotonic()
                if b'"choices":[{' in data or b'"choices": [{' in data:
                    if record.chunks == 0:
                        record.first_chunk_s = now
                    else:
                        record.longest_gap_s = max(record.longest_gap_s, now - last_s)
                    record.chunks += 1
                    record.last_chunk_s = last_s = now
                tail = (tail + data)[-USAGE_TAIL:]
        record.completion_tokens = completion_tokens(tail)
        if record.completion_tokens != record.output_tokens:
            raise ValueError(
                f"asked for {record.output_tokens} tokens, got {record.completion_tokens}"
            )

    async def _watch(self) -> None:
        """An engine that hangs keeps its connections open; only silence tells."""
        while self._gone is None:
            await asyncio.sleep(min(1.0, self.settings.stall_s / 4))
            if not self._under_way:
                self._heard_s = time.monotonic()
            silent_s = time.monotonic() - self._heard_s
            if silent_s > self.settings.stall_s:
                self._gone = EngineGone(
                    f"the engine stopped answering: {len(self._under_way)} requests are under way, "
                    f"and nothing came for {silent_s:.0f} s"
                )


def lost_connection(error: Exception) -> bool:
    """Whether a request found no connection or lost it; a timeout of any kind is none of these.

    ``TimeoutError`` is an ``OSError``, and aiohttp's own timeouts are connection errors too.
    """
    broken = isinstance(error, aiohttp.ClientConnectionError | OSError)
    return broken and not isinstance(error, TimeoutError)


def described(error: Exception) -> str:
    """Kind and text of an error, in one line."""
    return f"{type(error).__name__}: {error}".strip(": ")


def completion_tokens(tail: bytes) -> int:
    """Tokens made, from the usage at the end of a stream; -1 when it does not say."""
    for line in reversed(tail.splitlines()):  # whichever way the server ends its lines
        payload = line.partition(b"data:")[2].strip()
        if b'"completion_tokens"' not in payload:
            continue
        try:
            return int(msgspec.json.decode(payload)["usage"]["completion_tokens"])
        except (msgspec.DecodeError, KeyError, TypeError):
            continue
    return -1


def dispatch_errors_s(records: list[RequestRecord]) -> NDArray[np.float64]:
    """How late requests left, s."""
    return np.array([r.dispatched_s - r.scheduled_s for r in records])
