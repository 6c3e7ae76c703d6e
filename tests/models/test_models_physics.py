"""The one formula: closed forms by hand, three callers of the same source, monotonicity, the power
cap.
"""

import math

import casadi as ca
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_env.models import COEFFICIENT_DTYPE, Coefficients, as_record, load_model, physics

CONFIGURATIONS = [
    *((p, t, "bf16") for p in ("prefill", "decode") for t in (4, 8)),
    *((p, t, "fp8") for p in ("prefill", "decode") for t in (2, 4, 8)),
]
PLAIN = Coefficients(
    n_gpus=4.0,
    freq_profile_ghz=2.0,
    weights_s=0.0,
    gemm0_s=0.0,
    gemm_s_per_token=0.0,
    experts_s=0.0,
    expert_s_per_token=0.0,
    expert_miss=0.0,
    expert_skew=1.0,
    window_tokens=0.0,
    window_share=0.0,
    attn0_s=0.0,
    attn_prefill_s=0.0,
    attn_decode_s=0.0,
    comm0_s=0.0,
    comm_s_per_token=0.0,
    elem0_s=0.0,
    elem_s_per_token=0.0,
    host0_s=0.0,
    host_s_per_seq=0.0,
    stream_knee_ghz=0.0,
    core_share=1.0,
    v_knee_ghz=1.0,
    v_slope_per_ghz=0.0,
    p_static_w=0.0,
    p_clock_w_per_ghz=0.0,
    p_busy_w=0.0,
    p_seq_w=0.0,
    flops_per_token=0.0,
    flops_per_attn=0.0,
    weight_bytes=0.0,
    expert_bytes=0.0,
    expert_core_bytes=0.0,
    bytes_per_token=0.0,
    kv_bytes_per_token=0.0,
    link_bytes_per_token=0.0,
    energy_factor=1.0,
    e_flop_j=0.0,
    few_rows_saving=0.0,
    e_byte_j=0.0,
    e_hbm_j=0.0,
    e_link_j=0.0,
    p_cap_w=700.0,
)


def work(phase, tokens, context, requests):
    """Work of one iteration from three integers."""
    if phase == "prefill":
        return float(tokens), tokens * (tokens / requests / 2.0 + context), 0.0, float(requests)
    return float(requests), 0.0, float(requests * context), float(requests)


works = st.tuples(st.integers(64, 16384), st.integers(0, 8192), st.integers(1, 64))
models = st.sampled_from(CONFIGURATIONS).map(lambda c: load_model(*c))
members = st.integers(-1, 63)


def test_each_latency_term_by_hand():
    half = 1.0  # GHz, half the profile clock: compute takes twice as long
    cases = [
        ({"weights_s": 0.01}, (10, 0, 0, 1), 0.01),
        ({"gemm_s_per_token": 1e-5}, (100, 0, 0, 1), 2e-3),
        (
            {"weights_s": 3e-3, "gemm_s_per_token": 1e-5},
            (200, 0, 0, 1),
            (3**4 + 4**4) ** 0.25 * 1e-3,
        ),
        ({"gemm0_s": 1e-3}, (1, 0, 0, 1), 2e-3),
        # two of four experts per row: one row reads half of them, two rows three quarters
        ({"experts_s": 8e-3, "expert_miss": 0.5}, (1, 0, 0, 1), 4e-3),
        ({"experts_s": 8e-3, "expert_miss": 0.5}, (2, 0, 0, 1), 6e-3),
        ({"experts_s": 8e-3, "expert_miss": 0.5, "expert_skew": 0.5}, (2, 0, 0, 1), 4e-3),
        (
            {"experts_s": 1e-9, "expert_miss": 0.5, "expert_s_per_token": 1e-5},
            (100, 0, 0, 1),
            2e-3,
        ),
        ({"attn_prefill_s": 1e-9}, (1, 5e6, 0, 1), 1e-2),
        ({"attn_decode_s": 1e-8}, (1, 0, 1e6, 1), 1e-2),
        ({"attn0_s": 1e-3}, (1, 0, 0, 1), 2e-3),
        ({"attn0_s": 1e-3, "core_share": 0.25}, (1, 0, 0, 1), 1.25e-3),
        ({"comm0_s": 1e-3, "comm_s_per_token": 1e-6}, (500, 0, 0, 1), 1.5e-3),
        ({"elem0_s": 1e-3, "elem_s_per_token": 1e-6, "core_share": 0.5}, (1000, 0, 0, 1), 3e-3),
        ({"host0_s": 2e-3, "host_s_per_seq": 1e-4}, (1, 0, 0, 10), 3e-3),
    ]
    for change, w, expected in cases:
        assert physics.latency_s(PLAIN._replace(**change), *w, half) == pytest.approx(
            expected, rel=1e-12
        ), change


