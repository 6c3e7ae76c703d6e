"""Loading coefficient files: shipped families, a user's file, members, domains, and mistakes."""

import shutil

import numpy as np
import pytest
import yaml

from biscale_env.config import InstanceSpec, configs_dir
from biscale_env.core.errors import BiscaleError
from biscale_env.models import (
    COEFFICIENT_DTYPE,
    Coefficients,
    instance_model,
    load_model,
    physics,
)
from biscale_env.models.coefficient import dump_fitted
from biscale_env.models.coefficient_files import (
    WORK_AXES,
    files_in,
    known_names,
    read_model_file,
)

FOLDER = configs_dir() / "models" / "h100-sxm/llama-3.3-70b"
CONFIGURATIONS = [
    (p, t, d)
    for p in ("prefill", "decode")
    for d in ("bf16", "fp8")
    for t in (2, 4, 8)
    if (d, t) != ("bf16", 2)  # the weights leave no room for a cache
]


@pytest.mark.parametrize(("phase", "tp", "dtype"), CONFIGURATIONS)
def test_every_configuration_is_complete(phase, tp, dtype):
    model = load_model(phase, tp, dtype)
    assert (model.phase, model.tp, model.dtype, model.name) == (
        phase,
        tp,
        dtype,
        "h100-sxm/llama-3.3-70b",
    )
    assert model.coefficients.n_gpus == tp
    assert model.n_members >= 64
    assert set(model.domain) == set(WORK_AXES)
    assert 0 < model.delay_s() <= 0.2
    for name, c in model.content.coefficients.items():
        assert c.source, name
        assert c.provenance in ("measured", "derived", "assumed")
        assert "first quick" not in c.source
    assert model.coefficients.attn_prefill_s > 0
    assert model.coefficients.attn_decode_s > 0


def test_both_phases_of_a_configuration_share_what_belongs_to_the_gpu():
    shared = (
        "n_gpus",
        "attn_prefill_s",
        "attn_decode_s",
        "v_knee_ghz",
        "e_hbm_j",
        "p_static_w",
        "freq_profile_ghz",
    )
    for tp in (4, 8):
        a, b = load_model("prefill", tp), load_model("decode", tp)
        for k in (-1, 0, 63):
            assert [getattr(a.member(k), n) for n in shared] == [
                getattr(b.member(k), n) for n in shared
            ]
            assert a.delay_s(k) == b.delay_s(k)


def test_kv_room_is_zero_where_the_weights_fill_the_memory():
    crowded = load_model("decode", 4, "bf16", llm="llama-3.1-405b")
    assert crowded.kv_capacity_tokens == 0
    assert 380_000 < load_model("decode", 4, "bf16").kv_capacity_tokens < 420_000
    assert 1.1e6 < load_model("decode", 4, "fp8").kv_capacity_tokens < 1.3e6


def test_member_and_records_agree():
    model = load_model("decode", 4)
    picks = [-1, 0, 5, 63]
    records = model.records(picks)
    assert records.dtype.names == COEFFICIENT_DTYPE.names
    for record, k in zip(records, picks, strict=True):
        assert tuple(record) == tuple(model.member(k))
    assert model.member(None) == model.member(-1) == model.coefficients
    assert model.member(3) != model.member(4)
    assert model.records([]).shape == (0,)


@pytest.mark.parametrize("k", [64, -2, 1000])
def test_unknown_member(k):
    with pytest.raises(BiscaleError, match=rf"member {k} does not exist"):
        load_model("decode", 4).member(k)


def test_contains():
    model = load_model("decode", 4)
    assert model.contains(tokens=64, cached=64_000, n_seq=64, freq_mhz=1200)
    assert model.contains(tokens=[1, 512])
    assert not model.contains(tokens=[1, 513])
    assert not model.contains(freq_mhz=300)
    assert not model.contains(cached=float("nan"))
    with pytest.raises(BiscaleError, match="unknown work axis 'batch'"):
        model.contains(batch=3)


