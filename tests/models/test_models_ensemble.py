"""The ensemble: every committed member agrees with all the evidence, and member k is one sample
everywhere.
"""

import numpy as np
import pytest
from biscale_env.models.ensemble import (
    curve,
    disagreements,
    fit_member,
    gemm_clocks_ghz,
    sample,
    serving_errors,
)
from biscale_env.models.fit.evidence import SAMPLED_COEFFICIENTS, load_evidence
from biscale_env.models.fit.power import EnergyFit, fit_energy
from biscale_env.models.fit.serving_evidence import ColocatedServer

from biscale_env.config import load_gpu
from biscale_env.core.errors import BiscaleError
from biscale_env.models import load_model, physics
from biscale_env.models.fit.shipped import SAMPLED_FIELDS, fit_kernels, tables

EVIDENCE = load_evidence("h100-llama70b")
GPU = load_gpu()
N = EVIDENCE.n_members


@pytest.fixture(scope="module")
def kernels():
    return {
        (t.phase, t.dtype, t.tp): fit_kernels(t, EVIDENCE, GPU).coefficients
        for t in tables(EVIDENCE)
    }


def test_at_least_64_members():
    assert N >= 64
    assert load_model("prefill", 8, "fp8").n_members == N


def test_members_differ_and_spread_over_their_ranges():
    records = load_model("decode", 4).records(range(N))
    for name in SAMPLED_COEFFICIENTS:
        r = EVIDENCE.sample[name]
        assert len(np.unique(records[name])) > 0.9 * N  # five digits in the file may coincide
        assert np.ptp(records[name]) > 0.8 * (r.high - r.low), name
        assert records[name].min() >= r.low * 0.9999
        assert records[name].max() <= r.high * 1.0001


def test_delays():
    model = load_model("prefill", 4)
    delays = np.array([model.delay_s(k) for k in range(N)])
    assert 0.010 <= delays.min() < 0.03
    assert 0.10 < delays.max() <= 0.200
    assert 0.045 <= np.median(delays) <= 0.080
    assert model.delay_s(None) == 0.05


def test_member_k_is_the_same_sample_everywhere():
    shared = [n for n in SAMPLED_FIELDS if not n.startswith("host") and n != "e_flop_j"]
    reference = load_model("prefill", 4)
    for phase, tp, dtype in (("decode", 4, "bf16"), ("decode", 8, "fp8"), ("prefill", 2, "fp8")):
        model = load_model(phase, tp, dtype)
        for k in range(N):
            assert [getattr(model.member(k), n) for n in shared] == [
                getattr(reference.member(k), n) for n in shared
            ]
            assert model.delay_s(k) == reference.delay_s(k)
    fp8, bf16 = load_model("prefill", 4, "fp8"), load_model("prefill", 4)
    assert all(fp8.member(k).e_flop_j < bf16.member(k).e_flop_j for k in range(N))


@pytest.mark.parametrize("k", range(0, N, 3))
def test_committed_members_meet_the_measured_points(k):
    """Recomputed from the rounded figures in the file, without the fit's own bookkeeping of the
    member.
    """
    decode = load_model("decode", 4).member(k)
    server = ColocatedServer(decode.host0_s, decode.host_s_per_seq, *_prompt_and_context(k))
    errors = serving_errors(decode, EnergyFit({}, 0.0, server), EVIDENCE, 0.51)
    fitted = np.array([p.fitted for p in EVIDENCE.serving.points])
    assert np.abs(errors[fitted][:, [0, 2]]).max() <= EVIDENCE.accept.serving_error
    for tp in (4, 8):
        clocks = gemm_clocks_ghz(
            load_model("prefill", tp).member(k), EVIDENCE.gemm_cap.rows, 1.98, 0.51
        )
        assert clocks.min() >= 1.30
        assert clocks.max() <= 1.50
    assert 90 <= physics.idle_power_w(decode, 1.98) <= 150
    small = curve(decode, (8.0, 0.0, 8 * 620.0, 8.0), GPU.clocks_mhz)
    assert 0.57 <= small.ratio(small.power_w, 780.0) <= 0.79
    prefill = curve(
        load_model("prefill", 4).member(k), (2048.0, 2048.0**2 / 2, 0.0, 1.0), GPU.clocks_mhz
    )
    assert 690 <= prefill.best_mhz <= 1500


def _prompt_and_context(k):
    """Prompts as the nominal sample implies them; they vary by a few per cent over the members."""
    del k
    prompt = 313.0
    return prompt, prompt + EVIDENCE.serving.output_age_share * 413.4


