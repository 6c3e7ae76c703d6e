"""The compiled cluster: closed forms, conservation, agreement with the single instances,
backpressure, streaming.
"""

from itertools import pairwise

import numpy as np
import pytest
from cluster_support import (
    MAX_MHZ,
    colocated,
    idle_w,
    placement,
    plant,
    random_trace,
    trace,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.engine import Cluster
from biscale_env.envs.cluster.whole_run import run_cluster
from biscale_env.envs.loads.capacity import run_static
from biscale_env.sim.cluster.layout import ROUTERS
from biscale_env.sim.cluster.routing import level_with, route_decode


def test_one_request_by_hand():
    """One prompt, one transfer, three further tokens: every instant follows from the formula."""
    w = plant()
    run = run_cluster(w, placement(), trace([1.0], 1000, 4, duration_s=2.0))
    prefill, decode = w.plant("prefill", 4).model, w.plant("decode", 4).model
    first = 1.0 + float(prefill.latency_s(1000, 1000**2 / 2, 0, 1, MAX_MHZ))
    ready = first + 0.0017 + 1000 * 327_680 / (4 * 41.25e9)
    steps = [float(decode.latency_s(1, 0, 1001 + k, 1, MAX_MHZ)) for k in range(3)]
    assert run.ttft_s[0] == pytest.approx(first - 1.0, rel=1e-9)
    assert run.requests["finish_s"][0] == pytest.approx(ready + sum(steps), rel=1e-9)
    assert run.tpot_s[0] == pytest.approx((ready + sum(steps) - first) / 3, rel=1e-9)
    assert run.produced_tokens == run.prefilled_tokens == 4


def test_energy_by_hand():
    """Busy energy of the iterations, idle energy of the rest, spare GPUs at their own power."""
    w = plant()
    run = run_cluster(w, placement(), trace([1.0], 1000, 4, duration_s=2.0))
    prefill = w.plant("prefill", 4).model
    busy = float(prefill.energy_j(1000, 1000**2 / 2, 0, 1, MAX_MHZ))
    waiting = idle_w(prefill, MAX_MHZ) * (2.0 - run.ttft_s[0])
    assert run.energy.prefill_j == pytest.approx(busy + waiting, rel=1e-9)
    assert run.energy.prefill_idle_j == pytest.approx(waiting, rel=1e-9)
    assert run.row()["prefill_busy_j_per_token"] == pytest.approx(busy / 4, rel=1e-9)
    assert run.prefill_batches == 1
    assert run.energy.spare_j == pytest.approx(8 * 72.0 * 2.0)
    off = run_cluster(plant(spare="off"), placement(), trace([1.0], 1000, 4, duration_s=2.0))
    assert off.energy.spare_j == 0.0
    assert off.energy.decode_j == run.energy.decode_j


def batch_by_hand(prompts, head, done, tail, budget):
    """Tokens, attention work and requests of the next prefill batch."""
    tokens, work, n = 0, 0.0, 0
    while head < tail and tokens < budget:
        take = int(min(prompts[head] - done, budget - tokens))
        tokens, work, n = tokens + take, work + take * (take / 2 + done), n + 1
        head, done = head + 1, 0
    return tokens, work, 0, n


def test_energy_of_a_window_from_its_timeline():
    """Every iteration noted from outside.

    Their energies, the waiting between them and nothing else are what the books say.
    """
    freq = {"prefill": 1395.0, "decode": 1005.0}
    w = plant(prefill_policy="external", decode_policy="external")
    t, until = random_trace(400, rate_rps=20.0, seed=4), 20.0
    cluster = Cluster(w, placement((4,), (4, 4)))
    cluster.offer(t)
    seen = {k: [] for k in range(3)}
    while (k := cluster.advance(until)) is not None:
        phase = "prefill" if k == 0 else "decode"
        state = cluster.prefills.states[0] if k == 0 else cluster.decodes.states[k - 1]
        if k == 0:
            budget = int(cluster.prefills.params["token_budget"][0])
            load = batch_by_hand(
                cluster.prefills.queue.prompt[0],
                state["head"],
                state["head_done"],
                state["tail"],
                budget,
            )
        else:
            load = int(state["batch"]), 0.0, int(state["cached"]), int(state["batch"])
        seen[k].append((float(state["time_s"]), *load))
        cluster.decide(k, freq[phase])
    by_hand = {"prefill": 0.0, "decode": 0.0}
    for k, rows in seen.items():
        phase = "prefill" if k == 0 else "decode"
        model = w.plant(phase, 4).model
        spans = np.array([float(model.latency_s(*row[1:], freq[phase])) for row in rows])
        starts = np.array([row[0] for row in rows])
        assert (starts[1:] >= starts[:-1] + spans[:-1] - 1e-9).all()
        busy = sum(float(model.energy_j(*row[1:], freq[phase])) for row in rows)
        waiting = idle_w(model, MAX_MHZ) * starts[0] + idle_w(model, freq[phase]) * (
            max(until, starts[-1] + spans[-1]) - starts[0] - spans.sum()
        )
        by_hand[phase] += busy + waiting
    assert cluster.energies().prefill_j == pytest.approx(by_hand["prefill"], rel=1e-9)
    assert cluster.energies().decode_j == pytest.approx(by_hand["decode"], rel=1e-9)
    assert cluster.energies().spare_j == pytest.approx(4 * 72.0 * until)
    made = int(cluster.state[0]["prefilled"]) + sum(row[1] for k in (1, 2) for row in seen[k])
    running = int(
        cluster.decodes.states["batch"].sum()
    )  # the iterations under way are paid for, their tokens not yet counted
    assert made - running <= cluster.state[0]["produced_tokens"] <= made


def test_each_stage_divides_by_its_own_tokens():
    """The trace ends while decode is at work.

    Prefill answers for all tokens asked for, decode for those that are out.
    """
    run = run_cluster(plant(), placement(), trace([1.0], 1000, 400, duration_s=2.0))
    assert run.prefilled_tokens == 400
    assert 1 < run.produced_tokens < 100
    row = run.row()
    assert row["prefill_j_per_token"] == pytest.approx(run.energy.prefill_j / 400)
    assert row["decode_j_per_token"] == pytest.approx(run.energy.decode_j / run.produced_tokens)
    assert row["total_j_per_token"] == pytest.approx(run.energy.total_j / run.produced_tokens)


def test_prefill_pool_of_one_is_the_single_instance():
    """With nothing after prefill, a pool of one does exactly what the single-instance simulator
    does.
    """
    w = plant()
    t = random_trace(300, rate_rps=8.0, output_max=2)
    single = run_static(w.plant("prefill", 4), t, 1395.0)
    run = run_cluster(w, placement(freq_mhz=1395.0), t)
    np.testing.assert_allclose(run.ttft_s, single.latency_s, rtol=0, atol=1e-9)


def test_decode_pool_of_one_is_the_single_instance():
    """Decode behind a cluster equals the single decode simulator fed with the instants at which KV
    arrives.
    """
    w = plant(transfer={"latency_s": 0.0, "overlap": 1.0})
    t = random_trace(300, rate_rps=6.0, seed=3)
    run = run_cluster(w, placement(freq_mhz=1200.0), t)
    r = run.requests[run.requests["output_tokens"] > 1]
    r = r[np.argsort(r["first_token_s"], kind="stable")]
    fed = trace(r["first_token_s"], r["prompt_tokens"], r["output_tokens"])
    single = run_static(w.plant("decode", 4), fed, 1200.0)
    np.testing.assert_allclose(
        r["finish_s"] - r["first_token_s"], single.latency_s * (r["output_tokens"] - 1), atol=1e-6
    )


@pytest.mark.parametrize("router", ROUTERS)
def test_every_request_is_served_once(router):
    w = plant(prefill_router=router, decode_router=router, actuation_delay_s=0.05)
    t = random_trace(500, rate_rps=15.0, seed=1)
    run = run_cluster(w, placement((4, 8), (4,)), t)
    assert_conserved(run, t)
    assert set(run.requests["prefill"]) == {0, 1}


def assert_conserved(run, t):
    r = run.requests
    np.testing.assert_array_equal(r["request"], np.arange(len(t)))
    np.testing.assert_array_equal(r["arrival_s"], t.arrival_s)
    np.testing.assert_array_equal(r["prompt_tokens"], t.prompt_tokens)
    np.testing.assert_array_equal(r["output_tokens"], t.output_tokens)
    assert (r["first_token_s"] > r["arrival_s"]).all()
    several = r["output_tokens"] > 1
    assert (r["finish_s"][several] > r["first_token_s"][several] + 0.0017).all()
    np.testing.assert_array_equal(r["finish_s"][~several], r["first_token_s"][~several])


policies = st.tuples(
    st.sampled_from(["static", "mpc", "ecofreq", "throttllem"]),
    st.sampled_from(["static", "slack", "ecofreq", "throttllem"]),
)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.floats(1.0, 80.0),
    both=policies,
    what=st.sampled_from(ROUTERS),
)
def test_conservation_across_the_transfer(seed, rate, both, what):
    """Whatever the load, rule and router.

    Nothing is lost, doubled or left behind, in requests and in tokens.
    """
    w = plant(
        gpus=20,
        prefill_policy=both[0],
        decode_policy=both[1],
        decode_router=what,
        actuation_delay_s=0.03,
    )
    t = random_trace(150, rate_rps=rate, seed=seed)
    cluster = Cluster(w, placement((4, 4), (8, 4)), seed=seed)
    cluster.offer(t)
    for until in (2.0, 5.0):
        cluster.advance(until)
        c = cluster.counts()
        assert c["arrived"] == c["finished"] + c["queued"] + c["decoding"]
    cluster.advance()
    c = cluster.counts()
    assert c["arrived"] == c["finished"] == len(t)
    assert c["held_tokens"] == c["load_tokens"] == c["cached_tokens"] == 0
    assert cluster.state[0]["produced_tokens"] == t.output_tokens.sum()
    assert cluster.state[0]["prefilled_tokens"] == t.output_tokens.sum()


