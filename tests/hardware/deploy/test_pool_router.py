"""The router in front: the simulator's choices, books that balance, answers that pass through."""

import asyncio
import itertools

import aiohttp
import msgspec
import numpy as np
import pytest
from aiohttp import web
from hardware_helpers import free_port
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_env.config.loader import validate
from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.deploy.deployment_file import Deployment
from biscale_env.hardware.deploy.pool_router import PHASES, PoolRouter
from biscale_env.hardware.deploy.router_http import Route, Router, broken_off, prompt_length


def deployment(prefill=2, decode=3, ports=None, **router):
    ports = ports or itertools.count(9000)
    instances, gpu = {}, itertools.count()
    for phase, count in (("prefill", prefill), ("decode", decode)):
        for k in range(count):
            instances[f"{phase}_{k}"] = {
                "phase": phase,
                "machine": "a",
                "gpus": [next(gpu) for _ in range(4)],
                "engine": f"http://127.0.0.1:{next(ports)}",
            }
    data = {
        "name": "x",
        "machines": {"a": {"backend": "emulated", "emulated_gpus": 64}},
        "instances": instances,
        "router": router,
    }
    return validate(data, Deployment, "test")


def test_shortest_is_the_least_tokens_over_speed():
    router = PoolRouter(deployment())
    router.place({"prefill_0": 1.0, "prefill_1": 3.0, **{f"decode_{k}": 1.0 for k in range(3)}})
    rng, load = np.random.default_rng(0), np.zeros(2)
    for _ in range(60):
        prompt = int(rng.integers(1, 4000))
        expected = int(np.argmin(load / [1.0, 3.0]))
        assert router.choose("prefill", prompt) == f"prefill_{expected}"
        load[expected] += prompt


def test_decode_counts_what_runs_and_what_waits():
    router = PoolRouter(deployment())
    first = router.choose("decode", 1000)
    second = router.choose("decode", 10)
    third = router.choose("decode", 10)
    assert {first, second, third} == {"decode_0", "decode_1", "decode_2"}
    router.started(second, 10)
    router.more(second, 5000)
    assert router.choose("decode", 1) == third
    assert router.loads()[second].tokens == 10 + 1 + 5000


@pytest.mark.parametrize("kind", ["weighted", "round_robin", "what_if"])
def test_the_other_routers_spread_too(kind):
    router = PoolRouter(deployment_of(kind))
    seen = [router.choose("decode", 500) for _ in range(60)]
    assert {f"decode_{k}" for k in range(3)} == set(seen)
    if kind == "round_robin":
        assert seen[:6] == [f"decode_{k % 3}" for k in range(6)]


def deployment_of(kind):
    base = deployment().model_dump(mode="json")
    return validate({**base, "router": {"prefill": kind, "decode": kind}}, Deployment, "test")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5000)), max_size=60))
def test_books_balance_whatever_happens(moves):
    router, under_way = ROUTER, []
    for what, tokens in moves:
        if what == 0 or not under_way:
            phase = PHASES[tokens % 2]
            under_way.append([router.choose(phase, tokens), tokens, 0, phase])
        elif what == 1 and under_way[0][3] == "decode":
            one = under_way[0]
            if not one[2]:
                router.started(one[0], one[1])
                one[2] = 1
            router.more(one[0], tokens)
            one[2] += tokens
        else:
            name, prompt, made, _ = under_way.pop(0)
            router.leave(name, prompt, made)
        assert all(load.requests >= 0 and load.tokens >= 0 for load in router.loads().values())
    for name, prompt, made, _ in under_way:
        router.leave(name, prompt, made)
    assert all((load.requests, load.tokens) == (0, 0) for load in router.loads().values())
    for phase in PHASES:
        states = router._arrays[phase].states
        assert not states["end"].any()
        assert not states["batch"].any() if phase == "decode" else True


ROUTER = PoolRouter(deployment())