def test_memory_time_is_that_of_hbm_and_goes_with_the_clock_far_below_its_knee():
    c = PLAIN._replace(weights_s=0.01, stream_knee_ghz=0.4)
    assert physics.latency_s(c, 1, 0, 0, 1, 2.0) == pytest.approx(0.01, rel=1e-3)
    assert physics.latency_s(c, 1, 0, 0, 1, 1.2) == pytest.approx(
        0.01 * (1 + (1 / 3) ** 4) ** 0.25, rel=1e-12
    )
    assert physics.latency_s(c, 1, 0, 0, 1, 0.4) == pytest.approx(0.01 * 2**0.25, rel=1e-12)
    slow, slower = (physics.latency_s(c, 1, 0, 0, 1, f) for f in (0.04, 0.02))
    assert slower / slow == pytest.approx(2.0, rel=1e-3)


def test_windowed_layers_see_no_more_than_their_window():
    c = PLAIN._replace(
        attn_decode_s=1e-8, attn_prefill_s=1e-9, window_tokens=100.0, window_share=0.5
    )
    # contexts of 10,000 tokens: half of the layers read 100 of them; of 10 tokens: all
    far = physics.latency_s(c, 4, 0, 4e4, 4, 2.0)
    assert far == pytest.approx(1e-8 * (0.5 * 4e4 + 0.5 * 400), rel=1e-6)
    assert physics.latency_s(c, 4, 0, 40, 4, 2.0) == pytest.approx(1e-8 * 40, rel=1e-4)
    # a prompt of 10,000 tokens: half of the layers see 100 keys per token
    prompt = physics.latency_s(c, 1e4, 5e7, 0, 1, 2.0)
    assert prompt == pytest.approx(1e-9 * (0.5 * 5e7 + 0.5 * 1e6), rel=1e-3)
    assert physics.latency_s(c, 0, 0, 0, 0, 2.0) == 0.0


def test_experts_read_is_the_share_that_some_row_is_sent_to():
    """Against counting: rows that each choose k of E experts at random."""
    rng = np.random.default_rng(3)
    experts, chosen, rows = 32, 4, 7
    touched = [
        len({e for _ in range(rows) for e in rng.choice(experts, chosen, replace=False)})
        for _ in range(4000)
    ]
    c = PLAIN._replace(expert_miss=1.0 - chosen / experts)
    expected = np.mean(touched) / experts
    assert physics.experts_read(c, rows) == pytest.approx(expected, rel=5e-3)


def test_voltage_is_flat_then_linear():
    c = PLAIN._replace(v_knee_ghz=1.1, v_slope_per_ghz=0.5)
    assert physics.voltage(c, 0.6) == pytest.approx(1.0, abs=1e-3)
    assert physics.voltage(c, 1.9) == pytest.approx(1.4, abs=1e-3)
    slope = (physics.voltage(c, 1.91) - physics.voltage(c, 1.89)) / 0.02
    assert slope == pytest.approx(0.5, rel=1e-3)


