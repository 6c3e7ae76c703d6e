"""The hindsight optimum of a cluster's prefill stage, with prefixes that the cluster found.

Every instance is solved by itself on the requests that the router sent it. That is sound only if
the instance alone finds the same prefixes, and so does the same work, as it did in the cluster.
"""

import numpy as np
import pytest
from block_helpers import with_blocks
from cluster_support import placement, plant, random_trace

from biscale_env.envs.cluster.cluster_settings import ClusterSettings
from biscale_env.envs.cluster.whole_run import run_cluster
from biscale_env.envs.loads.capacity import run_static
from biscale_env.envs.loads.prefix_hits import cached_prefixes
from biscale_env.reproduce.experiment import ReproductionJob, oracle_figures, routed_requests

CLOCKS_MHZ = (705.0, 900.0, 1110.0, 1410.0, 1695.0, 1980.0)


def chats(n=60, seed=2, rate_rps=3.0):
    """Requests of which many begin alike."""
    rng = np.random.default_rng(seed)
    contents = [rng.integers(0, 2, 6).tolist() for _ in range(n)]
    return with_blocks(random_trace(n, rate_rps, seed, prompt_max=5000), contents, 256)


@pytest.fixture(scope="module", params=["shortest", "cache_aware"])
def routed(request):
    """Settings, placement, workload and run of two prefill instances with caches."""
    values = {"prefill_router": request.param, "prefix_cache": "lru:8000"}
    both, work = placement((4, 4), (4,)), chats()
    run = run_cluster(plant(**values), both, work)
    assert len(np.unique(run.requests["prefill"])) == 2
    assert run.requests["cached_tokens"].sum() > 0.1 * run.requests["prompt_tokens"].sum()
    return ClusterSettings.of(actuation_delay_s=0.0, **values), both, work, run


def test_an_instance_alone_finds_the_prefixes_that_it_found_in_the_cluster(routed):
    settings, _, work, run = routed
    alone = plant(prefill_router=settings.prefill_router, prefix_cache="lru:8000")
    one = alone.plant("prefill", 4)
    for i in (0, 1):
        mine = run.requests[run.requests["prefill"] == i]
        trace = routed_requests(mine, work)
        assert trace.prompt_tokens.tolist() == work.prompt_tokens[mine["request"]].tolist()
        hits = cached_prefixes(trace, one.prefix_cache_tokens)
        assert hits.tolist() == mine["cached_tokens"].tolist()
        # and so its batches end when they ended there
        ran = run_static(one, trace, one.clocks.freq_max_mhz)
        ttft_s = mine["first_token_s"] - mine["arrival_s"]
        np.testing.assert_allclose(ran.latency_s, ttft_s, rtol=1e-9)


@pytest.mark.slow
def test_no_clock_needs_less_than_the_hindsight_optimum(routed):
    """Energy of the optimum against every instance's best single clock on the same requests."""
    settings, both, work, run = routed
    job = ReproductionJob({}, settings, (), (), (), 3.0, 60.0)
    found = oracle_figures(job, run.requests, both, work)
    one = plant(prefix_cache="lru:8000").plant("prefill", 4)
    best_j = 0.0
    for i in np.unique(run.requests["prefill"]):
        trace = routed_requests(run.requests[run.requests["prefill"] == i], work)
        spent = []
        for freq_mhz in CLOCKS_MHZ:
            ran = run_static(one, trace, freq_mhz)
            if one.slo.attained(ran.latency_s, "prefill") >= one.slo.attainment:
                spent.append(ran.energy_j)
        best_j += min(spent)
    tokens = int(run.requests["output_tokens"].sum())
    optimum = found["prefill_j_per_token"]
    assert 0.0 <= found["oracle_gap"] < 0.05
    assert optimum <= best_j / tokens * (1 + 1e-3)
    # the bound below it stays below every clock too
    assert optimum / (1 + found["oracle_gap"]) <= best_j / tokens
    # without the cache the same requests cost more: the prefixes do count in the optimum
    without = settings.model_copy(update={"prefix_cache": "off"})
    off = ReproductionJob({}, without, (), (), (), 3.0, 60.0)
    assert oracle_figures(off, run.requests, both, work)["prefill_j_per_token"] > 1.05 * optimum
