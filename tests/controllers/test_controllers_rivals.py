"""The greedy search and the rival controllers against small cases worked out by hand or by brute
force.
"""

import itertools

import numpy as np
import pytest
from controllers_cases import clock_of, context, encode, plant, queue, recorded

from controllers import make_policy
from controllers.prefill.mpc_greedy import QueueTables, greedy_all
from controllers.rivals.agft import ARM, ARMS, BUSY, CONTEXT, SIZE, D
from controllers.rivals.dynamollm import TAIL
from controllers.surrogates.scan import LevelScan, search_grid

LEVELS = np.array(plant("prefill").clocks.levels_mhz)
PREFILL, DECODE = plant("prefill").model, plant("decode").model
TTFT, TPOT = plant("prefill").slo.ttft_s, plant("decode").slo.tpot_s


def feasible(latency, deadline, level):
    t = np.cumsum([latency[k, j] for k, j in enumerate(level)])
    return bool(np.all(t <= deadline + 1e-12))


def random_tables(rng, k, n):
    latency = np.sort(rng.uniform(0.05, 0.3, (k, n)), axis=1)[:, ::-1]
    energy = np.sort(rng.uniform(100.0, 500.0, (k, n)), axis=1)
    deadline = np.cumsum(latency[:, -1]) * rng.uniform(1.0, 2.5)
    return latency, energy, np.maximum.accumulate(deadline)


def test_greedy_is_feasible_locally_optimal_and_near_brute_force():
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(40):
        latency, energy, deadline = random_tables(rng, 4, 4)
        level = np.empty((1, 4), dtype=np.int64)
        greedy_all(latency[None], energy[None], deadline[None], level)
        found = level[0]
        assert feasible(latency, deadline, found)
        for k in np.flatnonzero(found):
            lower = found.copy()
            lower[k] -= 1
            assert not feasible(latency, deadline, lower)  # energy falls with every level here
        cost = {
            c: sum(energy[k, j] for k, j in enumerate(c))
            for c in itertools.product(range(4), repeat=4)
        }
        best = min(v for c, v in cost.items() if feasible(latency, deadline, c))
        ratios.append(cost[tuple(found.tolist())] / best)
    assert min(ratios) >= 1.0 - 1e-12
    assert np.mean(ratios) < 1.1


def test_greedy_on_real_batches_is_within_a_level_of_the_mpc():
    rows = recorded("prefill", 200, rate_rps=4.0, seed=2)
    greedy, mpc = (
        clock_of(make_policy("mpc-greedy", context("prefill")), rows),
        clock_of(make_policy("mpc", context("prefill")), rows),
    )
    gap = np.abs(greedy - mpc)
    cap = PREFILL.effective_freq_mhz(rows[:, 0] * 2048, rows[:, 8] * 2048**2, 0, 1, 1980.0)
    assert np.mean((gap <= 210.0) | (np.minimum(greedy, mpc) >= cap - 210.0)) > 0.95


def test_greedy_stays_at_the_top_when_a_deadline_is_lost_and_gives_up_when_told():
    o = queue([(1000, -0.5)])
    assert clock_of(make_policy("mpc-greedy", context("prefill")), o) == 1980.0
    energy_j = PREFILL.energy_j(1000, 0.5 * 1000**2, 0, 1, LEVELS)
    given_up = clock_of(make_policy("mpc-greedy", context("prefill"), give_up=True), o)
    assert given_up == LEVELS[energy_j.argmin()], "its cheapest level"


def test_queue_tables_leave_empty_batches_out():
    latency, energy, deadline = QueueTables(LevelScan(context("prefill")), 0.1)(
        queue([(500, 0.6)])[None] * plant("prefill").spec.scale
    )
    np.testing.assert_allclose(
        latency[0, 0], PREFILL.latency_s(500, 125000, 0, 1, LEVELS), rtol=1e-9
    )
    assert latency[0, 1:].sum() == energy[0, 1:].sum() == 0.0
    assert deadline[0, 0] == pytest.approx(0.5 * TTFT, rel=1e-5)


def test_ecofreq_prefill_subtracts_the_wait_and_sprints_when_others_wait():
    t = PREFILL.latency_s(800, 0.5 * 800**2, 0, 1, LEVELS)
    policy = make_policy("ecofreq", context("prefill"))
    for k in range(7):
        wait = 1.0 - t[k] * 1.0005 / TTFT
        assert clock_of(policy, queue([(800, 0.5)], oldest_wait=wait)) == LEVELS[k]
    assert clock_of(policy, queue([(800, 0.9)], queue_requests=2)) == 1980.0
    assert clock_of(policy, queue([(800, 0.9)])) == LEVELS[0]


