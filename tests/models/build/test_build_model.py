"""`biscale models build | list | describe`: what is made works, and says what it rests on."""

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from biscale_env.cli import build as commands
from biscale_env.config import InstanceSpec, configs_dir, load_gpu
from biscale_env.core.errors import BiscaleError, BiscaleWarning
from biscale_env.models import instance_model, load_model
from biscale_env.models.build import table_package
from biscale_env.models.build.borrowed_layer import factors, operations_per_clock
from biscale_env.models.build.build_model import build_model
from biscale_env.models.build.catalogue import catalogue, describe, entry
from biscale_env.models.build.table_package import tables_installed
from biscale_env.models.coefficient_files import known_names
from biscale_env.models.fit.llm_files import write_family

needs_tables = pytest.mark.skipif(not tables_installed(), reason="extra `tables` not installed")
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}


def run(*args):
    return CliRunner().invoke(commands(), ["models", *map(str, args)])


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """A family built by the roofline: needs no extra."""
    made = build_model("qwen3-14b", "h100-sxm", [1, 2], roofline=True)
    folder = tmp_path_factory.mktemp("counted") / "new"
    write_family(made.files, folder)
    return made, folder


def test_a_counted_family_loads_and_follows_its_own_times(counted):
    made, folder = counted
    assert made.family == "h100-sxm/qwen3-14b"
    assert not made.measured
    assert not made.borrowed
    table = pd.read_csv(folder / "kernels.csv", comment="#")
    rows = table[(table.phase == "decode") & (table.tp == 2)]
    model = load_model("decode", 2, "bf16", str(folder))
    c = model.coefficients
    from biscale_env.models import physics

    cached = (rows.batch * rows.context).to_numpy(float)
    batch = rows.batch.to_numpy(float)
    time = physics.latency_s(c, batch, 0.0, cached, batch, c.freq_profile_ghz)
    host = c.host0_s + c.host_s_per_seq * batch
    error = np.abs((time - host) / rows.latency_s.to_numpy() - 1.0)
    assert error.mean() < 0.06  # of it: large GEMMs are brought to another clock


def test_a_file_tells_its_table_and_that_nothing_is_measured(counted):
    made, folder = counted
    digest = hashlib.sha256((folder / "kernels.csv").read_bytes()).hexdigest()
    assert len(made.contents) == 4
    for content in made.contents:
        assert content.fit["profile_sha256"] == digest
        assert content.fit["estimated_share"] == 1.0
        times = content.coefficients["weights_s"]
        assert times.provenance != "measured"
        assert "roofline" in times.source
        assert content.coefficients["flops_per_token"].provenance == "derived"


@needs_tables
def test_measured_kernels_make_a_narrower_ensemble(counted, tmp_path):
    made = build_model("qwen3-14b", "h100-sxm", [2])
    write_family(made.files, tmp_path)
    assert made.measured
    spread = {}
    for name, folder in (("measured", tmp_path), ("counted", counted[1])):
        model = load_model("decode", 2, "bf16", str(folder))
        times = np.array([model.member(k).weights_s for k in range(model.n_members)])
        spread[name] = times.std() / times.mean()
    assert spread["counted"] > 2.0 * spread["measured"]
    for content in made.contents:
        assert content.fit["held_out_mape"] < 0.05


@needs_tables
@pytest.mark.parametrize(("llm", "gpu", "tp"), [("gpt-oss-20b", "h100-sxm", 1)])
def test_experts_and_windows_fit_their_tables(llm, gpu, tp):
    for content in build_model(llm, gpu, [tp]).contents:
        assert content.fit["held_out_mape"] < 0.08
        c = content.coefficients
        assert c["experts_s"].value > 0
        assert c["window_share"].value == 0.5
        assert c["expert_miss"].value == pytest.approx(1 - 4 / 32)