def test_energy_by_hand():
    c = PLAIN._replace(
        v_knee_ghz=1.0,
        v_slope_per_ghz=1.0,
        p_static_w=50.0,
        p_clock_w_per_ghz=10.0,
        p_busy_w=30.0,
        flops_per_token=1e9,
        flops_per_attn=2e3,
        weight_bytes=1e9,
        experts_s=1e-3,
        expert_miss=0.99,
        expert_bytes=2e9,
        expert_core_bytes=4e9,
        energy_factor=1.2,
        host_s_per_seq=1e-3,
        p_seq_w=20.0,
        few_rows_saving=0.5,
        bytes_per_token=1e5,
        kv_bytes_per_token=1e4,
        link_bytes_per_token=1e6,
        e_flop_j=1e-12,
        e_byte_j=1e-11,
        e_hbm_j=4e-11,
        e_link_j=1e-10,
    )
    v = physics.voltage(c, 1.5)
    flops = 1e9 * 100 + 2e3 * (1e6 + 5e5)
    moved = 1e9 + 2e9 * (1 - 0.99**100) + 1e5 * 100 + 1e4 * 5e5
    per_flop = 1e-12 * (1 - 0.5 * 2048 / 2148)
    on_chip = moved + 2e9 * (1 - 0.99**100)
    core, fixed = (
        per_flop * flops + 1e-11 * on_chip + 20.0 * 7e-3,
        4e-11 * moved + 1e-10 * 1e6 * 100,
    )
    idle = 0.2 * (50 + 10 * 1.5 * v * v)
    expected = idle + 1.2 * (0.2 * 30 * v * v + v * v * core + fixed)
    assert physics.iteration_energy_j(c, 100, 1e6, 5e5, 7, 0.2, 1.5) == pytest.approx(
        expected, rel=1e-12
    )
    assert physics.idle_power_w(c, 1.5) == pytest.approx(50 + 15 * v * v, rel=1e-12)
    assert v == pytest.approx(1.5, abs=2e-3)


def test_dtype_has_the_fields_of_the_tuple_in_order():
    assert COEFFICIENT_DTYPE.names == Coefficients._fields
    c = load_model("prefill").coefficients
    record = as_record(c)
    assert [record[name] for name in Coefficients._fields] == list(c)


@numba.njit
def _compiled(c, tokens, attn, cached, n_seq, f, out):
    for i in range(f.size):
        out[0, i] = physics.latency_s(c, tokens[i], attn[i], cached[i], n_seq[i], f[i])
        out[1, i] = physics.power_w(c, tokens[i], attn[i], cached[i], n_seq[i], f[i])
        out[2, i] = physics.iteration_energy_j(
            c, tokens[i], attn[i], cached[i], n_seq[i], out[0, i], f[i]
        )
        out[3, i] = physics.idle_power_w(c, f[i])


def _numpy(c, w, f):
    time = physics.latency_s(c, *w, f)
    energy = physics.iteration_energy_j(c, *w, time, f)
    return np.array(
        [time, physics.power_w(c, *w, f), energy, physics.idle_power_w(c, f) * np.ones_like(f)]
    )


def _symbolic(c):
    x = ca.SX.sym("x", 5)
    time = physics.latency_s(c, x[0], x[1], x[2], x[3], x[4])
    power = physics.power_w(c, x[0], x[1], x[2], x[3], x[4])
    energy = physics.iteration_energy_j(c, x[0], x[1], x[2], x[3], time, x[4])
    return ca.Function("f", [x], [ca.vertcat(time, power, energy, physics.idle_power_w(c, x[4]))])


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_numeric_compiled_and_symbolic_agree(configuration):
    model = load_model(*configuration)
    rng = np.random.default_rng(7)
    n = 400
    w = [
        np.exp(rng.uniform(0, 10, n)),
        np.exp(rng.uniform(0, 19, n)),
        np.exp(rng.uniform(0, 14, n)),
        rng.uniform(1, 512, n),
    ]
    f = rng.uniform(0.51, 1.98, n)
    experts = model.coefficients._replace(
        experts_s=0.01, expert_s_per_token=1e-5, expert_miss=0.9, expert_bytes=1e10
    )
    windowed = experts._replace(window_tokens=128.0, window_share=0.5)
    for c in (model.coefficients, model.member(0), model.member(31), experts, windowed):
        plain, compiled = _numpy(c, w, f), np.empty((4, n))
        _compiled(as_record(c), *w, f, compiled)
        symbolic = np.array(_symbolic(c).map(n)(np.vstack([*w, f])))
        np.testing.assert_allclose(compiled, plain, rtol=1e-9, atol=0)
        np.testing.assert_allclose(symbolic, plain, rtol=1e-9, atol=0)


