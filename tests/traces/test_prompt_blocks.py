"""Sessions and block hashes of a trace: chosen, cut, copied and digested with its requests."""

from dataclasses import replace

import numpy as np
import pytest
from block_helpers import contents_of, slow_hits, with_blocks
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_env.core.errors import BiscaleError
from biscale_env.traces import Trace
from biscale_env.traces.prompts.prompt_blocks import PromptBlocks, joined


def made(prompts, gap_s=1.0):
    n = len(prompts)
    times = np.arange(n) * gap_s
    return Trace("made", times, np.array(prompts), np.full(n, 3), "test", n * gap_s)


@st.composite
def shared(draw, most=15):
    n = draw(st.integers(1, most))
    prompts = draw(st.lists(st.integers(1, 300), min_size=n, max_size=n))
    return with_blocks(made(prompts), draw(contents_of(n)), 32)


def rows_of(blocks):
    return [
        blocks.ids[a:b].tolist() for a, b in zip(blocks.starts, blocks.starts[1:], strict=False)
    ]


@settings(deadline=None)
@given(shared(), st.data())
def test_taking_requests_takes_their_blocks(trace, data):
    n = len(trace)
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), dtype=np.intp)
    rows = rows_of(trace.blocks)
    taken = trace.blocks.take(index)
    assert rows_of(taken) == [rows[i] for i in index]
    assert taken.session.tolist() == trace.blocks.session[index].tolist()
    cut = data.draw(st.integers(0, n))
    again = joined([trace.blocks.take(slice(0, cut)), trace.blocks.take(slice(cut, n))])
    assert again.content() == trace.blocks.content()


@settings(deadline=None)
@given(shared(), st.integers(0, 5))
def test_numbers_do_not_matter(trace, seed):
    """Neither for the digest nor for what a load chooses."""
    rng = np.random.default_rng(seed)
    b = trace.blocks
    ids, sessions = rng.permutation(b.n_ids), 10**9 + rng.permutation(b.n_sessions)
    other = replace(
        trace, blocks=PromptBlocks.of(ids[b.ids], b.starts, b.block_tokens, sessions[b.session])
    )
    assert other.sha256 == trace.sha256
    assert other.scaled_to(0.6, seed).sha256 == trace.scaled_to(0.6, seed).sha256
    assert trace.without_blocks().sha256 != trace.sha256


def test_a_load_is_made_of_whole_sessions_and_lower_ones_are_part_of_higher_ones():
    rng = np.random.default_rng(1)
    session = rng.integers(0, 80, 400)
    blocks = PromptBlocks.of(np.arange(400), np.arange(401), 64, session)
    trace = replace(made(rng.integers(1, 64, 400)), blocks=blocks)
    chosen = [set(trace.scaled_to(rate, 7).arrival_s.tolist()) for rate in (0.3, 0.6)]
    assert chosen[0] < chosen[1]
    for times in chosen:
        kept = np.isin(trace.arrival_s, sorted(times))
        for s in np.unique(session):
            assert len(set(kept[session == s].tolist())) == 1
    assert len(chosen[1]) == pytest.approx(240, abs=60)


def test_copies_share_nothing_with_each_other():
    trace = with_blocks(made([64] * 40), [[0, 1]] * 40, 32)
    double = trace.scaled_to(2 * trace.rate_rps, 3)
    assert len(double) == 80
    assert double.blocks.n_ids == 2 * trace.blocks.n_ids
    assert len(np.unique(double.blocks.ids)) == 4
    assert sum(hit == 0 for hit in slow_hits(double, np.inf)) == 2  # the first of each copy


def test_windows_keep_the_numbers_of_the_whole():
    trace = with_blocks(made([64, 64, 96, 32]), [[0, 0], [0, 1], [0, 1, 0], [1]], 32)
    part = trace.window(1.0, 3.0)
    assert rows_of(part.blocks) == rows_of(trace.blocks)[1:3]
    assert part.blocks.n_ids == trace.blocks.n_ids


def test_sessions_are_told_by_what_prompts_share():
    """A chat of three turns, a request of its own, and one that shares but a system prompt."""
    ids = [0, 1, 9, 0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 7]
    blocks = PromptBlocks.of(ids, [0, 2, 3, 7, 12, 14], 10)
    first, other, second, third, system = blocks.session.tolist()
    assert first == second == third
    assert len({first, other, system}) == 3


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (PromptBlocks.of([0, 1], [0, 1, 2], 10), "blocks of 2 prompts for 1 requests"),
        (PromptBlocks.of([0, 1, 2], [0, 3], 10), "request 0: 3 blocks of 10 tokens are more"),
    ],
)
def test_blocks_must_belong_to_the_prompts(blocks, words):
    with pytest.raises(BiscaleError, match=words):
        replace(made([20]), blocks=blocks)
    with pytest.raises(BiscaleError, match="at least 1 token"):
        PromptBlocks.of([0], [0, 1], 0)