def test_methods_broadcast_and_honour_the_cap():
    model = load_model("prefill", 4)
    tokens = np.array([[512.0], [4096.0]])
    clocks = np.array([600.0, 1200.0, 1980.0])
    args = (tokens, tokens**2 / 2, 0.0, 1.0, clocks)
    latency, power, energy = model.latency_s(*args), model.power_w(*args), model.energy_j(*args)
    effective = model.effective_freq_mhz(*args)
    assert latency.shape == power.shape == energy.shape == effective.shape == (2, 3)
    assert effective[1, 2] < 1800 < effective[0, 2]
    assert power.max() <= 700 * (1 + 1e-6)
    np.testing.assert_allclose(energy, 4 * latency * power, rtol=1e-12)
    for i in range(2):
        for j in range(3):
            one = physics.effective_freq_ghz(
                model.coefficients,
                float(tokens[i, 0]),
                float(tokens[i, 0] ** 2 / 2),
                0.0,
                1.0,
                clocks[j] / 1e3,
                0.51,
            )
            assert effective[i, j] == pytest.approx(one * 1e3, rel=1e-12)
    assert model.latency_s(512, 0, 0, 1, 1200).shape == ()


def test_a_request_above_the_effective_clock_buys_nothing():
    model = load_model("prefill", 4)
    w = (8192.0, 8192.0**2 / 2, 0.0, 1.0)
    top = float(model.effective_freq_mhz(*w, 1980.0))
    assert top < 1800
    assert model.latency_s(*w, 1980.0) == pytest.approx(model.latency_s(*w, top + 30), rel=1e-9)


def test_optimal_clock_is_the_cheapest_of_the_grid():
    model = load_model("decode", 4)
    batch = np.array([8.0, 128.0])
    best = model.optimal_freq_mhz(batch, 0.0, batch * 700, batch)
    grid = model.gpu.clocks_mhz
    energy = np.array([[float(model.energy_j(b, 0.0, b * 700, b, f)) for f in grid] for b in batch])
    np.testing.assert_array_equal(best, grid[energy.argmin(axis=1)])
    assert set(best) <= set(grid)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("train",), "unknown phase 'train'"),
        (("decode", 4, "int4"), "unknown dtype 'int4'"),
        (("decode", 3), "no decode model for bf16 at TP 3; it has: decode-bf16-tp4"),
        (("decode", 1, "fp8"), "no decode model for fp8 at TP 1"),
        (
            ("decode", 4, "bf16", "nonsense"),
            "unknown model 'nonsense'; known: .*h100-sxm/llama-3.3-70b",
        ),
        (("decode", 4, "bf16", "nowhere.yaml"), "nowhere.yaml does not exist"),
    ],
)
def test_mistakes_are_one_sentence(args, message):
    with pytest.raises(BiscaleError, match=message) as caught:
        load_model(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_every_shipped_family_loads_whole():
    names = known_names()
    assert {
        *(f"h100-sxm/{n}" for n in ("llama-3.1-8b", "llama-3.3-70b", "qwen3-32b")),
        *(f"h100-sxm/{n}" for n in ("qwen3-30b-a3b", "gpt-oss-120b", "llama-3.1-405b")),
        *(f"h200-sxm/{n}" for n in ("llama-3.3-70b", "qwen3-32b", "gpt-oss-120b")),
        *(f"b200-sxm/{n}" for n in ("llama-3.3-70b", "gpt-oss-120b")),
        *(f"a100-sxm/{n}" for n in ("llama-3.1-8b", "llama-3.3-70b")),
    } <= set(names)
    for name in names:
        files = files_in(configs_dir() / "models" / name)
        configurations = {f.stem.split("-", 1)[1] for f in files}
        assert 2 * len(configurations) == len(files)  # both phases of each
        for file in files:
            content = read_model_file(file)
            c = content
            model = load_model(c.phase, c.tp, c.dtype, name, ep=c.ep)
            assert (model.gpu.name, model.llm.name) == tuple(name.split("/"))
            assert model.n_members >= 64
            assert model.kv_capacity_tokens > 0, file


def test_gpu_and_llm_choose_the_family():
    for spec, name in (
        ({}, "h100-sxm/llama-3.3-70b"),
        ({"llm": "qwen3-32b", "tp": 2}, "h100-sxm/qwen3-32b"),
        ({"gpu": "h200-sxm", "llm": "gpt-oss-120b", "tp": 1}, "h200-sxm/gpt-oss-120b"),
    ):
        instance = InstanceSpec.of(**spec)
        assert instance.family == name
        model = instance_model("decode", instance)
        assert (model.name, model.fitted_on) == (name, "")
    assert InstanceSpec.of(llm="gpt-oss-120b").dtype == "mxfp4"
    # what is not shipped is moved from a model that has the TP
    assert InstanceSpec.of(llm="qwen3-14b", tp=8).family == "h100-sxm/llama-3.3-70b"
    assert InstanceSpec.of(llm="qwen3-14b", tp=2).family == "h100-sxm/qwen3-32b"
    assert InstanceSpec.of(llm="gpt-oss-120b", dtype="bf16").dtype == "bf16"


@pytest.fixture
def copied(tmp_path):
    path = tmp_path / "mine.yaml"
    shutil.copy(FOLDER / "decode-bf16-tp4.yaml", path)
    return path


def rewrite(path, change):
    data = yaml.safe_load(path.read_text())
    change(data)
    path.write_text(yaml.safe_dump(data))


def test_a_complete_file_of_ones_own_needs_no_members(copied):
    copied.write_text(dump_fitted(load_model("decode").content))
    model = load_model("decode", 4, "bf16", str(copied))
    assert model.coefficients == load_model("decode").coefficients
    assert model.n_members == 0
    assert model.delay_s() == load_model("decode").delay_s()


def test_a_changed_file_is_read_again(copied):
    before = load_model("decode", 4, "bf16", str(copied)).coefficients.weights_s
    rewrite(copied, lambda d: d["coefficients"]["weights_s"].update(value=0.5))
    assert load_model("decode", 4, "bf16", str(copied)).coefficients.weights_s == 0.5 != before


def test_a_folder_of_ones_own(tmp_path):
    for name in ("prefill-bf16-tp4.yaml", "decode-bf16-tp4.yaml", "decode-bf16-tp4.ensemble.csv"):
        shutil.copy(FOLDER / name, tmp_path / name)
    assert load_model("decode", 4, "bf16", str(tmp_path)).n_members == 64
    # without a table of its own, what varies is the GPU's alone
    bare = load_model("prefill", 4, "bf16", str(tmp_path))
    assert bare.n_members == 64
    assert bare.member(3).weights_s == bare.coefficients.weights_s
    assert bare.member(3).v_knee_ghz == load_model("prefill", 4).member(3).v_knee_ghz
    with pytest.raises(BiscaleError, match="has no decode model for bf16 at TP 8"):
        load_model("decode", 8, "bf16", str(tmp_path))


def test_a_file_about_something_else(copied):
    with pytest.raises(
        BiscaleError,
        match="describes decode, TP 4, bf16, EP 1, but prefill, TP 4, bf16, EP 1 was asked for",
    ):
        load_model("prefill", 4, "bf16", str(copied))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.update(phases="decode"),
            "unknown key 'phases'; the nearest known key is 'phase'",
        ),
        (lambda d: d["coefficients"].pop("weights_s"), "weights_s"),
        (lambda d: d["coefficients"]["weights_s"].update(value=-1), "greater than or equal to 0"),
        (
            lambda d: d["coefficients"]["weights_s"].update(value=float("nan")),
            "finite|greater than or equal",
        ),
        (lambda d: d["coefficients"]["weights_s"].update(provenance="guessed"), "provenance"),
        (lambda d: d["box"].pop("tokens"), "tokens"),
        (lambda d: d.update(format=3), "format"),
        (
            lambda d: d.update(format=1),
            "by version 0.1, whose formula was another",
        ),
    ],
)
def test_broken_files_name_file_and_key(copied, change, message):
    rewrite(copied, change)
    with pytest.raises(BiscaleError, match=message) as caught:
        load_model("decode", 4, "bf16", str(copied))
    assert "mine.yaml" in str(caught.value)


