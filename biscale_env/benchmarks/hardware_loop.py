"""Speed of the hardware path on this machine, each figure with its target."""

import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from biscale_env.config import InstanceSpec
from biscale_env.hardware.emulation.emulate import PHASES, Emulation, EmulatorSettings
from biscale_env.hardware.engines.hook.sender import Sender
from biscale_env.hardware.engines.hook.vllm_hook import SchedulerWatcher
from biscale_env.hardware.replay.client import dispatch_errors_s
from biscale_env.hardware.replay.closed_loop import ClosedLoopReplay, ReplaySettings
from biscale_env.hardware.replay.raw_log import read_raw
from biscale_env.traces import Trace

RATE_RPS = 50.0
BATCH = 256
SETTLED = 0.3  # share of the run after which answers come as fast as requests leave


@dataclass(frozen=True)
class LoopMeasurement:
    """One figure.

    Attributes:
        name: what was measured.
        value: in ``unit``.
        target: what was asked for; a bound from above unless ``at_least``.
        unit: unit of both.
        at_least: the target is a bound from below.
    """

    name: str
    value: float
    target: float
    unit: str
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.value >= self.target if self.at_least else self.value <= self.target


def _stand_in(batch: int, prompts: int, queue: int) -> tuple[Any, Any]:
    """A scheduler with a full decode batch and a queue, and its output, with the attributes that
    the hook reads.
    """
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
        requests=everyone, waiting=[request(f"w-{k}") for k in range(queue)], kv_cache_manager=SimpleNamespace(usage=0.5),
        deferred_waiting=[],
    )  # fmt: skip
    cached = SimpleNamespace(
        req_ids=names, num_computed_tokens=[1100] * batch, num_output_tokens=[76] * batch
    )
    counts = dict.fromkeys(names, 1) | {r.req_id: 1024 for r in new}
    output = SimpleNamespace(
        scheduled_new_reqs=new, scheduled_cached_reqs=cached, num_scheduled_tokens=counts, total_num_scheduled_tokens=sum(counts.values()),
        finished_req_ids=set(),
    )  # fmt: skip
    return scheduler, output


def hook_figures(repeats: int = 4000) -> list[LoopMeasurement]:
    """Cost of the vLLM hook per iteration, nobody listening.

    Processor time of the thread, and wall time.
    """
    figures = []
    for name, shape in (
        ("decode, batch 256", (BATCH, 0, 0)),
        ("prefill, 8 prompts, 32 waiting", (0, 8, 32)),
    ):
        with tempfile.TemporaryDirectory(prefix="biscale-") as folder:
            sender = Sender(f"ipc://{folder}/r.sock", f"ipc://{folder}/a.sock")
            watcher, (scheduler, output) = SchedulerWatcher(sender), _stand_in(*shape)
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
        figures.append(
            LoopMeasurement(f"hook, {name}: processor time per iteration", cpu_s * 1e6, 50.0, "us")
        )
        figures.append(
            LoopMeasurement(
                f"hook, {name}: wall time, P50", float(np.quantile(wall, 0.5)) * 1e6, 50.0, "us"
            )
        )
    return figures


def _trace(duration_s: float, rate_rps: float) -> Trace:
    """Short chats: what one prefill and one decode instance of TP 4 can serve at 50 req/s."""
    rng = np.random.default_rng(0)
    n = int(duration_s * rate_rps)
    arrival = np.sort(rng.uniform(0.0, duration_s, n))
    return Trace(
        "bench",
        arrival,
        rng.integers(100, 200, n).astype(np.int32),
        rng.integers(40, 80, n).astype(np.int32),
        "uniform",
    )


def loop_figures(
    duration_s: float = 20.0, rate_rps: float = RATE_RPS, policies: dict[str, str] | None = None
) -> list[LoopMeasurement]:
    """The whole loop on emulated engines: load, records, decisions, clocks."""
    chosen = policies or {"prefill": "mpc", "decode": "slack"}
    folder = Path(tempfile.mkdtemp(prefix="biscale-"))
    try:
        settings = EmulatorSettings(
            folder / "gpus", folder / "s", ports=(8190, 8290), instance=InstanceSpec(max_seqs=512)
        )
        with Emulation(settings) as emulation:
            prefill, decode = emulation.urls
            replay_settings = ReplaySettings(
                policies=chosen,
                decode_url=decode,
                prefill_url=prefill,
                gpus={p: tuple(map(str, settings.gpus(p))) for p in PHASES},
                backend=f"fake:{settings.state}",
                engine="emulated",
                sockets=settings.sockets,
                instance=settings.instance,
                delay_s=settings.delay_s,
            )
            trace = _trace(duration_s, rate_rps)
            replay = ClosedLoopReplay(replay_settings, trace, folder / "raw")
            replay.run()
        raw = read_raw(folder / "raw")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    answered = [r for r in raw.requests if not r.error]
    begin_s = (
        raw.start_s + SETTLED * duration_s
    )  # from when the first answers have come until the last request has left
    steady = sum(begin_s <= r.last_chunk_s <= raw.start_s + duration_s for r in answered) / (
        (1 - SETTLED) * duration_s
    )
    figures = [
        LoopMeasurement(
            f"emulated engines: answers per second at {rate_rps:g} req/s",
            steady,
            0.95 * rate_rps,
            "req/s",
            True,
        ),
        LoopMeasurement(
            "emulated engines: requests failed", float(len(raw.requests) - len(answered)), 0.0, ""
        ),
        LoopMeasurement(
            "replayer: dispatch error, P99",
            float(np.quantile(dispatch_errors_s(raw.requests), 0.99)) * 1e3,
            5.0,
            "ms",
        ),
    ]
    for phase, policy in chosen.items():
        took = np.array([d.sent_s - d.received_s for d in raw.decisions[phase]])
        target = 5.0 if policy.startswith("mpc") else 1.0
        figures.append(
            LoopMeasurement(
                f"record to clock command, {phase} {policy}, P50",
                float(np.quantile(took, 0.5)) * 1e3,
                target,
                "ms",
            )
        )
        figures.append(
            LoopMeasurement(
                f"record to clock command, {phase} {policy}, P99",
                float(np.quantile(took, 0.99)) * 1e3,
                target,
                "ms",
            )
        )
    return figures


def as_json(figures: list[LoopMeasurement]) -> str:
    """Figures for machines."""
    return json.dumps([{**f.__dict__, "met": f.met} for f in figures], indent=2)
