"""The router in front of a deployment: one completion in, prefill and decode behind it.

It does vLLM's two-step hand-over: a prefill request of one token, whose ``kv_transfer_params`` go
to the decode instance that streams the answer. What it chose, and when, is kept per request.
"""

import asyncio
import contextlib
import math
import re
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import zmq
from aiohttp import web

from biscale_env.config import load_slo
from biscale_env.config.slo import within
from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.deploy.deployment_file import Deployment
from biscale_env.hardware.deploy.pool_router import InstanceLoad, PoolRouter
from biscale_env.hardware.loop import wire
from biscale_env.hardware.remote.channels import take
from biscale_env.hardware.replay.answers import BROKEN_FINISHES, error_text
from biscale_env.hardware.replay.engine_health import described

KEPT_ROUTES = 1_000_000
RECENT_S = 300.0  # attainment is told over the requests that ended within this
BYTES_PER_TOKEN = 4.0  # of a prompt that is text (assumed; only routing and counts depend on it)
TOKEN_MARK = re.compile(rb'"choices"\s*:\s*\[\s*\{')
BROKEN_MARK = re.compile(
    rb'[\r\n]event:\s*error|"error"\s*:\s*(?:"[^"]|\{\s*"|\[\s*[^\]\s]|[1-9t])|"object"\s*:\s*"error"'
    rb'|"finish_reason"\s*:\s*"(?:' + "|".join(BROKEN_FINISHES).encode() + rb')"'
)  # quotes within a token's text are escaped, so a key of the event it is
MARK_LENGTH = 40  # of a mark that a read cuts in two, at most (with three spaces at each place)
ROUTES, STATE, ARRIVALS = "/biscale/routes", "/biscale/state", "/biscale/arrivals"
KEPT_ARRIVALS = 200_000
REFUSED = (aiohttp.ClientConnectorError, ConnectionRefusedError)


class Route(msgspec.Struct):
    """What became of one request; times are CLOCK_MONOTONIC seconds, NaN (null): never.

    Attributes:
        request: its ``X-Request-Id``.
        prompt_tokens: of the prompt.
        output_tokens: asked for.
        arrived_s: the router had it.
        prefill: instance of its prefill.
        prefill_done_s: prefill had answered.
        decode: instance of its decode.
        first_s: first token of the stream.
        last_s: last token of it.
        chunks: pieces of the stream with tokens.
        error: why it failed; empty when it did not.
    """

    request: str
    prompt_tokens: int
    output_tokens: int
    arrived_s: float
    prefill: str = ""
    prefill_done_s: float = math.nan
    decode: str = ""
    first_s: float = math.nan
    last_s: float = math.nan
    chunks: int = 0
    error: str = ""


class SeenRequest(msgspec.Struct):
    """A request that has come: when (CLOCK_MONOTONIC), and what it asks for, in tokens."""

    time_s: float
    prompt_tokens: int
    output_tokens: int


class RouterState(msgspec.Struct):
    """What ``hw status`` and tier 1 read.

    Attributes:
        instances: load per instance.
        requests: that have arrived so far.
        failed: of those.
        rate_rps: arrivals per second over the last :data:`RECENT_S`.
        ttft_met: fraction of recent requests within the TTFT bound; NaN (null) without any.
        tpot_met: the same for TPOT.
    """

    instances: dict[str, InstanceLoad]
    requests: int
    failed: int
    rate_rps: float
    ttft_met: float = math.nan
    tpot_met: float = math.nan


def prompt_length(raw: bytes) -> int:
    """Tokens of a prompt, as JSON: a list of token ids, or a text."""
    text = bytes(raw).strip()
    if text.startswith(b"["):
        return text.count(b",") + 1
    return max(round(len(text) / BYTES_PER_TOKEN), 1)