def test_not_yaml(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("a: [1")
    with pytest.raises(BiscaleError, match="not valid YAML"):
        read_model_file(path)
    with pytest.raises(BiscaleError, match="cannot read"):
        read_model_file(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "delay_s,wheels\n0.05,4\n",
        "delay_s,weights_s\n0.05,-1\n",
        "delay_s,weights_s\n0.05,\n",
        "delay_s,weights_s\n0.05,x\n",
    ],
)
def test_broken_members(copied, text):
    copied.with_suffix(".ensemble.csv").write_text(text)
    with pytest.raises(BiscaleError, match=r"mine\.ensemble\.csv"):
        load_model("decode", 4, "bf16", str(copied))


def test_members_replace_only_their_columns(copied):
    copied.with_suffix(".ensemble.csv").write_text(
        "# mine\ndelay_s,weights_s\n0.07,0.25\n0.08,0.5\n"
    )
    model = load_model("decode", 4, "bf16", str(copied))
    assert model.n_members == 2
    assert model.delay_s(1) == 0.08
    shared = load_model("decode", 4).member(0)
    assert model.member(0).weights_s == 0.25
    assert model.member(0).e_hbm_j == shared.e_hbm_j
    assert model.member(0).attn_decode_s == model.coefficients.attn_decode_s
    assert isinstance(model.member(0), Coefficients)
