"""The OpenAI-compatible face of an emulated engine, with vLLM's two-step hand-over.

Prefill answers one token and ``kv_transfer_params``; decode takes them, waits for the KV transfer,
and streams. As in SGLang, the first token of the stream is the one that prefill made: it comes when
the KV has arrived.
"""

import asyncio
import contextlib
import signal
import time
import uuid
from typing import Any

import msgspec
from aiohttp import web

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.emulation.emulator import Instance, Ticket

# 4 x 400G network: 1.7 ms + bytes / 165 GB/s (second-hand, see docs/hardware.md)
TRANSFER_BASE_S = 1.7e-3
TRANSFER_BYTES_PER_S = 165e9
DONE = b"data: [DONE]\n\n"
MODEL = "emulated-llama-3.3-70b"


class Body(msgspec.Struct):
    """The part of a completion request that the emulation understands; the rest is ignored."""

    prompt: Any = None
    max_tokens: int | None = 16
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    min_tokens: int = 0


_decoder = msgspec.json.Decoder(Body)


def transfer_s(tokens: int, kv_bytes_per_token: float) -> float:
    """Time that the KV of a prompt takes between the pools, s."""
    return TRANSFER_BASE_S + tokens * kv_bytes_per_token / TRANSFER_BYTES_PER_S


class Refusal(Exception):
    """A request that the engine answers with 400."""


