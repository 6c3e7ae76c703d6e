"""Workloads: what a prefix cache costs a run, and how long a large trace takes to read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from meter import Meter

from biscale_env.envs.loads.capacity import StaticRun, run_static
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.traces import Trace, generate, read_trace
from biscale_env.traces.prompts.prompt_blocks import PromptBlocks

HOUR_S = 3600.0
CONV_RPS = 5.38  # Azure conversation 2023: 19,366 requests in an hour
TURNS = 5  # requests of an invented chat
WITHOUT_MS = 20.0  # target of the same hour with the cache off
FACTOR = 1.5
MILLION = 1_000_000


def chats(trace: Trace, block_tokens: int) -> Trace:
    """The same requests as turns of invented chats, each of which begins like the others of it."""
    chat = np.random.default_rng(0).integers(0, len(trace) // TURNS, len(trace))
    counts = -(-trace.prompt_tokens.astype(np.int64) // block_tokens)
    starts = np.concatenate([[0], np.cumsum(counts)])
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
    ids = np.repeat(chat, counts) * int(counts.max()) + within
    return replace(trace, blocks=PromptBlocks.of(ids, starts, block_tokens, chat))


@pytest.mark.parametrize("block_tokens", [None, 512, 16])
def test_hour_with_a_prefix_cache(meter: Meter, block_tokens: int | None) -> None:
    """The hour through both phases at the highest clock, with hits from `lru`."""
    prefill, decode = (Plant(PlantSettings.of(phase)) for phase in ("prefill", "decode"))
    top = prefill.gpu.freq_max_mhz
    hour = generate("azure-conv-like", rate_rps=CONV_RPS, duration_s=HOUR_S, seed=0)
    work = hour if block_tokens is None else chats(hour, block_tokens)

    def both() -> StaticRun:
        first = run_static(prefill, work, top)
        ready_s = hour.arrival_s + first.latency_s
        order = np.argsort(ready_s, kind="stable")
        lengths = hour.prompt_tokens[order], hour.output_tokens[order]
        return run_static(decode, Trace("ready", ready_s[order], *lengths, "prefill"), top)

    name = "off" if block_tokens is None else f"lru, blocks of {block_tokens} tokens"
    target = WITHOUT_MS * (1.0 if block_tokens is None else FACTOR)
    meter.time(both, f"hour, prefill + decode, prefix cache {name}", "ms", target)


def test_a_million_rows(meter: Meter, tmp_path: Path) -> None:
    """Reading a CSV of a million requests."""
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.exponential(0.1, MILLION)).round(6).astype(str)
    lengths = rng.integers(1, 4000, (2, MILLION)).astype(str)
    rows = (",".join(row) for row in zip(times, *lengths, strict=True))
    path = tmp_path / "million.csv"
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]))
    meter.time(lambda: read_trace(path), "a CSV of a million requests", "s", 2.0)
