"""Answers known by hand: constant load at a constant clock, queues of the textbook, delays, the
cap, idling.
"""

import numpy as np
import pytest
from reference_sim import Settings
from sim_support import COEFFICIENTS, compiled, plain, run_out, workload

from biscale_env.models import physics
from biscale_env.models.physics import Coefficients

ALWAYS_MAX = [1.0]


def work_by_hand(
    c: Coefficients, tokens: float, attn: float, cached: float, n_seq: float, f: float
) -> tuple[float, float]:
    """Duration (s) and energy of all GPUs (J) of an iteration below the cap, written out term by
    term.
    """

    def above(x: float) -> float:
        return 0.5 * (x + (x**2 + 0.05**2) ** 0.5)

    r = c.freq_profile_ghz / f

    def streams(clock: float) -> float:
        return (1 + (c.stream_knee_ghz / clock) ** 4) ** 0.25

    slow_memory = streams(f)
    core = c.core_share * r + (1 - c.core_share)
    gemm = ((c.weights_s * slow_memory) ** 4 + (c.gemm_s_per_token * tokens * r) ** 4) ** 0.25
    time_s = (
        gemm + c.gemm0_s * r
        + c.attn0_s * core + c.attn_prefill_s * attn * r + c.attn_decode_s * cached * slow_memory
        + c.comm0_s + c.comm_s_per_token * tokens
        + (c.elem0_s + c.elem_s_per_token * tokens) * core
        + c.host0_s + c.host_s_per_seq * n_seq
    )  # fmt: skip
    v = 1 + c.v_slope_per_ghz * above(f - c.v_knee_ghz)
    moved = c.weight_bytes + c.bytes_per_token * tokens + c.kv_bytes_per_token * cached
    flops = c.flops_per_token * tokens + c.flops_per_attn * (attn + cached)
    per_flop = c.e_flop_j * (1 - c.few_rows_saving * 2048 / (2048 + tokens))
    energy_j = (
        time_s * (c.p_static_w + c.p_clock_w_per_ghz * f * v**2)
        + c.energy_factor * (time_s * c.p_busy_w * v**2
        + v**2 * (
            per_flop * flops + c.e_byte_j * moved + c.p_seq_w * c.host_s_per_seq * n_seq
        )
        + c.e_hbm_j * moved + c.e_link_j * c.link_bytes_per_token * tokens)
    )  # fmt: skip
    return time_s, c.n_gpus * energy_j


def idle_by_hand(c: Coefficients, f: float) -> float:
    """Power of all idle GPUs, W."""
    v = 1 + c.v_slope_per_ghz * 0.5 * (
        f - c.v_knee_ghz + ((f - c.v_knee_ghz) ** 2 + 0.05**2) ** 0.5
    )
    return c.n_gpus * (c.p_static_w + c.p_clock_w_per_ghz * f * v**2)


def test_prefill_constant_load() -> None:
    """One prompt of 1000 tokens every half second.

    Each is a batch of its own, and the rest of the time is idle.
    """
    trace = workload([(0.5 * k, 1000, 1) for k in range(20)], 10.0)
    batch = compiled("prefill", COEFFICIENTS, Settings(delay_s=0.0), trace)
    freq = 1.2
    run_out(batch, [2 * (freq - 0.51) / 1.47 - 1])
    time_s, joules = work_by_hand(COEFFICIENTS, 1000, 1000 * 500, 0, 1, freq)
    st = batch.states[0]
    assert 0.1 < time_s < 0.5
    np.testing.assert_allclose(batch.finish_s - trace.arrival_s, time_s, rtol=1e-9)
    assert st["time_s"] == 10.0
    assert st["iterations"] == 20
    assert st["busy_s"] == pytest.approx(20 * time_s, rel=1e-9)
    assert st["energy_j"] == pytest.approx(
        20 * joules + (10 - 20 * time_s) * idle_by_hand(COEFFICIENTS, freq), rel=1e-9
    )