def test_closed_instances_get_nothing_and_one_stays_open():
    router = PoolRouter(deployment())
    router.place({"prefill_1": 1.0, "decode_2": 1.0})
    assert {router.choose("decode", 5) for _ in range(9)} == {"decode_2"}
    assert not router.loads()["decode_0"].open
    with pytest.raises(BiscaleError, match="no decode instance open"):
        router.place({"prefill_0": 1.0})
    with pytest.raises(BiscaleError, match="knows no instance 'x'"):
        router.place({"x": 1.0})
    assert {router.choose("decode", 5) for _ in range(3)} == {"decode_2"}


def test_an_instance_that_refuses_is_put_aside_for_a_while():
    router = PoolRouter(deployment())
    router.put_aside("prefill_0")
    assert {router.choose("prefill", 5) for _ in range(4)} == {"prefill_1"}


@pytest.mark.parametrize(
    ("raw", "tokens"), [(b"[1,2,3]", 3), (b" [7] ", 1), (b'"abcdefgh"', 2), (b'""', 1)]
)
def test_prompt_lengths(raw, tokens):
    assert prompt_length(raw) == tokens


class Engine:
    """Answers as vLLM does in a P/D hand-over; ``status`` other than 200 refuses."""

    def __init__(self, port, status=200, hang=False):
        self.port, self.status, self.hang, self.bodies = port, status, hang, []

    async def __aenter__(self):
        app = web.Application()
        app.router.add_post("/v1/completions", self.answer)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", self.port).start()
        return self

    async def __aexit__(self, *_):
        await self.runner.cleanup()

    async def answer(self, request):
        body = msgspec.json.decode(await request.read())
        self.bodies.append(body)
        if self.status != 200:
            return web.Response(text='{"error": "busy"}', status=self.status)
        if not body.get("stream"):
            return web.json_response({"choices": [], "kv_transfer_params": {"block": self.port}})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(int(body["max_tokens"])):
            await response.write(b'data: {"choices":[{"text":"x"}]}\n\n')
        if self.hang:
            await asyncio.sleep(60)
        await response.write(b"data: [DONE]\n\n")
        return response


def serve(engines, talk, ports):
    """Run a router over engines, and a client's coroutine against it."""

    async def main():
        router = Router(deployment(2, 1, iter(ports)))
        runner = router.runner()
        await runner.setup()
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        try:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
                for engine in engines:
                    await engine.__aenter__()
                return router, await talk(session, router)
        finally:
            for engine in engines:
                await engine.__aexit__()
            await runner.cleanup()

    return asyncio.run(main())


BODY = {"prompt": [5, 6, 7], "max_tokens": 4, "stream": True, "model": "m"}


async def ask(session, name="r-0", **changes):
    headers = {"X-Request-Id": name}
    async with session.post("/v1/completions", json=BODY | changes, headers=headers) as answer:
        return answer.status, await answer.read()


@pytest.fixture
def ports():
    return [free_port() for _ in range(3)]


def test_one_request_goes_through_both_phases(ports):
    engines = [Engine(port) for port in ports]

    async def talk(session, router):
        status, text = await ask(session)
        async with session.get("/biscale/routes?prefix=r-") as answer:
            routes = [msgspec.json.decode(x, type=Route) for x in (await answer.read()).split()]
        return status, text, routes

    router, (status, text, routes) = serve(engines, talk, ports)
    assert status == 200
    assert text.count(b"choices") == 4
    assert text.endswith(b"data: [DONE]\n\n")
    asked = engines[0].bodies[0]
    assert (asked["max_tokens"], asked["stream"], asked["prompt"]) == (1, False, [5, 6, 7])
    assert asked["kv_transfer_params"]["do_remote_decode"] is True
    assert engines[2].bodies[0]["kv_transfer_params"] == {"block": ports[0]}
    assert engines[2].bodies[0]["max_tokens"] == 4
    (route,) = routes
    assert (route.prefill, route.decode, route.chunks, route.error) == (
        "prefill_0",
        "decode_0",
        4,
        "",
    )
    assert route.arrived_s < route.prefill_done_s < route.first_s <= route.last_s
    assert all(load.requests == 0 for load in router.pool.loads().values())


def test_a_prefill_engine_that_is_gone_harms_no_request(ports):
    engines = [Engine(port) for port in ports[1:]]  # nobody at the first

    async def talk(session, router):
        return [await ask(session, f"r-{k}") for k in range(3)]

    router, answers = serve(engines, talk, ports)
    assert [status for status, _ in answers] == [200, 200, 200]
    assert router.failed == 0
    assert {route.prefill for route in router.routes} == {"prefill_1"}


