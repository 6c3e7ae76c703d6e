"""Prefix caches in a cluster: a cache per prefill instance, and the router that asks them."""

from dataclasses import replace

import numpy as np
import pytest
from block_helpers import contents_of, with_blocks
from cluster_support import colocated, placement, plant, random_trace, trace
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_env.envs.cluster.engine import Cluster
from biscale_env.envs.cluster.whole_run import run_cluster, run_windows
from biscale_env.envs.loads.prefix_hits import cached_prefixes
from biscale_env.sim.cluster.layout import ROUTERS
from biscale_env.traces.prompts.prompt_blocks import PromptBlocks


def chat(n=200, seed=0, rate_rps=6.0):
    """Requests of which many begin alike."""
    rng = np.random.default_rng(seed)
    contents = [rng.integers(0, 2, 6).tolist() for _ in range(n)]
    return with_blocks(random_trace(n, rate_rps, seed), contents, 256)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 100), st.sampled_from(["lru", "lru:2000", "infinite"]))
def test_a_single_instance_finds_what_is_known_before_the_run(seed, rule):
    w, work = plant(prefix_cache=rule), chat(seed=seed)
    run = run_cluster(w, placement(), work)
    room = w.plant("prefill", 4).prefix_cache_tokens
    assert run.requests["cached_tokens"].tolist() == cached_prefixes(work, room).tolist()
    assert run.requests["prompt_tokens"].tolist() == work.prompt_tokens.tolist()


def test_the_same_pieces_find_the_same_as_the_whole():
    """Blocks keep their numbers from window to window, and the cache what it has."""
    w, work = plant(prefix_cache="lru:4000"), chat()
    whole = run_cluster(w, placement(), work)
    pieces, _ = run_windows(w, lambda k, before: placement(), work, window_s=5.0)
    assert pieces.requests["cached_tokens"].tolist() == whole.requests["cached_tokens"].tolist()
    np.testing.assert_allclose(pieces.requests["finish_s"], whole.requests["finish_s"])


@pytest.mark.parametrize("router", ROUTERS)
def test_books_balance_with_every_router(router):
    w = plant(prefill_router=router, decode_router=router, prefix_cache="lru:3000")
    cluster = Cluster(w, placement((4, 4), (4, 4)))
    cluster.offer(chat(rate_rps=20.0))
    cluster.advance()
    counts = cluster.counts()
    assert counts["finished"] == counts["arrived"] == 200
    left = ("queued", "decoding", "held_tokens", "load_tokens", "cached_tokens")
    assert not any(counts[name] for name in left)
    assert cluster.log["cached_tokens"].sum() > 0


def test_a_cache_that_is_off_changes_no_bit():
    work, both = chat(rate_rps=20.0), placement((4, 4), (4,))
    expected = run_cluster(plant(), both, work.without_blocks())
    off = run_cluster(plant(prefix_cache="off"), both, work)
    assert np.array_equal(off.requests, expected.requests)
    assert off.energy == expected.energy


def test_the_cache_aware_router_by_hand():
    """Two instances. The first two prompts differ; the third begins like the second."""
    blocks = PromptBlocks.of([0, 1, 2, 3, 2, 3, 4], [0, 2, 4, 7], 500)
    base = trace([0.0, 0.01, 20.0], [1000, 1000, 1500], 4)
    work = replace(base, blocks=blocks)
    w, two = plant(prefill_router="cache_aware"), placement((4, 4), (4,))
    run = run_cluster(w, two, work)
    assert run.requests["prefill"].tolist() == [0, 1, 1]
    assert run.requests["cached_tokens"].tolist() == [0, 0, 1000]
    # the shortest queue alone sends it to the first instance, which knows nothing of it
    run = run_cluster(plant(), two, work)
    assert run.requests["prefill"].tolist() == [0, 1, 0]
    assert not run.requests["cached_tokens"].any()
    # nor does the router where nobody says what prompts share
    run = run_cluster(w, two, base)
    assert run.requests["prefill"].tolist() == [0, 1, 0]


def test_a_long_queue_outweighs_a_prefix():
    """Everybody begins alike: without a bound on the load, one instance would serve all."""
    n = 60
    blocks = PromptBlocks.of([0, 1] * n, np.arange(n + 1) * 2, 1000)
    base = trace(np.linspace(0.0, 3.0, n), 2000, 4)
    work = replace(base, blocks=blocks)
    run = run_cluster(plant(prefill_router="cache_aware"), placement((4, 4), (4,)), work)
    assert (run.requests["cached_tokens"] > 0).mean() > 0.9
    # all new: the same number, with blocks of their own
    apart = replace(base, blocks=PromptBlocks.of(np.arange(2 * n), np.arange(n + 1) * 2, 1000))
    run = run_cluster(plant(prefill_router="cache_aware"), placement((4, 4), (4,)), apart)
    assert 20 <= (run.requests["prefill"] == 0).sum() <= 40


def test_prefixes_are_found_more_often_by_the_router_that_asks_for_them():
    shares = {}
    for router in ("shortest", "round_robin", "cache_aware"):
        run = run_cluster(plant(prefill_router=router), placement((4, 4, 4), (4,)), chat(400))
        shares[router] = float(run.requests["cached_tokens"].sum())
    assert shares["cache_aware"] > 1.1 * max(shares["shortest"], shares["round_robin"])


def test_co_located_servers_have_no_cache():
    work = chat(60)
    run = run_cluster(plant(), colocated((4,)), work)
    assert not run.requests["cached_tokens"].any()
    expected = run_cluster(plant(), colocated((4,)), work.without_blocks())
    assert np.array_equal(run.requests, expected.requests)


@settings(max_examples=10, deadline=None)
@given(contents_of(40))
def test_a_tight_kv_room_still_serves_everybody(contents):
    """Cached prefixes of a batch count against what is kept for decode."""
    work = with_blocks(random_trace(40, 40.0, prompt_max=6000), contents, 256)
    w = plant(transfer={"gb_per_s_per_gpu": 0.5})
    cluster = Cluster(w, placement())
    cluster.prefills.params["kv_capacity"][:] = 9000
    cluster.offer(work)
    cluster.advance()
    assert cluster.counts()["finished"] == 40
    assert cluster.counts()["held_tokens"] == 0
