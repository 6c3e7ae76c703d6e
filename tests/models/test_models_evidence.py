"""The evidence: restated figures equal their source, the server mixture is exact, and the committed
models meet the targets.
"""

import math

import numpy as np
import pandas as pd
import pytest
import yaml
from biscale_env.models.ensemble import curve, fit_member, gemm_clocks_ghz, serving_errors
from biscale_env.models.fit.evidence import (
    ENERGY_NAMES,
    WORLD_NAMES,
    Evidence,
    Range,
    ServingPoint,
    evidence_path,
    load_evidence,
)
from biscale_env.models.fit.power import NOT_GEMM, gemm_only
from biscale_env.models.fit.serving_evidence import (
    ColocatedServer,
    infer_server,
    mean_s,
    median_s,
    mixture,
)

from biscale_env.config import load_gpu
from biscale_env.core.errors import BiscaleError
from biscale_env.models import load_model, physics
from biscale_env.models.fit.shipped import fit_kernels, tables

EVIDENCE = load_evidence("h100-llama70b")
GPU = load_gpu()
POINT = EVIDENCE.serving.points[2]


@pytest.fixture(scope="module")
def nominal():
    kernels = {
        (t.phase, t.dtype, t.tp): fit_kernels(t, EVIDENCE, GPU).coefficients
        for t in tables(EVIDENCE)
    }
    return fit_member(kernels, EVIDENCE.nominal_sample, EVIDENCE, GPU.freq_min_mhz * 1e-3)


def test_serving_points_equal_their_source(shared_data):
    raw = pd.read_csv(shared_data / "calibration" / "h100_llama33_70b_serving.csv")
    assert len(raw) == len(EVIDENCE.serving.points)
    for point, (_, row) in zip(EVIDENCE.serving.points, raw.iterrows(), strict=True):
        assert point.batch == row.mean_batch
        assert point.output_tokens == row.mean_output_tokens
        assert point.output_tokens_per_s == row.output_tokens_per_s
        assert point.itl_p50_s == pytest.approx(row.itl_p50_ms / 1e3, rel=1e-12)
        assert point.power_w == row.power_per_gpu_w


def test_hbm_points_equal_their_source(shared_data):
    raw = pd.read_csv(shared_data / "calibration" / "h200_power_vs_util_table.csv")
    raw = raw[(raw.gemm_dtype == "bfloat16") & (raw.tc_util_hi <= 0.05)]
    middle = (raw.hbm_util_lo + raw.hbm_util_hi) / 2
    for point in EVIDENCE.hbm_power.points:
        assert raw.W_p75[np.isclose(middle, point.hbm_use)].to_list() == [point.power_w]


@pytest.mark.parametrize("prompt", [50.0, 300.0])
def test_mixture_has_the_moments_of_its_distribution(prompt):
    m = mixture(POINT, prompt, 500.0)
    rate = POINT.batch / POINT.output_tokens
    extra = m.work.tokens - POINT.batch
    assert m.share.sum() == pytest.approx(1.0, rel=1e-12)
    assert m.share[0] == pytest.approx(math.exp(-rate), rel=1e-6)
    assert m.share @ extra == pytest.approx(rate * prompt, rel=1e-6)
    # compound Poisson of exponentials: variance = rate * E[l^2] = 2 rate prompt^2
    assert m.share @ extra**2 - (m.share @ extra) ** 2 == pytest.approx(
        2 * rate * prompt**2, rel=1e-5
    )
    # sum l_i^2 / 2 has the mean rate * prompt^2
    assert m.share @ m.work.attn_work == pytest.approx(rate * prompt**2, rel=1e-6)
    assert np.all(m.work.cached == POINT.batch * 500.0)


def test_mixture_against_simulation():
    rng = np.random.default_rng(3)
    c = load_model("decode", 4).coefficients
    rate, n = POINT.batch / POINT.output_tokens, 200_000
    counts = rng.poisson(rate, n)
    lengths = rng.exponential(300.0, counts.sum())
    owner = np.repeat(np.arange(n), counts)
    tokens = POINT.batch + np.bincount(owner, lengths, n)
    attn = np.bincount(owner, lengths**2 / 2, n)
    time = physics.latency_s(c, tokens, attn, POINT.batch * 500.0, POINT.batch, 1.98)
    m = mixture(POINT, 300.0, 500.0)
    assert mean_s(c, m, 1.98) == pytest.approx(time.mean(), rel=5e-3)
    assert median_s(c, m, 1.98) == pytest.approx(np.median(time), rel=5e-3)