class _Refusal(Exception):
    """An answer of an engine that is passed on: status and body."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"answered {status}: {body[:200].decode(errors='replace')}")
        self.status, self.body = status, body


class Router:
    """HTTP in front of the instances of a deployment."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.pool = PoolRouter(deployment)
        slo = load_slo(deployment.instance.slo)
        self._bounds_s = slo.ttft_s, slo.tpot_s
        self._urls = {
            name: one.engine.rstrip("/").removesuffix("/v1")
            for name, one in deployment.instances.items()
        }
        self.routes: deque[Route] = deque(maxlen=KEPT_ROUTES)
        self.arrivals: deque[SeenRequest] = deque(maxlen=KEPT_ARRIVALS)
        self.arrived = self.failed = self.ended = 0
        self._session: aiohttp.ClientSession | None = None
        self.app = web.Application(client_max_size=64 << 20)
        self.app.cleanup_ctx.append(self._sessions)
        self.app.router.add_post("/v1/completions", self.completions)
        self.app.router.add_get("/v1/models", self._first_decode)
        self.app.router.add_get("/metrics", self._first_decode)
        self.app.router.add_get("/health", self._health)
        self.app.router.add_get(ROUTES, self._tell_routes)
        self.app.router.add_get(STATE, self._tell_state)
        self.app.router.add_get(ARRIVALS, self._tell_arrivals)

    async def _sessions(self, app: web.Application) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, read_bufsize=1 << 18
        ) as self._session:
            yield

    def runner(self) -> web.AppRunner:
        """What serves it; a request whose client goes away ends at once, at the engines too."""
        return web.AppRunner(
            self.app, access_log=None, shutdown_timeout=0.5, handler_cancellation=True
        )

    # --- small routes ---

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _first_decode(self, request: web.Request) -> web.Response:
        """Models and metrics are those of the first decode instance."""
        assert self._session is not None
        url = self._urls[self.deployment.of_phase("decode")[0]] + request.path
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=5)) as answer:
                kind = answer.content_type
                return web.Response(
                    body=await answer.read(), status=answer.status, content_type=kind
                )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return web.Response(text=f"{url} does not answer ({error})", status=502)

    async def _tell_routes(self, request: web.Request) -> web.Response:
        """Routes of requests that ended, JSON lines; ``?prefix=`` of their request ids."""
        prefix = request.query.get("prefix", "")
        return _json_lines(route for route in self.routes if route.request.startswith(prefix))

    async def _tell_arrivals(self, request: web.Request) -> web.Response:
        """Requests that came ``?after=`` a time of this machine, JSON lines."""
        try:
            after_s = float(request.query.get("after", "-inf"))
        except ValueError:
            return _failure(400, "after= is a number of seconds")
        return _json_lines(arrival for arrival in self.arrivals if arrival.time_s >= after_s)

    async def _tell_state(self, request: web.Request) -> web.Response:
        body = msgspec.json.encode(self.state())
        return web.Response(body=body, content_type="application/json")

    def state(self) -> RouterState:
        """Loads, counts and recent attainment."""
        now = time.monotonic()
        recent = []
        for route in reversed(self.routes):
            if route.arrived_s < now - 2 * RECENT_S:  # they are kept in the order of their ends
                break
            if route.arrived_s >= now - RECENT_S:
                recent.append(route)
        ttft = [route.prefill_done_s - route.arrived_s for route in recent]
        tpot = [
            (route.last_s - route.first_s) / (route.output_tokens - 1)
            for route in recent
            if route.output_tokens > 1
        ]
        in_flight = self.arrived - self.ended
        return RouterState(
            self.pool.loads(),
            self.arrived,
            self.failed,
            (len(recent) + in_flight) / RECENT_S,
            float(within(ttft, self._bounds_s[0]).mean()) if ttft else math.nan,
            float(within(tpot, self._bounds_s[1]).mean()) if tpot else math.nan,
        )

    # --- completions ---

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """One completion: prefill at one instance, the stream from another."""
        arrived_s = time.monotonic()
        try:
            body = msgspec.json.decode(await request.read(), type=dict[str, msgspec.Raw])
            tokens = int(msgspec.json.decode(body.get("max_tokens", b"16")) or 16)
            prompt = prompt_length(bytes(body["prompt"]))
        except (msgspec.DecodeError, KeyError, ValueError, TypeError):
            return _failure(400, "the body is no completion request with a prompt")
        name = request.headers.get("X-Request-Id", "")
        route = Route(name, prompt, tokens, arrived_s)
        self.arrived += 1
        self.arrivals.append(SeenRequest(arrived_s, prompt, tokens))
        try:
            return await self._serve(request, body, route)
        except _Refusal as error:
            route.error = str(error)
            return web.Response(
                body=error.body, status=error.status, content_type="application/json"
            )
        except (aiohttp.ClientError, TimeoutError, OSError, BiscaleError) as error:
            route.error = f"{type(error).__name__}: {error}"
            return _failure(502, route.error)
        except asyncio.CancelledError:
            route.error = "the client went away"
            raise
        finally:
            self.ended += 1
            self.failed += bool(route.error)
            self.routes.append(route)

    async def _serve(
        self, request: web.Request, body: dict[str, Any], route: Route
    ) -> web.StreamResponse:
        headers = {"Content-Type": "application/json", "X-Request-Id": route.request}
        if "Authorization" in request.headers:  # the engines' API key
            headers["Authorization"] = request.headers["Authorization"]
        params = await self._prefill(body, route, headers)
        decode = body if params is None else {**body, "kv_transfer_params": msgspec.Raw(params)}
        data = msgspec.json.encode(decode)
        if route.output_tokens == 1:  # nothing to decode: it is no load there
            name = self.pool.names["decode"][0]
            return await self._stream(request, name, data, route, headers)
        route.decode = name = self.pool.choose("decode", route.prompt_tokens)
        try:
            return await self._stream(request, name, data, route, headers)
        finally:
            self.pool.leave(name, route.prompt_tokens, route.chunks)

    async def _prefill(
        self, body: dict[str, Any], route: Route, headers: dict[str, str]
    ) -> bytes | None:
        """First token; ``kv_transfer_params`` as JSON.

        An instance that refuses the connection is put aside and another one asked: nothing has
        happened to the request yet.
        """
        nothing = dict.fromkeys(
            ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
        )
        asked = {
            **{key: value for key, value in body.items() if key != "stream_options"},
            "max_tokens": 1,
            "stream": False,
            "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False, **nothing},
        }
        data = msgspec.json.encode(asked)
        for left in reversed(range(len(self.pool.names["prefill"]))):
            route.prefill = name = self.pool.choose("prefill", route.prompt_tokens)
            try:
                return await self._prefill_at(name, data, route, headers)
            except REFUSED:
                self.pool.put_aside(name)
                if not left:
                    raise
            finally:
                self.pool.leave(name, route.prompt_tokens)
        raise BiscaleError("there is no prefill instance")

    async def _prefill_at(
        self, name: str, data: bytes, route: Route, headers: dict[str, str]
    ) -> bytes | None:
        assert self._session is not None
        url = f"{self._urls[name]}/v1/completions"
        async with self._session.post(url, data=data, headers=headers) as answer:
            text = await answer.read()
            if answer.status != 200:
                raise _Refusal(answer.status, text)
        try:
            answered = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, UnicodeError):
            answered = {}
        if "choices" not in answered:
            said = error_text(text.decode(errors="replace"))
            raise BiscaleError(f"{name} answered no completion: {said}")
        route.prefill_done_s = time.monotonic()
        found = answered.get("kv_transfer_params")
        return None if found is None or bytes(found) == b"null" else bytes(found)

    async def _stream(
        self,
        request: web.Request,
        name: str,
        data: bytes,
        route: Route,
        headers: dict[str, str],
    ) -> web.StreamResponse:
        assert self._session is not None
        url = f"{self._urls[name]}/v1/completions"
        async with self._session.post(url, data=data, headers=headers) as answer:
            if answer.status != 200:
                raise _Refusal(answer.status, await answer.read())
            response = web.StreamResponse(headers={"Content-Type": answer.content_type})
            response.enable_chunked_encoding()
            await response.prepare(request)
            rest = b"\n"  # a stream begins with a line
            try:
                async for piece in answer.content.iter_any():
                    seen = rest + piece
                    route.error = route.error or broken_off(seen, name)
                    rest = self._count(seen, name, route)
                    await response.write(piece)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                # no second answer into the first one: the client is to see that it is cut off
                route.error = described(error)
                if request.transport is not None:
                    request.transport.close()
            with contextlib.suppress(ConnectionError):
                await response.write_eof()
            return response

    def _count(self, piece: bytes, name: str, route: Route) -> bytes:
        """Count the tokens of a piece of a stream: one per event with choices.

        Returns:
            The end of the piece, which may be the beginning of a mark; it goes before the next one.
        """
        marks = list(TOKEN_MARK.finditer(piece))
        rest = piece[max(marks[-1].end() if marks else 0, len(piece) - MARK_LENGTH) :]
        tokens = len(marks)
        if not tokens:
            return rest
        now = route.last_s = time.monotonic()
        if math.isnan(route.first_s):
            route.first_s = now
            if route.decode:
                self.pool.started(name, route.prompt_tokens)
                self.pool.more(name, tokens - 1)
        elif route.decode:
            self.pool.more(name, tokens)
        route.chunks += tokens
        return rest