def test_backpressure_stalls_prefill_and_nothing_is_lost():
    """Decode with room for few requests.

    Prefill keeps their KV, stalls, and everything is served in the end.
    """
    n = 40
    w = plant(decode_max_seqs=1)
    t = trace(np.arange(n) * 0.01, 20_000, 400)
    cluster = Cluster(w, placement())
    cluster.offer(t)
    room = w.plant("prefill", 4).kv_capacity_tokens
    held = []
    for until in np.arange(1.0, 300.0):
        cluster.advance(until)
        held.append(cluster.counts()["held_tokens"])
    assert cluster.counts()["stalls"] > 0
    assert room - 40_000 < max(held) <= room
    assert_conserved(run_cluster(w, placement(), t), t)


def test_link_sends_one_request_at_a_time():
    """Two prompts that finish together: the second KV waits for the link."""
    w = plant(transfer={"latency_s": 0.0, "gb_per_s_per_gpu": 0.25})
    run = run_cluster(w, placement(), trace([0.0, 0.0], 500, 2))
    sending = 500 * 327_680 / 1e9
    decode = w.plant("decode", 4).model
    first = run.requests["first_token_s"][0]
    step = float(decode.latency_s(1, 0, 501, 1, MAX_MHZ))
    np.testing.assert_allclose(
        run.requests["finish_s"], [first + sending + step, first + 2 * sending + step], rtol=1e-9
    )


