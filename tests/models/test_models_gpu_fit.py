"""The GPU's layer: lone GEMMs by hand, evidence as its sources say, a known GPU comes back, and the
committed layers meet what was measured.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_env.config import configs_dir, load_gpu
from biscale_env.core.errors import BiscaleError
from biscale_env.jobs.workers import Workers
from biscale_env.models import load_model, physics
from biscale_env.models.ensemble_table import read_table, table_text
from biscale_env.models.fit import gpu_fit
from biscale_env.models.fit.gpu_evidence import (
    GpuEvidence,
    Prior,
    ServingPoint,
    evidence_dir,
    known_evidence,
    load_gpu_evidence,
)
from biscale_env.models.fit.gpu_files import counted, fit_gpu, layer_texts, servers_of
from biscale_env.models.fit.gpu_fit import GpuFit, fixed_values, predict_kernels, predict_points
from biscale_env.models.fit.host_fit import NO_HOST, fit_energy_factor, fit_host
from biscale_env.models.fit.server_model import mixture, predict_server, prompt_tokens_of
from biscale_env.models.gemm import gemm_coefficients, predict_gemm
from biscale_env.models.gpu_layer import LAYER_FIELDS, layer_files, layer_path, load_layer

H100 = load_gpu("h100-sxm")
EVIDENCE = load_gpu_evidence("h100-sxm")
LAYER = load_layer("h100-sxm").values


def test_a_large_gemm_runs_at_the_sustained_rate_and_a_small_one_streams_its_weights():
    large = predict_gemm("h100-sxm", 16384, 8192, 8192, freq_mhz=1005)
    assert large.freq_effective_mhz == pytest.approx(1005)
    rate = 132 * LAYER["flops_per_clock_sm"] * 1.005e9
    assert large.tflops * 1e12 == pytest.approx(rate, rel=0.01)
    assert large.energy_per_tflop_j == pytest.approx(large.power_w / large.tflops, rel=1e-12)
    small = predict_gemm("h100-sxm", 1, 4096, 129280)
    assert small.freq_effective_mhz == pytest.approx(1980)
    slowed = (1 + (LAYER["stream_knee_ghz"] / 1.98) ** 4) ** 0.25
    seconds = slowed * 4096 * 129280 * 2 / (LAYER["stream_gb_per_s"] * 1e9) + LAYER["kernel0_s"]
    assert small.time_s == pytest.approx(seconds, rel=1e-6)


def test_energy_of_a_gemm_by_hand():
    c = gemm_coefficients(LAYER, H100, "bf16", 1024.0, 2048.0)
    rows, f = 2048.0, 1.2
    v2 = (1 + LAYER["v_slope_per_ghz"] * physics.hinge(f - LAYER["v_knee_ghz"])) ** 2
    time_s = float(physics.latency_s(c, rows, 0.0, 0.0, 1.0, f))
    moved = 2.0 * (1024 * 2048 + rows * (1024 + 2048))
    per_flop = LAYER["e_flop_bf16_j"] * (1 - LAYER["few_rows_saving"] / 2)  # half at 2048 rows
    energy = (
        time_s * (LAYER["p_static_w"] + LAYER["p_clock_w_per_ghz"] * f * v2)
        + v2 * (per_flop * 2 * rows * 1024 * 2048 + LAYER["e_byte_j"] * moved)
        + LAYER["e_hbm_j"] * moved
    )
    assert physics.power_w(c, rows, 0.0, 0.0, 1.0, f) * time_s == pytest.approx(energy, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows of a GEMM must be 1 or more, but is 0"),
        ({"k": -3}, "k of a GEMM"),
        ({"n": float("nan")}, "n of a GEMM"),
        ({"dtype": "int4"}, "unknown dtype 'int4': choose bf16, fp8, mxfp4"),
        ({"freq_mhz": 9.0}, "clock 9 MHz is impossible on h100-sxm"),
        ({"gpu": "v100"}, "unknown gpu"),
    ],
)
def test_impossible_gemms(change, message):
    good = {"gpu": "h100-sxm", "rows": 8, "k": 8, "n": 8, "dtype": "bf16", "freq_mhz": 1200.0}
    with pytest.raises(BiscaleError, match=f"(?i){message}"):
        predict_gemm(**(good | change))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20_000),
    k=st.integers(64, 16_384),
    n=st.integers(64, 131_072),
    f=st.floats(510, 1950),
)
def test_gemms_cost_more_for_more_work_and_never_exceed_the_cap(rows, k, n, f):
    a, more = (
        predict_gemm("h100-sxm", rows, k, n, freq_mhz=f),
        predict_gemm("h100-sxm", rows + 512, k, n, freq_mhz=f),
    )
    assert a.power_w <= 700 * (1 + 1e-6)
    assert more.time_s > a.time_s
    faster = predict_gemm("h100-sxm", rows, k, n, freq_mhz=f + 15)
    assert faster.time_s <= a.time_s * (1 + 1e-9)


# --- what the evidence says ------------------------------------------------------------------


def test_kernels_equal_their_source(shared_data):
    raw = pd.read_csv(shared_data / "calibration" / "gemm_power_by_clock.csv")
    for gpu in ("h100-sxm", "b200-sxm"):
        mine, theirs = load_gpu_evidence(gpu).kernels.points, raw[raw.gpu == gpu]
        assert len(mine) == len(theirs)
        for p, (_, r) in zip(mine, theirs.iterrows(), strict=True):
            assert (p.rows, p.k, p.n) == (r.rows_m, r.k, r.n)
            assert p.power_w == pytest.approx(r.power_w, rel=2e-3)
            assert p.time_us == pytest.approx(r.time_us_p50, rel=5e-4)


def test_servers_equal_their_source(shared_data):
    raw = pd.read_csv(shared_data / "calibration" / "mlenergy_v3_serving.csv")
    raw = raw[raw.gpu == "H100"]
    for group in EVIDENCE.serving.groups:
        for p in group.points:
            same = raw[np.isclose(raw.mean_batch, p.batch, rtol=1e-4)]
            same = same[np.isclose(same.itl_p50_ms / 1e3, p.itl_p50_s, rtol=5e-4)]
            assert len(same) == 1
            row = same.iloc[0]
            assert row.power_per_gpu_w == pytest.approx(p.power_w, rel=5e-4)
            assert (row.n_gpus, max(row.ep, 1)) == (group.tp, group.ep)


@pytest.mark.parametrize("gpu", known_evidence())
def test_committed_layers_are_complete_and_within_their_bounds(gpu):
    ev, layer = load_gpu_evidence(gpu), load_layer(gpu)
    path = layer_path(gpu)
    assert path is not None
    table = layer_files(path).table()
    for name in LAYER_FIELDS:
        prior = ev.prior[name]
        values = [layer.value(name), *table.get(name, [])]
        assert prior.low * 0.999 <= min(values), name
        assert max(values) <= prior.high * 1.001, name
        assert layer.coefficients[name].source
    assert all(len(column) == ev.n_members for column in table.values())


def test_what_is_borrowed_is_wider_and_says_so():
    own, borrowed = load_gpu_evidence("h100-sxm"), load_gpu_evidence("h200-sxm")
    layer = load_layer("h100-sxm")
    p = borrowed.prior["e_flop_bf16_j"]
    assert p.mean == layer.value("e_flop_bf16_j")
    assert p.source.startswith("borrowed from the fit of h100-sxm")
    assert p.provenance == "assumed"
    for gpu in ("h200-sxm", "l40s"):
        path = layer_path(gpu)
        assert path is not None
        wide = layer_files(path).table()["e_hbm_j"]
        narrow = layer_files(layer_path("h100-sxm")).table()["e_hbm_j"]
        assert np.std(np.log(wide)) > 1.2 * np.std(np.log(narrow))
    assert own.base is None


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["prior"].pop("e_hbm_j"),
        lambda d: d["prior"].update(warp=d["prior"]["e_hbm_j"]),
        lambda d: d["prior"]["e_hbm_j"].update(mean=1.0),
        lambda d: d["kernels"]["points"][0].update(power_w=-3),
    ],
)
def test_evidence_must_make_sense(change):
    data = yaml.safe_load((evidence_dir() / "h100-sxm.yaml").read_text())
    change(data)
    with pytest.raises(ValueError, match=r"wrong or missing|must hold|greater than 0"):
        GpuEvidence.model_validate(data)


def test_priors_sample_what_they_say():
    rng = np.random.default_rng(0)
    p = Prior(mean=2.0, sigma=0.3, low=0.1, high=50.0, log=True, source="s")
    values = np.array([p.sample(rng) for _ in range(4000)])
    assert np.log(values).mean() == pytest.approx(math.log(2.0), abs=0.02)
    assert np.log(values).std() == pytest.approx(0.3, rel=0.05)
    assert p.pull(2.0 * math.exp(0.6)) == pytest.approx(2.0)
    q = Prior(mean=2.0, sigma=0.5, low=1.9, high=2.1, source="s")
    assert {round(q.sample(rng), 3) for _ in range(200)} >= {1.9, 2.1}
    assert q.pull(2.5) == 1.0


# --- the fit finds what is there -------------------------------------------------------------


def known_gpu(**changes):
    """Evidence whose kernels were measured on a GPU with known coefficients."""
    truth = fixed_values(EVIDENCE) | {
        "v_knee_ghz": 0.98, "v_slope_per_ghz": 0.75, "e_flop_bf16_j": 4.2e-13, "e_hbm_j": 5.1e-11,
        "few_rows_saving": 0.25, "stream_knee_ghz": 0.9, "flops_per_clock_sm": 3700.0, **changes,
    }  # fmt: skip
    points = EVIDENCE.kernels.points
    for _ in range(2):
        time, power = predict_kernels(points, H100, truth)
        points = tuple(
            p.model_copy(update={"time_us": t * 1e6, "power_w": w})
            for p, t, w in zip(points, time, power, strict=True)
        )
    kernels = EVIDENCE.kernels.model_copy(update={"points": points})
    return truth, EVIDENCE.model_copy(update={"kernels": kernels})


def test_a_known_gpu_comes_back_from_its_kernels():
    truth, ev = known_gpu()
    exact = ev.noise.model_copy(
        update={"kernel_time": 1e-4, "kernel_power": 1e-4, "short_kernel_power": 1e-4,
                "kernel_gain": 0.0}
    )  # fmt: skip
    ev = ev.model_copy(update={"noise": exact, "idle": ()})
    fit = GpuFit(ev, H100, (), {})
    found = fit.values(fit.solve(fixed_values(ev), fit.unmoved()), fixed_values(ev))
    time, power = predict_kernels(ev.kernels.points, H100, found)
    np.testing.assert_allclose(power, fit.kernel_power_w, rtol=2e-3)
    np.testing.assert_allclose(time, fit.kernel_time_s, rtol=2e-3)
    for name in ("v_knee_ghz", "stream_knee_ghz", "flops_per_clock_sm"):
        assert found[name] == pytest.approx(truth[name], rel=0.05), name


def test_an_unbiased_start_would_not_pass():
    _, ev = known_gpu()
    _, power = predict_kernels(ev.kernels.points, H100, fixed_values(EVIDENCE))
    measured = np.array([p.power_w for p in ev.kernels.points])
    assert np.abs(power / measured - 1.0).mean() > 0.03


@pytest.mark.slow
def test_members_are_the_same_wherever_they_are_fitted_and_however_many_follow():
    ev = load_gpu_evidence("b200-sxm")
    ev = ev.model_copy(update={"serving": ev.serving.model_copy(update={"groups": ()})})
    told = []
    here = fit_gpu(ev, 3, progress=lambda *step: told.append(step))
    assert told == [(1, 3), (2, 3), (3, 3)]
    first = [m["e_hbm_j"] for m in here.members]
    assert len(set(first)) == 3
    assert layer_texts(fit_gpu(ev, 3, workers=Workers(2))) == layer_texts(here)
    assert fit_gpu(ev, 2).members == here.members[:2]


def test_progress_of_several_fits_counts_on():
    told = []
    tell = counted(lambda *step: told.append(step), 3)
    assert tell is not None
    for step in ((1, 2), (2, 2), (1, 1)):
        tell(*step)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert counted(None, 3) is None


def test_mixture_has_the_moments_of_its_distribution():
    point = ServingPoint(
        batch=96.0, output_tokens=420.0, output_tokens_per_s=1.0, itl_p50_s=1.0, power_w=1.0
    )
    m = mixture(point, 300.0, 500.0)
    rate, extra = 96.0 / 420.0, m.work.tokens - 96.0
    assert m.share.sum() == pytest.approx(1.0, rel=1e-12)
    assert m.share[0] == pytest.approx(math.exp(-rate), rel=1e-3)
    assert m.share @ extra == pytest.approx(rate * 300.0, rel=3e-3)
    # compound Poisson of exponentials: variance = rate * E[l^2] = 2 rate prompt^2
    second = m.share @ extra**2 - (m.share @ extra) ** 2
    assert second == pytest.approx(2 * rate * 300.0**2, rel=1e-2)
    assert m.share @ m.work.attn_work == pytest.approx(rate * 300.0**2, rel=1e-2)


def test_server_against_simulation():
    rng = np.random.default_rng(3)
    c = load_model("decode", 4).coefficients
    batch, output, prompt, context, n = 96.0, 420.0, 300.0, 500.0, 100_000
    counts = rng.poisson(batch / output, n)
    lengths = rng.exponential(prompt, counts.sum())
    owner = np.repeat(np.arange(n), counts)
    tokens = batch + np.bincount(owner, lengths, n)
    attn = np.bincount(owner, lengths**2 / 2, n)
    f = np.array([1.98] * n)
    time = physics.latency_s(c, tokens, attn, batch * context, batch, f)
    joule = physics.iteration_energy_j(c, tokens, attn, batch * context, batch, time, f)
    point = ServingPoint(
        batch=batch, output_tokens=output, output_tokens_per_s=1.0, itl_p50_s=1.0, power_w=1.0
    )
    uncapped = c._replace(p_cap_w=1e9)
    found = predict_server(uncapped, mixture(point, prompt, context), 1.98, 0.51)
    assert found.interval_s == pytest.approx(time.mean(), rel=1e-2)
    assert found.itl_p50_s == pytest.approx(np.median(time), rel=5e-3)
    assert found.power_w == pytest.approx(joule.sum() / time.sum(), rel=1e-2)
    measured = point.model_copy(
        update={"output_tokens_per_s": batch / found.interval_s, "itl_p50_s": found.itl_p50_s}
    )
    back = prompt_tokens_of(uncapped, measured, 1.98, context, 0.51)
    assert back == pytest.approx(prompt, rel=0.02)
    slow = measured.model_copy(update={"itl_p50_s": found.interval_s * 1.2})
    assert prompt_tokens_of(uncapped, slow, 1.98, context, 0.51) is None


@pytest.fixture(scope="module")
def dense():
    """A measured server: Llama 3.3 70B."""
    groups = [g for g in EVIDENCE.serving.groups if g.llm == "llama-3.3-70b"]
    return servers_of(EVIDENCE, LAYER, groups)[0]


def test_host_time_and_energy_factor_come_back(dense):
    (server,) = dense
    truth = gpu_fit.HostTime(0.0015, 6e-5)
    made = predict_points(EVIDENCE, H100, LAYER, server, truth, 1.15)
    points = tuple(
        p.model_copy(update={"itl_p50_s": q.itl_p50_s, "power_w": q.power_w})
        for p, q in zip(server.group.points, made, strict=True)
    )
    group = server.group.model_copy(update={"points": points})
    known = gpu_fit.server_work(EVIDENCE, group, server.work, server.prompt_tokens)
    loose = {
        n: EVIDENCE.prior[n].model_copy(update={"sigma": 1.0, "high": 1.0})
        for n in ("decode_host0_s", "decode_host_s_per_seq")
    }
    free = EVIDENCE.model_copy(update={"prior": EVIDENCE.prior | loose})
    found = fit_host(free, H100, LAYER, [known]).by_server[group.label]
    assert found.host0_s == pytest.approx(truth.host0_s, rel=0.05)
    assert found.host_s_per_seq == pytest.approx(truth.host_s_per_seq, rel=0.05)
    factor, spread = fit_energy_factor(EVIDENCE, H100, LAYER, [known], {group.label: truth})
    assert math.log(factor) == pytest.approx(0.5 * math.log(1.15), abs=0.01)  # half trusted
    assert 0 < spread < EVIDENCE.noise.server_power
    assert fit_host(EVIDENCE, H100, LAYER, []).by_server == {}
    none = predict_points(EVIDENCE, H100, LAYER, server, NO_HOST)
    assert all(a.itl_p50_s < b.itl_p50_s for a, b in zip(none, made, strict=True))


def test_prompts_of_the_chat_servers_are_about_as_long_as_the_evidence_says():
    """Quartiles, as the comment of the evidence file states them."""
    found = []
    groups = [g for g in EVIDENCE.serving.groups if g.task == "chat"]
    for server in servers_of(EVIDENCE, LAYER, groups)[0]:
        g = server.group
        c = load_model("decode", g.tp, g.dtype, f"h100-sxm/{g.llm}", ep=g.ep).coefficients
        for p in g.points:
            context = gpu_fit.context_tokens(EVIDENCE, p, EVIDENCE.serving.prompt_tokens["chat"])
            found.append(prompt_tokens_of(c, p, 1.98, context, 0.51))
    assert None not in found
    assert np.percentile(found, (25, 75)) == pytest.approx([310, 410], abs=10)


def test_an_ensemble_is_read_as_it_was_written():
    columns = {"weights_s": [0.0123456789, 1e-12], "delay_s": np.array([0.05, 0.0])}
    text = table_text("of a test", columns)
    assert text.splitlines()[:2] == ["# of a test", "weights_s,delay_s"]
    back = read_table(Path("mine.csv"), text.encode(), ("weights_s", "delay_s"))
    assert list(back["weights_s"]) == [0.012346, 1e-12]  # five digits
    assert list(back["delay_s"]) == [0.05, 0.0]


# --- the committed layer against what was measured --------------------------------------------


def test_kernels_of_the_h100_within_their_targets():
    time, power = predict_kernels(EVIDENCE.kernels.points, H100, LAYER)
    measured = np.array([(p.time_us * 1e-6, p.power_w) for p in EVIDENCE.kernels.points]).T
    assert np.abs(power / measured[1] - 1.0).mean() <= 0.06
    assert np.abs(time / measured[0] - 1.0).mean() <= 0.06
    slow, capped = (predict_gemm("h100-sxm", 4096, 8192, 8192, freq_mhz=f) for f in (1005, 1980))
    saving = 1.0 - slow.energy_per_tflop_j / capped.energy_per_tflop_j
    assert 0.19 <= saving <= 0.25
    assert 1320 <= capped.freq_effective_mhz <= 1410
    assert 660 <= capped.tflops <= 715


def test_streaming_and_small_kernels_lose_what_was_measured_at_1200_mhz():
    def loss(k, n):
        fast, slow = (predict_gemm("h100-sxm", 1, k, n, freq_mhz=f) for f in (1980, 1200))
        return slow.time_s / fast.time_s - 1.0

    assert 0.015 <= loss(4096, 129280) <= 0.035
    assert 0.04 <= loss(1024, 32768) <= 0.14
    assert 0.10 <= loss(4096, 4096) <= 0.25


def test_b200_streaming_follows_the_clock():
    fast, slow = (predict_gemm("b200-sxm", 32, 4096, 129280, freq_mhz=f) for f in (1965, 1005))
    assert 0.38 <= slow.time_s / fast.time_s - 1.0 <= 0.55
    assert 0.30 <= 1.0 - slow.power_w / fast.power_w <= 0.48


def test_servers_of_70b_within_eight_per_cent(dense):
    (server,) = dense
    c = load_model("decode", 4).coefficients
    host = gpu_fit.HostTime(c.host0_s, c.host_s_per_seq)
    found = predict_points(EVIDENCE, H100, LAYER, server, host, c.energy_factor)
    itl = [q.itl_p50_s / p.itl_p50_s - 1 for p, q in zip(server.group.points, found, strict=True)]
    power = [q.power_w / p.power_w - 1 for p, q in zip(server.group.points, found, strict=True)]
    assert max(map(abs, itl)) <= 0.08
    assert max(map(abs, power)) <= 0.08
    assert abs(np.mean(itl)) <= 0.03
    assert abs(np.mean(power)) <= 0.04


def test_idle_power_with_a_context():
    c = load_model("decode", 4).coefficients
    assert 95 <= physics.idle_power_w(c, 1.98) <= 141
    # H100 NVL: 61 of 88-91 W
    assert 0.6 < physics.idle_power_w(c, 1.0) / physics.idle_power_w(c, 1.785) < 0.85


def test_delays_of_members():
    model = load_model("prefill", 4)
    delays = np.array([model.delay_s(k) for k in range(model.n_members)])
    assert 0.010 <= delays.min() < 0.03
    assert 0.10 < delays.max() <= 0.200
    assert 0.03 <= np.median(delays) <= 0.080
    assert model.delay_s(None) == 0.05


def test_member_k_is_the_same_gpu_everywhere():
    shared = ("v_knee_ghz", "v_slope_per_ghz", "e_hbm_j", "p_static_w", "core_share")
    a, b = load_model("prefill", 4), load_model("decode", 1, "mxfp4", "h100-sxm/gpt-oss-120b")
    for k in range(a.n_members):
        assert [getattr(a.member(k), n) for n in shared] == [
            getattr(b.member(k), n) for n in shared
        ]
        assert a.delay_s(k) == b.delay_s(k)
    assert len({a.member(k).v_slope_per_ghz for k in range(a.n_members)}) > 50


def test_no_layer_is_left_over():
    fitted = {p.stem for p in (configs_dir() / "gpus" / "fitted").glob("*.yaml")}
    assert fitted == set(known_evidence())