def test_prefill_chunks_by_hand() -> None:
    """5000 tokens and then 100 under a budget of 2048.

    Batches of 2048, 2048, and 904 + 100 tokens.
    """
    batch = compiled(
        "prefill",
        COEFFICIENTS,
        Settings(delay_s=0.0, drain=1),
        workload([(0, 5000, 1), (0, 100, 1)], 1.0),
    )
    states = run_out(batch, ALWAYS_MAX)
    expected = [
        (2048, 2048**2 / 2, 1),
        (2048, 2048 * (1024 + 2048), 1),
        (904 + 100, 904 * (452 + 4096) + 100 * 50, 2),
    ]
    ends = np.cumsum([work_by_hand(COEFFICIENTS, n, a, 0, s, 1.98)[0] for n, a, s in expected])
    assert [int(s["step_tokens"][0]) for s in states] == [2048, 2048, 1004]
    np.testing.assert_allclose(batch.finish_s, [ends[2], ends[2]], rtol=1e-9)
    np.testing.assert_allclose(
        [s["step_start_s"][0] for s in states], [0, *ends[:2]], rtol=1e-9, atol=1e-12
    )
    energies = [work_by_hand(COEFFICIENTS, n, a, 0, s, 1.98)[1] for n, a, s in expected]
    np.testing.assert_allclose(
        [s["step_energy_j"][0] - s["step_energy_idle_j"][0] for s in states], energies, rtol=1e-9
    )


def test_decode_constant_batch_by_hand() -> None:
    """Eight requests of 512 + 101 tokens from time 0.

    100 iterations, each with 8 cached tokens more.
    """
    trace = workload([(0.0, 512, 101)] * 8, 60.0)
    batch = compiled("decode", COEFFICIENTS, Settings(delay_s=0.0, slo_s=0.1), trace)
    states = run_out(batch, ALWAYS_MAX)
    pieces = [work_by_hand(COEFFICIENTS, 8, 0, 8 * (513 + k), 8, 1.98) for k in range(100)]
    time_s, joules = np.sum(pieces, axis=0)
    assert len(states) == 100
    np.testing.assert_allclose(batch.finish_s, time_s, rtol=1e-9)
    idle = (60.0 - time_s) * idle_by_hand(COEFFICIENTS, 1.98)
    assert batch.states[0]["energy_j"] == pytest.approx(joules + idle, rel=1e-9)
    assert [int(s["cached"][0]) for s in states[:3]] == [8 * 514, 8 * 515, 8 * 516]
    assert states[-1]["cached"][0] == 0


def test_one_output_token_never_reaches_decode() -> None:
    """Prefill makes the first token, so a request of one token has nothing left to decode."""
    batch = compiled(
        "decode", COEFFICIENTS, Settings(), workload([(0.0, 10, 1), (0.1, 10, 2)], 1.0)
    )
    assert len(batch.pool.arrival_s) == 1
    run_out(batch, ALWAYS_MAX)
    assert batch.states[0]["iterations"] == 1


def test_deadline_is_inclusive() -> None:
    """Exactly the SLO is within it; a nanosecond more is not."""
    for slo_s, late in ((0.25, 0), (0.25 - 1e-9, 1)):
        batch = compiled(
            "prefill", plain(host0_s=0.25), Settings(slo_s=slo_s), workload([(0.0, 5, 1)], 1.0)
        )
        run_out(batch, ALWAYS_MAX)
        assert batch.states[0]["violations"] == late
        decode = compiled(
            "decode", plain(host0_s=0.25), Settings(slo_s=slo_s), workload([(0.0, 5, 4)], 1.0)
        )
        run_out(decode, ALWAYS_MAX)
        assert decode.states[0]["violations"] == late