def test_streaming_in_pieces_is_the_whole():
    """Offering a trace window by window gives the same run, with queues no longer than a piece
    needs.
    """
    w = plant(prefill_policy="mpc", decode_policy="slack", actuation_delay_s=0.05)
    t = random_trace(3000, rate_rps=6.0, seed=5)
    whole = Cluster(w, placement((4,), (4,)))
    whole.offer(t)
    whole.advance()
    pieces = Cluster(w, placement((4,), (4,)))
    logs = []
    edges = np.append(np.arange(0.0, t.duration_s, 20.0), t.duration_s)
    for a, b in pairwise(edges):
        pieces.offer(t.window(a, b), start_s=a)
        pieces.advance(b if b < t.duration_s else np.inf)
        logs.append(pieces.log)
    got = np.concatenate(logs)
    assert len(got) == len(t)
    np.testing.assert_array_equal(np.sort(got, order="request")["request"], np.arange(len(t)))
    np.testing.assert_allclose(
        np.sort(got, order="request")["finish_s"],
        np.sort(whole.log, order="request")["finish_s"],
        atol=1e-6,
    )
    assert pieces.energies().decode_j == pytest.approx(whole.energies().decode_j, rel=1e-9)
    assert pieces.prefills.queue.prompt.shape[1] < whole.prefills.queue.prompt.shape[1] / 4


