"""Tier 3 (`make test-engine`).

The real vLLM prefill/decode pair on the CPU, our hook, the actuator on the C stand-in for NVML.

Needs ``tests/engine/setup.sh`` once. Not part of the ordinary suite: it takes minutes and its
environment is 3.7 GB. However it ends, by itself, by a signal or by ``kill -9``, no engine is left
behind.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
VENV = Path(os.environ.get("BISCALE_ENGINE_VENV", ROOT / ".venv-engine"))
MODEL = VENV / "tiny-llama"
START_S = 600.0  # half a minute on two free cores, minutes on busy ones

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not MODEL.is_dir(), reason="no engine environment: run tests/engine/setup.sh"
    ),
    pytest.mark.skipif(not shutil.which("gcc"), reason="no C compiler on this machine"),
]


@pytest.fixture(scope="module", autouse=True)
def _orderly():
    """A polite kill (of `timeout`, of CI) ends like Ctrl-C: with the fixtures' clean-up."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


def die_with_parent():
    """Runs in the child: SIGTERM when the tests die without clean-up (PR_SET_PDEATHSIG = 1,
    linux/prctl.h).
    """
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Stands over an engine as the leader of its process group. vLLM does not always heed a polite
# signal while it starts, so when this process is told to end, or the tests have died, the whole
# group gets ten seconds and then no choice.
GUARDIAN = """
import os, signal, subprocess, sys
def end(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    try:
        engine.wait(10)
    finally:
        os.killpg(0, signal.SIGKILL)
signal.signal(signal.SIGTERM, end)
engine = subprocess.Popen(sys.argv[1:])
sys.exit(engine.wait())
"""


