"""Closed forms of queueing with DistServe's own coefficients, and the capacity table on the fitted
models.
"""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cluster_support import random_trace, trace

from biscale_env.config.loader import configs_dir
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_options import fitting_tps
from biscale_env.envs.cluster.cluster_settings import ClusterPlant, ClusterSettings
from biscale_env.envs.loads.capacity import run_static
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.models.physics import Coefficients
from biscale_env.traces import generate
from controllers.placement import capacity_table as capacity_table_module
from controllers.placement.capacity_table import TableRequest, capacity_table, measure
from controllers.placement.ilp import PHASES

# DistServe's fits for OPT-66B, TP4, A100-80G, in ms (LLMServe/DistServe,
# simdistserve/estimators/profile_data, Apache-2.0): prefill a + b sum n + c sum n^2; decode, batch
# below 95: a + b context tokens + c batch.
PREFILL_MS = (26.76512367065223, 0.1375928914774527, 7.561318878163137e-06)
DECODE_MS = (30.760284619429587, 0.000451947603788462, 0.063284195750671)


def distserve_plant(phase, **settings):
    """A plant whose iterations take exactly what DistServe's formula says, at every clock."""
    zero = dict.fromkeys(Coefficients._fields, 0.0)
    a, b, c = (x / 1e3 for x in (PREFILL_MS if phase == "prefill" else DECODE_MS))
    form = {
        "host0_s": a,
        "n_gpus": 4.0,
        "freq_profile_ghz": 1.98,
        "p_cap_w": 1e9,
        "p_static_w": 1.0,
    }
    if phase == "prefill":
        form |= {"elem_s_per_token": b, "attn_prefill_s": 2 * c}  # A = n^2 / 2
    else:
        form |= {"attn_decode_s": b, "host_s_per_seq": c}
    plant = Plant(PlantSettings.of(phase, drain=True, actuation_delay_s=0.0, **settings))
    plant.model = replace(plant.model, coefficients=Coefficients(**{**zero, **form}))
    return plant


def prefill_s(n):
    a, b, c = PREFILL_MS
    return (a + b * n + c * n * n) / 1e3


def poisson(n, rate, prompts, seed):
    rng = np.random.default_rng(seed)
    return trace(np.cumsum(rng.exponential(1 / rate, n)), rng.choice(prompts, n), 1)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_m_d_1(load):
    """Equal prompts one by one from a Poisson stream.

    Mean wait rho s / (2 (1 - rho)), the formula DistServe reasons with.
    """
    service = prefill_s(512)
    n = 120_000
    run = run_static(
        distserve_plant("prefill", max_seqs=1), poisson(n, load / service, [512], 3), 1980.0
    )
    want = load * service / (2 * (1 - load))
    assert np.mean(run.latency_s) - service == pytest.approx(want, rel=0.06)
    assert run.busy_s == pytest.approx(n * service, rel=1e-9)


@pytest.mark.parametrize("load", [0.4, 0.7])
def test_m_g_1(load):
    """Short and long prompts: Pollaczek-Khinchine, mean wait = lambda E[s^2] / (2 (1 - rho))."""
    services = np.array([prefill_s(128), prefill_s(1900)])
    rate = load / services.mean()
    run = run_static(
        distserve_plant("prefill", max_seqs=1), poisson(200_000, rate, [128, 1900], 4), 1980.0
    )
    want = rate * np.mean(services**2) / (2 * (1 - load))
    assert np.mean(run.latency_s) - services.mean() == pytest.approx(want, rel=0.08)


def test_distserve_decode_formula():
    """A batch of 20 equal requests: every interval is a + b context + c batch."""
    plant = distserve_plant("decode")
    run = run_static(plant, trace(np.zeros(20), 500, 11), 1980.0)
    a, b, c = (x / 1e3 for x in DECODE_MS)
    total = sum(a + b * 20 * (501 + k) + c * 20 for k in range(10))
    np.testing.assert_allclose(run.latency_s * 10, total, rtol=1e-12)


SAMPLE = generate("gamma-sharegpt-like", rate_rps=20.0, duration_s=120.0, seed=5)
SETTINGS = ClusterSettings.of(actuation_delay_s=0.0)


