"""Batches of prompts that wait already: nothing is lost, and the engine's limits hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biscale_env.sim.prefill_plan import equal_prompts, prefill_batches


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=20),
    st.integers(1, 4096),
    st.integers(1, 8),
    st.integers(0, 3000),
)
def test_batches_hold_every_token_and_every_pair_once(prompts, budget, max_seqs, prefix):
    lengths = np.array(prompts, dtype=np.int32)
    works = np.array(prefill_batches(lengths, budget, max_seqs, prefix))
    tokens, pairs, cached, n_seq = works.T
    assert tokens.sum() == lengths.sum()
    assert (tokens <= budget).all()
    assert (n_seq <= max_seqs).all()
    assert not cached.any()
    exact = lengths.astype(float)
    assert pairs.sum() == pytest.approx(np.sum(exact**2 / 2 + exact * prefix), rel=1e-12)


def test_a_long_prompt_runs_in_chunks_and_the_next_one_joins_the_last():
    works = prefill_batches(np.array([2500, 600], dtype=np.int32), 1024, 512)
    assert [w[0] for w in works] == [1024, 1024, 1024, 28]
    assert [w[3] for w in works] == [1, 1, 2, 1]
    assert works[1][1] == 1024 * (512 + 1024)
    assert works[2][1] == 452 * (226 + 2048) + 572 * 286


@given(st.integers(1, 10**6), st.integers(1, 100))
def test_equal_prompts_share_all_tokens(tokens, requests):
    lengths = equal_prompts(tokens, requests)
    assert lengths.sum() == tokens
    assert lengths.max() - lengths.min() <= 1