def test_what_an_engine_refuses_is_passed_on(ports):
    engines = [Engine(ports[0], 503), Engine(ports[1], 503), Engine(ports[2])]

    async def talk(session, router):
        return await ask(session), router.state()

    router, ((status, text), state) = serve(engines, talk, ports)
    assert (status, text) == (503, b'{"error": "busy"}')
    assert state.failed == 1
    assert "503" in router.routes[0].error
    assert all(load.requests == 0 for load in router.pool.loads().values())


def test_nobody_there_at_all_is_a_502(ports):
    async def talk(session, router):
        return await ask(session)

    router, (status, _) = serve([], talk, ports)
    assert status == 502
    assert all(load.requests == 0 for load in router.pool.loads().values())


@pytest.mark.slow
def test_a_client_that_goes_away_frees_its_place(ports):
    engines = [Engine(port, hang=port == ports[2]) for port in ports]

    async def talk(session, router):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ask(session), 0.5)
        for _ in range(100):
            if router.ended:
                break
            await asyncio.sleep(0.02)
        return router.pool.loads()

    router, loads = serve(engines, talk, ports)
    assert router.routes[0].error == "the client went away"
    assert all(load.requests == 0 for load in loads.values())


def test_a_body_that_is_no_completion_is_a_400(ports):
    async def talk(session, router):
        return await ask(session, prompt=None, max_tokens="many")

    _, (status, _) = serve([], talk, ports)
    assert status == 400


@pytest.mark.parametrize("number", ["many", 1e400, [4], {"a": 1}])
def test_a_number_of_tokens_that_is_none_is_a_400(ports, number):
    async def talk(session, router):
        text = msgspec.json.encode(BODY | {"max_tokens": "N"}).decode()
        told = "1e400" if number == 1e400 else msgspec.json.encode(number).decode()
        data = text.replace('"N"', told)
        async with session.post("/v1/completions", data=data) as answer:
            return answer.status

    _, status = serve([], talk, ports)
    assert status == 400


class Odd(Engine):
    """Writes these parts as its stream; None cuts the connection, numbers are pauses, s."""

    def __init__(self, port, parts=(), prefill=b""):
        super().__init__(port)
        self.parts, self.prefill = parts, prefill

    async def answer(self, request):
        body = msgspec.json.decode(await request.read())
        if not body.get("stream"):
            return web.Response(body=self.prefill, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in self.parts:
            if part is None:
                request.transport.close()
                return response
            if isinstance(part, float):
                await asyncio.sleep(part)
            else:
                await response.write(part)
        return response


SPACED = b'data: {"id": "c", "choices": [{"text": "x"}], "usage": null}\n\n'
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 4}}\n\ndata: [DONE]\n\n'


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4 * len(SPACED)), max_size=8, unique=True).map(sorted))
def test_tokens_are_counted_wherever_a_read_ends(cuts):
    """The books of a decode instance go by this count; spaces are Python's own."""
    body = 4 * SPACED + USAGE
    router, route = Router(deployment(1, 1)), Route("r", 3, 4, 0.0)
    route.decode = name = router.pool.choose("decode", 3)
    rest = b""
    for a, b in itertools.pairwise([0, *cuts, len(body)]):
        rest = router._count(rest + body[a:b], name, route)
    assert route.chunks == 4
    router.pool.leave(name, 3, route.chunks)
    assert all(load.requests == 0 for load in router.pool.loads().values())