@pytest.mark.parametrize("phase", PHASES)
def test_capacity_rises_with_clock_and_tp(phase):
    request = TableRequest(SETTINGS)
    rates = {
        tp: [measure(request, SAMPLE, phase, tp, f).rate_rps for f in (810.0, 1200.0, 1605.0)]
        for tp in fitting_tps(SETTINGS, phase)
    }
    slack = 1 + 2 * request.tolerance
    for of_tp in rates.values():
        assert of_tp[0] > 0
        assert of_tp[0] <= of_tp[1] * slack
        assert of_tp[1] <= of_tp[2] * slack
    for smaller, larger in zip(sorted(rates), sorted(rates)[1:], strict=False):
        assert all(a <= b * slack for a, b in zip(rates[smaller], rates[larger], strict=True))


@pytest.mark.parametrize("phase", PHASES)
def test_capacity_rises_with_the_slo(phase):
    slos = ("mlperf-interactive", "biscale", "mlperf-server")  # tighter to wider in both bounds
    rates = [
        measure(TableRequest(SETTINGS.changed(slo=slo)), SAMPLE, phase, 4, 1200.0).rate_rps
        for slo in slos
    ]
    assert rates[0] <= rates[1] * 1.02
    assert rates[1] <= rates[2] * 1.02
    assert rates[0] < rates[2]


@pytest.mark.parametrize("phase", PHASES)
def test_energy_of_an_entry_is_that_of_a_request_at_capacity(phase):
    entry = measure(TableRequest(SETTINGS, seeds=(1,)), SAMPLE, phase, 4, 1200.0)
    load = SAMPLE.scaled_to(entry.rate_rps, 1)
    run = run_static(ClusterPlant(SETTINGS).plant(phase, 4), load, 1200.0)
    assert entry.energy_j == pytest.approx(run.energy_j / len(load))
    assert entry.power_w == pytest.approx(
        run.energy_j / SAMPLE.duration_s, rel=0.05
    )  # what the programme adds up


def test_tables_are_kept_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path))
    request = TableRequest(SETTINGS, freqs_mhz=(1200.0, 1980.0))
    seen = []
    first = capacity_table(request, SAMPLE, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(first.entries), len(first.entries))
    assert len(list((tmp_path / "capacity").glob("*.json"))) == 1
    monkeypatch.setattr(
        capacity_table_module, "_measure_all", lambda *a: pytest.fail("measured again")
    )
    assert capacity_table(request, SAMPLE).entries == first.entries
    assert (
        capacity_table(
            TableRequest(SETTINGS.changed(decode_policy="slack"), (1200.0, 1980.0)), SAMPLE
        )
        == first
    )


@pytest.mark.parametrize("damage", ["", "{}", "[1]", "[{}]", "null", '[{"phase": "prefill"'])
def test_a_damaged_table_is_measured_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path))
    request = TableRequest(SETTINGS, freqs_mhz=(1980.0,), seeds=(0,), tolerance=0.2)
    first = capacity_table(request, SAMPLE)
    (path,) = (tmp_path / "capacity").glob("*.json")
    kept = path.read_text()
    path.write_text(damage)
    assert capacity_table(request, SAMPLE) == first
    assert path.read_text() == kept


def test_a_table_of_other_configurations_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path))
    request = TableRequest(SETTINGS, freqs_mhz=(1980.0,), seeds=(0,), tolerance=0.2)
    first = capacity_table(request, SAMPLE)
    (path,) = (tmp_path / "capacity").glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text())[:-1]))
    assert capacity_table(request, SAMPLE) == first


