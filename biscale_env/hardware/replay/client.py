"""Open-loop replay of a trace against OpenAI-compatible engines, prefill and decode apart or not.

Requests leave when the trace says so, whether earlier ones are answered or not. Prompts are random
token ids of exact length (no tokenizer, no prefix hits), outputs have exact length
(``ignore_eos``). Tokens are counted by the server's ``usage``, because one chunk of a stream may
hold several tokens.
"""

import asyncio
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

import aiohttp
import msgspec
import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.engines.http_access import KEY_HINT, base_url, key_headers
from biscale_env.hardware.replay.answers import RequestRefused, error_text, read_stream, refusal
from biscale_env.hardware.replay.engine_health import EngineHealth, described
from biscale_env.hardware.replay.request_record import (
    GONE_ERROR,
    INTERRUPTED_ERROR,
    RequestRecord,
)
from biscale_env.traces import Trace

FIRST_ID = 10  # ids below are special tokens in most vocabularies
SPIN_S = 0.002
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
        stall_s: silence, or nothing but refusals, after which the engine is gone
            (:mod:`~biscale_env.hardware.replay.engine_health`).
        api_key: sent to both engines; None sends none.
    """

    decode_url: str
    prefill_url: str | None = None
    model: str | None = None
    vocabulary: int = 32_000
    seed: int = 0
    timeout_s: float = 600.0
    stall_s: float = 30.0
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.vocabulary <= FIRST_ID:
            raise BiscaleError(
                f"a vocabulary of {self.vocabulary} token ids is too small: "
                f"{FIRST_ID} are left to special tokens"
            )
        key_headers(self.api_key)


async def _get_json(session: aiohttp.ClientSession, url: str) -> Any:
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=10)) as answer:
            if answer.status in (401, 403):
                raise BiscaleError(f"{url} answers {answer.status}: {KEY_HINT}")
            if answer.status != 200:
                raise BiscaleError(
                    f"{url} answers {answer.status}: is it an OpenAI-compatible engine?"
                )
            return msgspec.json.decode(await answer.read())
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise BiscaleError(
            f"no engine answers at {url} ({error or type(error).__name__})"
        ) from None
    except (msgspec.DecodeError, UnicodeError):
        raise BiscaleError(
            f"{url} does not answer JSON: is it an OpenAI-compatible engine?"
        ) from None


async def inspect_engine(session: aiohttp.ClientSession, url: str) -> tuple[str, int]:
    """Model name and context length (0: not told) of an engine.

    Raises:
        BiscaleError: nobody answers, or something that is no engine.
    """
    listing = await _get_json(session, f"{base_url(url)}/v1/models")
    try:
        entry = listing["data"][0]
        name, context = entry["id"], int(entry.get("max_model_len") or 0)
        if not name or not isinstance(name, str):
            raise TypeError
        return name, max(context, 0)  # some say -1 for no bound
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise BiscaleError(
            f"{url}/v1/models names no model: is it an OpenAI-compatible engine?"
        ) from None


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
        self.run_id = uuid.uuid4().hex
        self._model = settings.model or ""
        self._under_way: set[asyncio.Task[None]] = set()
        self._active: dict[int, RequestRecord] = {}
        self.health = EngineHealth(settings.stall_s)

    def request_id(self, index: int) -> str:
        """``X-Request-Id`` of one request, by which a router tells what it did with it."""
        return f"{self.run_id}-{index}"

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
            connector=connector,
            timeout=timeout,
            read_bufsize=1 << 18,
            headers=key_headers(self.settings.api_key),
        ) as session:
            await self._check(session)
            watchdog = asyncio.create_task(self._watch())
            try:
                await self._send_all(session)
                while self._under_way and self.health.gone is None:
                    await asyncio.wait(self._under_way, timeout=0.2)
            finally:
                watchdog.cancel()
                for task in self._under_way:
                    task.cancel()
                await asyncio.gather(*self._under_way, return_exceptions=True)
        self.records.sort(key=lambda r: r.index)
        if self.health.gone is not None:
            raise self.health.gone
        return self.records

    async def _check(self, session: aiohttp.ClientSession) -> None:
        for url in filter(None, (self.settings.prefill_url, self.settings.decode_url)):
            name, context = await inspect_engine(session, url)
            self._model = self._model or name
            if context:
                self.trace.check_fits(context)

    async def _send_all(self, session: aiohttp.ClientSession) -> None:
        rng = np.random.default_rng(self.settings.seed)
        self.started_s = time.monotonic()
        self.health.hears(self.started_s)
        for index in range(len(self.trace)):
            prompt = rng.integers(
                FIRST_ID, self.settings.vocabulary, self.trace.prompt_tokens[index]
            ).tolist()
            due_s = self.started_s + float(self.trace.arrival_s[index])
            record = RequestRecord(index, due_s, len(prompt), int(self.trace.output_tokens[index]))
            bodies = self._bodies(prompt, record.output_tokens)
            await until(due_s)
            if self.health.gone is not None:
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
        headers = {
            "Content-Type": "application/json",
            "X-Request-Id": self.request_id(record.index),
        }
        # here and not where the task was made: answers that had come may have been served first
        record.dispatched_s = time.monotonic()
        self._active[record.index] = record
        try:
            if prefill is not None:
                params = await self._prefill(session, record, prefill, headers)
                if params is not None:  # appended, instead of encoding the prompt again
                    added = msgspec.json.encode(params)
                    decode = decode[:-1] + b',"kv_transfer_params":' + added + b"}"
            record.decode_sent_s = time.monotonic()
            await self._stream(session, record, decode, headers)
            self.health.served()
        except asyncio.CancelledError:
            record.error = INTERRUPTED_ERROR if self.health.gone is None else GONE_ERROR
            self._keep(record)
            raise
        except (
            Exception
        ) as error:  # a request that is not on record would make the engine look good
            record.error = described(error)
            self.health.failed(error, time.monotonic(), self._last_token_s())
        self._keep(record)

    def _last_token_s(self) -> float:
        """When a request that is still under way got its newest token."""
        times = [r.last_chunk_s for r in self._active.values() if not r.error]
        return max((t for t in times if math.isfinite(t)), default=-math.inf)

    def _keep(self, record: RequestRecord) -> None:
        self.records.append(record)
        self._active.pop(record.index, None)
        if self.out is not None:
            self.out.write(msgspec.json.encode(record) + b"\n")
            self.out.flush()  # for whoever follows the replay
        self.tell(record)

    async def _prefill(
        self,
        session: aiohttp.ClientSession,
        record: RequestRecord,
        body: bytes,
        headers: dict[str, str],
    ) -> dict[str, Any] | None:
        async with session.post(
            f"{base_url(self.settings.prefill_url or '')}/v1/completions",
            data=body,
            headers=headers,
        ) as answer:
            text = await answer.text(errors="replace")
            done_s = time.monotonic()
            self.health.hears(done_s)
            if answer.status != 200:
                raise refusal("prefill", answer.status, text)
        try:
            answered = msgspec.json.decode(text)
        except msgspec.DecodeError:
            answered = None
        if not isinstance(answered, dict) or not answered.get("choices"):
            raise RequestRefused(f"prefill answered no completion: {error_text(text)}")
        record.prefill_done_s = done_s
        params = answered.get("kv_transfer_params")
        return params if isinstance(params, dict) else None

    async def _stream(
        self,
        session: aiohttp.ClientSession,
        record: RequestRecord,
        body: bytes,
        headers: dict[str, str],
    ) -> None:
        url = f"{base_url(self.settings.decode_url)}/v1/completions"
        async with session.post(url, data=body, headers=headers) as answer:
            if answer.status != 200:
                text = await answer.text(errors="replace")
                self.health.hears(time.monotonic())
                raise refusal("decode", answer.status, text)
            await read_stream(answer, record, self.health.hears)

    async def _watch(self) -> None:
        while self.health.gone is None:
            await asyncio.sleep(min(1.0, self.settings.stall_s / 4))
            self.health.look(len(self._under_way), time.monotonic())


def dispatch_errors_s(records: list[RequestRecord]) -> NDArray[np.float64]:
    """How late requests left, s."""
    return np.array([r.dispatched_s - r.scheduled_s for r in records])