def test_an_llm_of_ones_own_lies_beside_its_coefficients(tmp_path, monkeypatch):
    source = tmp_path / "Tiny-1B"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(TINY))
    made = build_model(str(source), "h100-sxm", [1], roofline=True)
    out = tmp_path / "out"
    write_family(made.files, out)
    assert (out / "tiny-1b.yaml").is_file()
    monkeypatch.chdir(tmp_path)
    model = load_model("decode", 1, "bf16", "out")
    assert model.llm.parameters == pytest.approx(1.24e9, rel=0.01)
    assert model.llm.name == "tiny-1b"
    assert float(model.latency_s(8, 0, 8192, 8, 1980)) > 0


def test_a_gpu_of_ones_own_borrows_its_layer(tmp_path):
    text = (configs_dir() / "gpus" / "h100-sxm.yaml").read_text()
    mine = text.replace("name: h100-sxm", "name: mine")
    mine = mine.replace("power_cap_w: 700", "power_cap_w: 350")
    path = tmp_path / "mine.yaml"
    path.write_text(mine)
    made = build_model("qwen3-8b", str(path), [1])
    assert made.borrowed
    assert not made.measured  # nobody has tables of it
    out = tmp_path / "out"
    write_family(made.files, out)
    model, lent = (
        load_model("decode", 1, "bf16", str(out)),
        load_model("decode", name="h100-sxm/llama-3.3-70b"),
    )
    assert model.gpu.power_cap_w == 350
    assert model.coefficients.p_static_w == pytest.approx(
        lent.coefficients.p_static_w / 2, rel=1e-4
    )
    assert model.coefficients.e_hbm_j == lent.coefficients.e_hbm_j
    statics = np.array([model.member(k).p_static_w for k in range(model.n_members)])
    before = np.array([lent.member(k).p_static_w for k in range(lent.n_members)])
    assert statics.std() / statics.mean() > before.std() / before.mean()


def test_what_is_borrowed_follows_the_data_sheets():
    h100 = load_gpu("h100-sxm")
    assert set(factors(h100, h100).values()) == {1.0}
    for name, per_clock in (("a100-sxm", 2048), ("h200-sxm", 4096), ("b200-sxm", 8192)):
        assert operations_per_clock(load_gpu(name)) == per_clock
    # as many bytes per clock and SM as on an H100: B200 streams at its full rate above 1.39 GHz
    b200 = factors(load_gpu("b200-sxm"), h100)["stream_knee_ghz"]
    assert b200 == pytest.approx(8000 / 3350 * 132 / 148)


def test_the_instance_of_a_built_folder_runs(counted):
    spec = InstanceSpec.of(model=str(counted[1]), tp=2)
    assert instance_model("prefill", spec).llm.name == "qwen3-14b"


def test_build_from_the_command_line(tmp_path):
    out = tmp_path / "a" / "b"
    result = run("build", "--llm", "Qwen/Qwen3-8B", "--roofline", "--tp", 1, "--out", out)
    assert result.exit_code == 0, result.output
    assert "nothing measured" in result.output
    assert {p.name for p in out.glob("*.yaml")} == {"decode-bf16-tp1.yaml", "prefill-bf16-tp1.yaml"}
    shown = run("describe", out)
    assert "kernels roofline" in shown.output
    assert "weights_s" in shown.output


def test_without_the_extra_the_roofline_is_built_and_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr(table_package, "PACKAGE", "no_such_package")
    with pytest.warns(BiscaleWarning, match=r"not installed \(pip install 'biscale-env\[tables\]'"):
        result = run("build", "--llm", "qwen3-8b", "--out", tmp_path / "x")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--llm", "llama-3.3-70b", "--tp", 1), "does not fit on TP 1"),
        (("--llm", "llama-3.3-70b", "--tp", 3), "TP 3 does not divide the 64 attention heads"),
        (("--llm", "no-such-llm"), "unknown LLM 'no-such-llm'"),
        (("--llm", "qwen3-8b", "--gpu", "b100"), "unknown gpu 'b100'"),
        (("--llm", "qwen3-8b", "--dtype", "int4"), "unknown dtype 'int4': choose bf16, fp8, mxfp4"),
        (("--llm", "qwen3-8b", "--ep", 2), "has no experts"),
        (("--llm", "qwen3-8b", "--dtype", "mxfp4"), "mxfp4 is a format of experts"),
    ],
)
def test_build_mistakes_are_one_sentence(tmp_path, args, message):
    result = run("build", *args, "--out", tmp_path / "x")
    assert isinstance(result.exception, BiscaleError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "x").exists()


