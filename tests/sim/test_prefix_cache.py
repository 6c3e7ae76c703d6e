"""The prefix cache: what it finds, what it gives up, and what an instance then computes."""

from dataclasses import replace

import numpy as np
import pytest
from block_helpers import contents_of, slow_hits, with_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_helpers import ROW, plant_of, trace_of

from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.loads.capacity import run_static
from biscale_env.envs.loads.prefix_hits import cached_prefixes
from biscale_env.traces import Trace
from biscale_env.traces.prompts.prompt_blocks import PromptBlocks


@st.composite
def shared_traces(draw, most=12, longest=400):
    """Traces of up to ``most`` requests that share prefixes of blocks of 16 or 100 tokens."""
    n = draw(st.integers(1, most))
    prompts = draw(st.lists(st.integers(1, longest), min_size=n, max_size=n))
    gaps = draw(st.lists(st.sampled_from([0.0, 0.01, 0.3]), min_size=n, max_size=n))
    contents, block = draw(contents_of(n)), draw(st.sampled_from([16, 100]))
    return with_blocks(trace_of(gaps, prompts, tail_s=0.1), contents, block)


@settings(deadline=None)
@given(shared_traces(), st.integers(1, 1500))
def test_hits_are_those_of_an_ordered_dictionary(trace, capacity):
    assert cached_prefixes(trace, capacity).tolist() == slow_hits(trace, capacity)
    assert cached_prefixes(trace, None).tolist() == slow_hits(trace, np.inf)


@settings(deadline=None)
@given(shared_traces(), st.integers(1, 800), st.integers(0, 800))
def test_more_room_never_finds_less(trace, capacity, more):
    less_found = cached_prefixes(trace, capacity)
    assert (less_found <= cached_prefixes(trace, capacity + more)).all()
    assert (less_found < trace.prompt_tokens).all()
    assert not cached_prefixes(trace, 0).any()
    assert not cached_prefixes(trace.without_blocks(), capacity).any()


def test_the_end_of_a_prefix_is_given_up_before_its_beginning():
    """Three blocks of 10 tokens; then a prompt of one other block where three blocks have room."""
    blocks = PromptBlocks.of([0, 1, 2, 7, 0, 1, 2], [0, 3, 4, 7], 10)
    trace = replace(trace_of([0, 1, 1], [30, 10, 30]), blocks=blocks)
    assert cached_prefixes(trace, 30).tolist() == [0, 0, 20]
    assert cached_prefixes(trace, 40).tolist() == [0, 0, 29]  # one token is always new


def test_a_part_of_a_block_takes_only_its_tokens():
    blocks = PromptBlocks.of([0, 1, 0, 0], [0, 1, 2, 3, 4], 100)
    trace = replace(trace_of([0, 1, 1, 1], [40, 60, 40, 40]), blocks=blocks)
    assert cached_prefixes(trace, 100).tolist() == [0, 0, 39, 39]
    assert cached_prefixes(trace, 99).tolist() == [0, 0, 0, 39]


def by_hand(plant, trace):
    """One prompt and, long after it, one that begins with it: their durations at max clock."""
    run = run_static(plant, trace, 1980.0)
    return run.latency_s


def test_only_the_rest_is_computed_and_attention_sees_the_prefix():
    plant = plant_of("prefill", prefix_cache="infinite")
    blocks = PromptBlocks.of([0, 1, 0, 1, 2], [0, 2, 5], 500)
    trace = replace(trace_of([0, 50], [1000, 1400]), blocks=blocks)
    latency = plant.model.latency_s
    expected = [float(latency(1000, 500_000, 0, 1, 1980.0))]
    expected.append(float(latency(400, 400 * (200 + 1000), 0, 1, 1980.0)))
    np.testing.assert_allclose(by_hand(plant, trace), expected, rtol=1e-9)
    off = by_hand(plant_of("prefill", prefix_cache="off"), trace)
    assert off[1] == pytest.approx(float(latency(1400, 980_000, 0, 1, 1980.0)), rel=1e-9)


def test_room_is_the_kv_of_the_instance_or_what_was_asked_for():
    assert plant_of("prefill").prefix_cache_tokens == plant_of("prefill").kv_capacity_tokens
    assert plant_of("prefill", prefix_cache="off").prefix_cache_tokens == 0
    assert plant_of("prefill", prefix_cache="infinite").prefix_cache_tokens is None
    assert plant_of("prefill", prefix_cache="lru:5000").prefix_cache_tokens == 5000
    most = plant_of("prefill", prefix_cache=f"lru:{10**9}").prefix_cache_tokens
    assert most == plant_of("prefill").kv_capacity_tokens


def test_decode_holds_the_whole_prompt():
    blocks = PromptBlocks.of([0, 0], [0, 1, 2], 500)
    trace = replace(trace_of([0, 1], [500, 500]), blocks=blocks)
    table = RequestTable.of(plant_of("decode"), [trace])
    assert table.prompt.tolist() == [500, 500]
    assert not table.prefix.any()
    prefill = RequestTable.of(plant_of("prefill"), [trace, trace])
    assert prefill.prompt.tolist() == [500, 1, 500, 1]  # each workload has a cache of its own
    assert prefill.cumulative.tolist() == [0, 500, 501, 1001, 1002]


def trajectory(plant, trace: Trace):
    batch = Batch(plant, 1, RequestTable.of(plant, [trace]), record=True)
    batch.reset(ROW, ROW, np.array([-1]))
    seen = [batch.obs.copy()]
    rng = np.random.default_rng(0)
    while not batch.done[0]:
        batch.step(rng.uniform(-1, 1, 1).astype(np.float32))
        seen.append(np.concatenate([batch.obs[0], batch.reward])[None])
    return seen, batch.finish_s


@settings(max_examples=10, deadline=None)
@given(shared_traces(longest=4000))
def test_a_cache_that_is_off_changes_no_bit(trace):
    """Nor does a cache where the trace does not say what prompts share."""
    runs = [
        trajectory(plant_of("prefill", prefix_cache="off"), trace),
        trajectory(plant_of("prefill", prefix_cache="lru"), trace.without_blocks()),
        trajectory(plant_of("prefill", prefix_cache="off"), trace.without_blocks()),
    ]
    for seen, finish_s in runs[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(seen, runs[0][0], strict=True))
        assert np.array_equal(finish_s, runs[0][1], equal_nan=True)


@settings(max_examples=20, deadline=None)
@given(shared_traces(longest=4000), st.sampled_from([512, 2048]))
def test_the_observation_counts_what_is_to_be_computed(trace, budget):
    plant = plant_of("prefill", token_budget=budget, prefix_cache="lru:2000")
    table = RequestTable.of(plant, [trace])
    batch = Batch(plant, 1, table)
    batch.reset(ROW, ROW, np.array([-1]))
    value = plant.spec.value
    while not batch.done[0]:
        st_ = batch.states[0]
        left = table.prompt[st_["head"] : st_["tail"]].sum() - st_["head_done"]
        assert value(batch.obs[0], "queue_tokens") == pytest.approx(left, rel=1e-6)
        assert value(batch.obs[0], "batch_tokens") == pytest.approx(min(left, budget), rel=1e-6)
        batch.step(np.ones(1, dtype=np.float32))