class EngineServer:
    """HTTP in front of one :class:`Instance`."""

    def __init__(self, engine: Instance, max_model_len: int) -> None:
        self.engine = engine
        self.phase = engine.plant.phase
        self.max_model_len = max_model_len
        self.kv_bytes = engine.plant.model.llm.kv_bytes_per_token(engine.plant.settings.dtype)
        self.app = web.Application(client_max_size=64 << 20)
        self.app.router.add_post("/v1/completions", self.completions)
        self.app.router.add_get("/v1/models", self.models)
        self.app.router.add_get("/metrics", self.metrics)
        self.app.router.add_get("/health", self.health)

    # --- small routes

    async def health(self, request: web.Request) -> web.Response:
        """Liveness."""
        return web.Response()

    async def models(self, request: web.Request) -> web.Response:
        """The model list, with the context length."""
        return _json(
            {
                "object": "list",
                "data": [{"id": MODEL, "object": "model", "max_model_len": self.max_model_len}],
            }
        )

    async def metrics(self, request: web.Request) -> web.Response:
        """Prometheus text under vLLM's names, so that pollers work.

        One metric of its own says that nothing here is real.
        """
        lines = ["# an emulated engine: no GPU computes anything here", "biscale_emulated:engine 1"]
        lines += [
            f'vllm:{name}{{engine="0",model_name="{MODEL}"}} {value!r}'
            for name, value in self.engine.metrics().items()
        ]
        return web.Response(text="\n".join(lines) + "\n")

    # --- completions

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """One completion of token ids."""
        try:
            body = self._checked(_decoder.decode(await request.read()))
            return await (
                self._prefill(body) if self.phase == "prefill" else self._decode(request, body)
            )
        except (msgspec.DecodeError, Refusal, BiscaleError) as error:
            return _json(
                {"error": {"message": str(error), "type": "BadRequestError", "code": 400}}, 400
            )

    def _checked(self, body: Body) -> Body:
        prompt = body.prompt
        if not isinstance(prompt, list) or not prompt or not isinstance(prompt[0], int):
            raise Refusal("the emulated engine takes the prompt as a list of token ids")
        if body.max_tokens is None or body.max_tokens < 1:
            raise Refusal("max_tokens must be at least 1")
        if self.phase == "prefill" and body.max_tokens != 1:
            raise Refusal("this is a prefill instance: it makes one token, ask for max_tokens=1")
        if len(prompt) + body.max_tokens > self.max_model_len:
            raise Refusal(
                f"this model's maximum context length is {self.max_model_len} tokens, "
                f"but {len(prompt)} + {body.max_tokens} were asked for"
            )
        return body

    async def _prefill(self, body: Body) -> web.Response:
        done = asyncio.Event()
        ticket = Ticket(len(body.prompt), 1, lambda: None, done.set)
        self.engine.submit(ticket)
        try:
            await done.wait()
        except asyncio.CancelledError:
            ticket.cancelled = True
            raise
        params = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": f"emulated-{id(self.engine)}",
            "remote_block_ids": [0],
            "remote_num_tokens": len(body.prompt),
            "remote_host": "127.0.0.1",
            "remote_port": 0,
        }
        choice = {"index": 0, "text": " x", "finish_reason": "length", "logprobs": None}
        return _json(
            {
                **_head(),
                "choices": [choice],
                "usage": _usage(len(body.prompt), 1),
                "kv_transfer_params": params,
            }
        )

    async def _decode(self, request: web.Request, body: Body) -> web.StreamResponse:
        prompt, tokens = len(body.prompt), int(body.max_tokens or 1)
        if body.kv_transfer_params:
            self.engine.incoming += 1
            try:
                await asyncio.sleep(transfer_s(prompt, self.kv_bytes))
            finally:
                self.engine.incoming -= 1
        finished = asyncio.Event()
        if not body.stream:
            if tokens > 1:
                self.engine.submit(Ticket(prompt, tokens, lambda: None, finished.set))
                await finished.wait()
            choice = {
                "index": 0,
                "text": " x" * tokens,
                "finish_reason": "length",
                "logprobs": None,
            }
            return _json({**_head(), "choices": [choice], "usage": _usage(prompt, tokens)})
        return await self._stream(request, body, prompt, tokens, finished)

    async def _stream(
        self, request: web.Request, body: Body, prompt: int, tokens: int, finished: asyncio.Event
    ) -> web.StreamResponse:
        """Stream tokens straight from the engine's turn to the connection.

        A coroutine per token would cost more than the token.
        """
        head = _head()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        transport = request.transport
        event = _event({**head, "choices": [{"index": 0, "text": " x", "finish_reason": None}]})
        await response.write(event)  # the token that prefill made; sends the headers too
        one = _framed(event)

        def tell() -> None:
            if transport is not None and not transport.is_closing():
                transport.write(one)

        if tokens > 1:
            ticket = Ticket(prompt, tokens, tell, finished.set)
            self.engine.submit(ticket)
            try:
                await finished.wait()
            except asyncio.CancelledError:
                ticket.cancelled = True
                raise
        last = _event({**head, "choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        if (body.stream_options or {}).get("include_usage"):
            last += _event({**head, "choices": [], "usage": _usage(prompt, tokens)})
        with contextlib.suppress(ConnectionError):
            await response.write(last + DONE)
            await response.write_eof()
        return response


def _head() -> dict[str, Any]:
    return {
        "id": f"cmpl-{uuid.uuid4().hex[:16]}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": MODEL,
    }


def _usage(prompt: int, tokens: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def _framed(data: bytes) -> bytes:
    """One chunk of HTTP's chunked transfer encoding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _json(data: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(data), status=status, content_type="application/json"
    )


def ready_line(phase: str, url: str) -> str:
    """What an emulated engine prints when it answers."""
    return f"emulated {phase} ready at {url}"


async def serve(server: EngineServer, host: str, port: int) -> None:
    """Serve until a signal. Prints ``emulated ... ready`` when it answers.

    Raises:
        BiscaleError: the port is taken.
    """
    runner = web.AppRunner(server.app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    engine = asyncio.create_task(server.engine.run())
    try:
        try:
            await web.TCPSite(runner, host, port, backlog=1024).start()
        except OSError as error:
            raise BiscaleError(
                f"cannot serve at {host}:{port} ({error.strerror}): "
                f"choose another --{server.phase}-port"
            ) from None
        print(ready_line(server.phase, f"http://{host}:{port}"), flush=True)
        waiting = asyncio.create_task(stop.wait())
        await asyncio.wait({waiting, engine}, return_when=asyncio.FIRST_COMPLETED)
        if engine.done():
            engine.result()
    finally:
        # Python 3.11's wait_for may swallow a cancellation that meets its time-out
        while not engine.done():
            engine.cancel()
            await asyncio.wait({engine}, timeout=0.2)
        server.engine.sender.close()
        await runner.cleanup()
