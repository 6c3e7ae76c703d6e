"""A user's own table: known coefficients come back, the file loads, mistakes are told."""

import numpy as np
import pandas as pd
import pytest

from biscale_env.core.errors import BiscaleError
from biscale_env.models import load_model, physics
from biscale_env.models.fit import user_profile as module
from biscale_env.models.fit.llm_files import write_family
from biscale_env.models.fit.profile_table import ONE_GPU_LACKS
from biscale_env.models.fit.user_profile import fit_user
from biscale_env.models.gpu_layer import ensemble_path

CLOCKS = (600, 810, 1005, 1200, 1395, 1605, 1800, 1980)
CHANGED = {
    "weights_s": 0.0155,
    "gemm_s_per_token": 5.2e-5,
    "core_share": 0.5,
    "stream_knee_ghz": 0.95,
    "v_knee_ghz": 1.2,
    "v_slope_per_ghz": 0.65,
    "p_static_w": 60.0,
    "e_flop_j": 6.5e-13,
}
DECODE = {"attn_decode_s": 3.4e-8, "host0_s": 0.003, "p_busy_w": 70.0}


@pytest.fixture(autouse=True)
def _few_bootstraps(monkeypatch):
    monkeypatch.setattr(module, "BOOTSTRAPS", 6)


def truth(phase="decode"):
    c = load_model(phase, 4).coefficients._replace(**CHANGED)
    return c._replace(**DECODE) if phase == "decode" else c._replace(attn_prefill_s=1.4e-9)


def table(phase="decode", clocks=CLOCKS, noise=0.0, seed=0):
    """Iterations of a machine whose coefficients are known, measured without the cap in the way."""
    rng, c, rows = np.random.default_rng(seed), truth(phase), []
    for f in clocks:
        for batch in (1, 4, 16, 64, 128, 256) if phase == "decode" else (1, 2, 4):
            for size in (128, 512, 2048):
                if phase == "decode":
                    w = (float(batch), 0.0, float(batch * size), float(batch))
                    shape = {"new_tokens": 0, "prefix": 0, "context": size}
                else:
                    w = (float(batch * size), batch * size * size / 2.0, 0.0, float(batch))
                    shape = {"new_tokens": size, "prefix": 0, "context": 0}
                latency, power = physics.latency_s(c, *w, f / 1e3), physics.power_w(c, *w, f / 1e3)
                jitter = 1 + noise * rng.standard_normal(2)
                figures = {
                    "latency_s": latency * jitter[0],
                    "power_w": power * jitter[1],
                    "freq_mhz": f,
                }
                rows.append(
                    {"phase": phase, "tp": 4, "dtype": "bf16", "batch": batch, **shape, **figures}
                )
    return pd.DataFrame(rows)


def save(tmp_path, frame, name="table.csv"):
    path = tmp_path / name
    frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_known_coefficients_come_back(tmp_path, phase):
    (fit,) = fit_user(save(tmp_path, table(phase)))
    found, true = fit.content.as_tuple(), truth(phase)
    assert fit.latency_mape < 0.003
    assert fit.power_mape < 0.003
    # what a table of whole iterations identifies, tightly
    quadratic = "attn_decode_s" if phase == "decode" else "attn_prefill_s"
    for name in (quadratic, "v_knee_ghz", "v_slope_per_ghz", "e_flop_j"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.03), name
    for name, rel in (("weights_s", 0.10), ("gemm_s_per_token", 0.10)):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=rel), name
    # constant time that goes with the clock, and time per row that does, wherever they are kept
    for clocked in (
        lambda c: c.gemm0_s + c.core_share * (c.attn0_s + c.elem0_s),
        lambda c: c.core_share * c.elem_s_per_token + (phase == "prefill") * c.gemm_s_per_token,
    ):
        assert clocked(found) == pytest.approx(clocked(true), rel=0.05)
    # terms of equal form can only be told together
    for group, rel in ((("comm0_s", "host0_s"), 0.2), (("p_static_w", "p_busy_w"), 0.05)):
        assert sum(getattr(found, n) for n in group) == pytest.approx(
            sum(getattr(true, n) for n in group), rel=rel
        )