@pytest.mark.slow
def test_whole_numbers_of_tokens_are_as_good_as_any():
    """Simulators count tokens in integers, whose fourth power does not fit into 64 bits."""
    c = load_model("decode").coefficients._replace(
        experts_s=0.01, expert_s_per_token=1e-5, expert_miss=0.9, window_tokens=128.0,
        window_share=0.5,
    )  # fmt: skip
    w = [np.array([1, 64, 512, 4096]), np.array([0, 1, 10**6, 10**9]),
         np.array([10, 60_000, 1_000_000, 10_000_000]), np.array([1, 64, 512, 4096])]  # fmt: skip
    f = np.full(4, 1.5)
    whole, exact = np.empty((4, 4)), np.empty((4, 4))
    _compiled(as_record(c), *w, f, whole)
    _compiled(as_record(c), *(x.astype(float) for x in w), f, exact)
    np.testing.assert_array_equal(whole, exact)
    np.testing.assert_allclose(_numpy(c, w, f), exact, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    model=models,
    k=members,
    w=works,
    grow=st.tuples(*[st.floats(1.01, 3.0)] * 3),
    f=st.floats(0.51, 1.95),
)
def test_latency_rises_with_work_and_falls_with_clock(model, k, w, grow, f):
    c = model.member(k)
    base = work(model.phase, *w)
    t = physics.latency_s(c, *base, f)
    more_tokens = (base[0] * grow[0], *base[1:])
    assert physics.latency_s(c, *more_tokens, f) > t
    assert (
        physics.latency_s(c, base[0], base[1] + 1e5 * grow[1], base[2] + 1e3 * grow[1], base[3], f)
        > t
    )
    if model.phase == "decode":
        assert physics.latency_s(c, *base[:3], base[3] * grow[2], f) > t
    assert physics.latency_s(c, *base, f + 0.015) < t


@settings(max_examples=60, deadline=None)
@given(model=models, k=members, w=works, f=st.floats(0.51, 1.95))
def test_power_rises_with_clock(model, k, w, f):
    c = model.member(k)
    base = work(model.phase, *w)
    assert physics.power_w(c, *base, f + 0.015) > physics.power_w(c, *base, f)
    assert physics.idle_power_w(c, f + 0.015) > physics.idle_power_w(c, f)
    assert physics.idle_power_w(c, f) < physics.power_w(c, *base, f)


@settings(max_examples=60, deadline=None)
@given(model=models, k=members, w=works, f=st.floats(0.52, 1.98))
def test_effective_clock_is_the_highest_within_the_cap(model, k, w, f):
    c = model.member(k)
    base = work(model.phase, *w)
    effective = physics.effective_freq_ghz(c, *base, f, 0.51)
    assert 0.51 <= effective <= f
    power = physics.power_w(c, *base, effective)
    if effective < f:
        assert power == pytest.approx(c.p_cap_w, rel=1e-6)
    else:
        assert power <= c.p_cap_w * (1 + 1e-9)


def test_cap_below_the_lowest_clock_returns_the_lowest_clock():
    c = load_model("prefill").coefficients._replace(p_cap_w=50.0)
    assert physics.effective_freq_ghz(c, 2048.0, 2e6, 0.0, 1.0, 1.98, 0.51) == 0.51
    assert physics.effective_freq_ghz(c, 2048.0, 2e6, 0.0, 1.0, 0.51, 0.51) == 0.51


@settings(max_examples=40, deadline=None)
@given(
    k=members, n=st.integers(256, 16384), batch=st.integers(1, 256), context=st.integers(16, 1500)
)
def test_energy_has_an_interior_minimum_over_the_clock(k, n, batch, context):
    f = np.arange(0.51, 1.985, 0.015)
    for phase, w in (
        ("prefill", work("prefill", n, 0, 1)),
        ("decode", work("decode", 0, context, batch)),
    ):
        c = load_model(phase).member(k)
        energy = physics.power_w(c, *w, f) * physics.latency_s(c, *w, f)
        best = int(np.argmin(energy))
        assert 0.65 < f[best] < 1.6
        assert np.all(np.diff(energy[best:]) > 0)  # one minimum: from there on every MHz costs


def test_energy_of_an_iteration_does_not_depend_on_how_it_is_cut():
    c = load_model("decode").coefficients
    whole = physics.iteration_energy_j(c, 64.0, 0.0, 6e4, 64.0, 0.03, 1.4)
    core, fixed = physics.work_energy_j(c, 64.0, 0.0, 6e4, 64.0)
    v = physics.voltage(c, 1.4)
    busy = c.energy_factor * c.p_busy_w * v * v
    parts = 0.03 * (physics.idle_power_w(c, 1.4) + busy) + v * v * core + fixed
    assert math.isclose(whole, parts, rel_tol=1e-12)