def test_a_stream_with_spaces_passes_through_and_is_counted(ports):
    body = 4 * SPACED + USAGE
    good = b'{"choices": [{}], "kv_transfer_params": null}'
    parts = [x for k in range(0, len(body), 40) for x in (body[k : k + 40], 0.005)]
    engines = [Odd(ports[0], (), good), Odd(ports[2], parts)]

    async def talk(session, router):
        return await ask(session)

    router, (status, text) = serve(engines, talk, ports)
    assert (status, text) == (200, body)
    (route,) = router.routes
    assert (route.chunks, route.error) == (4, "")
    assert route.first_s < route.last_s


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>sign in</html>", "prefill_0 answered no completion: <html>sign in"),
        (b'{"error": {"message": "KV is full"}}', "prefill_0 answered no completion: KV is full"),
        (b'["choices"]', "prefill_0 answered no completion"),
        (b"", "prefill_0 answered no completion"),
        (b"\xff\xfe", "prefill_0 answered no completion"),
    ],
)
def test_a_prefill_without_a_completion_is_a_502_that_says_so(ports, body, words):
    async def talk(session, router):
        return await ask(session), router.state()

    router, ((status, text), state) = serve([Odd(ports[0], (), body)], talk, ports)
    assert status == 502
    assert words in msgspec.json.decode(text)["error"]["message"]
    assert (state.failed, router.failed) == (1, 1)
    assert np.isnan(router.routes[0].prefill_done_s)
    assert all(load.requests == 0 for load in state.instances.values())


NO_ERRORS = [
    b'data: {"choices": [{"text": "an \\"error\\": \\"x\\""}], "error": null}',
    b'data: {"choices": [{"text": "event: error"}], "error": {}}',
    b'data: {"choices": [{"text": "x", "finish_reason": null}], "error": ""}',
    b'data: {"choices": [{"text": "finish_reason abort"}], "object": "text_completion"}',
]
ERRORS = {
    b'data: {"error": {"message": "KV is full", "code": 500}}': "KV is full",
    b'data: {"error":"out of memory"}': "out of memory",
    b'data: {"object": "error", "message": "preempted"}': "preempted",
    b'event: error\ndata: {"message": "gone"}': "gone",
    b'data: {"choices": [{"text": "", "finish_reason": "abort"}]}': "abort",
}


def read_in_pieces(body, cut):
    """The error that a router sees where reads end every ``cut`` bytes."""
    route, rest, error = Route("r", 3, 4, 0.0), b"\n", ""
    for begin in range(0, len(body), cut):
        piece = rest + body[begin : begin + cut]
        error = error or broken_off(piece, "decode_0")
        rest = READER._count(piece, "decode_0", route)
    return error


READER = Router(deployment(1, 1))


@pytest.mark.parametrize("said", ERRORS)
def test_an_error_within_a_stream_is_seen_wherever_a_read_ends(said):
    """Its status is 200 and it passes through; the books know that it failed."""
    body = said + b"\n\ndata: [DONE]\n\n"
    for cut in range(1, len(body)):
        assert read_in_pieces(body, cut).startswith("decode_0 broke the stream off: ")
    assert ERRORS[said] in read_in_pieces(body, len(body))


@given(st.permutations(NO_ERRORS), st.integers(1, 60))
def test_what_only_looks_like_an_error_is_none(lines, cut):
    assert read_in_pieces(b"\n\n".join(lines), cut) == ""


def test_a_stream_that_reports_an_error_is_counted_as_failed(ports):
    said = b'data: {"error": {"message": "KV is full"}}\n\n'
    engines = [Odd(ports[0], (), b'{"choices": [{}]}'), Odd(ports[2], [SPACED, said])]

    async def talk(session, router):
        return await ask(session), router.state()

    router, ((status, text), state) = serve(engines, talk, ports)
    assert (status, text) == (200, SPACED + said)
    assert router.routes[0].error == "decode_0 broke the stream off: KV is full"
    assert state.failed == 1


def test_an_engine_that_breaks_off_is_seen_as_that_and_as_nothing_else(ports):
    """No second answer is written into the first."""
    good = b'{"choices": [{}]}'
    engines = [Odd(ports[0], (), good), Odd(ports[2], [SPACED, 0.05, None])]

    async def talk(session, router):
        async with session.post("/v1/completions", json=BODY) as answer:
            begun = await answer.content.readexactly(len(SPACED))
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.content.read()
        return answer.status, begun, router.state()

    router, (status, begun, state) = serve(engines, talk, ports)
    assert (status, begun) == (200, SPACED)
    assert router.routes[0].error == "the connection was cut in the middle of the answer"
    assert state.failed == 1
    assert all(load.requests == 0 for load in state.instances.values())