def broken_off(piece: bytes, name: str) -> str:
    """The error that a piece of a stream reports under status 200; empty when it reports none."""
    found = BROKEN_MARK.search(piece)
    if found is None:
        return ""
    begin = piece.rfind(b"\n", 0, found.start() + 1) + 1
    lines = piece[begin:].decode(errors="replace").splitlines()
    data = next((line for line in lines if not line.startswith("event:")), lines[0])
    return f"{name} broke the stream off: {error_text(data.removeprefix('data:'))}"


def _failure(status: int, text: str) -> web.Response:
    body = msgspec.json.encode({"error": {"message": text, "code": status}})
    return web.Response(body=body, status=status, content_type="application/json")


def _json_lines(rows: Iterable[msgspec.Struct]) -> web.Response:
    lines = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
    return web.Response(body=lines, content_type="application/x-ndjson")


def placement_endpoint(deployment: Deployment) -> str:
    """Address on which the router is told which instances to open; a socket file, not a port."""
    return wire.ipc(router_folder(deployment) / "placement.sock")


def router_folder(deployment: Deployment) -> Path:
    """Folder of the router's socket."""
    return deployment.folder / "router"


async def _obey(router: Router, socket: zmq.Socket) -> None:
    """Open and drain instances as tier 1 asks."""
    while True:
        await asyncio.sleep(0.05)
        while (data := take(socket)) is not None:
            with contextlib.suppress(msgspec.DecodeError, BiscaleError):
                router.pool.place(msgspec.json.decode(data, type=dict[str, float]))


async def serve_router(deployment: Deployment) -> None:
    """Serve until a signal. Prints ``router ready`` when it answers.

    Raises:
        BiscaleError: the port is taken.
    """
    router = Router(deployment)
    wire.socket_folder(router_folder(deployment))
    context = zmq.Context()
    endpoint = placement_endpoint(deployment)
    socket = wire.newest_receiver(context, endpoint)
    host, _, port = deployment.router.url.rstrip("/").partition("//")[2].partition(":")
    runner = router.runner()
    await runner.setup()
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    obeying = asyncio.create_task(_obey(router, socket))
    try:
        try:
            await web.TCPSite(runner, host, int(port), backlog=1024).start()
        except OSError as error:
            raise BiscaleError(
                f"cannot serve at {deployment.router.url} ({error.strerror}): choose another "
                "router.url"
            ) from None
        print(f"router ready at {deployment.router.url}", flush=True)
        await stop.wait()
    finally:
        obeying.cancel()
        await runner.cleanup()
        context.destroy(0)
        wire.unbind(endpoint)