def test_ecofreq_decode_rounds_batches_up_to_bins():
    policy = make_policy("ecofreq", context("decode"))
    cached = 60000.0
    at64 = DECODE.latency_s(64, 0, cached, 64, LEVELS)
    for batch in (57, 60, 64):
        assert (
            clock_of(
                policy, encode("decode", batch=batch, cached_tokens=cached, slo=at64[2] * 1.0005)
            )
            == LEVELS[2]
        )
        assert (
            clock_of(
                policy, encode("decode", batch=batch, cached_tokens=cached, slo=at64[2] * 0.9995)
            )
            == LEVELS[3]
        )
    assert (
        clock_of(policy, encode("decode", batch=8, cached_tokens=1e3, waiting_requests=1)) == 1980.0
    )


def test_throttllem_prefill_is_the_lowest_common_clock_that_meets_every_deadline():
    policy, grid = make_policy("throttllem", context("prefill")), search_grid(context("prefill"))
    spec = plant("prefill").spec
    for row in recorded("prefill", 60, rate_rps=4.0, seed=9):
        tokens, attn, n_seq = (
            spec.horizon(row, f"batch_{name}") for name in ("tokens", "attn", "requests")
        )
        slack = spec.horizon(row, "batch_slack")
        used = tokens > 0
        ok = []
        for f in grid:
            done = np.cumsum(np.where(used, PREFILL.latency_s(tokens, attn, 0, n_seq, f), 0.0))
            ok.append(bool(np.all(~used | (slack > 9.99) | (done <= slack * TTFT))))
        expected = grid[ok.index(True)] if any(ok) else grid[-1]
        assert clock_of(policy, row) == expected


def test_throttllem_decode_projects_admission_growth_and_kv():
    policy, grid = (
        make_policy("throttllem", context("decode"), steps=20.0),
        search_grid(context("decode")),
    )
    seen = {
        "batch": 40,
        "cached_tokens": 40000.0,
        "waiting_requests": 6,
        "waiting_tokens": 9000.0,
        "incoming_requests": 4,
    }
    ahead, cached = 50, 40000.0 + 9000.0 + 4 * 1000.0 + 0.5 * 20 * 50
    t = DECODE.latency_s(ahead, 0, cached, ahead, grid)
    for k in (0, 5, 12):
        assert clock_of(policy, encode("decode", **seen, slo=t[k] * 1.0005)) == grid[k]
    full = plant("decode").kv_capacity_tokens
    assert clock_of(policy, encode("decode", **{**seen, "cached_tokens": full - 1000.0})) == 1980.0


def test_dynamollm_prefill_takes_the_cheapest_clock_that_serves_the_load():
    policy = make_policy("dynamollm", context("prefill"))
    rate, tokens = 3.0, 900.0
    s = PREFILL.latency_s(tokens, 0.5 * tokens**2, 0, 1, LEVELS)
    e = PREFILL.energy_j(tokens, 0.5 * tokens**2, 0, 1, LEVELS)
    use = rate * s
    p99 = np.where(use < 1, s + TAIL * 0.5 * use * s / np.maximum(1 - use, 1e-9), np.inf)
    allowed = p99 <= TTFT
    expected = LEVELS[np.where(allowed, e, np.inf).argmin()] if allowed.any() else 1980.0
    o = queue([(900, 0.9)], arrival_rate_10s=rate, token_rate_10s=rate * tokens)
    assert clock_of(policy, o) == expected
    assert (
        clock_of(policy, queue([(900, 0.9)], arrival_rate_10s=30.0, token_rate_10s=30.0 * tokens))
        == 1980.0
    )


def test_dynamollm_keeps_its_clock_for_the_window_and_has_an_emergency():
    policy = make_policy("dynamollm", context("decode"), window_s=1.0)
    clocks = policy.context.clocks
    levels = np.array(clocks.levels_mhz)
    slo_s = float(DECODE.latency_s(250, 0, 3.5e5, 250, levels[-2])) * 1.0005  # the crowd's clock
    calm = encode("decode", batch=20, cached_tokens=2e4, last_time=0.03, slo=slo_s)
    crowd = encode("decode", batch=250, cached_tokens=3.5e5, last_time=0.1, slo=slo_s)
    action, state = policy.predict(calm)
    first, steps = action, 0
    while True:
        action, state = policy.predict(crowd, state)
        steps += 1
        if action != first:
            break
        assert steps < 20
    assert steps in (10, 11)  # 10 x 0.1 s, in float32
    assert clocks.to_freq_mhz(action) > clocks.to_freq_mhz(first)
    full = encode("decode", batch=20, cached_tokens=2e4, last_time=0.03, slo=slo_s, kv_use=0.95)
    assert policy.predict(full, state)[0] == pytest.approx(1.0)


def test_greenllm_prefill_treats_a_length_class_alike_and_clears_the_queue():
    policy = make_policy("greenllm", context("prefill"))
    assert clock_of(policy, queue([(520, 0.9)])) == clock_of(policy, queue([(1000, 0.9)]))
    longer = clock_of(policy, queue([(2048, 0.9), (2048, 0.9), (2048, 0.9)]))
    assert longer > clock_of(policy, queue([(2048, 0.9)]))


