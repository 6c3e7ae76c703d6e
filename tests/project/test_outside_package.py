"""An installed package adds a policy, a trace format, an engine, a GPU, an LLM and an SLO.

It lies in tests/outside_package, and docs/from-outside.md shows its files.
"""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pandas as pd
import pytest

from biscale_env.hardware.engines.hook import engine_record
from biscale_env.hardware.loop import wire

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tests" / "outside_package"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Environment in which the package is installed, in a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(PACKAGE)], check=True, timeout=300)
    assert list(target.glob("outside_lab-*.dist-info"))
    return {**os.environ, "PYTHONPATH": f"{target}:{ROOT}", "COLUMNS": "200"}


def biscale(env, *words, cwd, code=0):
    call = [sys.executable, "-m", "biscale_env.cli", *map(str, words)]
    done = subprocess.run(call, env=env, cwd=cwd, capture_output=True, text=True, timeout=1800)
    assert done.returncode == code, done.stdout + done.stderr
    return done


ASKED = """
import numpy as np
from biscale_env.config.slo import load_slo
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.policies import policy_settings, resolve_policy

for phase in ("prefill", "decode"):
    plant = Plant(PlantSettings.of(phase, slo="outside-slo"))
    policy = resolve_policy("two-clocks:low_mhz=600", plant)
    rows = np.zeros((2, plant.spec.dim), dtype=np.float32)
    rows[1, plant.spec.index("oldest_wait")] = 0.5
    actions, _ = policy.predict(rows)
    print(*(round(float(f)) for f in plant.clocks.to_freq_mhz(actions).ravel()))
print(len(policy_settings("two-clocks", "decode")), load_slo("outside-slo").tpot_s)
"""


def test_policy_and_slo_have_names_in_python(installed, tmp_path):
    call = [sys.executable, "-c", ASKED]
    done = subprocess.run(call, env=installed, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["600 1980", "600 1980", "3 0.2"]


def test_the_policy_is_compared_tuned_and_named(installed, tmp_path):
    words = ["compare", "--quick", "--phase", "decode", "--out", "run"]
    words += ["--policies", "max,two-clocks", "--policy", "slow=two-clocks:low_mhz=600"]
    biscale(installed, *words, cwd=tmp_path)
    results = pd.read_parquet(tmp_path / "run" / "results.parquet").set_index("policy")
    energy = results["energy_per_output_token_j"]
    assert energy["slow"] < energy["two-clocks"] < energy["max"]
    said = biscale(installed, "compare", "--policies", "two-clock", cwd=tmp_path, code=2).stderr
    assert "did you mean 'two-clocks'" in said


def test_the_trace_format_is_read_everywhere(installed, tmp_path):
    lines = ["TICKS", *(f"{50 * k} {300 + k} {40 + k}" for k in range(60))]
    (tmp_path / "mine.ticks").write_text("\n".join(lines) + "\n")
    told = biscale(installed, "traces", "describe", "mine.ticks", "--json", cwd=tmp_path).stdout
    assert json.loads(told)["requests"] == 60
    biscale(installed, "traces", "convert", "mine.ticks", "mine.parquet", cwd=tmp_path)
    frame = pd.read_parquet(tmp_path / "mine.parquet")
    assert frame["arrival_s"].iloc[-1] == pytest.approx(59 * 0.5)
    assert frame["prompt_tokens"].tolist() == [300 + k for k in range(60)]


def test_gpu_llm_and_slo_have_names(installed, tmp_path):
    point = ["decode", "--batch", "16", "--context", "512", "--tp", "1", "--json"]
    own = biscale(
        installed, "predict", *point, "--gpu", "outside-gpu", "--llm", "outside-llm", cwd=tmp_path
    )
    found = json.loads(own.stdout)
    shipped = json.loads(
        biscale(installed, "predict", *point, "--llm", "llama-3.1-8b", cwd=tmp_path).stdout
    )
    assert found != shipped
    words = ["--slo", "outside-slo", "--gpu", "outside-gpu", "--llm", "outside-llm", "--tp", "1"]
    compare = ["compare", "--quick", "--phase", "decode", "--policies", "max,slack", "--out", "run"]
    biscale(installed, *compare, *words, cwd=tmp_path)
    results = pd.read_parquet(tmp_path / "run" / "results.parquet")
    assert set(results["slo_tpot_s"]) == {0.2}
    assert results["freq_applied_mean_mhz"].max() == pytest.approx(1200.0)  # its highest clock
    said = biscale(installed, "predict", *point, "--gpu", "outside-gp", cwd=tmp_path, code=2).stderr
    assert "outside-gpu" in said


def test_records_of_the_engine_reach_the_controller(installed, tmp_path):
    zmq = pytest.importorskip("zmq")
    sockets, log = tmp_path / "s", tmp_path / "engine.log"
    sockets.mkdir()
    log.write_text("")
    context = zmq.Context()
    receiver = wire.newest_receiver(context, wire.record_endpoint(sockets, "decode"))
    words = ["hw", "bridge", "--phase", "decode", "--source", f"logfile:{log}"]
    call = [sys.executable, "-m", "biscale_env.cli", *words, "--sockets", str(sockets)]
    bridge = subprocess.Popen(call, env=installed, stdout=subprocess.PIPE, text=True)
    try:
        assert "ready" in bridge.stdout.readline()
        end = time.monotonic() + 300
        with log.open("a") as file:
            while not receiver.poll(50) and time.monotonic() < end:
                file.write("7 2\n")
                file.flush()
        record = engine_record.decode(receiver.recv(zmq.NOBLOCK))
        assert record.worker_id == f"logfile {log}"
        assert record.scheduled_requests.num_decode_requests == 7
        assert record.queued_requests.num_decode_requests == 2
        bridge.terminate()
        said, _ = bridge.communicate(timeout=300)
        assert bridge.returncode == 0
        assert re.search(r"[1-9]\d* records forwarded", said)
        with log.open("a") as file:
            file.write("seven 2\n")
        broken = biscale(installed, *words, "--sockets", sockets, cwd=tmp_path, code=2)
        assert "engine 'logfile': its entry point outside_lab.engine:records" in broken.stderr
    finally:
        bridge.kill()
        bridge.wait()
        receiver.close(0)
        wire.unbind(wire.record_endpoint(sockets, "decode"))
        context.destroy(0)


def test_the_guide_shows_the_files_as_they_are():
    guide = (ROOT / "docs" / "from-outside.md").read_text()
    for name in ("policy", "trace_format", "engine"):
        code = (PACKAGE / "src" / "outside_lab" / f"{name}.py").read_text()
        assert f"# {name}.py\n{code}" in guide, f"docs/from-outside.md shows another {name}.py"
    points = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]["entry-points"]
    for group, names in points.items():
        assert f'[project.entry-points."{group}"]' in guide
        for name, value in names.items():
            assert f'{name} = "{value}"' in guide
