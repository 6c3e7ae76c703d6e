"""Fitting: reading tables, recovering known kernels, honest hold-out, and the committed files being
what the fit gives.
"""

import numpy as np
import pandas as pd
import pytest
from biscale_env.models.fit.evidence import evidence_path, load_evidence, profile_path

from biscale_env.config import configs_dir, load_gpu, load_llm
from biscale_env.core.errors import BiscaleError
from biscale_env.models import Coefficients, load_model, physics
from biscale_env.models.coefficient_files import rounded
from biscale_env.models.fit.latency import LATENCY_FIELDS, fit_components, mape, predict_s, refine
from biscale_env.models.fit.profile_table import ProfileTable, read_profile, sha256
from biscale_env.models.fit.shipped import (
    fit_family,
    fit_kernels,
    stale_files,
    tables,
    write_family,
)
from biscale_env.models.geometry import counted_work

NAME = "h100-llama70b"
EVIDENCE = load_evidence(NAME)
HEADER = "phase,tp,dtype,batch,new_tokens,prefix,context,latency_s\n"
GOOD = "decode,4,bf16,8,0,0,512,0.02\n"


def write(tmp_path, text):
    path = tmp_path / "table.csv"
    path.write_text(text)
    return path


def test_prefill_and_decode_rows_become_work(tmp_path):
    path = write(tmp_path, "# a comment\n" + HEADER + GOOD + "prefill,8,fp8,2,100,30,0,0.01\n")
    decode, prefill = read_profile(path)
    assert (decode.phase, decode.tp, decode.dtype) == ("decode", 4, "bf16")
    assert [float(a[0]) for a in decode.work.as_tuple()] == [8, 0, 4096, 8]
    assert (prefill.phase, prefill.tp, prefill.dtype) == ("prefill", 8, "fp8")
    assert [float(a[0]) for a in prefill.work.as_tuple()] == [200, 2 * 100 * (50 + 30), 0, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a table"),
        (HEADER, "no rows"),
        ("phase,tp\ndecode,4\n", "column batch, context, dtype, new_tokens, prefix is missing"),
        (HEADER.replace("latency_s", "latency") + GOOD, "unknown column latency; known: phase"),
        (
            HEADER + GOOD + GOOD.replace("decode", "encode"),
            "line 3: phase must be prefill or decode",
        ),
        (HEADER + GOOD.replace("bf16", "int8"), "line 2: dtype must be bf16 or fp8"),
        (
            HEADER + GOOD + GOOD.replace("0.02", "-0.02"),
            r"line 3: latency_s is .*0\.02.*above zero",
        ),
        (HEADER + GOOD + GOOD.replace("0.02", "nan"), "line 3: latency_s"),
        (HEADER + GOOD + GOOD.replace("0.02", "quick"), "line 3: latency_s is 'quick'"),
        (HEADER + GOOD.replace(",8,", ",0,"), "line 2: batch"),
        ("# one\n# two\n" + HEADER + GOOD.replace("512", "-1"), "line 4: context"),
    ],
)
def test_bad_tables_name_file_line_and_column(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(BiscaleError, match=message) as caught:
        read_profile(path)
    assert "table.csv" in str(caught.value)


def test_missing_table():
    with pytest.raises(BiscaleError, match="cannot read"):
        read_profile(configs_dir() / "absent.csv")


def test_hold_out_is_three_in_ten_and_spread():
    for table in tables(EVIDENCE):
        held = table.held_out()
        assert held.mean() == pytest.approx(0.3, abs=0.01)
        assert np.diff(np.flatnonzero(held)).max() <= 4
        for axis in table.work.as_tuple():
            assert axis[~held].max() >= axis[held].max() * 0.5  # the fit sees the far end too


def synthetic(phase="decode", tp=4):
    """A kernel table computed from known coefficients."""
    true = load_model(phase, tp).coefficients._replace(host0_s=0.0, host_s_per_seq=0.0)
    source = next(t for t in tables(EVIDENCE) if (t.phase, t.tp, t.dtype) == (phase, tp, "bf16"))
    none = dict.fromkeys((*LATENCY_FIELDS, "attn_prefill_s", "attn_decode_s"), 0.0)
    parts = {
        "gemm_s": ("weights_s", "gemm_s_per_token"),
        "attn_s": ("attn0_s", "attn_prefill_s", "attn_decode_s"),
        "comm_s": ("comm0_s", "comm_s_per_token"),
        "elem_s": ("elem0_s", "elem_s_per_token"),
        "latency_s": tuple(none),
    }
    rows = source.rows.copy()
    f0 = true.freq_profile_ghz
    for column, fields in parts.items():
        c = true._replace(
            **{n: (getattr(true, n) if n in fields else 0.0) for n in none}, mem_loss_per_ghz=0.0
        )
        rows[column] = predict_s(c, source, f0)
    return true, ProfileTable(source.phase, source.tp, source.dtype, rows)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_components_recover_known_kernels(phase):
    true, table = synthetic(phase)
    found = fit_components(table, ~table.held_out())
    for name, value in found.items():
        assert value == pytest.approx(getattr(true, name), rel=1e-5), name


def test_refine_moves_towards_the_truth_and_holds_the_start():
    true, table = synthetic()
    clocks = np.full(len(table.rows), true.freq_profile_ghz)
    wrong = true._replace(weights_s=true.weights_s * 1.3)
    train = ~table.held_out()
    free = refine(wrong, ["weights_s"], table, train, clocks, sigma=100.0)
    assert free.weights_s == pytest.approx(true.weights_s, rel=1e-3)
    held = refine(wrong, ["weights_s"], table, train, clocks, sigma=1e-4)
    assert held.weights_s == pytest.approx(wrong.weights_s, rel=1e-2)
    assert refine(wrong, ["host0_s"], table, train, clocks, 1.0).host0_s == 0.0  # zero stays zero


def test_fit_sees_only_the_training_rows():
    table = next(
        t for t in tables(EVIDENCE) if t.phase == "decode" and t.tp == 4 and t.dtype == "bf16"
    )
    spoiled = table.rows.copy()
    columns = ["latency_s", "gemm_s", "attn_s", "comm_s", "elem_s"]
    spoiled.loc[table.held_out(), columns] *= 7.0
    gpu = load_gpu()
    clean = fit_kernels(table, EVIDENCE, gpu)
    dirty = fit_kernels(ProfileTable(table.phase, table.tp, table.dtype, spoiled), EVIDENCE, gpu)
    assert dirty.coefficients == clean.coefficients
    assert dirty.train_mape == clean.train_mape
    assert dirty.held_out_mape > 0.8


def test_mape_by_hand():
    assert mape(np.array([1.1, 1.9]), np.array([1.0, 2.0])) == pytest.approx(0.075)


def test_geometry_by_hand():
    llm = load_llm()
    g = counted_work(llm, 4, "bf16")
    assert g["flops_per_token"] == pytest.approx(2 * (70.6e9 - 2 * 128256 * 8192) / 4)
    assert g["flops_per_attn"] == 4 * 64 * 128 * 80 / 4
    assert g["kv_bytes_per_token"] == 327680 / 4
    assert g["weight_bytes"] == pytest.approx((70.6e9 - 128256 * 8192) * 2 / 4)
    assert counted_work(llm, 4, "fp8")["weight_bytes"] == pytest.approx(g["weight_bytes"] / 2)
    assert counted_work(llm, 1, "bf16")["link_bytes_per_token"] == 0.0
    # two all-reduces of 8192 bf16 per layer; a ring moves 2 (p - 1) / p of them
    assert g["link_bytes_per_token"] == pytest.approx(80 * 2 * 8192 * 2 * 2 * 3 / 4)


@pytest.mark.parametrize("digits", [3, 6])
def test_rounded(digits):
    assert rounded(0.123456789, digits) == pytest.approx(0.123456789, rel=10.0 ** (1 - digits))
    assert rounded(0.0) == 0.0
    assert rounded(1.2345675e-12, 3) == 1.23e-12


def held_out_error(model, table):
    c = model.coefficients._replace(host0_s=0.0, host_s_per_seq=0.0)
    held = table.held_out()
    return mape(predict_s(c, table, c.freq_profile_ghz)[held], table.column("latency_s")[held])


@pytest.mark.parametrize("table", tables(EVIDENCE), ids=lambda t: f"{t.phase}-{t.dtype}-tp{t.tp}")
def test_held_out_latency_within_five_per_cent(table):
    model = load_model(table.phase, table.tp, table.dtype)
    error = held_out_error(model, table)
    assert error <= 0.05
    assert error == pytest.approx(model.content.fit["held_out_mape"], abs=2e-4)
    assert model.content.fit["train_points"] + model.content.fit["held_out_points"] == len(
        table.rows
    )


def test_fit_beats_a_straight_line_in_tokens():
    """The hold-out is not so easy that anything passes.

    A + b n alone misses the target in decode.
    """
    table = next(
        t for t in tables(EVIDENCE) if t.phase == "decode" and t.tp == 4 and t.dtype == "bf16"
    )
    held, y, n = table.held_out(), table.column("latency_s"), table.work.tokens
    rows = np.column_stack([np.ones_like(n), n]) / y[:, None]
    line = np.linalg.lstsq(rows[~held], np.ones(int((~held).sum())), rcond=None)[0]
    assert np.abs(rows[held] @ line - 1).mean() > 0.05
    assert held_out_error(load_model("decode", 4), table) < 0.03


def test_files_carry_the_hash_of_their_data():
    for phase in ("prefill", "decode"):
        record = load_model(phase, 4).content.fit
        assert record["profile_sha256"] == sha256(profile_path(EVIDENCE))
        assert record["evidence_sha256"] == sha256(evidence_path(NAME))


def test_profile_table_is_the_public_one(shared_data):
    for phase, new, context in (
        ("prefill", "new_tokens_per_req", None),
        ("decode", None, "context_tokens"),
    ):
        raw = pd.read_csv(shared_data / "profiles" / f"aic_h100_llama70b_{phase}.csv")
        raw = raw[raw.backend == "vllm"]
        keys = {"tp": "tp", "dtype": "precision", "batch": "batch"}
        keys |= {"new_tokens": new, "prefix": "prefix_tokens"} if new else {"context": context}
        for table in (t for t in read_profile(profile_path(EVIDENCE)) if t.phase == phase):
            mine = table.rows.assign(tp=table.tp, dtype=table.dtype)
            both = mine.merge(raw, left_on=list(keys), right_on=list(keys.values()))
            assert len(both) == len(mine)
            for column in ("latency", "gemm", "attn", "comm", "elem"):
                np.testing.assert_allclose(
                    both[f"{column}_s"], both[f"{column}_ms"] / 1e3, rtol=6e-5, atol=1e-9
                )


@pytest.mark.slow
def test_committed_files_are_what_the_fit_gives(tmp_path):
    files = fit_family(NAME)
    assert stale_files(files, configs_dir() / "models" / NAME) == []
    write_family(files, tmp_path)
    assert stale_files(files, tmp_path) == []
    (tmp_path / "decode-bf16-tp4.yaml").write_text("other")
    (tmp_path / "decode-bf16-tp8.yaml").unlink()
    assert stale_files(files, tmp_path) == ["decode-bf16-tp4.yaml", "decode-bf16-tp8.yaml"]


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file.yaml"
    write_family({path.name: "old"}, tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(BiscaleError, match=r"cannot write into .*: disk full"):
        write_family({path.name: "new"}, tmp_path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.yaml"]


def test_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(BiscaleError, match="cannot write into"):
        write_family({"a.yaml": "x"}, tmp_path / "taken")


def test_unknown_family():
    with pytest.raises(
        BiscaleError, match="no evidence for model family 'b200'; known: h100-llama70b"
    ):
        load_evidence("b200")


def test_shipped_models_are_small():
    size = sum(p.stat().st_size for p in (configs_dir() / "models").rglob("*") if p.is_file())
    assert size < 600_000


def test_prediction_at_the_profile_clock_is_the_kernel_sum():
    c = load_model("prefill", 4).coefficients
    bare = c._replace(host0_s=0.0, host_s_per_seq=0.0, mem_loss_per_ghz=0.0)
    n = 512.0
    gemm = (c.weights_s**4 + (c.gemm_s_per_token * n) ** 4) ** 0.25
    rest = (
        c.attn0_s
        + c.attn_prefill_s * n * n / 2
        + c.comm0_s
        + c.comm_s_per_token * n
        + c.elem0_s
        + c.elem_s_per_token * n
    )
    assert physics.latency_s(bare, n, n * n / 2, 0, 1, c.freq_profile_ghz) == pytest.approx(
        gemm + rest, rel=1e-12
    )
    assert isinstance(c, Coefficients)