def test_the_start_alone_would_not_pass(tmp_path):
    frame = table()
    wrong = load_model("decode", 4).coefficients
    w = (frame.batch, 0.0, frame.batch * frame.context, frame.batch)
    assert (
        np.abs(physics.latency_s(wrong, *w, frame.freq_mhz / 1e3) / frame.latency_s - 1).mean()
        > 0.05
    )
    assert (
        np.abs(physics.power_w(wrong, *w, frame.freq_mhz / 1e3) / frame.power_w - 1).mean() > 0.01
    )


@pytest.mark.slow
def test_noise_widens_the_ensemble_and_not_the_truth(tmp_path):
    (clean,) = fit_user(save(tmp_path, table(), "a.csv"))
    (noisy,) = fit_user(save(tmp_path, table(noise=0.02), "b.csv"))
    assert noisy.latency_mape < 0.03
    assert noisy.members.v_slope_per_ghz.std() > clean.members.v_slope_per_ghz.std()
    assert noisy.content.as_tuple().e_flop_j == pytest.approx(truth().e_flop_j, rel=0.15)


def test_the_file_loads_and_says_what_was_measured(tmp_path):
    (fit,) = fit_user(save(tmp_path, table()))
    path = tmp_path / "mine.yaml"
    write_family(fit.files(path), tmp_path)
    assert ensemble_path(path).is_file()
    model = load_model("decode", 4, "bf16", str(path))
    assert model.name == "table"
    assert model.n_members == 6
    assert model.coefficients == fit.content.as_tuple()
    provenance = {n: c.provenance for n, c in model.content.coefficients.items()}
    assert provenance["weights_s"] == provenance["v_slope_per_ghz"] == "measured"
    assert provenance["flops_per_token"] == "derived"
    assert (
        "kept from h100-sxm/llama-3.3-70b" in model.content.coefficients["freq_profile_ghz"].source
    )
    assert model.domain["freq_mhz"] == (600.0, 1980.0)
    assert model.domain["cached"] == (0.0, 256 * 2048)
    assert model.content.fit["held_out_mape"] == pytest.approx(fit.latency_mape, rel=1e-3)
    assert load_model("decode", 4).delay_s(3) == pytest.approx(model.delay_s(3), rel=1e-4)


@pytest.mark.slow
def test_same_table_same_file(tmp_path):
    path = save(tmp_path, table(noise=0.01))
    first, second = fit_user(path)[0], fit_user(path)[0]
    assert first.files(tmp_path / "x.yaml") == second.files(tmp_path / "x.yaml")


def shard_table(phase="decode"):
    """What `biscale profile` measures on such a machine.

    One GPU's share of the work, without all-reduce and host.
    """
    frame, c = table(phase), truth(phase)._replace(**ONE_GPU_LACKS)
    batch, new = frame.batch.astype(float), frame.new_tokens.astype(float)
    work = (
        (batch, 0.0 * batch, batch * frame.context, batch)
        if phase == "decode"
        else (batch * new, batch * new * new / 2, 0.0 * batch, batch)
    )
    clock = frame.freq_mhz / 1e3
    return frame.assign(
        latency_s=physics.latency_s(c, *work, clock),
        power_w=physics.power_w(c, *work, clock),
        scope="shard",
    )


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_table_of_shards_keeps_all_reduce_and_host_of_the_start(tmp_path, phase):
    (fit,) = fit_user(save(tmp_path, shard_table(phase)))
    found, true, start = fit.content.as_tuple(), truth(phase), load_model(phase, 4).coefficients
    for name in (*ONE_GPU_LACKS, "e_link_j"):
        assert getattr(found, name) == pytest.approx(getattr(start, name), rel=1e-6), name
        assert "fitted to table.csv" not in fit.content.coefficients[name].source
    assert start.comm0_s + start.host0_s > 1e-3  # what would be lost is worth keeping
    assert found.weights_s == pytest.approx(true.weights_s, rel=0.1)
    assert found.e_flop_j == pytest.approx(true.e_flop_j, rel=0.05)
    assert fit.latency_mape < 0.003
    assert fit.power_mape < 0.003
    assert not set(ONE_GPU_LACKS) & set(fit.members.columns)
    assert "all-reduce" in fit.content.fit["scope"]