def test_seeded_weighted_routing_is_reproducible_and_proportional():
    w = plant(prefill_router="weighted")
    t = random_trace(3000, rate_rps=10.0, prompt_max=100, output_max=2)
    runs = [run_cluster(w, placement((4, 8), (4,)), t, seed=s) for s in (7, 7, 8)]
    np.testing.assert_array_equal(runs[0].requests, runs[1].requests)
    assert (runs[0].requests["prefill"] != runs[2].requests["prefill"]).any()
    share = np.mean(runs[0].requests["prefill"] == 1)
    assert abs(share - 2 / 3) < 4 * np.sqrt(2 / 9 / 3000)


def test_shortest_queue_counts_tokens_over_speed():
    """The default router, by hand: tokens waiting over the weight, which is 4 and 8 here."""
    prefill = run_cluster(
        plant(), placement((4, 8), (4,)), trace([0.0, 1e-4, 2e-4, 3e-4], [1500, 1000, 1000, 100], 2)
    )
    np.testing.assert_array_equal(
        prefill.requests["prefill"], [0, 1, 1, 1]
    )  # 1500/4 against 0, 1000/8, 2000/8
    decode = run_cluster(
        plant(), placement((4,), (4, 8)), trace([0.0, 1.0, 2.0, 3.0], [1500, 1000, 1000, 100], 500)
    )
    np.testing.assert_array_equal(decode.requests["decode"], [0, 1, 1, 1])
    plain = run_cluster(
        plant(),
        placement((4, 4), (4,)),
        trace([0.0, 1e-4, 2e-4, 3e-4, 4e-4], [300, 100, 100, 200, 9], 2),
    )
    np.testing.assert_array_equal(
        plain.requests["prefill"], [0, 1, 1, 1, 0]
    )  # 300 against 0, 100, 200, 400


def test_round_robin_takes_turns():
    run = run_cluster(
        plant(prefill_router="round_robin"), placement((4, 4), (4,)), random_trace(50)
    )
    np.testing.assert_array_equal(run.requests["prefill"], np.arange(50) % 2)


def test_what_if_router_avoids_the_boundary():
    """The request goes where it raises no clock level, even if that queue is longer."""
    w = plant(decode_router="what_if", decode_policy="slack", slo="mlperf-interactive")
    cluster = Cluster(w, placement((4,), (4, 8)))
    cluster.offer(trace([0.0], 10, 10))
    d = cluster.decodes
    d = d._replace(
        **{
            name: getattr(d, name).view(np.recarray)
            for name in ("states", "coefs", "params", "meta")
        }
    )
    levels = cluster.levels_ghz
    for j in range(2):
        d.states[j]["end"] = d.states[j]["head"] = d.states[j]["tail"] = 0
    boundary = next(b for b in range(1, 500) if at_batch(d, levels, b + 1) > at_batch(d, levels, b))
    d.states[0]["batch"], d.states[1]["batch"] = boundary, 500
    d.states[0]["cached"], d.states[1]["cached"] = 100, 5000
    assert level_with(d, 1, levels, 1, 0) == level_with(d, 1, levels, 0, 0)
    state = cluster.state.view(np.recarray)[0]
    assert route_decode(state, d, levels, 0, 0.0) == 1
    d.states[0]["batch"] = boundary - 1
    assert route_decode(state, d, levels, 0, 0.0) == 0


def at_batch(d, levels, batch):
    d.states[0]["batch"] = batch
    return level_with(d, 0, levels, 0, 0)


def test_colocated_one_request_by_hand():
    w = plant()
    run = run_cluster(w, colocated(), trace([1.0], 1000, 3, duration_s=2.0))
    model = w.plant("decode", 4).model
    first = float(model.latency_s(1000, 1000**2 / 2, 0, 1, MAX_MHZ))
    steps = [float(model.latency_s(1, 0, 1001 + k, 1, MAX_MHZ)) for k in range(2)]
    assert run.ttft_s[0] == pytest.approx(first, rel=1e-9)
    assert run.requests["finish_s"][0] == pytest.approx(1.0 + first + sum(steps), rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000), rate=st.floats(1.0, 60.0), budget=st.sampled_from([64, 300, 2048])
)
def test_colocated_conserves(seed, rate, budget):
    w = plant(token_budget=budget, decode_max_seqs=64)
    t = random_trace(120, rate_rps=rate, seed=seed)
    cluster = Cluster(w, colocated((4, 8)))
    cluster.offer(t)
    cluster.advance()
    c = cluster.counts()
    assert c["finished"] == len(t)
    assert c["cached_tokens"] == c["reserved_tokens"] == c["load_tokens"] == 0
    assert cluster.state[0]["produced_tokens"] == t.output_tokens.sum()


