"""The fit finds what it was made of: experts, windows and their constants from a made-up table."""

import numpy as np
import pandas as pd
import pytest

from biscale_env.config import load_llm
from biscale_env.models import physics
from biscale_env.models.fit.profile_table import IterationWork, ProfileTable
from biscale_env.models.fit.work_fit import ZERO, fit_work
from biscale_env.models.geometry import counted_work

LAYER = {
    "freq_profile_ghz": 1.98,
    "core_share": 0.35,
    "stream_knee_ghz": 0.65,
    "kernel0_s": 4e-6,
    "gemm_profile_ghz": 1.98,
}
TRUE = {
    "weights_s": 1.5e-3,
    "gemm_s_per_token": 1.2e-5,
    "experts_s": 2e-2,
    "expert_s_per_token": 2.5e-5,
    "expert_skew": 0.7,
    "attn0_s": 4e-4,
    "attn_decode_s": 2e-9,
    "elem0_s": 1.5e-3,
    "elem_s_per_token": 2e-6,
}


def made_up(noise):
    """Decode of gpt-oss-120b at TP 1 whose times are the formula's own, with noise."""
    llm = load_llm("gpt-oss-120b")
    from biscale_env.models.fit.work_fit import gemm_kernels

    c = ZERO._replace(
        **{n: LAYER[n] for n in ("freq_profile_ghz", "core_share", "stream_knee_ghz")},
        **counted_work(llm, 1, "mxfp4"),
        gemm0_s=LAYER["kernel0_s"] * gemm_kernels(llm),
        **TRUE,
    )
    rows = pd.DataFrame(
        [(b, 0, 0, k) for b in (1, 2, 4, 8, 16, 32, 64, 128, 256) for k in (64, 512, 4096, 32768)],
        columns=["batch", "new_tokens", "prefix", "context"],
    )
    work: IterationWork = ProfileTable("decode", 1, "mxfp4", rows).work
    n = work.tokens
    _, read = physics.attended(c, *work.as_tuple())
    rows["gemm_s"] = physics.smooth_max(c.weights_s, c.gemm_s_per_token * n) + c.gemm0_s
    rows["expert_s"] = 1.2e-3 + physics.smooth_max(
        c.experts_s * physics.experts_read(c, n), c.expert_s_per_token * n
    )
    rows["attn_s"] = c.attn0_s + c.attn_decode_s * read
    rows["comm_s"] = 0.0
    rows["elem_s"] = (c.elem0_s - 1.2e-3) + c.elem_s_per_token * n
    parts = ["gemm_s", "expert_s", "attn_s", "comm_s", "elem_s"]
    rng = np.random.default_rng(3)
    rows[parts] *= np.exp(noise * rng.normal(size=(len(rows), len(parts))))
    rows["latency_s"] = rows[parts].sum(axis=1)
    return ProfileTable("decode", 1, "mxfp4", rows), llm


def test_coefficients_of_a_made_up_table_are_found():
    table, llm = made_up(0.0)
    fit = fit_work(table, llm, LAYER)
    assert fit.held_out_mape < 1e-3
    for name, value in TRUE.items():
        assert getattr(fit.coefficients, name) == pytest.approx(value, rel=0.05), name


def test_noise_in_the_table_is_the_error_on_kept_rows():
    table, llm = made_up(0.02)
    fit = fit_work(table, llm, LAYER)
    assert 0.003 < fit.held_out_mape < 0.02  # several kernels average their noise
    assert fit.coefficients.experts_s == pytest.approx(TRUE["experts_s"], rel=0.1)
    assert 0.1 <= fit.coefficients.expert_skew <= 1.0
