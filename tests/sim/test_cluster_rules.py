"""Rules, routers and schedules of the cluster on states set by hand.

The parts are called as plain Python, so that every answer can be had by the formula.
"""

import numpy as np
import pytest
from cluster_support import MAX_MHZ, colocated, placement, plant, trace

from biscale_env.envs.cluster.engine import Cluster
from biscale_env.sim.cluster.colocated import reserve, take_chunk
from biscale_env.sim.cluster.layout import ECOFREQ, MPC, SLACK, THROTTLLEM
from biscale_env.sim.cluster.loop import kv_spoken_for, send_kv
from biscale_env.sim.cluster.routing import (
    first_ready,
    in_turn,
    level_with,
    shortest_decode,
    shortest_prefill,
)
from biscale_env.sim.cluster.tier2_rules import (
    BatchWork,
    decode_ghz,
    decode_outlook,
    prefill_ghz,
    project_batches,
    spend_clock_delay,
)

RECORDS = ("states", "coefs", "params", "meta")
SLO = "mlperf-interactive"
TPOT_S = 0.0455  # tight, so that the answers differ between levels


def by_name(pool):
    """The pool with records whose fields are attributes, as kernels see them."""
    return pool._replace(**{name: getattr(pool, name).view(np.recarray) for name in RECORDS})


@pytest.fixture
def decode():
    """One idle decode instance and its cluster."""
    cluster = Cluster(plant(slo=SLO, decode_margin=0.1), placement((4,), (4,)))
    cluster.offer(trace([0.0], 100, 2))
    pool = by_name(cluster.decodes)
    pool.params["slo_s"][0] = TPOT_S
    return cluster, pool


def set_decode(pool, j=0, **fields):
    for name, value in fields.items():
        target = pool.meta if name in pool.meta.dtype.names else pool.states
        target[j][name] = value


def lowest(cluster, phase, work, limit_s):
    """Lowest level by exhaustion, MHz."""
    model = cluster.plant.plant(phase, 4).model
    for level in cluster.levels_ghz[:-1]:
        if float(model.latency_s(*work, 1e3 * level)) <= limit_s:
            return 1e3 * level
    return MAX_MHZ


BATCHES = [(1, 2_000, 0), (60, 60_000, 0), (200, 220_000, 0), (60, 60_000, 1500), (500, 380_000, 0)]