def test_greenllm_decode_steps_by_15_mhz_inside_its_band():
    policy = make_policy("greenllm", context("decode"))
    clocks = policy.context.clocks
    fast, slow = (encode("decode", batch=32, cached_tokens=3e4, last_time=t) for t in (0.025, 0.3))
    state, seen = None, []
    for _ in range(60):
        action, state = policy.predict(fast, state)
        seen.append(float(clocks.to_freq_mhz(action)[0]))
    band = state[0, 4:6]
    assert band[0] == LEVELS[0]
    assert band[1] == LEVELS[1]
    down = -np.diff(seen)
    assert np.all(
        (np.abs(down) < 0.01) | (np.abs(down - 15.0) < 0.01) | (np.abs(seen[:-1] - LEVELS[1]) > 1.0)
    )
    assert seen[-1] == pytest.approx(LEVELS[0])
    for _ in range(300):
        action, state = policy.predict(slow, state)
    assert clocks.to_freq_mhz(action) == pytest.approx(LEVELS[1], abs=0.1)


def test_greenllm_tracks_the_95th_percentile():
    policy, rng = make_policy("greenllm", context("decode")), np.random.default_rng(1)
    state, tail = None, []
    for _ in range(6000):
        interval = rng.exponential(0.02)
        _, state = policy.predict(
            encode("decode", batch=32, cached_tokens=3e4, last_time=interval), state
        )
        tail.append(state[0, 3])
    assert np.mean(tail[3000:]) == pytest.approx(0.02 * np.log(20.0), rel=0.1)


def play(policy, power_w, seconds, steps, late=lambda freq: False):
    """A machine whose batch of 1000 tokens costs known power and time per level.

    Returns the clocks chosen.
    """
    clocks, state, seen = policy.context.clocks, None, []
    feedback = {"last_time": 0.0, "last_power": 0.0, "oldest_wait": 0.0}
    for _ in range(steps):
        action, state = policy.predict(queue([(1000, 0.9)], **feedback), state)
        k = int(np.abs(LEVELS - clocks.to_freq_mhz(action)[0]).argmin())
        seen.append(k)
        feedback = {
            "last_time": seconds[k],
            "last_power": power_w[k],
            "oldest_wait": 2.0 if late(k) else 0.0,
        }
    return np.array(seen)


def test_agft_finds_the_clock_of_least_energy_delay_product():
    power, seconds = (
        np.array([300, 310, 330, 400, 500, 600, 700.0]),
        np.array([0.30, 0.22, 0.16, 0.15, 0.145, 0.14, 0.138]),
    )
    best = int((power * seconds**2).argmin())
    seen = play(make_policy("agft", context("prefill"), explore=0.1), power, seconds, 600)
    assert np.mean(seen[300:] == best) > 0.8
    assert set(seen) == set(range(7))


def test_agft_avoids_clocks_that_miss_the_slo():
    power, seconds = np.linspace(200, 700, 7), np.full(7, 0.15)
    seen = play(
        make_policy("agft", context("prefill"), explore=0.1, penalty=5.0),
        power,
        seconds,
        600,
        late=lambda k: k < 4,
    )
    assert np.mean(seen[300:] == 4) > 0.8


def test_agft_learns_the_ridge_regression():
    """After some windows the inverse design matrix and response of an arm are those of the recorded
    contexts and rewards.
    """
    policy = make_policy("agft", context("prefill"), window_s=0.1, penalty=0.0)
    rng, state, design, response = np.random.default_rng(3), None, {}, {}
    arm, scale, before = None, None, np.zeros(D)
    for t in range(40):
        seconds, power = rng.uniform(0.1, 0.2), rng.uniform(300, 700)
        o = queue(
            [(1000, 0.9)], last_time=seconds, last_power=power, token_rate_10s=rng.uniform(0, 1e4)
        )
        seen = o.astype(np.float64) * policy.context.spec.scale
        if t > 0:
            s, p = (seen[policy.context.spec.index(name)] for name in ("last_time", "last_power"))
            product = p * s * s / 1e6
            scale = scale or product
            design.setdefault(arm, np.eye(D))
            response.setdefault(arm, np.zeros(D))
            design[arm] = design[arm] + np.outer(before, before)
            response[arm] = response[arm] - before * product / scale
        _, state = policy.predict(o, state)
        arm, before = int(state[0, ARM]), state[0, CONTEXT : CONTEXT + D].copy()
        assert state[0, BUSY] == 0.0
    for k, matrix in design.items():
        at = ARMS + k * SIZE
        np.testing.assert_allclose(
            state[0, at : at + D * D].reshape(D, D), np.linalg.inv(matrix), rtol=1e-8, atol=1e-12
        )
        np.testing.assert_allclose(
            state[0, at + D * D : at + SIZE], response[k], rtol=1e-8, atol=1e-12
        )
