"""What no workload, clock or delay may break: requests, tokens, energy, time, memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as some
from reference_sim import Settings
from sim_support import (
    COEFFICIENTS,
    actions,
    coefficients,
    compiled,
    decode_cases,
    prefill_cases,
    run_out,
)

from biscale_env.models import physics
from biscale_env.models.physics import Coefficients
from biscale_env.traces import Trace

some_plants = hypothesis(max_examples=60, deadline=None)
either = some.one_of(
    some.tuples(some.just("prefill"), prefill_cases()),
    some.tuples(some.just("decode"), decode_cases()),
)


@some_plants
@given(coefficients(), either, actions)
def test_every_request_ends_once_and_energy_is_the_integral_of_power(
    c: Coefficients, case: tuple[str, tuple[Settings, Trace]], chosen: list[float]
) -> None:
    phase, (settings, trace) = case
    settings.drain = 1
    batch = compiled(phase, c, settings, trace)
    n, first = len(batch.pool.arrival_s), batch.states[0].copy()
    states = run_out(batch, chosen)
    last = batch.states[0]
    assert last["finished"] == n == sum(int(s["step_finished"][0]) for s in states)
    assert np.isfinite(batch.finish_s).all()
    assert (batch.finish_s > batch.pool.arrival_s).all()
    bound_s = settings.slo_s * np.ones(n)
    if settings.classes:
        bound_s *= np.array(settings.class_scale)[batch.pool.slo_class]
    late = batch.finish_s - batch.pool.arrival_s > bound_s * (
        1 if phase == "prefill" else batch.pool.output - 1
    )
    assert last["violations"] == late.sum() == sum(int(s["step_violations"][0]) for s in states)
    clock_s = first["time_s"]
    joules = first["energy_j"]
    for s in (s[0] for s in states):
        assert s["step_start_s"] == pytest.approx(clock_s, rel=1e-12, abs=1e-12), (
            "time has a gap or runs back"
        )
        assert s["step_duration_s"] > 0
        assert s["step_idle_s"] >= 0
        assert s["time_s"] == pytest.approx(
            s["step_start_s"] + s["step_duration_s"] + s["step_idle_s"], rel=1e-9
        )
        assert s["step_energy_j"] >= s["step_energy_idle_j"] >= 0
        clock_s, joules = s["time_s"], joules + s["step_energy_j"]
    assert last["energy_j"] == pytest.approx(joules, rel=1e-9)
    assert last["energy_idle_j"] <= last["energy_j"]
    idle_s = last["time_s"] - last["busy_s"]
    at_w = [physics.idle_power_w(c, f) for f in (0.51, 1.98)]
    if settings.parked:
        at_w = [settings.parked_w] * 2
    cold, hot = (c.n_gpus * power_w * idle_s for power_w in at_w)
    assert cold * (1 - 1e-9) - 1e-9 <= last["energy_idle_j"] <= hot * (1 + 1e-9) + 1e-9
    assert last["time_s"] >= min(settings.end_s, trace.duration_s)


@some_plants
@given(coefficients(), prefill_cases(), actions)
def test_prefill_serves_every_token_once_and_in_order(
    c: Coefficients, case: tuple[Settings, Trace], chosen: list[float]
) -> None:
    settings, trace = case
    settings.drain, settings.min_interval_s = 1, 0.0
    batch = compiled("prefill", c, settings, trace)
    states = run_out(batch, chosen)
    tokens = [int(s["step_tokens"][0]) for s in states]
    assert sum(tokens) == trace.prompt_tokens.sum()
    assert max(tokens) <= settings.token_budget
    assert max(int(s["step_requests"][0]) for s in states) <= settings.max_seqs
    assert (np.diff(batch.finish_s) >= 0).all(), "first come, first served"
    assert all(int(s["head"][0]) <= int(s["tail"][0]) <= len(trace) for s in states)


@some_plants
@given(coefficients(), decode_cases(), actions)
def test_decode_makes_the_tokens_asked_within_memory(
    c: Coefficients, case: tuple[Settings, Trace], chosen: list[float]
) -> None:
    settings, trace = case
    settings.drain, settings.min_interval_s = 1, 0.0
    batch = compiled("decode", c, settings, trace)
    pool, made = batch.pool, 0
    while not batch.done.all():
        st = batch.states[0].copy()
        assert 0 < st["batch"] <= settings.max_seqs
        assert st["cached"] + st["batch"] <= settings.kv_capacity, "no room for the next tokens"
        made += int(st["batch"])
        assert (
            st["finished"] + st["batch"] + st["preempted"] + (st["tail"] - st["head"]) == st["tail"]
        ), "a request is lost"
        batch.step(np.array([chosen[made % len(chosen)]], dtype=np.float32))
        assert batch.obs[0, batch.plant.spec.index("kv_use")] <= 1.0
    assert made == (pool.output - 1).sum(), (
        "every token is made once; a rebuilt one is not made again"
    )
    last = batch.states[0]
    assert (last["batch"], last["cached"], last["preempted"]) == (0, 0, 0)
    assert (batch.start_s >= pool.arrival_s).all()
    assert (batch.finish_s > batch.start_s).all()


@some_plants
@given(either, some.floats(0.51, 1.9))
def test_slower_clock_never_serves_sooner(
    case: tuple[str, tuple[Settings, Trace]], freq_ghz: float
) -> None:
    """At a constant clock without delay, each iteration takes longer at a lower clock, so no
    request ends sooner.

    One request at a time: with batching a slower clock makes fuller and fewer batches, which may
    even end sooner.
    """
    phase, (settings, trace) = case
    settings.drain, settings.delay_s, settings.max_seqs = 1, 0.0, 1
    settings.parked_ramp_s = 0.0  # who is fast waits more often, and would ramp more often
    ends = []
    for f in (freq_ghz, 1.98):
        batch = compiled(phase, COEFFICIENTS, settings, trace)
        run_out(batch, [2 * (f - 0.51) / 1.47 - 1])
        ends.append(batch.finish_s)
    assert (ends[0] >= ends[1] - 1e-9).all()


@some_plants
@given(either, actions)
def test_rows_of_a_batch_do_not_touch_each_other(
    case: tuple[str, tuple[Settings, Trace]], chosen: list[float]
) -> None:
    """Three copies with different actions behave as three batches of one."""
    phase, (settings, trace) = case
    together = compiled(phase, COEFFICIENTS, settings, trace, n=3)
    alone = [compiled(phase, COEFFICIENTS, settings, trace) for _ in range(3)]
    for k in range(30):
        acts = np.array(
            [chosen[(k + i) % len(chosen)] * (1 - 0.3 * i) for i in range(3)], dtype=np.float32
        )
        before = together.done
        together.step(acts)
        for i, one in enumerate(alone):
            one.step(acts[i : i + 1])
            assert together.states[i]["time_s"] == one.states[0]["time_s"]
            assert together.reward[i] == one.reward[0]
            np.testing.assert_array_equal(together.obs[i], one.obs[0])
            if before[i]:
                assert together.reward[i] == 0.0, "a finished row earns nothing"
                assert together.states[i]["step_energy_j"] == 0.0
                assert together.terms[i].tolist() == [0.0, 0.0]


@some_plants
@given(
    either,
    some.lists(some.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=8),
)
def test_any_action_gives_a_sane_clock_and_observation(
    case: tuple[str, tuple[Settings, Trace]], chosen: list[float]
) -> None:
    """NaN and infinities are clocks too: NaN and +inf the highest, -inf the lowest.

    The observation stays in its bounds.
    """
    phase, (settings, trace) = case
    settings.delay_s = 0.0
    batch = compiled(phase, COEFFICIENTS, settings, trace)
    spec = batch.plant.spec
    for k in range(20):
        if batch.done.all():
            break
        action = chosen[k % len(chosen)]
        batch.step(np.array([action], dtype=np.float32))
        ghz = float(batch.states[0]["freq_ghz"])
        assert 0.51 - 1e-9 <= ghz <= 1.98
        assert (1.98 - ghz) / 0.015 == pytest.approx(round((1.98 - ghz) / 0.015), abs=1e-6)
        if not action < 1.0:
            assert ghz == 1.98
        if action <= -1.0:
            assert ghz == pytest.approx(0.51)
        assert np.isfinite(batch.obs).all()
        assert (batch.obs[0] >= spec.low).all()
        assert (batch.obs[0] <= spec.high).all()
        assert batch.obs.dtype == np.float32