def test_infer_server_recovers_a_known_server():
    """A server simulated with known host time and prompts gives them back."""
    c = load_model("decode", 4).coefficients
    truth = ColocatedServer(
        host0_s=0.0015, host_s_per_seq=3e-5, prompt_tokens=220.0, context_tokens=0.0
    )
    points = []
    for batch in (8.0, 32.0, 96.0, 128.0):
        blank = ServingPoint(
            batch=batch,
            output_tokens=400.0,
            output_tokens_per_s=1.0,
            itl_p50_s=1.0,
            power_w=1.0,
            fitted=True,
        )
        context = truth.prompt_tokens + EVIDENCE.serving.output_age_share * 400.0
        m = mixture(blank, truth.prompt_tokens, context)
        rate = batch / mean_s(truth.apply(c), m, 1.98)
        itl = float(physics.latency_s(truth.apply(c), batch, 0.0, batch * context, batch, 1.98))
        points.append(blank.model_copy(update={"output_tokens_per_s": rate, "itl_p50_s": itl}))
    serving = EVIDENCE.serving.model_copy(update={"points": tuple(points)})
    found = infer_server(c, serving, 0.0015)
    assert found.prompt_tokens == pytest.approx(truth.prompt_tokens, rel=1e-3)
    assert found.host0_s == pytest.approx(truth.host0_s, rel=1e-2)
    assert found.host_s_per_seq == pytest.approx(truth.host_s_per_seq, rel=1e-2)


def test_impossible_serving_point():
    bad = POINT.model_copy(update={"output_tokens_per_s": POINT.batch / (POINT.itl_p50_s * 0.5)})
    serving = EVIDENCE.serving.model_copy(update={"points": (bad, bad)})
    with pytest.raises(BiscaleError, match="do not fit any prompt length"):
        infer_server(load_model("decode", 4).coefficients, serving, 0.001)


def test_prompt_length_is_confirmed_by_the_tail(nominal, shared_data):
    """The inferred mean predicts the 99th percentile of the interval, which the inference has not
    seen.
    """
    raw = pd.read_csv(shared_data / "calibration" / "h100_llama33_70b_serving.csv")
    server = nominal.energy.server
    assert 200 < server.prompt_tokens < 450
    c = load_model("decode", 4).coefficients
    rng = np.random.default_rng(0)
    for i, relative in ((1, 0.10), (2, 0.35)):
        point = EVIDENCE.serving.points[i]
        counts = rng.poisson(point.batch / point.output_tokens, 100_000)
        lengths = rng.exponential(server.prompt_tokens, counts.sum())
        tokens = point.batch + np.bincount(np.repeat(np.arange(100_000), counts), lengths, 100_000)
        time = physics.latency_s(
            c, tokens, 0.0, point.batch * server.context_tokens, point.batch, 1.98
        )
        assert np.percentile(time, 99) * 1e3 == pytest.approx(raw.itl_p99_ms[i], rel=relative)


def test_serving_within_ten_per_cent(nominal):
    c = load_model("decode", 4).coefficients
    errors = serving_errors(c, nominal.energy, EVIDENCE, 0.51)
    fitted = np.array([p.fitted for p in EVIDENCE.serving.points])
    assert fitted.sum() == 5
    assert np.abs(errors[fitted][:, [0, 2]]).max() <= 0.10
    assert (
        np.abs(errors[fitted][:, 1]).max() <= 0.10
    )  # the mean interval too, though nothing was fitted to it alone


def test_committed_nominal_is_the_fitted_one(nominal):
    for key, c in nominal.coefficients.items():
        committed = load_model(key[0], key[2], key[1]).coefficients
        np.testing.assert_allclose(np.array(committed), np.array(c), rtol=1e-5)


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_sustained_gemms_sit_at_the_cap(tp, dtype):
    c = load_model("prefill", tp, dtype).coefficients
    rows = (1024, 1536, 2048, 4096, 8192, 16384)
    clocks = gemm_clocks_ghz(c, rows, 1.98, 0.51)
    assert clocks.min() >= 1.30
    assert clocks.max() <= 1.50
    power = physics.power_w(gemm_only(c), np.array(rows, float), 0.0, 0.0, 1.0, clocks)
    np.testing.assert_allclose(power, 700.0, rtol=0.03)
    uncapped = physics.power_w(gemm_only(c), np.array(rows, float), 0.0, 0.0, 1.0, 1.98)
    assert (
        uncapped.min() > 1000
    )  # the cap binds hard: without it the clock range above would mean nothing


