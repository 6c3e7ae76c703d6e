"""The hardware path on this machine: what the hook costs, how fast a record becomes a clock."""

import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from meter import Meter, Metric

from biscale_env.config import InstanceSpec
from biscale_env.hardware.emulation.emulate import PHASES, Emulation, EmulatorSettings
from biscale_env.hardware.engines.hook.sender import Sender
from biscale_env.hardware.engines.hook.vllm_hook import SchedulerWatcher
from biscale_env.hardware.replay.client import dispatch_errors_s
from biscale_env.hardware.replay.closed_loop import ClosedLoopReplay, ReplaySettings
from biscale_env.hardware.replay.raw_log import Raw, read_raw
from biscale_env.traces import Trace

RATE_RPS, DURATION_S = 50.0, 20.0
BATCH = 256
SETTLED = 0.3  # share of the run after which answers come as fast as requests leave


pytestmark = pytest.mark.hardware


def stand_in(batch: int, prompts: int, queue: int) -> tuple[Any, Any]:
    """A scheduler with a full decode batch and a queue, and its output, as the hook reads them."""
    now = time.time()

    def request(name: str) -> SimpleNamespace:
        return SimpleNamespace(
            request_id=name,
            num_prompt_tokens=1024,
            num_tokens=1024,
            num_computed_tokens=0,
            arrival_time=now,
        )

    names = [f"request-{k}" for k in range(batch)]
    new = [SimpleNamespace(req_id=f"new-{k}", num_computed_tokens=0) for k in range(prompts)]
    everyone = {n: request(n) for n in (*names, *(r.req_id for r in new))}
    scheduler = SimpleNamespace(
        requests=everyone,
        waiting=[request(f"w-{k}") for k in range(queue)],
        kv_cache_manager=SimpleNamespace(usage=0.5),
        deferred_waiting=[],
    )
    cached = SimpleNamespace(
        req_ids=names, num_computed_tokens=[1100] * batch, num_output_tokens=[76] * batch
    )
    counts = dict.fromkeys(names, 1) | {r.req_id: 1024 for r in new}
    output = SimpleNamespace(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=cached,
        num_scheduled_tokens=counts,
        total_num_scheduled_tokens=sum(counts.values()),
        finished_req_ids=set(),
    )
    return scheduler, output


def hook_times_s(shape: tuple[int, int, int], repeats: int = 4000) -> tuple[float, float]:
    """Cost of the vLLM hook per iteration with nobody listening: processor time, median wall time.

    Args:
        shape: decode batch, new prompts, waiting requests.
        repeats: iterations.
    """
    with tempfile.TemporaryDirectory(prefix="biscale-") as folder:
        sender = Sender(f"ipc://{folder}/r.sock", f"ipc://{folder}/a.sock")
        watcher, (scheduler, output) = SchedulerWatcher(sender), stand_in(*shape)
        for _ in range(200):
            watcher.forms(scheduler, output)
        wall = np.empty(repeats)
        cpu_s = time.thread_time()
        for k in range(repeats):
            begin = time.perf_counter()
            watcher.forms(scheduler, output)
            wall[k] = time.perf_counter() - begin
        cpu_s = (time.thread_time() - cpu_s) / repeats
        sender.close()
    return cpu_s, float(np.median(wall))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("decode, batch 256", (BATCH, 0, 0)), ("prefill, 8 prompts, 32 waiting", (0, 8, 32))],
)
def test_hook(meter: Meter, name: str, shape: tuple[int, int, int]) -> None:
    """What the hook costs an engine in every iteration."""
    cpu_s, wall_s = meter.once(lambda: hook_times_s(shape))
    label = f"hook, {name}, processor time per iteration"
    meter.keep(Metric(label, cpu_s * 1e6, "us", 50.0, "lower", wall_s * 1e6, "median wall"))


def short_chats() -> Trace:
    """What one prefill and one decode instance of TP 4 can serve at 50 req/s."""
    rng = np.random.default_rng(0)
    n = int(DURATION_S * RATE_RPS)
    arrival = np.sort(rng.uniform(0.0, DURATION_S, n))
    prompts = rng.integers(100, 200, n).astype(np.int32)
    return Trace("bench", arrival, prompts, rng.integers(40, 80, n).astype(np.int32), "uniform")


def raw_log(policies: dict[str, str]) -> Raw:
    """Log of a closed loop on emulated engines: load, records, decisions, clocks."""
    folder = Path(tempfile.mkdtemp(prefix="biscale-"))
    try:
        settings = EmulatorSettings(
            folder / "gpus", folder / "s", ports=(8190, 8290), instance=InstanceSpec(max_seqs=512)
        )
        with Emulation(settings) as emulation:
            prefill, decode = emulation.urls
            replay_settings = ReplaySettings(
                policies=policies,
                decode_url=decode,
                prefill_url=prefill,
                gpus={p: tuple(map(str, settings.gpus(p))) for p in PHASES},
                backend=f"fake:{settings.state}",
                engine="emulated",
                sockets=settings.sockets,
                instance=settings.instance,
                delay_s=settings.delay_s,
            )
            ClosedLoopReplay(replay_settings, short_chats(), folder / "raw").run()
        return read_raw(folder / "raw")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def answers_per_s(raw: Raw) -> float:
    """Answers per second, from when the first have come until the last request has left."""
    begin_s = raw.start_s + SETTLED * DURATION_S
    last = (r.last_chunk_s for r in raw.requests if not r.error)
    steady = sum(begin_s <= moment <= raw.start_s + DURATION_S for moment in last)
    return steady / ((1 - SETTLED) * DURATION_S)


@pytest.mark.parametrize(
    "policies",
    [{"prefill": "mpc", "decode": "slack"}, {"prefill": "agent", "decode": "agent"}],
    ids=["controllers", "agents"],
)
def test_closed_loop(meter: Meter, policies: dict[str, str]) -> None:
    """Engines, replayer and controllers in real time."""
    raw = meter.once(lambda: raw_log(policies))
    failed = sum(bool(r.error) for r in raw.requests)
    late_ms = float(np.quantile(dispatch_errors_s(raw.requests), 0.99)) * 1e3
    answers = f"emulated engines, answers at {RATE_RPS:g} req/s"
    meter.keep(
        Metric(answers, answers_per_s(raw), "req/s", 0.95 * RATE_RPS, "higher"),
        Metric("emulated engines, requests failed", float(failed), "", 0.0),
        Metric("replayer, dispatch error, P99", late_ms, "ms", 5.0),
    )
    for phase, policy in policies.items():
        took_ms = np.array([d.sent_s - d.received_s for d in raw.decisions[phase]]) * 1e3
        p50, p99 = np.quantile(took_ms, [0.5, 0.99])
        target = 5.0 if policy.startswith("mpc") else 1.0
        label = f"record to clock command, {phase} {policy}, P99"
        meter.keep(Metric(label, float(p99), "ms", target, "lower", float(p50)))
