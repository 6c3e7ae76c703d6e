"""Kernel times: the shipped tables, the package that they are from, and the counted stand-in."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biscale_env.config import configs_dir, load_gpu, load_llm
from biscale_env.core.errors import BiscaleError
from biscale_env.models.build import table_package
from biscale_env.models.build.grid import WorkPoint, decode_points, prefill_points
from biscale_env.models.build.kernel_tables import (
    FAMILIES,
    kernel_family,
    kernel_table,
)
from biscale_env.models.build.partition import Partition, check_partition
from biscale_env.models.build.roofline import family_times, roofline_table
from biscale_env.models.build.shipped_tables import parse_partition, shipped_configurations
from biscale_env.models.build.table_package import tables_installed

needs_tables = pytest.mark.skipif(not tables_installed(), reason="extra `tables` not installed")
PROFILES = configs_dir() / "models" / "profiles"


def shipped(gpu, llm):
    return pd.read_csv(PROFILES / f"{gpu}-{llm}.csv", comment="#")


def rows_of(table, part, phase=None):
    mine = (table.tp == part.tp) & (table.ep == part.ep) & (table.dtype == part.dtype)
    return table[mine if phase is None else mine & (table.phase == phase)]


@pytest.mark.parametrize(("gpu", "llm"), shipped_configurations().pairs())
def test_every_listed_configuration_is_shipped_and_adds_up(gpu, llm):
    table = shipped(gpu, llm)
    description, on = load_llm(llm), load_gpu(gpu)
    listed = shipped_configurations().partitions(gpu, llm)
    assert len(listed) == table.groupby(["dtype", "tp", "ep"]).ngroups
    for part in listed:
        check_partition(description, on, part)
        rows = rows_of(table, part)
        assert set(rows.phase) == {"prefill", "decode"}
        sums = rows[list(FAMILIES)].sum(axis=1)
        assert np.allclose(sums, rows.latency_s, rtol=1e-4)
        assert (rows.expert_s.gt(0) == bool(description.experts)).all()
        assert (rows.comm_s.gt(0) == (part.tp > 1)).all()
        kv = description.kv_capacity_tokens(on, part.tp, part.dtype)
        decode = rows[rows.phase == "decode"]
        assert (decode.batch * decode.context <= kv).all()


@pytest.mark.parametrize(("gpu", "llm"), shipped_configurations().pairs())
def test_measured_weights_stream_no_faster_than_the_data_sheet(gpu, llm):
    """A lone row reads all dense weights; nothing is faster than HBM."""
    from biscale_env.models.geometry import counted_work

    for part in shipped_configurations().partitions(gpu, llm):
        work = counted_work(load_llm(llm), part.tp, part.dtype)
        one = rows_of(shipped(gpu, llm), part, "decode").query("batch == 1").latency_s.min()
        touched = 1.0 - work["expert_miss"] if load_llm(llm).experts else 0.0
        moved = work["weight_bytes"] + touched * work["expert_bytes"]
        assert moved / one < load_gpu(gpu).hbm_gb_per_s * 1e9


@pytest.mark.parametrize(
    ("kernel", "family"),
    [
        ("context_qkv_gemm", "gemm_s"),
        ("generation_logits_gemm", "gemm_s"),
        ("context_router_gemm", "gemm_s"),
        ("context_moe", "expert_s"),
        ("generation_moe_overlap", "expert_s"),
        ("context_moe_pre_dispatch", "comm_s"),
        ("generation_ar_1", "comm_s"),
        ("context_tp_allreduce", "comm_s"),
        ("generation_embedding_ar", "comm_s"),
        ("context_p2p", "comm_s"),
        ("context_attention", "attn_s"),
        ("generation_mla_block", "attn_s"),
        ("context_add_norm_1", "elem_s"),
        ("generation_embedding", "elem_s"),
        ("context_act_gate", "elem_s"),
    ],
)
def test_kernels_by_family(kernel, family):
    assert kernel_family(kernel) == family


@needs_tables
def test_the_package_gives_what_is_shipped(capfd):
    llm, gpu, part = load_llm("qwen3-30b-a3b"), load_gpu("h100-sxm"), Partition("bf16", 2, 2)
    made = kernel_table(llm, gpu, part)
    mine = rows_of(shipped("h100-sxm", "qwen3-30b-a3b"), part).reset_index(drop=True)
    pd.testing.assert_frame_equal(made.rows, mine, check_dtype=False)
    assert "aiconfigurator-core 0.12.0" in made.source
    assert "vllm" in made.source
    assert made.measured
    assert capfd.readouterr() == ("", "")  # the package's noise stays inside


@needs_tables
def test_windowed_layers_read_less():
    gemma, gpu, part = load_llm("gemma-3-12b"), load_gpu("h100-sxm"), Partition("bf16", 1)
    full = gemma.model_copy(update={"window_layers": 40, "window_tokens": 1024})
    rows = kernel_table(full, gpu, part).rows.query("phase == 'decode' and batch == 4")
    time = rows.set_index("context").attn_s
    # 40 of 48 layers stop at 1024 tokens: four times the context is far from four times the time
    assert time[16384] / time[4096] < 3.2
    assert time[4096] < 2.5 * time[1024]


@needs_tables
@pytest.mark.parametrize(
    ("llm", "gpu", "part", "message"),
    [
        ("gpt-oss-20b", "a100-sxm", Partition("mxfp4", 1), "have nothing for gpt-oss-20b in mxfp4"),
        ("llama-3.1-8b", "a100-sxm", Partition("fp8", 1), "nothing for llama-3.1-8b in fp8"),
    ],
)
def test_what_the_tables_lack_is_one_sentence(llm, gpu, part, message):
    big = load_gpu(gpu).model_copy(update={"memory_gb": 2000.0})
    with pytest.raises(BiscaleError) as error:
        kernel_table(load_llm(llm), big, part)
    assert message in str(error.value)
    assert "--roofline" in str(error.value)
    assert "\n" not in str(error.value)


def test_without_the_extra_it_is_said(monkeypatch):
    monkeypatch.setattr(table_package, "PACKAGE", "no_such_package")
    assert not tables_installed()
    with pytest.raises(BiscaleError, match=r"biscale-env\[tables\]"):
        kernel_table(load_llm("qwen3-8b"), load_gpu("h100-sxm"), Partition("bf16", 1))


@needs_tables
def test_a_gpu_without_tables_is_told_which_have_them():
    gpu = load_gpu("h100-sxm").model_copy(update={"name": "mine"})
    with pytest.raises(BiscaleError, match=r"no kernel tables of GPU 'mine'.*h100-sxm"):
        kernel_table(load_llm("qwen3-8b"), gpu, Partition("bf16", 1))


@pytest.mark.parametrize(("gpu", "llm"), shipped_configurations().pairs())
def test_the_roofline_is_near_the_measured_tables(gpu, llm):
    for part in shipped_configurations().partitions(gpu, llm):
        rows = rows_of(shipped(gpu, llm), part)
        points = [
            WorkPoint(*map(int, r))
            for r in rows[["batch", "new_tokens", "prefix", "context"]].to_numpy()
        ]
        times = family_times(load_llm(llm), load_gpu(gpu), part, points)
        error = np.abs(sum(times.values()) / rows.latency_s.to_numpy() - 1.0)
        for phase in ("prefill", "decode"):
            assert error[(rows.phase == phase).to_numpy()].mean() < 0.40


def test_the_roofline_has_the_form_of_the_tables_and_says_what_it_is():
    made = roofline_table(load_llm("gpt-oss-120b"), load_gpu("h100-sxm"), Partition("mxfp4", 2))
    table = shipped("h100-sxm", "gpt-oss-120b")
    assert list(made.rows.columns) == list(table.columns)
    mine = rows_of(table, Partition("mxfp4", 2))
    keys = ["phase", "batch", "new_tokens", "prefix", "context"]
    assert made.rows[keys].reset_index(drop=True).equals(mine[keys].reset_index(drop=True))
    assert (made.rows.estimated_share == 1.0).all()
    assert not made.measured
    assert "nothing measured" in made.source


@given(st.integers(1000, 5_000_000), st.integers(512, 131072))
def test_points_fit_the_cache_and_the_context(kv_tokens, max_context):
    for p in prefill_points(kv_tokens, max_context):
        assert p.batch * (p.new_tokens + p.prefix) <= kv_tokens
        assert p.new_tokens + p.prefix <= max_context
        assert p.context == 0
    for p in decode_points(kv_tokens, max_context):
        assert p.batch * p.context <= kv_tokens
        assert 0 < p.context <= max_context


@pytest.mark.parametrize(
    ("llm", "gpu", "part", "message"),
    [
        ("llama-3.3-70b", "h100-sxm", Partition("bf16", 3), "TP 3 does not divide the 64"),
        ("qwen3-14b", "h100-sxm", Partition("bf16", 5), "neither divides the 8 key-value heads"),
        ("qwen3-30b-a3b", "h100-sxm", Partition("bf16", 2, 3), "EP 3 does not divide the 2 GPUs"),
        ("mixtral-8x7b", "h100-sxm", Partition("bf16", 16, 16), "does not divide the 8 experts"),
        ("llama-3.3-70b", "h100-sxm", Partition("bf16", 4, 4), "has no experts: leave EP at 1"),
        ("llama-3.3-70b", "h100-sxm", Partition("mxfp4", 4), "mxfp4 is a format of experts"),
        ("llama-3.3-70b", "h100-sxm", Partition("bf16", 1), "does not fit on TP 1"),
        ("deepseek-v3", "h100-sxm", Partition("fp8", 8), "does not fit on TP 8"),
        ("llama-3.1-8b", "a100-sxm", Partition("fp8", 1), "a100-sxm cannot multiply in fp8"),
    ],
)
def test_impossible_partitions_are_one_sentence(llm, gpu, part, message):
    with pytest.raises(BiscaleError) as error:
        check_partition(load_llm(llm), load_gpu(gpu), part)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_key_value_heads_may_be_repeated():
    llm, gpu = load_llm("qwen3-30b-a3b"), load_gpu("h100-sxm")
    check_partition(llm, gpu, Partition("bf16", 8))  # 4 key-value heads on 8 GPUs
    assert llm.kv_copies(8) == 2.0


@pytest.mark.parametrize("text", ["", "x", "2-ep", "2-epx", "2.5"])
def test_partitions_are_written_in_one_way(text):
    assert parse_partition("bf16", "2-ep2") == Partition("bf16", 2, 2)
    assert parse_partition("bf16", "8") == Partition("bf16", 8, 1)
    with pytest.raises(BiscaleError, match="must be a TP degree"):
        parse_partition("bf16", text)
