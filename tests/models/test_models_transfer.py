"""A fitted model on another GPU or with another LLM: what follows, and what is kept, by hand."""

import numpy as np
import pytest
from toy_hardware import TOY_GPU, TOY_LLM

from biscale_env.config import load_gpu, load_llm
from biscale_env.core.errors import BiscaleError
from biscale_env.models import load_model
from biscale_env.models.geometry import counted_work
from biscale_env.models.physics import GPU_FIELDS, Coefficients
from biscale_env.models.transfer import PER_LAYER, TIMES, Hardware, plan_move

H100, LLAMA = load_gpu("h100-sxm"), load_llm("llama-3.3-70b")
GPU, LLM = load_gpu(TOY_GPU), load_llm(TOY_LLM)
COUNTED = set(counted_work(LLM, 4, "bf16"))
MEMBERS = (-1, 0, 5, 63)


def pairs(phase="decode", tp=4, dtype="bf16", **moved):
    own, other = load_model(phase, tp, dtype), load_model(phase, tp, dtype, **moved)
    return own, other, [(own.member(k), other.member(k)) for k in MEMBERS]


def ratio(a, b, name):
    return getattr(b, name) / getattr(a, name)


def test_another_gpu_scales_times_by_its_data_sheet_and_keeps_energies():
    _, model, members = pairs(gpu=TOY_GPU)
    assert model.gpu == GPU
    assert model.llm == LLAMA
    per_cycle = (989 / 1980) / (312 / 1200)
    wanted = {
        "weights_s": 3350 / 1600, "attn_decode_s": 3350 / 1600, "elem_s_per_token": 3350 / 1600,
        "gemm_s_per_token": per_cycle, "attn_prefill_s": per_cycle, "comm_s_per_token": 450 / 300,
        "experts_s": 3350 / 1600, "expert_s_per_token": per_cycle,
    }  # fmt: skip
    assert set(wanted) == set(TIMES)
    for a, b in members:
        for name in Coefficients._fields:
            if name == "p_cap_w":
                assert b.p_cap_w == 250.0
            elif getattr(a, name) == 0:  # no experts, no windows
                assert getattr(b, name) == 0
            else:
                assert ratio(a, b, name) == pytest.approx(wanted.get(name, 1.0), rel=1e-12), name


def test_another_llm_brings_its_counted_work_and_times_in_proportion():
    _, model, members = pairs(llm=TOY_LLM)
    was, now = counted_work(LLAMA, 4, "bf16"), counted_work(LLM, 4, "bf16")
    for a, b in members:
        assert {n: getattr(b, n) for n in COUNTED} == now
        for name, (work, _) in TIMES.items():
            if getattr(a, name) == 0:
                continue
            assert ratio(a, b, name) == pytest.approx(now[work] / was[work], rel=1e-12)
        for name in PER_LAYER:
            assert ratio(a, b, name) == pytest.approx(32 / 80, rel=1e-12)
        kept = set(Coefficients._fields) - COUNTED - set(TIMES) - set(PER_LAYER)
        assert all(getattr(a, n) == getattr(b, n) for n in kept)
    assert model.kv_capacity_tokens == LLM.kv_capacity_tokens(H100, 4, "bf16")


@pytest.mark.parametrize(("dtype", "tp"), [("bf16", 8), ("fp8", 2)])
def test_every_configuration_moves(dtype, tp):
    own, model, _ = pairs("prefill", tp, dtype, gpu=TOY_GPU, llm=TOY_LLM)
    work = (2048.0, 2048.0**2 / 2, 0.0, 2.0)
    assert 0 < float(model.latency_s(*work, 1200.0)) < np.inf
    assert float(model.power_w(*work, 1200.0)) <= 250.0 * (1 + 1e-6)
    assert own.digest != model.digest
    assert set(model.gpu.clocks_mhz) >= {300.0, 1200.0}
    assert float(model.optimal_freq_mhz(*work)) in model.gpu.clocks_mhz


def test_the_provenance_says_what_was_moved_and_what_was_kept():
    model = load_model("decode", 4, gpu=TOY_GPU, llm=TOY_LLM)
    c = model.content.coefficients
    assert (model.content.gpu, model.content.llm) == ("toy-40gb", "toy-9b")
    assert c["p_cap_w"].source == "description of toy-40gb"
    assert c["flops_per_token"].source == "description of toy-9b"
    assert c["weights_s"].provenance == "derived"
    assert c["weights_s"].source.startswith("scaled from h100-sxm with llama-3.3-70b to toy-40gb")
    assert c["host0_s"].source.startswith("kept from the fit on h100-sxm with llama-3.3-70b: ")
    assert c["e_hbm_j"] == load_model("decode", 4).content.coefficients["e_hbm_j"]
    for name, value in model.coefficients._asdict().items():
        assert c[name].value == value


def test_names_and_sources_are_no_physics(tmp_path):
    content = load_model("decode", 4).content
    own = Hardware(H100, LLAMA)
    renamed = Hardware(H100.model_copy(update={"name": "x", "sources": {}}), LLAMA)
    assert plan_move(content, own, own) is None
    assert plan_move(content, own, renamed) is None
    capped = Hardware(H100.model_copy(update={"power_cap_w": 500.0}), LLAMA)
    move = plan_move(content, own, capped)
    assert move is not None
    assert (move.fixed, move.factor) == ({}, {})


def test_a_gpu_with_a_fitted_layer_brings_its_own_energies_and_clocks():
    moved = load_model("decode", 1, "mxfp4", "h100-sxm/gpt-oss-120b", gpu="h200-sxm")
    own = load_model("decode", 1, "mxfp4", "h200-sxm/gpt-oss-120b")
    assert moved.fitted_on
    assert not own.fitted_on
    for name in set(GPU_FIELDS) - {"p_cap_w"}:
        assert getattr(moved.member(7), name) == getattr(own.member(7), name), name
    old = load_model("decode", 1, "mxfp4", "h100-sxm/gpt-oss-120b")
    assert ratio(old.member(2), moved.member(2), "experts_s") == pytest.approx(3350 / 4800)


def test_times_are_brought_to_the_profile_clock_of_the_new_layer():
    """An A100's times are given at 1.41 GHz: at equal clocks compute goes by the data sheets."""
    old = load_model("prefill", 8, "bf16")
    new = load_model("prefill", 8, "bf16", gpu="a100-sxm")
    per_cycle = (989 / 1980) / (312 / 1410)

    def at(model, name, f):
        return getattr(model.coefficients, name) * model.coefficients.freq_profile_ghz / f

    for name in ("gemm_s_per_token", "attn_prefill_s"):
        assert at(new, name, 1.2) == pytest.approx(per_cycle * at(old, name, 1.2), rel=1e-9)


def test_nothing_moves_between_dense_llms_and_those_with_experts():
    for name, llm, dtype, tp in (
        ("h100-sxm/llama-3.3-70b", "gpt-oss-120b", "bf16", 4),
        ("h100-sxm/gpt-oss-120b", "llama-3.3-70b", "mxfp4", 1),
    ):
        with pytest.raises(BiscaleError, match="make its own with `biscale models build`"):
            load_model("decode", tp, dtype, name, llm=llm)


def test_there_and_back_is_where_it_began():
    content = load_model("decode", 4).content
    own, toy = Hardware(H100, LLAMA), Hardware(GPU, LLM)
    there, back = plan_move(content, own, toy), plan_move(content, toy, own)
    assert there is not None
    assert back is not None
    for name, factor in there.factor.items():
        assert factor * back.factor[name] == pytest.approx(1.0, rel=1e-12)
