"""Generated sessions: chats that grow, questions about one document, and Mooncake's statistics."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biscale_env.envs.loads.prefix_hits import cached_prefixes
from biscale_env.traces import generate, load_workload, with_lengths
from biscale_env.traces.prompts.prompt_blocks import PromptBlocks
from biscale_env.traces.synthetic.synthesize import WorkloadRecipe

CHATS = load_workload("chat-sessions")


def rows_of(b: PromptBlocks):
    return [b.ids[x:y] for x, y in zip(b.starts, b.starts[1:], strict=False)]


def varied(**changes):
    sessions = CHATS.sessions.model_copy(update=changes)
    return CHATS.model_copy(update={"sessions": sessions})


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    grows=st.booleans(),
    block=st.sampled_from([16, 100, 512]),
    system=st.sampled_from([(0, 0), (2, 300)]),
)
def test_turns_begin_with_what_was_said_before(seed, grows, block, system):
    """Blocks are counted by the prompts; turns of a session share exactly what they have to."""
    profile = varied(
        grows=grows, block_tokens=block, system_prompts=system[0], system_tokens=system[1]
    )
    trace = generate(profile, rate_rps=2.0, duration_s=120.0, seed=seed)
    b, rows = trace.blocks, rows_of(trace.blocks)
    assert (b.counts == -(-trace.prompt_tokens.astype(np.int64) // block)).all()
    assert (trace.prompt_tokens > system[1]).all()
    last, first_rows = {}, []
    for i, session in enumerate(b.session.tolist()):
        if session in last:
            j = last[session]
            same = int(
                np.argmin(np.append(rows[i][: len(rows[j])] == rows[j][: len(rows[i])], False))
            )
            if grows:
                assert trace.prompt_tokens[i] > trace.prompt_tokens[j] + trace.output_tokens[j]
                assert same == trace.prompt_tokens[j] // block
            else:
                assert same <= min(trace.prompt_tokens[i], trace.prompt_tokens[j]) // block
        else:
            first_rows.append(rows[i])
        last[session] = i
    shared = system[1] // block
    beginnings = {tuple(row[:shared].tolist()) for row in first_rows}
    assert len(beginnings) <= max(system[0], 1)
    others = np.concatenate([row[shared:] for row in first_rows])
    assert len(np.unique(others)) == others.size  # sessions share nothing else


def test_arrivals_are_those_of_the_process_whatever_the_sessions_are():
    plain = CHATS.model_copy(update={"sessions": None})
    trace, alone = (generate(p, seed=5, duration_s=300.0) for p in (CHATS, plain))
    assert np.array_equal(trace.arrival_s, alone.arrival_s)
    assert alone.blocks is None
    gaps = [
        np.diff(trace.arrival_s[trace.blocks.session == s]) for s in np.unique(trace.blocks.session)
    ]
    assert np.concatenate(gaps).mean() == pytest.approx(CHATS.sessions.think_mean_s, rel=0.35)


def test_long_chats_end():
    trace = generate(varied(longest_tokens=3000, turns_mean=40.0), duration_s=600.0, seed=1)
    last_but_one = [trace.prompt_tokens[trace.blocks.session == s][:-1] for s in range(50)]
    assert np.concatenate(last_but_one).max() < 3000


def test_the_statistics_of_mooncakes_synthetic_trace():
    profile = load_workload("mooncake-synthetic-like")
    told = profile.measured
    traces = [generate(profile, seed=seed) for seed in range(4)]
    found = {
        "requests": [len(t) for t in traces],
        "sessions": [len(np.unique(t.blocks.session)) for t in traces],
        "repeated_sessions": [(np.bincount(t.blocks.session) > 1).sum() for t in traces],
        "prompt_tokens_mean": [t.prompt_tokens.mean() for t in traces],
        "output_tokens_mean": [t.output_tokens.mean() for t in traces],
    }
    for name, values in found.items():
        assert np.mean(values) == pytest.approx(told[name], rel=0.07), name
    shares = [cached_prefixes(t, None).sum() / t.prompt_tokens.sum() for t in traces]
    assert np.mean(shares) == pytest.approx(told["cached_share"], abs=0.03)
    little = [cached_prefixes(t, 406_000).sum() / t.prompt_tokens.sum() for t in traces]
    assert np.mean(little) == pytest.approx(0.075, abs=0.02)  # the trace in the KV room of TP4


def test_other_lengths_know_no_sessions():
    assert generate("chat-sessions", duration_s=60.0).blocks is not None
    assert with_lengths(generate("chat-sessions", duration_s=60.0), "azure-conv", 0).blocks is None
    from biscale_env.traces import load_lengths

    recipe = WorkloadRecipe.of("chat-sessions", load_lengths("azure-conv"))
    assert recipe.make(2.0, 60.0, 0).blocks is None
    assert recipe.digest != WorkloadRecipe.of("chat-sessions").digest