class Engine:
    """One real vLLM server with our hook."""

    def __init__(self, phase, folder):
        self.phase, self.port = phase, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{phase}.log"
        role = "kv_producer" if phase == "prefill" else "kv_consumer"
        env = {
            **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            # a core each: spinning threads that share one starve
            "VLLM_CPU_OMP_THREADS_BIND": "0" if phase == "prefill" else "1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            "BISCALE_RECORDS": f"ipc://{folder}/s/record-{phase}.sock",
            "BISCALE_RECORDS_ALL": f"ipc://{folder}/s/all-{phase}.sock",
        }
        transfer = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
        command = [
            VENV / "bin" / "python",
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            MODEL,
            "--served-model-name",
            "tiny",
            "--host",
            "127.0.0.1",
            "--port",
            self.port,
            "--enforce-eager",
            # bf16 has no fast matrix product on a processor without AVX-512
            "--dtype",
            "float32",
            "--max-model-len",
            "4096",
            "--enable-logging-iteration-details",
            "--scheduler-cls",
            "biscale_hook.vllm_hook.BiscaleScheduler",
            "--kv-transfer-config",
            json.dumps(transfer),
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-c", GUARDIAN, *map(str, command)],
            cwd=folder,
            env=env,
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    def wait(self):
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
                return
            except OSError:
                time.sleep(1)
        raise AssertionError(
            f"{self.phase} did not start in {START_S} s: {self.log.read_text()[-3000:]}"
        )

    def ask(self, **body):
        """One plain request. The decode engine needs one before its first remote prefill, or it
        dies (SIGILL) on the CPU.
        """
        data = json.dumps(
            {"model": "tiny", "prompt": [5, 6, 7, 8], "max_tokens": 4, "ignore_eos": True, **body}
        ).encode()
        request = urllib.request.Request(
            f"{self.url}/v1/completions", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())

    def stop(self):
        """End the server and whatever it has started: they are one process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Both engines, fake GPUs under the C library, and the environment of our commands."""
    from biscale_env.hardware.clocks.fake_gpus import create_state

    folder = tmp_path_factory.mktemp("e")
    (folder / "s").mkdir()
    library = folder / "libnvidia-ml.so.1"
    source = ROOT / "tests" / "fake_nvml" / "nvml.c"
    subprocess.run(
        [
            "gcc",
            "-shared",
            "-fPIC",
            "-O1",
            "-Wl,-soname,libnvidia-ml.so.1",
            "-o",
            library,
            source,
            "-lm",
        ],
        check=True,
    )
    state = create_state(folder / "gpus", 8, delay_s=0.05)
    env = {
        "LD_LIBRARY_PATH": str(folder),
        "FAKE_NVML_STATE": str(state),
        "BISCALE_HW_STATE": str(folder / "owned"),
    }
    engines = {phase: Engine(phase, folder) for phase in ("prefill", "decode")}
    try:
        for engine in engines.values():
            engine.wait()
        engines["decode"].ask()
        yield folder, engines, env, state
    finally:
        for process in replays:
            if process.poll() is None:
                process.kill()  # its own children end with it
                process.wait()
        for engine in engines.values():
            engine.stop()


replays: list[subprocess.Popen] = []


def write_trace(folder, n, rate):
    """Requests of the Azure conversation profile, clipped to what the engine serves quickly."""
    from biscale_env.traces import generate

    trace = generate("azure-conv-like", rate_rps=rate, duration_s=4 * n / rate, seed=0)
    rows = zip(
        trace.arrival_s[:n],
        trace.prompt_tokens[:n].clip(4, 1500),
        trace.output_tokens[:n].clip(2, 48),
        strict=True,
    )
    lines = [
        json.dumps(
            {
                "timestamp": 1e3 * float(t),
                "input_length": int(p),
                "output_length": int(o),
                "time_unit": "ms",
            }
        )
        for t, p, o in rows
    ]
    path = folder / "trace.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def start_replay(site, name, n):
    folder, engines, env, _ = site
    command = [
        sys.executable,
        "-m",
        "biscale_env.cli",
        "replay",
        "--trace",
        write_trace(folder, n, 2.0),
        "--prefill",
        engines["prefill"].url,
        "--decode",
        engines["decode"].url,
        "--backend",
        "nvml",
        "--sockets",
        folder / "s",
        "--out",
        folder / name,
        "--policy",
        "biscale",
        # a model on a busy CPU may take its time over a prompt
        "--vocabulary",
        "1000",
        "--stall",
        "180",
    ]
    process = subprocess.Popen(
        [str(c) for c in command],
        env={**os.environ, **env},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    replays.append(process)
    return process


def locked(state):
    from biscale_env.hardware.clocks.fake_gpus import FakeState

    with FakeState(state).locked() as gpus:
        return int(gpus["locked"].sum())


BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def test_our_figures_are_those_of_vllm_bench_serve(tmp_path):
    """The same Mooncake trace against the same (emulated) engine, measured by vLLM's own client and
    by ours.

    The first test: two engines that wait spin on every core of a small machine, and what either
    client measures beside them is chance.
    """
    import asyncio

    from biscale_env.hardware.emulation.emulate import Emulation, EmulatorSettings
    from biscale_env.hardware.replay.client import LoadSettings, Replayer
    from biscale_env.traces import read_trace

    rng = np.random.default_rng(1)
    at_ms = np.cumsum(rng.exponential(250, 60))
    lengths = zip(
        at_ms - at_ms[0], rng.integers(64, 2000, 60), rng.integers(20, 120, 60), strict=True
    )
    rows = [
        {
            "timestamp": int(t),
            "input_length": int(p),
            "output_length": int(o),
            "hash_ids": list(range(10 * k, 10 * k + -(-int(p) // 512))),
        }
        for k, (t, p, o) in enumerate(lengths)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    with Emulation(
        EmulatorSettings(tmp_path / "gpus", tmp_path / "s", ports=(free_port(), free_port()))
    ) as emulation:
        url = emulation.urls[1]
        records = asyncio.run(Replayer(read_trace(path), LoadSettings(url)).run())
        command = [
            VENV / "bin" / "python",
            "-c",
            BENCH,
            "--backend",
            "openai",
            "--base-url",
            url,
            "--endpoint",
            "/v1/completions",
            "--model",
            "emulated-llama-3.3-70b",
            "--tokenizer",
            MODEL,
            "--dataset-name",
            "timed_trace",
            "--dataset-path",
            path,
            "--timed-trace-chunk-hash-size",
            "512",
            "--timed-trace-sec-multiplier",
            "0.001",
            "--num-prompts",
            "60",
            "--ignore-eos",
            "--percentile-metrics",
            "ttft,tpot",
            "--metric-percentiles",
            "50,99",
            "--save-result",
            "--result-dir",
            tmp_path,
            "--result-filename",
            "bench.json",
        ]
        done = subprocess.run(
            [str(c) for c in command], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((tmp_path / "bench.json").read_text())
    assert theirs["completed"] == 60
    assert theirs["total_output_tokens"] == sum(r.completion_tokens for r in records)
    ours = np.array([r.tpot_s for r in records]) * 1e3
    print(f"TPOT mean {ours.mean():.2f} ms, median {np.median(ours):.2f} ms")
    print(f"vllm bench serve: {theirs['mean_tpot_ms']:.2f} and {theirs['median_tpot_ms']:.2f} ms")
    assert ours.mean() == pytest.approx(theirs["mean_tpot_ms"], rel=0.02)
    assert np.median(ours) == pytest.approx(theirs["median_tpot_ms"], rel=0.02)
    assert np.median([r.ttft_s for r in records]) * 1e3 == pytest.approx(
        theirs["median_ttft_ms"], abs=5.0
    )


def test_forty_requests_under_control(site):
    from biscale_env.hardware.replay.raw_log import read_raw

    folder, _, _, state = site
    process = start_replay(site, "run", 40)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stdout + stderr
    print(stdout)
    raw = read_raw(folder / "run" / "raw")
    assert [r.error for r in raw.requests] == [""] * 40
    assert all(r.completion_tokens == r.output_tokens for r in raw.requests)
    for phase in ("prefill", "decode"):
        counters = [r.counter for r in raw.iterations[phase]]
        assert counters == list(range(counters[0], counters[-1] + 1)), (
            "an observation for every iteration"
        )
        assert raw.decisions[phase]
        commands = [c for c in raw.changes if c.group == phase and c.cause == "command"]
        decided = {d.sequence: d.freq_mhz for d in raw.decisions[phase]}
        assert commands
        known = [c for c in commands if c.sequence in decided]
        assert all(c.freq_mhz == decided[c.sequence] for c in known), "clocks follow the policy"
        seen = [c.seen_mhz for c in commands if np.isfinite(c.seen_s)]
        assert len(seen) > 0.5 * len(commands)
        hook = np.array([r.hook_s for r in raw.iterations[phase] if r.hook_s])
        print(
            f"{phase}: {len(counters)} iterations, hook p50 {np.median(hook) * 1e6:.0f} us, p99"
            f" {np.quantile(hook, 0.99) * 1e6:.0f} us"
        )
    assert sum(r.decode_requests for r in raw.iterations["prefill"]) == 0, (
        "a prefill engine decodes nothing"
    )
    prompts = sum(r.prefill_tokens for r in raw.iterations["prefill"])
    assert prompts == sum(r.prompt_tokens for r in raw.requests)
    assert locked(state) == 0
    assert not list((folder / "owned").glob("*.json"))


def test_serving_is_unharmed_when_the_actuator_is_killed(site):
    from biscale_env.hardware.replay.raw_log import read_raw

    folder, _, env, state = site
    process = start_replay(site, "killed", 20)
    end = time.monotonic() + 300
    while locked(state) == 0:
        assert time.monotonic() < end, "no clock was ever locked"
        time.sleep(0.1)
    actuators = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if parent == process.pid and b"actuate" in line:
            actuators.append(int(entry.name))
    (pid,) = actuators
    os.kill(pid, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stdout + stderr
    raw = read_raw(folder / "killed" / "raw")
    assert [r.error for r in raw.requests] == [""] * 20
    restore = [sys.executable, "-m", "biscale_env.cli", "hw", "restore"]
    subprocess.run(restore, env={**os.environ, **env}, cwd=ROOT, check=True)
    assert locked(state) == 0


def test_the_engine_serves_without_anybody_listening(site):
    _, engines, _, _ = site
    answer = engines["decode"].ask(max_tokens=8)
    assert answer["usage"]["completion_tokens"] == 8