def test_shards_and_whole_iterations_do_not_mix(tmp_path):
    mixed = pd.concat([shard_table(), table().assign(scope="iteration")])
    with pytest.raises(BiscaleError, match="mixes whole iterations and shards"):
        fit_user(save(tmp_path, mixed))
    with pytest.raises(BiscaleError, match="must both hold"):
        fit_user(save(tmp_path, shard_table(), "a.csv"), save(tmp_path, table(), "b.csv"))
    with pytest.raises(BiscaleError, match="scope must be iteration or shard"):
        fit_user(save(tmp_path, table().assign(scope="half")))


@pytest.mark.slow
def test_power_may_stand_in_its_own_table(tmp_path):
    frame = table()
    together = fit_user(save(tmp_path, frame, "both.csv"))[0].content.as_tuple()
    profile = save(tmp_path, frame.drop(columns="power_w"), "time.csv")
    power = save(tmp_path, frame, "power.csv")
    apart = fit_user(profile, power)[0]
    assert apart.power_mape < 0.003
    assert apart.content.as_tuple().e_flop_j == pytest.approx(together.e_flop_j, rel=1e-3)
    without_time = save(tmp_path, frame.drop(columns="latency_s"), "watts.csv")
    assert fit_user(profile, without_time)[0].power_mape < 0.005


def test_without_power_the_energies_are_kept(tmp_path):
    (fit,) = fit_user(save(tmp_path, table().drop(columns="power_w")))
    assert np.isnan(fit.power_mape)
    assert (
        fit.content.coefficients["e_flop_j"].value == load_model("decode", 4).coefficients.e_flop_j
    )
    assert fit.content.coefficients["e_flop_j"].provenance == "derived"
    assert fit.content.fit["power_held_out_mape"] == "no power measured"


def test_one_clock_keeps_the_frequency_behaviour(tmp_path):
    (fit,) = fit_user(save(tmp_path, table(clocks=(1980,))))
    start, found = load_model("decode", 4).coefficients, fit.content.as_tuple()
    for name in ("core_share", "stream_knee_ghz", "v_knee_ghz", "v_slope_per_ghz"):
        assert getattr(found, name) == getattr(start, name)
    assert fit.latency_mape < 0.01


@pytest.mark.slow
def test_an_energy_at_its_bound_is_zero_and_not_a_rounding_error_below(tmp_path, monkeypatch):
    """The bounded least squares may return -1e-15 there, and a file with that could not be read
    again.
    """
    solved = module.lsq_linear

    def below(*given, **named):
        found = solved(*given, **named)
        found.x = np.where(np.arange(found.x.size) == 2, -1e-15, found.x)
        return found

    monkeypatch.setattr(module, "lsq_linear", below)
    (fit,) = fit_user(save(tmp_path, table()))
    assert min(fit.content.as_tuple()) >= 0.0
    assert fit.members.min(axis=None) >= 0.0


def test_several_configurations_in_one_table(tmp_path):
    both = pd.concat([table("prefill"), table("decode")])
    fits = fit_user(save(tmp_path, both))
    assert [f.content.phase for f in fits] == ["decode", "prefill"]


def test_a_new_tp_starts_from_the_nearest(tmp_path):
    (fit,) = fit_user(save(tmp_path, table().assign(tp=1)))
    assert fit.content.tp == 1
    assert fit.content.as_tuple().n_gpus == 1.0
    assert fit.content.as_tuple().link_bytes_per_token == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.drop(columns="latency_s"), "column latency_s is missing"),
        (lambda d: d.drop(columns="freq_mhz"), "column freq_mhz is missing"),
        (lambda d: d.head(5), "has 5 rows; a fit needs at least 12"),
        (lambda d: d.assign(latency_s=-1.0), "line 2: latency_s"),
        (lambda d: d.assign(speed=1.0), "unknown column speed"),
    ],
)
def test_mistakes(tmp_path, change, message):
    with pytest.raises(BiscaleError, match=message):
        fit_user(save(tmp_path, change(table())))


def test_unknown_start(tmp_path):
    with pytest.raises(
        BiscaleError, match="model 'none' has no decode model to start the fit from"
    ):
        fit_user(save(tmp_path, table()), base="none")