def test_the_ensemble_is_wider_than_rounding_but_not_arbitrary():
    model = load_model("decode", 4)
    saving = [
        curve(model.member(k), (32.0, 0.0, 32 * 620.0, 32.0), GPU.clocks_mhz).saving_at_best
        for k in range(N)
    ]
    assert 0.03 < np.ptp(saving) < 0.30
    nominal = curve(
        model.coefficients, (32.0, 0.0, 32 * 620.0, 32.0), GPU.clocks_mhz
    ).saving_at_best
    assert np.percentile(saving, 10) < nominal < np.percentile(saving, 90)


def test_sampling_is_a_function_of_the_seed(kernels):
    few = EVIDENCE.model_copy(update={"n_members": 2})
    first, counts = sample(kernels, few, GPU.clocks_mhz)
    again, _ = sample(kernels, few, GPU.clocks_mhz)
    other, _ = sample(kernels, few.model_copy(update={"seed": 1}), GPU.clocks_mhz)
    assert [d.sample for d in first] == [d.sample for d in again]
    assert first[0].sample != other[0].sample
    assert counts["proposals"] >= 2
    committed = load_model("decode", 4).member(0)
    assert committed.v_knee_ghz == pytest.approx(first[0].sample["v_knee_ghz"], rel=1e-4)
    assert committed.e_hbm_j == pytest.approx(first[0].energy.values["e_hbm_j"], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"serving_error": 0.001}, "serving"),
        ({"idle_w": (10.0, 20.0)}, "idle"),
        ({"power_share_780": (0.1, 0.2)}, "power_share_780"),
        ({"saving_at_best": (0.6, 0.7)}, "saving_at_best"),
        ({"slowdown_1200": 0.001}, "slowdown_1200"),
        ({"best_clock_mhz": (1700.0, 1900.0)}, "best_clock"),
    ],
)
def test_each_band_can_reject(kernels, change, reason):
    member = fit_member(kernels, EVIDENCE.nominal_sample, EVIDENCE, 0.51)
    assert disagreements(member, EVIDENCE, GPU.clocks_mhz) == []
    strict = EVIDENCE.model_copy(update={"accept": EVIDENCE.accept.model_copy(update=change)})
    assert disagreements(member, strict, GPU.clocks_mhz) == [reason]
    cap = EVIDENCE.gemm_cap.model_copy(update={"clock_range_ghz": (1.0, 1.1)})
    assert disagreements(member, EVIDENCE.model_copy(update={"gemm_cap": cap}), GPU.clocks_mhz) == [
        "gemm_cap"
    ]


def test_contradictory_evidence_is_reported(kernels, monkeypatch):
    monkeypatch.setattr("biscale_env.models.ensemble.MAX_PROPOSALS_PER_MEMBER", 7)
    accept = EVIDENCE.accept.model_copy(update={"saving_at_best": (0.8, 0.9)})
    impossible = EVIDENCE.model_copy(update={"accept": accept, "n_members": 1})
    with pytest.raises(
        BiscaleError, match=r"only 0 of 7 samples agree; rejected by .*saving_at_best"
    ):
        sample(kernels, impossible, GPU.clocks_mhz)


def test_energy_fit_comes_nearer_to_points_it_could_have_made(kernels):
    """Serving power replaced by what the fitted model itself gives.

    The misfit shrinks, so it came from the points, not from the solver.
    """
    sample = EVIDENCE.nominal_sample
    first = fit_energy(kernels, sample, EVIDENCE, 0.51)
    c = first.apply(load_model("decode", 4).coefficients, "bf16")
    errors = serving_errors(c, first, EVIDENCE, 0.51)
    points = tuple(
        p.model_copy(update={"power_w": p.power_w * (1 + float(e[2]))})
        for p, e in zip(EVIDENCE.serving.points, errors, strict=True)
    )
    exact = EVIDENCE.model_copy(
        update={"serving": EVIDENCE.serving.model_copy(update={"points": points})}
    )
    second = fit_energy(kernels, sample, exact, 0.51)
    again = serving_errors(second.apply(c, "bf16"), second, exact, 0.51)
    assert np.abs(again[:5, 2]).max() < 0.5 * np.abs(errors[:5, 2]).max()


def test_energies_respect_their_bounds():
    for k in range(-1, N):
        c = load_model("prefill", 4).member(k)
        for name, prior in EVIDENCE.energy.items():
            assert prior.low * 0.9999 <= getattr(c, name) <= prior.high * 1.0001, name
