"""Books of the cluster under any load, rule, router and change of placement.

Requests in are finished or in flight, tokens are where they belong, and energy is that of the
instances and nothing else.
"""

import numpy as np
import pytest
from cluster_support import colocated, idle_w, placement, plant, random_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_env.envs.cluster.engine import PHASES, Cluster
from biscale_env.sim.cluster.layout import ROUTERS

RULES = st.tuples(
    st.sampled_from(["static", "mpc", "ecofreq", "throttllem"]),
    st.sampled_from(["static", "slack", "ecofreq", "throttllem"]),
)
SHAPES = [((4,), (4, 4)), ((4, 4), (4,)), ((8,), (4, 4)), ((4,), (8,))]


def check_books(cluster):
    """What must hold between any two events."""
    c = cluster.counts()
    assert c["arrived"] == c["finished"] + c["queued"] + c["decoding"]
    assert cluster.in_flight == c["arrived"] - c["finished"]
    energies = cluster.energies()
    for phase, total, idle in (
        ("prefill", energies.prefill_j, energies.prefill_idle_j),
        ("decode", energies.decode_j, energies.decode_idle_j),
    ):
        arrays = cluster._arrays[phase]
        assert total == pytest.approx(arrays.past["energy_j"] + sum(arrays.states["energy_j"]))
        assert 0.0 <= idle <= total * (1 + 1e-12)
    used = sum(cluster.gpu_seconds(phase) for phase in PHASES)
    assert energies.spare_j == pytest.approx(
        72.0 * max(cluster.plant.settings.gpus * cluster.time_s - used, 0.0)
    )
    assert energies.total_j == pytest.approx(
        energies.prefill_j + energies.decode_j + energies.spare_j
    )


def check_nothing_left(cluster, offered_tokens, requests):
    c = cluster.counts()
    assert c["arrived"] == c["finished"] == requests
    assert c["held_tokens"] == c["load_tokens"] == c["cached_tokens"] == c["reserved_tokens"] == 0
    assert cluster.state[0]["produced_tokens"] == offered_tokens
    assert cluster.state[0]["prefilled_tokens"] == offered_tokens


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.floats(2.0, 60.0),
    both=RULES,
    routers=st.tuples(st.sampled_from(ROUTERS), st.sampled_from(ROUTERS)),
    shapes=st.lists(st.sampled_from(SHAPES), min_size=2, max_size=4),
    cold_s=st.sampled_from([0.0, 0.7]),
)
def test_books_balance_through_changes_of_the_placement(seed, rate, both, routers, shapes, cold_s):
    w = plant(
        gpus=32,
        prefill_policy=both[0],
        decode_policy=both[1],
        prefill_router=routers[0],
        decode_router=routers[1],
        actuation_delay_s=0.02,
        transitions={"cold_start_s": cold_s, "reshard_s": cold_s / 2},
    )
    pieces = [random_trace(40, rate_rps=rate, seed=seed + k) for k in range(len(shapes))]
    cluster = Cluster(w, placement(*shapes[0], freq_mhz=1395.0), seed=seed)
    finished, before = [], 0.0
    for k, (shape, piece) in enumerate(zip(shapes, pieces, strict=True)):
        if k:
            cluster.place(placement(*shape, freq_mhz=(1200.0, 1605.0)[k % 2]))
        cluster.offer(piece)
        cluster.advance(cluster.time_s + float(piece.arrival_s[-1]) + 1e-3)
        finished.append(cluster.log)
        check_books(cluster)
        assert cluster.energies().total_j > before
        before = cluster.energies().total_j
    cluster.advance()
    finished.append(cluster.log)
    check_books(cluster)
    logged = np.sort(np.concatenate(finished), order="request")
    np.testing.assert_array_equal(logged["request"], np.arange(40 * len(shapes)))
    tokens = sum(int(piece.output_tokens.sum()) for piece in pieces)
    check_nothing_left(cluster, tokens, 40 * len(shapes))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.floats(1.0, 40.0),
    both=RULES,
    budget=st.sampled_from([256, 2048, 8192]),
    long=st.booleans(),
)
def test_books_balance_on_colocated_servers(seed, rate, both, budget, long):
    w = plant(token_budget=budget, decode_policy=both[1], decode_router="shortest")
    t = random_trace(60, rate, seed, 20_000 if long else 1500, 900 if long else 100)
    cluster = Cluster(w, colocated((4, 8), freq_mhz=1605.0), seed=seed)
    cluster.offer(t)
    for until in (0.5, 2.0, 6.0):
        cluster.advance(until)
        check_books(cluster)
    cluster.advance()
    check_books(cluster)
    check_nothing_left(cluster, int(t.output_tokens.sum()), 60)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), rate=st.floats(1.0, 30.0), shared=st.booleans())
def test_time_and_idle_energy_of_every_instance(seed, rate, shared):
    """At one clock an instance is busy or waits, and waiting costs idle power: by hand."""
    freq_mhz, end_s = 1395.0, 400.0
    w = plant(gpus=32)
    where = colocated((4, 8), freq_mhz) if shared else placement((4, 8), (4, 8), freq_mhz)
    cluster = Cluster(w, where, seed=seed)
    cluster.offer(random_trace(80, rate, seed))
    cluster.advance(3.0)
    if not shared:
        cluster.place(placement((8,), (4, 8, 8), freq_mhz))
    cluster.advance(end_s)
    assert cluster.in_flight == 0
    check_books(cluster)
    for phase in PHASES:
        arrays = cluster._arrays[phase]
        for tp, state, meta in zip(arrays.tps, arrays.states, arrays.meta, strict=True):
            out_s = min(meta["retired_s"], end_s)
            assert state["time_s"] == pytest.approx(out_s)
            waited_s = out_s - meta["born_s"] - state["busy_s"]
            assert waited_s >= -1e-9
            power_w = idle_w(w.plant(phase, int(tp)).model, freq_mhz)
            assert state["energy_idle_j"] == pytest.approx(power_w * waited_s, rel=1e-9, abs=1e-6)
            busy_w = (state["energy_j"] - state["energy_idle_j"]) / max(state["busy_s"], 1e-9)
            assert state["busy_s"] == 0 or power_w < busy_w <= 700.0 * tp * (1 + 1e-6)