def test_two_that_want_one_table_measure_it_once(tmp_path, monkeypatch):
    """The second waits for the first and reads what it kept."""
    monkeypatch.setenv("BISCALE_CACHE", str(tmp_path))
    request = TableRequest(SETTINGS, freqs_mhz=(1980.0,), seeds=(0,), tolerance=0.2)
    real, calls = capacity_table_module._measure_all, []
    begun, other_waits = threading.Event(), threading.Event()

    def slow(*args):
        calls.append(args)
        begun.set()
        assert other_waits.wait(30)
        return real(*args)

    monkeypatch.setattr(capacity_table_module, "_measure_all", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(capacity_table, request, SAMPLE)
        assert begun.wait(30)
        second = pool.submit(capacity_table, request, SAMPLE)
        with pytest.raises(TimeoutError):
            second.result(0.3)
        other_waits.set()
        assert first.result(60) == second.result(60)
    assert len(calls) == 1


def test_without_a_folder_that_can_be_written_it_is_measured(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(capacity_table_module, "cache_folder", lambda: blocked / "capacity")
    request = TableRequest(SETTINGS, freqs_mhz=(1980.0,), seeds=(0,), tolerance=0.2)
    assert capacity_table(request, SAMPLE) == capacity_table(request, SAMPLE, use_cache=False)


def test_what_is_loaded_counts_by_content(tmp_path):
    """A changed SLO or GPU file is another table; the same content is the same."""

    def key(**changes):
        request = TableRequest(SETTINGS.changed(**changes), (1980.0,))
        return capacity_table_module.table_key(request, SAMPLE)

    for kind, name, old, new in (
        ("slo", "slos/biscale.yaml", "tpot_s: ", "tpot_s: 1"),
        ("gpu", "gpus/h100-sxm.yaml", "memory_gb: 80", "memory_gb: 72"),
    ):
        text = (configs_dir() / name).read_text()
        assert old in text
        file = tmp_path / f"{kind}.yaml"
        file.write_text(text)
        before = key(**{kind: str(file)})
        assert key(**{kind: str(file)}) == before
        file.write_text(text.replace(old, new))
        assert key(**{kind: str(file)}) != before


def test_the_code_that_measures_counts(monkeypatch):
    """Sources of the simulator in all packages, of this one, of traces and of the SLO."""
    key = partial(capacity_table_module.table_key, TableRequest(SETTINGS, (1980.0,)), SAMPLE)
    before, seen = key(), []
    real = Path.read_bytes

    def changed(path):
        seen.append(path)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", changed)
    assert key() == before
    names = {f"{path.parent.name}/{path.name}" for path in seen}
    assert names >= {
        "placement/capacity_table.py",
        "cluster/loop.py",
        "cluster/cluster_options.py",
        "laws/slack_law.py",
        "sim/decode.py",
        "loads/capacity.py",
        "traces/trace.py",
        "config/slo.py",
    }
    for name in ("placement/capacity_table.py", "traces/trace.py", "config/slo.py"):
        wanted = tuple(name.split("/"))
        monkeypatch.setattr(
            Path,
            "read_bytes",
            lambda path, wanted=wanted: real(path) + b"#" * (path.parts[-2:] == wanted),
        )
        assert key() != before, name


def test_a_changed_setting_or_trace_is_another_table():
    key = capacity_table_module.table_key(TableRequest(SETTINGS), SAMPLE)
    other = random_trace(200)
    assert key != capacity_table_module.table_key(
        TableRequest(SETTINGS.changed(slo="mlperf-server")), SAMPLE
    )
    assert key != capacity_table_module.table_key(TableRequest(SETTINGS), other)
    assert key != capacity_table_module.table_key(TableRequest(SETTINGS, seeds=(0,)), SAMPLE)


def test_impossible_tables_are_explained():
    with pytest.raises(BiscaleError, match="needs at least 100"):
        capacity_table(TableRequest(SETTINGS), random_trace(50), use_cache=False)
    with pytest.raises(BiscaleError, match="7 GPUs cannot be divided"):
        capacity_table(TableRequest(SETTINGS.changed(gpus=7)), SAMPLE, use_cache=False)
    with pytest.raises(BiscaleError, match="unknown slo 'fast'"):
        capacity_table(TableRequest(SETTINGS.changed(slo="fast")), SAMPLE, use_cache=False)


@pytest.mark.slow
def test_speed_of_a_whole_table():
    """Both phases, all TP, 7 clocks, one window of 5 minutes: at most 60 s on one core."""
    import time

    window = generate("gamma-sharegpt-like", rate_rps=30.0, duration_s=300.0, seed=1)
    start = time.perf_counter()
    table = capacity_table(TableRequest(SETTINGS.changed(dtype="fp8")), window, use_cache=False)
    assert time.perf_counter() - start < 60.0
    assert len(table.entries) == 2 * 3 * 7