def test_link_energy_does_not_decide_the_gemm_clock():
    """The target holds whether or not the link bytes are counted as GEMM work."""
    c = load_model("prefill", 4).coefficients
    for kept in ({}, {"link_bytes_per_token": c.link_bytes_per_token}):
        g = c._replace(**{**NOT_GEMM, **kept})
        f = physics.effective_freq_ghz(g, 4096.0, 0.0, 0.0, 1.0, 1.98, 0.51)
        assert 1.30 <= f <= 1.50


def test_whole_iterations_run_above_the_gemm_clock():
    for tp in (4, 8):
        model = load_model("prefill", tp)
        whole = float(model.effective_freq_mhz(4096, 4096**2 / 2, 0, 1, 1980)) / 1e3
        assert whole > gemm_clocks_ghz(model.coefficients, (4096,), 1.98, 0.51)[0] + 0.1


def test_idle_power_with_a_context():
    for phase in ("prefill", "decode"):
        c = load_model(phase, 4).coefficients
        assert 95 <= physics.idle_power_w(c, 1.98) <= 141
        assert (
            0.6 < physics.idle_power_w(c, 1.0) / physics.idle_power_w(c, 1.785) < 0.85
        )  # NVL: 61 of 88-91 W


def test_light_load_at_a_low_clock_takes_about_100_w_more_than_idle():
    c = load_model("decode", 4).coefficients
    excess = physics.power_w(c, 1.0, 0.0, 500.0, 1.0, 0.81) - physics.idle_power_w(c, 0.81)
    assert 60 < excess < 230  # one 70B request still streams all weights, so it lies above 100 W


@pytest.mark.parametrize("batch", [8.0, 32.0])
def test_shape_over_the_clock(batch):
    c = load_model("decode", 4).coefficients
    k = curve(c, (batch, 0.0, batch * 620.0, batch), GPU.clocks_mhz)
    assert 0.60 <= k.ratio(k.power_w, 780.0) <= 0.76
    assert k.ratio(k.latency_s, 1200.0) < 1.08
    assert 0.15 < k.saving_at_best < 0.40
    assert 900 < k.best_mhz < 1400


def test_prefill_saves_at_the_best_clock():
    c = load_model("prefill", 4).coefficients
    k = curve(c, (2048.0, 2048.0**2 / 2, 0.0, 1.0), GPU.clocks_mhz)
    assert 0.12 < k.saving_at_best < 0.35
    assert 900 < k.best_mhz < 1400
    np.testing.assert_allclose(
        k.energy_j[-5:], k.energy_j[-1]
    )  # above the effective clock nothing changes


def test_range_samples_stay_inside():
    rng = np.random.default_rng(0)
    for name in WORLD_NAMES:
        r = EVIDENCE.sample[name]
        values = np.array([r.sample(rng) for _ in range(500)])
        assert r.low <= values.min()
        assert values.max() <= r.high
        assert np.std(values) > 0.1 * (r.high - r.low)


def test_delay_median_is_fifty_to_eighty_ms():
    rng = np.random.default_rng(1)
    values = [EVIDENCE.sample["delay_s"].sample(rng) for _ in range(20_000)]
    assert 0.05 < np.median(values) < 0.08


@pytest.mark.parametrize("bad", [{"nominal": 3.0}, {"low": 1.5}, {"mode": 9.0}])
def test_range_must_be_ordered(bad):
    with pytest.raises(ValueError, match="must hold"):
        Range(
            **(
                {"nominal": 1.0, "low": 0.5, "high": 2.0, "provenance": "assumed", "source": "s"}
                | bad
            )
        )


@pytest.mark.parametrize("section", ["energy", "sample"])
def test_evidence_must_be_complete(section):
    data = yaml.safe_load(evidence_path("h100-llama70b").read_text())
    assert set(data["energy"]) == set(ENERGY_NAMES)
    data[section].popitem()
    with pytest.raises(ValueError, match="exactly the known quantities"):
        Evidence.model_validate(data)