def waiting_times(service_s: np.ndarray, load: float, seed: int) -> tuple[np.ndarray, float]:
    """Waits in an M/G/1 queue of single-prompt batches whose service times come from prompt
    lengths; and the arrival rate.
    """
    rng = np.random.default_rng(seed)
    rate = load / service_s.mean()
    tokens = np.rint(service_s / 1e-5).astype(int)
    arrival = np.cumsum(rng.exponential(1 / rate, len(service_s)))
    c = plain(elem_s_per_token=1e-5)
    trace = workload(
        list(zip(arrival.tolist(), tokens.tolist(), [1] * len(tokens), strict=True)),
        float(arrival[-1]) + 1,
    )
    settings = Settings(
        max_seqs=1, token_budget=10**6, kv_capacity=10**6, drain=1, delay_s=0.0, min_interval_s=1e9
    )
    batch = compiled("prefill", c, settings, trace)
    run_out(batch, ALWAYS_MAX, limit=2)  # one decision for the whole run
    return batch.finish_s - arrival - tokens * 1e-5, rate


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("kind", ["deterministic", "two-point", "exponential"])
def test_waiting_time_of_a_single_server_queue(load: float, kind: str) -> None:
    """Pollaczek-Khinchine: mean wait = rate E[S^2] / (2 (1 - load)).

    The tolerance is four standard errors of batch means (80 blocks), which respects the correlation
    of successive waits.
    """
    n, rng = 40_000, np.random.default_rng(7)
    service = {
        "deterministic": np.full(n, 0.05),
        "two-point": np.where(rng.random(n) < 0.1, 0.2, 0.03),
        "exponential": np.maximum(rng.exponential(0.05, n), 1e-4),
    }[kind]
    wait, rate = waiting_times(service, load, seed=11)
    expected = rate * np.mean(service**2) / (2 * (1 - load))
    kept = wait[n // 20 :]
    blocks = np.array([b.mean() for b in np.array_split(kept, 80)])
    error = blocks.std(ddof=1) / np.sqrt(80)
    assert error < 0.2 * expected, "the sample is too small to say anything"
    assert abs(kept.mean() - expected) < 4 * error
    assert abs(kept.mean() - 2 * expected) > 4 * error, "a factor of two would be seen"
    idle_share = np.mean(wait < 1e-9)
    assert idle_share == pytest.approx(
        1 - load, abs=0.03
    )  # PASTA: an arrival finds the server idle with probability 1 - load


def slower_below(f0_s: float) -> Coefficients:
    """Iterations that take f0_s at 1.98 GHz and scale as 1/f.

    100 W at 1 GHz times f while busy or idle.
    """
    return plain(attn0_s=f0_s, core_share=1.0, p_clock_w_per_ghz=100.0)


def action_for(freq_ghz: float) -> float:
    return 2 * (freq_ghz - 0.51) / 1.47 - 1


HALF, THIRD = 0.99, 0.66  # both on the 15 MHz grid


def test_delay_within_one_iteration() -> None:
    """1 s of work at full clock; half the clock from 0.25 s on: 0.25 + 0.75 * 2 = 1.75 s."""
    batch = compiled(
        "prefill",
        slower_below(1.0),
        Settings(delay_s=0.25, end_s=9.0),
        workload([(0.0, 1, 1)], 9.0),
    )
    batch.step(np.array([action_for(HALF)], dtype=np.float32))
    st = batch.states[0]
    assert batch.finish_s[0] == pytest.approx(1.75, rel=1e-12)
    busy_j = 0.25 * 198 + 1.5 * 99
    assert st["step_energy_j"] - st["step_energy_idle_j"] == pytest.approx(busy_j, rel=1e-9)
    assert st["step_freq_mean_ghz"] == pytest.approx((0.25 * 1.98 + 1.5 * 0.99) / 1.75, rel=1e-9)
    assert st["energy_j"] == pytest.approx(busy_j + (9 - 1.75) * 99, rel=1e-9)
    assert st["last_power_w"] == pytest.approx(busy_j / 1.75, rel=1e-9)


def test_requests_during_a_flight_conflate() -> None:
    """Delay 0.3 s, 0.1 s batches. Asked: half at 0, max at 0.1, a third at 0.2. Half lands at 0.3.

    Only then the third sets out.

    The request for the maximum in between is never carried out.
    """
    trace = workload(
        [
            (0.0, 1, 1),
            (0.05, 1, 1),
            (0.15, 1, 1),
            (0.25, 1, 1),
            (0.26, 1, 1),
            (0.27, 1, 1),
            (0.28, 1, 1),
        ],
        5.0,
    )
    batch = compiled("prefill", slower_below(0.1), Settings(delay_s=0.3, max_seqs=1), trace)
    asked = [HALF, 1.98, THIRD, THIRD, THIRD, THIRD, THIRD]
    seen = []
    for f in asked:
        batch.step(np.array([action_for(f)], dtype=np.float32))
        seen.append(batch.states[0].copy())
    # three batches at full clock to 0.3, then 0.2 s each at half: 0.5, and from 0.6 on a third (0.3
    # s of work per batch)
    ends = [0.1, 0.2, 0.3, 0.5, 0.6 + 0.5 * 0.3, 1.05, 1.35]
    np.testing.assert_allclose(batch.finish_s, ends, rtol=1e-9)
    assert seen[-1]["n_switches"] == 2
    energy = 0.3 * 198 + 0.3 * 99 + (1.35 - 0.6) * 66
    busy = seen[-1]["energy_j"] - seen[-1]["energy_idle_j"]
    assert busy == pytest.approx(energy, rel=1e-9)


def test_time_to_apply_counts_the_flight_before() -> None:
    """Behind a flight of which 0.12 s are left, a newer request waits 0.12 + 0.3 s.

    A repeated one changes nothing.
    """
    trace = workload([(0.0, 1, 1), (0.05, 1, 1), (0.15, 1, 1), (0.25, 1, 1)], 5.0)
    batch = compiled("prefill", slower_below(0.09), Settings(delay_s=0.3, max_seqs=1), trace)
    spec = batch.plant.spec
    waits, current, pending = [], [], []
    for f in (HALF, THIRD, THIRD):
        batch.step(np.array([action_for(f)], dtype=np.float32))
        waits.append(float(spec.value(batch.obs[0], "time_to_apply")))
        current.append(float(spec.value(batch.obs[0], "freq_current")))
        pending.append(float(spec.value(batch.obs[0], "freq_pending")))
    np.testing.assert_allclose(waits, [0.21, 0.12 + 0.3, 0.03 + 0.3], atol=1e-6)
    np.testing.assert_allclose(current, [1980, 1980, 1980], rtol=1e-6)
    np.testing.assert_allclose(pending, [990, 660, 660], rtol=1e-6)


def test_zero_delay_acts_at_once() -> None:
    """Each batch runs wholly at its own clock."""
    trace = workload([(0.0, 1, 1), (0.05, 1, 1), (0.06, 1, 1)], 5.0)
    batch = compiled("prefill", slower_below(0.1), Settings(delay_s=0.0, max_seqs=1), trace)
    for f in (HALF, THIRD, 1.98):
        batch.step(np.array([action_for(f)], dtype=np.float32))
    np.testing.assert_allclose(batch.finish_s, [0.2, 0.5, 0.6], rtol=1e-9)


def test_clock_lands_while_idle() -> None:
    """A clock asked for before an idle gap lands in it; idle power follows."""
    trace = workload([(0.0, 1, 1), (2.0, 1, 1)], 3.0)
    batch = compiled("prefill", slower_below(0.1), Settings(delay_s=0.5), trace)
    batch.step(np.array([action_for(HALF)], dtype=np.float32))
    st = batch.states[0]
    assert st["step_energy_idle_j"] == pytest.approx(0.4 * 198 + 1.5 * 99, rel=1e-9)
    assert st["freq_ghz"] == pytest.approx(0.99)


def test_idle_before_the_first_request_counts() -> None:
    """The instance waits at its highest clock with its context loaded."""
    batch = compiled("prefill", slower_below(0.1), Settings(), workload([(2.0, 1, 1)], 3.0))
    assert batch.states[0]["energy_j"] == pytest.approx(2.0 * 198, rel=1e-12)
    assert batch.states[0]["time_s"] == 2.0


@pytest.mark.parametrize("cap_w", [200.0, 350.0, 500.0, 700.0])
def test_power_never_exceeds_the_cap(cap_w: float) -> None:
    """Mean power of every iteration stays below the cap, unless even the lowest clock is above it.

    Then it runs there.
    """
    rng = np.random.default_rng(3)
    c = COEFFICIENTS._replace(p_cap_w=cap_w)
    rows = [
        (float(t), int(n), 1)
        for t, n in zip(rng.uniform(0, 20, 150), rng.integers(1, 4000, 150), strict=True)
    ]
    batch = compiled("prefill", c, Settings(drain=1, delay_s=0.02), workload(rows, 20.0))
    capped = at_floor = 0
    for s in run_out(batch, rng.uniform(-1, 1, 50).tolist()):
        power = s["last_power_w"][0]
        if power > cap_w + 1e-6:
            assert s["step_freq_mean_ghz"][0] == pytest.approx(0.51, abs=1e-9)
            at_floor += 1
        capped += abs(power - cap_w) < 1e-5
    assert capped + at_floor > 0 or cap_w == 700.0


def test_cap_raises_no_time_and_saves_no_time() -> None:
    """A request above the effective clock buys nothing.

    Time and energy are those of the effective clock.
    """
    c = COEFFICIENTS._replace(p_cap_w=400.0)
    work = (2048.0, 2048.0**2 / 2, 0.0, 1.0)
    f = physics.effective_freq_ghz(c, *work, 1.98, 0.51)
    assert 0.6 < f < 1.9
    assert physics.power_w(c, *work, f) == pytest.approx(400.0, abs=1e-5)
    results = []
    for asked in (1.98, 1.95):
        batch = compiled("prefill", c, Settings(delay_s=0.0), workload([(0.0, 2048, 1)], 1e-6))
        batch.step(np.array([action_for(asked)], dtype=np.float32))
        results.append((batch.finish_s[0], batch.states[0]["step_energy_j"]))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-8)
    assert results[0][0] == pytest.approx(work_by_hand(c, *work, f)[0], rel=1e-8)