@pytest.mark.parametrize(("batch", "cached", "redo"), BATCHES)
def test_slack_and_ecofreq_by_the_formula(decode, batch, cached, redo):
    cluster, pool = decode
    limit = TPOT_S * 0.9
    fields = {"batch": batch, "cached": cached, "recompute_tokens": redo}
    set_decode(pool, **fields, recompute_attn=redo**2 / 2, head=0, tail=0, end=0, kv_guard=2.0)
    set_decode(pool, policy=SLACK)
    work = (batch + redo, redo**2 / 2, cached, batch)
    assert 1e3 * decode_ghz(pool, 0, cluster.levels_ghz) == pytest.approx(
        lowest(cluster, "decode", work, limit)
    )
    set_decode(pool, policy=ECOFREQ)
    binned = 8 * -(-batch // 8)
    work = (max(batch + redo, binned), redo**2 / 2, cached, binned)
    assert 1e3 * decode_ghz(pool, 0, cluster.levels_ghz) == pytest.approx(
        lowest(cluster, "decode", work, limit)
    )


def test_the_answers_above_are_not_all_the_same(decode):
    cluster, pool = decode
    set_decode(pool, policy=SLACK, kv_guard=2.0)
    seen = set()
    for batch, cached, redo in BATCHES:
        set_decode(pool, batch=batch, cached=cached, recompute_tokens=redo)
        seen.add(decode_ghz(pool, 0, cluster.levels_ghz))
    assert len(seen) > 2


def test_slack_takes_the_highest_clock_above_its_guard(decode):
    cluster, pool = decode
    room = int(pool.params["kv_capacity"][0])
    for used in (0.5, 0.75):
        set_decode(pool, policy=SLACK, kv_guard=0.6, batch=1, cached=int(used * room))
        highest = decode_ghz(pool, 0, cluster.levels_ghz) == cluster.levels_ghz[-1]
        assert highest == (used > 0.6)


@pytest.mark.parametrize(("waiting", "preempted"), [(0, 0), (1, 0), (0, 1)])
def test_ecofreq_takes_the_highest_clock_when_anything_waits(decode, waiting, preempted):
    cluster, pool = decode
    set_decode(pool, policy=ECOFREQ, batch=1, cached=500, head=0, tail=waiting)
    set_decode(pool, preempted=preempted)
    highest = decode_ghz(pool, 0, cluster.levels_ghz) == cluster.levels_ghz[-1]
    assert highest == (waiting + preempted > 0)


def test_what_throttllem_projects(decode):
    """Waiting, incoming and preempted requests join with their tokens."""
    _, pool = decode
    set_decode(pool, batch=10, cached=9000, head=2, tail=4, end=7, load_tokens=4000, preempted=2)
    set_decode(pool, recompute_tokens=30, recompute_attn=450.0)
    pool.queue.prompt[0, :2] = 1000, 600
    pool.running.stack[0, :2] = [[0, 50], [1, 7]]
    assert decode_outlook(pool, 0) == (10, 5 + 2, 9000 + 4000 + 1050 + 607, 30, 450.0)


def test_throttllem_by_the_formula(decode):
    cluster, pool = decode
    set_decode(pool, policy=THROTTLLEM, ahead=32.0, batch=160, cached=260_000, load_tokens=50_000)
    set_decode(pool, head=0, tail=10, end=40)
    work = (200, 0, 310_000 + 16 * 200, 200)
    want = lowest(cluster, "decode", work, TPOT_S * 0.9)
    assert 1e3 * decode_ghz(pool, 0, cluster.levels_ghz) == pytest.approx(want)
    assert cluster.levels_ghz[0] < want / 1e3 < cluster.levels_ghz[-1]


def test_the_router_asks_for_the_level_with_what_is_queued(decode):
    cluster, pool = decode
    set_decode(pool, batch=60, cached=60_000, load_tokens=20_000, head=0, tail=10, end=20)
    limit = TPOT_S * 0.9
    for requests, tokens in ((0, 0), (150, 150_000)):
        n, cached = 80 + requests, 80_000 + tokens
        got = 1e3 * level_with(pool, 0, cluster.levels_ghz, requests, tokens)
        assert got == pytest.approx(lowest(cluster, "decode", (n, 0, cached, n), limit))
    before = level_with(pool, 0, cluster.levels_ghz, 0, 0)
    set_decode(pool, margin=0.6)
    assert level_with(pool, 0, cluster.levels_ghz, 0, 0) > before


# --- prefill


@pytest.fixture
def prefill():
    """One prefill instance with three prompts that arrived at 0, 0.1 and 0.2 s; it is 0.25 s."""
    cluster = Cluster(plant(slo=SLO, prefill_margin=0.1), placement((4,), (4,)))
    cluster.offer(trace([0.0], 100, 2))
    pool = by_name(cluster.prefills)
    pool.queue.arrival_s[0, :3] = 0.0, 0.1, 0.2
    pool.queue.prompt[0, :3] = 1500, 400, 900
    st = pool.states[0]
    st["head"], st["tail"], st["end"], st["time_s"], st["head_done"] = 0, 3, 3, 0.25, 0
    return cluster, pool


def test_projected_batches_and_deadlines_by_hand(prefill):
    """Budget 2048: 1500 + 400 + 148, then 752. A margin only shortens what is left."""
    cluster, pool = prefill
    model, slo = cluster.plant.plant("prefill", 4).model, cluster.plant.slo.ttft_s
    assert project_batches(pool, 0, cluster.levels_ghz) == 2
    works = [
        (2048, 1500**2 / 2 + 400**2 / 2 + 148**2 / 2, 0, 3),
        (752, 752 * (752 / 2 + 148), 0, 1),
    ]
    for k, work in enumerate(works):
        for n, level in enumerate(cluster.levels_ghz):
            effective = 1e3 * level
            capped = model.latency_s(*work, effective)
            assert pool.plans.latency_s[0, k, n] >= float(capped) * (1 - 1e-9)
    top = pool.plans.latency_s[0, :2, -1]
    done = np.cumsum(top)
    tightest = 0.0 + slo - 0.25  # the oldest of the first batch
    want = [max(tightest - 0.1 * slo, done[0]), max(0.2 + slo - 0.25 - 0.1 * slo, done[1])]
    np.testing.assert_allclose(pool.plans.deadline_s[0, :2], want, rtol=1e-12)


def test_a_deadline_that_has_passed_constrains_nothing(prefill):
    cluster, pool = prefill
    pool.states[0]["time_s"] = 0.1 + cluster.plant.slo.ttft_s  # the first two are too late
    project_batches(pool, 0, cluster.levels_ghz)
    assert pool.plans.deadline_s[0, 0] == np.inf
    pool.queue.arrival_s[0, 1:3] = 0.35, 0.4
    pool.states[0]["time_s"] = 0.02 + cluster.plant.slo.ttft_s  # the first is, the second not yet
    project_batches(pool, 0, cluster.levels_ghz)
    done = pool.plans.latency_s[0, 0, -1]
    assert done <= pool.plans.deadline_s[0, 0] < np.inf


def test_the_delay_of_a_clock_change_is_taken_off_the_deadlines(prefill):
    cluster, pool = prefill
    pool.params["delay_s"][0] = 0.2
    pool.params["slo_s"][0] = 2.0
    st = pool.states[0]
    st["freq_ghz"] = st["requested_ghz"] = st["inflight_ghz"] = cluster.levels_ghz[0]
    st["apply_at_s"] = np.inf
    n = project_batches(pool, 0, cluster.levels_ghz)
    before = pool.plans.deadline_s[0, :n].copy()
    spend_clock_delay(pool, 0, cluster.levels_ghz, n)
    slow, fast = pool.plans.latency_s[0, 0, 0], pool.plans.latency_s[0, 0, -1]
    late = min(0.2, slow) * (1 - fast / slow)
    assert late > 0.01
    np.testing.assert_allclose(before - pool.plans.deadline_s[0, :n], late, rtol=1e-9)
    pool.plans.deadline_s[0, :n] = before
    st["freq_ghz"] = st["requested_ghz"] = cluster.levels_ghz[-1]
    spend_clock_delay(pool, 0, cluster.levels_ghz, n)
    np.testing.assert_array_equal(pool.plans.deadline_s[0, :n], before)


def test_prefill_rules_on_a_tight_and_a_loose_queue(prefill):
    cluster, pool = prefill
    batch = BatchWork(2048, 1500**2 / 2 + 400**2 / 2 + 148**2 / 2, 0.0, 3)
    for policy in (MPC, THROTTLLEM):
        pool.meta[0]["policy"] = policy
        pool.params["slo_s"][0] = 0.26 + cluster.plant.plant("prefill", 4).model.latency_s(
            2048, batch.attn_work, 0, 3, MAX_MHZ
        )
        pool.meta[0]["margin"] = 0.0
        tight = prefill_ghz(pool, 0, cluster.levels_ghz, batch)
        pool.params["slo_s"][0] = 10.0
        loose = prefill_ghz(pool, 0, cluster.levels_ghz, batch)
        assert loose < tight
    assert loose == cluster.levels_ghz[0]


@pytest.mark.parametrize(("slo_s", "margin"), [(0.5, 0.0), (0.5, 0.2), (0.6, 0.0), (1.0, 0.0)])
def test_ecofreq_prefill_counts_the_wait_of_the_oldest(prefill, slo_s, margin):
    cluster, pool = prefill
    pool.meta[0]["policy"], pool.meta[0]["margin"] = ECOFREQ, margin
    pool.params["slo_s"][0] = slo_s
    work = BatchWork(900, 900**2 / 2, 0.0, 3)
    want = lowest(cluster, "prefill", tuple(work), slo_s * (1 - margin) - 0.25)
    got = prefill_ghz(pool, 0, cluster.levels_ghz, work)
    assert 1e3 * got == pytest.approx(want)
    behind = work._replace(n_seq=2)
    assert prefill_ghz(pool, 0, cluster.levels_ghz, behind) == cluster.levels_ghz[-1]


# --- routers, transfer, schedules


def test_routers_pass_over_what_is_not_open():
    cluster = Cluster(plant(gpus=32), placement((4, 4, 4), (4, 4, 4)))
    pf, dc = by_name(cluster.prefills), by_name(cluster.decodes)
    for pool in (pf, dc):
        pool.meta["ready_s"] = 5.0, 0.0, 0.0
        pool.meta["accepting"] = 1, 0, 1
    pf.meta["load_tokens"] = 0, 0, 900
    assert shortest_prefill(pf, 1.0) == 2
    assert shortest_prefill(pf, 5.0) == 0
    assert shortest_decode(dc, cluster.levels_ghz, 10, 1.0, False) == 2
    assert in_turn(pf.meta, 0, 1.0) == 2
    assert in_turn(pf.meta, 0, 5.0) == 0
    assert in_turn(pf.meta, 3, 5.0) == 0
    pf.meta["ready_s"] = 5.0, 0.0, 4.0
    assert first_ready(pf.meta) == 2
    assert shortest_prefill(pf, 1.0) == -1


def test_shortest_decode_counts_kv_and_what_is_queued():
    cluster = Cluster(plant(gpus=32), placement((4,), (4, 4)))
    dc = by_name(cluster.decodes)
    dc.states["cached"] = 1000, 1200
    dc.meta["load_tokens"] = 500, 100
    assert shortest_decode(dc, cluster.levels_ghz, 10, 0.0, False) == 1
    dc.meta["load_tokens"] = 500, 400
    assert shortest_decode(dc, cluster.levels_ghz, 10, 0.0, False) == 0
    dc.meta["weight"] = 4.0, 8.0
    assert shortest_decode(dc, cluster.levels_ghz, 10, 0.0, False) == 1


def test_backpressure_is_kv_used_and_promised():
    cluster = Cluster(plant(gpus=32), placement((4,), (4, 4, 4)))
    dc = by_name(cluster.decodes)
    room = float(dc.params["kv_capacity"][0])
    dc.states["cached"] = 1000, 2000, 9999
    dc.meta["load_tokens"] = 500, 0, 9999
    dc.meta["accepting"] = 1, 1, 0
    assert kv_spoken_for(dc) == pytest.approx(3500 / (2 * room))
    dc.meta["accepting"] = 0
    assert kv_spoken_for(dc) == 0.0


@pytest.mark.parametrize("overlap", [0.0, 0.6])
def test_the_slower_end_sets_the_bandwidth(overlap):
    w = plant(gpus=32, transfer={"latency_s": 0.002, "overlap": overlap})
    cluster = Cluster(w, placement((8,), (4,)))
    a = cluster._groups()._replace(
        totals=cluster.state.view(np.recarray)[0],
        prefills=by_name(cluster.prefills),
        decodes=by_name(cluster.decodes),
    )
    sending = (1 - overlap) * 1000 * 327_680 / (4 * 41.25e9)
    assert send_kv(a, 0, 0, 1000, 1.0) == pytest.approx(1.0 + sending + 0.002, rel=1e-12)
    assert send_kv(a, 0, 0, 1000, 1.0) == pytest.approx(1.0 + 2 * sending + 0.002, rel=1e-12)
    assert a.prefills.meta["held_tokens"][0] == 2000


@pytest.fixture
def server():
    """A co-located server with five prompts of 600 tokens that wait, budget 1000."""
    w = plant(token_budget=1000, decode_max_seqs=8)
    cluster = Cluster(w, colocated((4,)))
    cluster.offer(trace([0.0], 100, 2))
    pool = by_name(cluster.decodes)
    pool.queue.prompt[0, :5] = 600
    set_decode(pool, head=0, tail=5, end=5, load_tokens=3000)
    return pool


def test_a_chunk_fills_what_is_left_of_the_budget(server):
    set_decode(server, batch=4, cached=4000)
    tokens, attn_work, _, n_seq = take_chunk(server, 0)
    assert (tokens, n_seq) == (996, 2)
    assert attn_work == 600**2 / 2 + 396**2 / 2
    meta = server.meta[0]
    assert (meta.next_head, meta.next_head_done, meta.load_tokens) == (1, 396, 2004)
    assert meta.reserved_tokens == 1200


def test_a_chunk_keeps_to_the_number_of_requests(server):
    set_decode(server, batch=7, cached=4000)
    tokens, _, _, n_seq = take_chunk(server, 0)
    assert (tokens, n_seq) == (600, 1)


def test_preempted_requests_come_before_new_prompts(server):
    set_decode(server, batch=2, cached=4000, preempted=1)
    assert take_chunk(server, 0).n_seq == 0
    assert server.meta[0].reserved_tokens == 0


def test_kv_of_prompts_in_progress_is_reserved(server):
    room = float(server.params["kv_capacity"][0]) * (1 - float(server.params["kv_watermark"][0]))
    set_decode(server, batch=1, cached=int(room) - 900)
    assert reserve(server, 0) == 1
    set_decode(server, reserved_tokens=400)
    assert reserve(server, 0) == 0
    set_decode(server, next_head_done=100)  # a prompt in progress has its room
    assert reserve(server, 0) == 1
    set_decode(server, batch=0, cached=0, reserved_tokens=0, next_head_done=0)
    server.queue.prompt[0, 0] = 10**6
    assert reserve(server, 0) == 1  # alone it is always taken: its length was checked before