def test_the_catalogue_lists_every_shipped_family():
    entries = catalogue()
    assert [e.name for e in entries] == known_names()
    shown = run("list")
    for e in entries:
        assert e.name in shown.output
        assert e.configurations
        assert e.decode_error is not None
    told = json.loads(run("list", "--json").output)
    assert [t["name"] for t in told] == known_names()


def test_a_description_has_every_coefficient_with_its_source():
    d = describe("h100-sxm/llama-3.3-70b", "prefill-bf16-tp4")
    model = load_model("prefill", 4)
    values = {c["name"]: c["value"] for c in d.coefficients}
    for field, value in model.coefficients._asdict().items():
        if field != "p_cap_w":  # that is the GPU's description
            assert values[field] == pytest.approx(value)
    assert all(c["source"] for c in d.coefficients)
    assert d.assumed == [c["name"] for c in d.coefficients if c["provenance"] == "assumed"]
    assert d.layer["gpu"] == "h100-sxm"
    row = next(f for f in d.files if f["phase"] == "prefill" and f["configuration"] == "bf16-tp4")
    assert row["members"] == model.n_members
    assert d.entry == entry("h100-sxm/llama-3.3-70b")


def test_what_cannot_be_described():
    with pytest.raises(BiscaleError, match="has no file 'decode-bf16-tp3'; it has: decode-"):
        describe("h100-sxm/llama-3.3-70b", "decode-bf16-tp3")
    result = run("describe", "h100-sxm/llama-3.3-07b")
    assert isinstance(result.exception, BiscaleError)
    assert "llama-3.3-70b" in str(result.exception)


def predicted_gemm(*args):
    return CliRunner().invoke(commands(), ["predict", "gemm", *map(str, args)])


def test_one_gemm_in_numbers():
    args = ("--rows", 4096, "--k", 8192, "--n", 8192, "--gpu", "h100-sxm", "--clock", 1200)
    told = json.loads(predicted_gemm(*args, "--json").output)
    flop = 2.0 * 4096 * 8192 * 8192
    assert told["tflops"] == pytest.approx(flop / told["time_s"] / 1e12)
    assert told["energy_per_tflop_j"] == pytest.approx(
        told["power_w"] * told["time_s"] / flop * 1e12
    )
    assert told["freq_effective_mhz"] == 1200
    # GeometricAGI, 2026: 898 microseconds and 509 W on one H100 SXM
    assert told["time_s"] == pytest.approx(898e-6, rel=0.06)
    assert told["power_w"] == pytest.approx(509, rel=0.06)
    text = predicted_gemm(*args).output
    assert f"{told['power_w']:.1f} W" in text
    assert "1200 MHz" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--rows", 0), "rows of a GEMM must be 1 or more"),
        (("--rows", "nan"), "rows of a GEMM must be 1 or more"),
        (("--rows", 8, "--dtype", "int8"), "unknown dtype 'int8'"),
        (("--rows", 8, "--clock", 9999), "clock 9999 MHz is impossible on h100-sxm"),
        (("--rows", 8, "--gpu", "tpu"), "unknown gpu 'tpu'"),
    ],
)
def test_an_impossible_gemm_is_one_sentence(args, message):
    result = predicted_gemm("--k", 1024, "--n", 1024, *args)
    assert isinstance(result.exception, BiscaleError)
    assert message in str(result.exception)
