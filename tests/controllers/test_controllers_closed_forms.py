"""Parts of the laws against closed forms, run as plain Python: what one wrong sign would change."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from controllers_cases import context, encode, plant

from agents.policy import feature_parts, features_decode, features_prefill
from biscale_env.models import physics
from controllers import make_policy
from controllers.columns import DECODE, PREFILL
from controllers.decode import slack
from controllers.prefill import mpc_dual, mpc_problem
from controllers.prefill.mpc_dual import DualRange, Start
from controllers.prefill.mpc_options import FAR_S, RARE_RPS
from controllers.rivals import agft, dynamollm, greenllm
from controllers.surrogates import scan

C = plant("prefill").model.member(-1)
LOW, HIGH = 0.51, 1.98


def observed(columns, dim, **values):
    """A physical observation (dim,), zero but for the given columns; lists fill a horizon."""
    x = np.zeros(dim)
    for name, value in values.items():
        at = getattr(columns, name)
        filled = np.atleast_1d(value)
        x[at : at + len(filled)] = filled
    return x


def queue_of(**values):
    slack = {"batch_slack": [10.0] * 8, "batch_slack_alive": [10.0] * 8, "slo": 0.6}
    return observed(PREFILL, plant("prefill").spec.dim, **{**slack, **values})


def stages():
    return np.zeros(8, dtype=mpc_problem.STAGE_DTYPE).view(np.recarray)


def setting(**changes):
    base = dict.fromkeys(mpc_problem.ProblemSetting.__annotations__, 0.0)
    limits = {"token_budget": 2048.0, "drain_ghz": 1.2, "freq_min_ghz": LOW, "freq_max_ghz": HIGH}
    return SimpleNamespace(**{**base, **limits, **changes})


def test_only_the_last_batch_waits_and_for_the_mean_time_between_arrivals():
    st = stages()
    x = queue_of(batch_tokens=[500.0, 400.0], batch_requests=[1.0, 1.0], arrival_rate_60s=4.0)
    assert mpc_problem.read_queue(C, x, setting(idle_clock=0.5), st) == 2
    assert st.idle_s.tolist() == [0.0, 0.125, *[0.0] * 6]
    x = queue_of(batch_tokens=[500.0], batch_requests=[1.0])
    mpc_problem.read_queue(C, x, setting(idle_clock=1.0), st)
    assert st.idle_s[0] == pytest.approx(1.0 / RARE_RPS)


def test_deadlines_are_the_slack_less_the_margin_and_expired_ones_can_be_dropped():
    st = stages()
    x = queue_of(
        batch_tokens=[500.0, 400.0], batch_slack=[-0.2, 0.5], batch_slack_alive=[10.0, 0.7]
    )
    mpc_problem.read_queue(C, x, setting(margin=0.1), st)
    assert st.deadline_s[:3] == pytest.approx([-0.18, 0.24, FAR_S])
    mpc_problem.read_queue(C, x, setting(margin=0.1, give_up=1.0), st)
    assert st.deadline_s[:3] == pytest.approx([FAR_S, 0.36, FAR_S])
    assert st.share.tolist() == [1.0, 1.0, *[0.0] * 6]


def test_a_forecast_batch_weighs_what_a_poisson_stream_brings():
    st = stages()
    rates = {"token_rate_10s": 3000.0, "arrival_rate_10s": 3.0}
    x = queue_of(batch_tokens=[2000.0], batch_requests=[2.0], **rates)
    used = mpc_problem.read_queue(C, x, setting(), st)
    mpc_problem.add_forecast(C, x, setting(forecast=1.0, margin=0.1), used, st)
    drain = float(physics.latency_s(C, 2000.0, 0.0, 0.0, 2.0, 1.2))
    expected = 3000.0 * drain
    assert expected < 2048.0
    assert st.weight[1] == pytest.approx(1.0 - math.exp(-expected / 1000.0))
    assert st.tokens[1] == pytest.approx(max(expected, 1000.0))
    assert st.deadline_s[1] == pytest.approx(0.9 * 0.6)
    assert st.share[2] == 0.0


@pytest.mark.parametrize(("wait", "delay", "switch", "effect"), [
    (0.0, 0.03, 0.0, 0.03),    # nothing in flight: a request takes one delay
    (0.01, 0.03, 0.01, 0.04),  # one in flight: it takes effect, then a full delay
    (0.05, 0.03, 0.05, 0.05),  # one waits behind it: a new request takes its place
])  # fmt: skip
def test_the_time_before_a_clock_takes_effect_goes_to_the_clocks_before(
    wait, delay, switch, effect
):
    st = stages()
    x = queue_of(
        batch_tokens=[1500.0], batch_requests=[1.0], time_to_apply=wait, actuation_delay=delay,
        freq_current=1980.0, freq_pending=800.0,
    )  # fmt: skip
    mpc_problem.read_queue(C, x, setting(), st)
    mpc_problem.spend_delay(C, x, st)
    clocks = (st.cap_ghz[0], 0.8)
    whole = [float(physics.latency_s(C, 1500.0, 0.0, 0.0, 1.0, f)) for f in clocks]
    assert whole[0] > effect
    done = switch / whole[0] + (effect - switch) / whole[1]
    assert st.lead_s[0] == pytest.approx(effect)
    assert st.share[0] == pytest.approx(1.0 - done, rel=1e-6)


def test_a_batch_that_is_unlikely_sees_a_price_that_is_higher_by_its_probability():
    st = stages()
    for k, weight in enumerate((1.0, 0.25)):
        st.tokens[k], st.attn_work[k], st.n_seq[k] = 1000.0, 5e5, 1.0
        st.share[k], st.weight[k], st.cap_ghz[k] = 1.0, weight, HIGH
        st.deadline_s[k] = FAR_S
    plan, dual = np.zeros(8), DualRange(0.0, 2e5, LOW)
    mpc_dual.plan_at_price(C, st, Start(0, 0.0), 500.0, dual, plan)
    assert plan[1] > plan[0] > LOW
    for f, price in ((plan[0], 500.0), (plan[1], 2000.0)):
        stage = st[0]
        assert abs(mpc_dual.marginal_cost(C, stage, price, f)) < 0.5
        assert mpc_dual.marginal_cost(C, stage, price, f + 0.02) > 0.5


def test_the_infeasible_prefix_ends_behind_the_last_deadline_that_nothing_meets():
    st = stages()
    st.tokens[:3], st.n_seq[:3], st.share[:3], st.cap_ghz[:3] = 1000.0, 1.0, 1.0, HIGH
    one = float(physics.latency_s(C, 1000.0, 0.0, 0.0, 1.0, HIGH))
    st.deadline_s[:] = FAR_S
    assert mpc_dual.infeasible_prefix(C, st, Start(0, 0.0)) == 0
    st.deadline_s[1] = 1.5 * one
    assert mpc_dual.infeasible_prefix(C, st, Start(0, 0.0)) == 2
    assert mpc_dual.infeasible_prefix(C, st, Start(1, 0.0)) == 1
    assert mpc_dual.infeasible_prefix(C, st, Start(1, one)) == 2


def test_recomputed_requests_count_half_their_square_as_attention():
    x = observed(DECODE, plant("decode").spec.dim, batch=8, recompute_tokens=100.0)
    work = np.zeros((1, 4))
    scan.decode_work.py_func(x[None], work)
    assert work[0].tolist() == [108.0, 5000.0, 0.0, 8.0]


def test_a_length_class_scales_attention_with_the_square():
    work = np.array([[600.0, 1e5, 0.0, 1.0], [3000.0, 1e5, 0.0, 1.0]])
    greenllm.to_class.py_func(work, 2048.0)
    assert work[:, 0].tolist() == [1024.0, 2048.0]
    assert work[0, 1] == pytest.approx(1e5 * (1024.0 / 600.0) ** 2)


@pytest.mark.parametrize(("p95", "step"), [(0.102, 15.0), (0.095, 0.0), (0.07, -15.0)])
def test_greenllm_steps_between_two_thresholds(p95, step):
    x = observed(DECODE, plant("decode").spec.dim, slo=0.1, last_time=0.05)
    memory = np.array([[1200.0, 0.0, 0.0, p95 + 1e-4, 500.0, 1980.0]])
    greenllm.track.py_func(x[None], 1.0, 0.8, memory)
    assert memory[0, 0] == 1200.0 + step
    assert memory[0, 3] == pytest.approx(p95 + 1e-4 - 0.02 * 0.1 * 0.05)


def test_dynamollm_waits_as_an_m_d_1_queue():
    latency, freq = np.array([[0.1, 0.05]]), np.zeros(1)
    arguments = np.array([[1.0, 2.0]]), np.array([5.0])
    dynamollm.prefill_windows.py_func(
        latency, *arguments, np.array([0.4]), freq, np.array([1.0, 2])
    )
    tail = [s + dynamollm.TAIL * 0.5 * 5 * s * s / (1 - 5 * s) for s in (0.1, 0.05)]
    assert latency[0] == pytest.approx(tail)
    assert freq[0] == 1.0 if tail[0] <= 0.4 else freq[0] == 2.0


def test_agft_sees_load_backlog_and_whether_a_window_was_late_at_all():
    dim, seen = plant("decode").spec.dim, np.zeros((1, 7))
    x = observed(DECODE, dim, batch=64.0, kv_use=0.3, last_time=0.2, last_power=900.0, slo=0.1)
    agft.measure_decode.py_func(x[None], 256.0, seen)
    assert seen[0].tolist() == [1.0, 0.25, 0.3, 64.0, 1.0, 0.2, 900.0]
    x = queue_of(batch_tokens=[700.0], token_rate_10s=5000.0, queue_tokens=9000.0, oldest_wait=0.9)
    agft.measure_prefill.py_func(x[None], 2048.0, seen)
    assert seen[0, :5] == pytest.approx([1.0, 0.5, 4.0, 700.0, 0.0])
    windows = np.array([(10.0, 0.3, 2.0)], dtype=agft.WINDOW_DTYPE).view(np.recarray)
    memory = np.zeros((1, agft.ARMS + agft.SIZE))
    memory[0, agft.PENDING] = 5.0
    for late in (1.0, 0.0):
        seen[0, agft.SEEN.late], seen[0, agft.SEEN.time_s] = late, 0.2
        agft.bandit.py_func(seen, np.array([1000.0]), windows, memory, np.zeros(1))
    assert memory[0, agft.LATE] == 1.0


def test_the_rule_stands_between_two_levels_where_the_spare_time_crosses_zero():
    levels = np.array([1.0, 1.4, 2.0])
    assert feature_parts.between_levels(levels, 0, 0.0, 0.5) == 1.0
    assert feature_parts.between_levels(levels, 1, -0.3, 0.1) == pytest.approx(1.3)
    assert feature_parts.between_levels(levels, 2, -0.1, 0.1) == pytest.approx(1.7)


def walked(x, before_ghz: float, lead_s: float) -> features_prefill.QueueWalk:
    """The projected queue of one encoded observation at 1.2 GHz, after a change in flight."""
    batches = np.empty(features_prefill.BATCHES)
    g = SimpleNamespace(freq_min_ghz=LOW, freq_max_ghz=HIGH)
    n = features_prefill.project(x, C, g, batches)
    pending = features_prefill.PendingClock(physics.clock_terms(C, before_ghz), lead_s)
    return features_prefill.walk_queue(x, C, physics.clock_terms(C, 1.2), pending, batches, n)


def test_late_requests_grow_with_the_lateness_of_their_batch():
    scale = features_prefill.SCALE
    one = float(physics.latency_s(C, 1000.0, 0.0, 0.0, 4.0, 1.2))
    for lateness, late in ((-0.01, 0.0), (0.06, 1.6), (0.15, 2.5), (1.0, 4.0)):
        x = queue_of(
            batch_tokens=[1000.0], batch_requests=[4.0], batch_completing=[4.0],
            batch_slack=[(one - lateness) / 0.6, *[10.0] * 7],
        ) / np.where(scale > 0, scale, 1.0)  # fmt: skip
        at = PREFILL.batch_slack
        x[at : at + 8] *= scale[at]
        walk = walked(x, HIGH, 0.0)
        assert walk.late == pytest.approx(late, abs=0.01)
        assert walk.first_s == pytest.approx(one)


def test_before_the_delay_is_over_the_queue_runs_at_the_clock_requested_before():
    x = queue_of(batch_tokens=[1000.0], batch_requests=[1.0]) / features_prefill.SCALE
    fast, slow = (float(physics.latency_s(C, 1000.0, 0.0, 0.0, 1.0, f)) for f in (1.2, 0.8))
    for lead in (0.0, 0.02, 10.0):
        walk = walked(x, 0.8, lead)
        part = min(lead / slow, 1.0)
        assert walk.drain_s == pytest.approx(part * slow + (1.0 - part) * fast)


def test_the_decode_rule_hurries_for_spent_slack_and_does_not_linger_for_saved_slack():
    decode = plant("decode")
    c = np.array([tuple(decode.model.member(-1))], dtype=[(n, float) for n in C._fields])
    plants = feature_parts.feature_plants(decode.clocks, [LOW], [None]).view(np.recarray)
    at_1200 = float(decode.model.latency_s(64.0, 0.0, 7e4, 64.0, 1200.0))
    slo, rules = at_1200 / (1.0 - features_decode.RULE_MARGIN), []
    for saved in (-1.0, 0.0, 8.0):
        x = observed(
            DECODE, decode.spec.dim, batch=64.0, cached_tokens=7e4, slo=slo, tpot_slack_min=saved
        )
        rows = (x / decode.spec.scale)[None].astype(np.float32)
        out, rule = np.zeros((1, len(features_decode.DECODE_NAMES)), np.float32), np.zeros(1)
        features_decode.decode_features.py_func(
            rows, c.view(np.recarray), plants, out, rule, np.zeros(1)
        )
        rules.append(rule[0])
    assert rules[0] > rules[1] == rules[2]
    assert decode.clocks.to_freq_mhz(rules[1]) == pytest.approx(1200.0, abs=1.0)


def test_of_equally_late_batches_the_last_is_the_tight_one():
    st = stages()
    st.tokens[:3], st.n_seq[:3], st.share[:3] = 1000.0, 1.0, 1.0
    st.weight[:], st.cap_ghz[:], st.deadline_s[:] = 1.0, HIGH, FAR_S
    plan, dual = np.zeros(8), DualRange(0.0, 2e5, LOW)
    mpc_dual.plan_at_price(C, st, Start(0, 0.0), 0.0, dual, plan)
    done = np.cumsum([mpc_dual.duration_s(C, st[k], plan[k]) for k in range(2)])
    st.deadline_s[:2] = done - 0.01
    late = mpc_dual.plan_at_price(C, st, Start(0, 0.0), 0.0, dual, plan)
    assert late.stage == 1
    assert late.worst_s == pytest.approx(0.01)


def test_a_floor_raises_and_never_lowers():
    freq, energy = np.array([800.0, 1600.0]), np.array([[3.0, 2.0, 4.0], [3.0, 2.0, 4.0]])
    slack.raise_to_cheapest.py_func(energy, np.array([800.0, 1200.0, 1600.0]), freq)
    assert freq.tolist() == [1200.0, 1600.0]


def test_the_load_floor_asks_for_the_present_batch_and_for_twice_it():
    policy = make_policy("slack", context("decode"), load_floor=True)
    scanned, asked = policy._scan, []

    class Spy:
        clocks_mhz = scanned.clocks_mhz

        def __call__(self, work):
            asked.append(work.copy())
            return scanned(work)

    policy._scan = Spy()
    policy.predict(encode("decode", batch=64, cached_tokens=7e4, kv_use=0.2))
    assert len(asked) == 2
    assert np.array_equal(asked[1], 2.0 * asked[0])