def test_colocated_kv_pressure_preempts_and_conserves():
    """Prompts that fill the cache: preemption and recompute, and still everything ends."""
    w = plant(token_budget=8192)
    t = trace(np.arange(60) * 0.05, 12_000, 1500)
    run = run_cluster(w, colocated(), t)
    assert run.preemptions > 0
    r = run.requests
    np.testing.assert_array_equal(r["request"], np.arange(60))


def test_changing_the_placement_drains_and_counts_gpus():
    """Surplus instances finish what they have; GPU time in service adds up."""
    w = plant()
    cluster = Cluster(w, placement((4,), (4, 4)))
    cluster.offer(random_trace(200, rate_rps=20.0))
    cluster.advance(5.0)
    cluster.place(placement((4,), (4,), freq_mhz=1200.0))
    cluster.advance()
    cluster.advance(60.0)
    assert cluster.counts()["finished"] == 200
    retired = cluster.decodes.meta["retired_s"]
    assert np.isfinite(retired).sum() == 1
    assert 5.0 <= retired.min() < 60.0
    assert cluster.gpu_seconds("decode") == pytest.approx(4 * 60.0 + 4 * retired.min())
    before = cluster.energies()
    cluster.place(placement((4,), (4, 4), freq_mhz=1200.0))
    assert cluster.energies().decode_j == pytest.approx(before.decode_j)
    assert len(cluster.decodes.meta) == 2  # the row of the retired one is used again


def test_what_drains_does_not_retire_while_kv_is_on_its_way():
    """Neither the prefill instance that holds it nor the decode instance that waits for it."""
    slow = {"latency_s": 0.0, "gb_per_s_per_gpu": 0.25}
    turns = {"prefill_router": "round_robin", "decode_router": "round_robin"}
    cluster = Cluster(plant(gpus=32, transfer=slow, **turns), placement((4, 4), (4, 4)))
    cluster.offer(trace([0.0, 0.0], 5000, 20))
    cluster.advance(1.2)
    pools = (cluster.prefills, cluster.decodes)
    assert [list(pool.meta["running"]) for pool in pools] == [[0, 0], [0, 0]]
    cluster.place(placement((4,), (4,)))
    cluster.advance(1.3)
    assert all(np.isinf(pool.meta["retired_s"]).all() for pool in pools)
    cluster.place(placement((4, 4), (4, 4)))  # the rows of what drains are not given away
    assert [len(pool.meta) for pool in (cluster.prefills, cluster.decodes)] == [3, 3]
    cluster.advance()
    assert set(cluster.log["decode"]) == {0, 1}
    cluster.advance(10.0)
    for pool in (cluster.prefills, cluster.decodes):
        retired_s = pool.meta["retired_s"]
        assert np.isinf(retired_s[[0, 2]]).all()
        assert 1.3 <= retired_s[1] <= 10.0


def test_cold_start_makes_requests_wait():
    w = plant(transitions={"cold_start_s": 3.0, "reshard_s": 3.0})
    cluster = Cluster(w, placement((4,), (4,)))
    cluster.offer(trace([0.1], 100, 2))
    cluster.advance(1.0)
    cluster.place(placement((8,), (4,)))
    cluster.offer(trace([0.5], 100, 2), start_s=1.0)
    cluster.advance()
    assert cluster.log["first_token_s"][0] > 4.0


def test_a_cold_instance_takes_nothing_while_another_is_ready():
    w = plant(transitions={"cold_start_s": 3.0}, prefill_router="round_robin")
    cluster = Cluster(w, placement((4,), (4,)))
    cluster.advance(1.0)
    cluster.place(placement((4, 4), (4, 4)))
    cluster.offer(trace(np.arange(50) * 0.1, 100, 2), start_s=1.0)
    cluster.advance()
    cold = cluster.log["arrival_s"] < 4.0
    assert set(cluster.log["prefill"][cold]) == {0}
    assert set(cluster.log["prefill"][~cold]) == {0, 1}