def test_min_interval_keeps_one_decision() -> None:
    """Ten batches of 0.1 s under decisions of 0.25 s.

    Steps of 3, 3, 3 and 1 batches, each at the clock asked for first.
    """
    settings = Settings(min_interval_s=0.25, max_seqs=1, delay_s=0.0)
    batch = compiled("prefill", plain(host0_s=0.1), settings, workload([(0.0, 1, 1)] * 10, 1.0))
    states = run_out(batch, ALWAYS_MAX)
    assert [int(s["step_iterations"][0]) for s in states] == [3, 3, 3, 1]
    assert [int(s["step_finished"][0]) for s in states] == [3, 3, 3, 1]


def test_preemption_by_hand() -> None:
    """Two requests of 10 + 9 tokens in a room of 30: at 2 x 14 tokens one must go.

    It is rebuilt when the other is done.

    Both start with 11. After four iterations they hold 15 each, 30 together: no room for 2 more, so
    the newer leaves with 5 tokens and the older makes its remaining 4 alone. Then 15 tokens are
    rebuilt and 4 more made: 4 + 4 + 4 iterations.
    """
    settings = Settings(kv_capacity=30, kv_watermark=0.0, drain=1, slo_s=0.1)
    c = plain(host0_s=0.1, elem_s_per_token=0.01)
    batch = compiled("decode", c, settings, workload([(0.0, 10, 9), (0.0, 10, 9)], 1.0))
    states = run_out(batch, ALWAYS_MAX)
    assert batch.states[0]["preemptions"] == 1
    assert [int(s["batch"][0]) for s in states] == [2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 0]
    assert states[7]["recompute_tokens"][0] == 15
    first = 4 * 0.12 + 4 * 0.11
    assert batch.finish_s[0] == pytest.approx(first, rel=1e-9)
    assert batch.finish_s[1] == pytest.approx(first + (0.11 + 15 * 0.01) + 3 * 0.11, rel=1e-9)
    assert batch.start_s.tolist() == [0.0, 0.0]