def test_kv_waits_for_a_cold_decode_instance():
    w = plant(transitions={"reshard_s": 3.0})
    cluster = Cluster(w, placement((4,), (4,)))
    cluster.advance(1.0)
    cluster.place(placement((4,), (8,)))
    cluster.offer(trace([0.5], 100, 3), start_s=1.0)
    cluster.advance()
    assert cluster.log["first_token_s"][0] < 2.0
    step = float(w.plant("decode", 8).model.latency_s(1, 0, 101, 1, MAX_MHZ))
    assert 4.0 + 2 * step <= cluster.log["finish_s"][0] < 4.0 + 2.1 * step


@pytest.mark.parametrize(("wanted", "wait_s"), [((8,), 1.0), ((4, 4), 5.0)])
def test_a_change_of_tp_is_a_reshard_and_one_more_is_a_cold_start(wanted, wait_s):
    w = plant(transitions={"cold_start_s": 5.0, "reshard_s": 1.0})
    cluster = Cluster(w, placement((4,), (4,)))
    cluster.advance(2.0)
    cluster.place(placement(wanted, (4,)))
    assert cluster.prefills.meta["ready_s"][-1] == pytest.approx(2.0 + wait_s)


def test_instances_that_stay_take_the_new_clock_and_weight():
    cluster = Cluster(plant(), placement((4,), (4,), freq_mhz=1980.0))
    cluster.advance(1.0)
    cluster.place(placement((4,), (4,), freq_mhz=1200.0))
    cluster.offer(trace([0.5], 100, 3), start_s=1.0)
    cluster.advance()
    for pool in (cluster.prefills, cluster.decodes):
        assert len(pool.meta) == 1
        assert pool.states["freq_ghz"][0] == pytest.approx(1.2)


def test_a_longer_timing_wheel_keeps_what_is_linked():
    """Requests that run while a longer output is offered finish when they would have."""
    w = plant()
    ends = []
    for later in (20, 3000):
        cluster = Cluster(w, placement((4,), (4,)))
        cluster.offer(trace(np.linspace(0.0, 0.4, 20), 100, np.arange(20) + 45))
        cluster.advance(1.0)
        running = int(cluster.decodes.states["batch"][0])
        assert running > 10
        logs = [cluster.log]
        cluster.offer(trace([60.0], 100, later), start_s=1.0)
        cluster.advance(30.0)
        logs.append(cluster.log)
        ends.append(np.sort(np.concatenate(logs), order="request")["finish_s"])
    assert len(ends[0]) == 20
    np.testing.assert_array_equal(ends[0], ends[1])


def test_mistakes_are_sentences():
    w = plant(gpus=8)
    with pytest.raises(BiscaleError, match="needs 16 GPUs, but the cluster has 8"):
        Cluster(w, placement((4, 4), (4, 4)))
    with pytest.raises(BiscaleError, match="do not fit"):
        run_cluster(w, placement(), trace([0.0], 500_000, 2))
    with pytest.raises(BiscaleError, match="has no requests"):
        run_cluster(w, placement(), trace([], 1, 1, duration_s=1.0))
    cluster = Cluster(w, placement())
    cluster.offer(trace([0.0], 10, 2))
    with pytest.raises(BiscaleError, match="advance further"):
        cluster.offer(trace([0.0], 10, 2))
    with pytest.raises(BiscaleError, match="disaggregated and co-located"):
        Cluster(w, placement()).place(colocated())


def test_speed_of_a_window():
    """A window of 5 minutes at 85 requests/s on 16 GPUs with static clocks takes at most 50 ms
    (best of several: shared machines).
    """
    import time

    w = plant(dtype="fp8")
    t = random_trace(25_500, rate_rps=85.0, prompt_max=320, output_max=400)
    best = np.inf
    for _ in range(7):
        cluster = Cluster(w, placement((4,), (4, 4, 4)))
        cluster.offer(t)
        start = time.perf_counter()
        cluster.advance(300.0)
        best = min(best, time.perf_counter() - start)
    assert best <= 0.05, f"{best * 1e3:.1f} ms"
