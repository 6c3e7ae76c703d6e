"""Levels looked up by table are those of bisection; whole workloads keep their digests."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.checks import check_lengths, check_times
from biscale_env.traces.synthetic.arrival_times import PiecewiseRate
from biscale_env.traces.synthetic.inverse_cdf import CELLS, InverseCdf, LevelIndex, Segments
from biscale_env.traces.synthetic.profiles import Quantiles, load_lengths
from biscale_env.traces.synthetic.synthesize import WorkloadRecipe

PARTS = st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=60)


@given(PARTS, st.lists(st.floats(0.0, 1.0), max_size=50))
def test_the_index_counts_as_bisection_does(parts, asked):
    levels = np.cumsum(parts) / np.sum(parts)
    ends = np.concatenate([levels, np.nextafter(levels, 0), np.arange(CELLS + 1) / CELLS])
    x = np.concatenate([asked, ends, [0.0, 1.0]]).clip(0.0, 1.0)
    expected = np.searchsorted(levels, x, side="right")
    assert np.array_equal(LevelIndex.of(levels).count(x), expected)


@given(PARTS, st.integers(0, 2**32 - 1))
def test_segments_are_those_of_numpy(parts, seed):
    levels = np.unique(np.append(np.cumsum(parts) / np.sum(parts), 0.0))
    if (np.diff(levels) < 1e-12).any():
        return
    rng = np.random.default_rng(seed)
    values = np.sort(rng.uniform(1, 1e5, levels.size))
    x = np.concatenate([rng.random(40), levels, [0.0, 1.0]]).clip(0.0, 1.0)
    assert Segments.of(levels, values).at(x) == pytest.approx(np.interp(x, levels, values))


def test_quantiles_hold_at_their_levels_and_between():
    cdf = InverseCdf.of(Quantiles(levels=(0.0, 0.25, 1.0), tokens=(1.0, 11.0, 311.0)))
    level = np.array([0.0, 0.125, 0.25, 0.5, 1.0])
    assert cdf.at(level).tolist() == [1, 6, 11, 111, 311]


@pytest.mark.parametrize("name", ["azure-conv", "azure-code"])
def test_shipped_lengths_are_those_of_bisection(name):
    profile = load_lengths(name)
    level = np.random.default_rng(3).random(20_000)
    for marginal in (profile.prompt_tokens, profile.output_tokens):
        expected = np.rint(np.interp(level, marginal.levels, marginal.tokens)).astype(int)
        assert np.array_equal(InverseCdf.of(marginal).at(level), expected)


DIGEST = "5f82210e2a74d19f"


def test_workloads_are_what_they_were():
    """Workload k is the same in every version: policies of different versions are compared."""
    told = hashlib.sha256()
    for name in ("azure-conv-like", "azure-code-like", "poisson-sharegpt-pd"):
        recipe = WorkloadRecipe.of(name)
        for seed in range(5):
            trace = recipe.make(4.0, 60.0, seed)
            told.update(np.round(trace.arrival_s, 9).tobytes())
            told.update(trace.prompt_tokens.tobytes() + trace.output_tokens.tobytes())
    assert told.hexdigest()[:16] == DIGEST


def test_a_constant_rate_only_scales_another():
    edges, rate = np.array([0.0, 1.5, 4.0]), np.array([2.0, 3.0])
    made = PiecewiseRate(np.array([0.0, 4.0]), np.array([5.0])) * PiecewiseRate(edges, rate)
    assert np.array_equal(made.edges_s, edges)
    assert np.array_equal(made.rate, 5.0 * rate)
    shorter = PiecewiseRate(np.array([0.0, 2.0]), np.array([5.0])) * PiecewiseRate(edges, rate)
    assert np.array_equal(shorter.edges_s, [0.0, 1.5, 2.0, 4.0])


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ([0.0, np.nan, 2.0], "request 1: arrival_s is missing or not a finite"),
        ([np.nan], "request 0: arrival_s is missing or not a finite"),
        ([0.0, np.inf], "request 1: arrival_s is missing or not a finite"),
        ([-1.0, 2.0], "request 0: arrival_s is -1 s"),
        ([0.0, 2.0, 1.0], "request 2: arrival_s lies 1 s before the row above"),
    ],
)
def test_what_is_wrong_does_not_take_the_short_way(times, told):
    with pytest.raises(BiscaleError, match=told):
        check_times(np.array(times), lambda i: f"request {i}")


def test_times_follow_those_of_the_rows_before():
    check_times(np.array([3.0, 3.0]), str, after_s=3.0)
    with pytest.raises(BiscaleError, match="lies 1 s before"):
        check_times(np.array([3.0, 4.0]), str, after_s=4.0)
    check_times(np.array([-1.0, 2.0]), str, is_relative=True)
    check_times(np.array([]), str)


def test_whole_lengths_are_checked_on_the_short_way_too():
    check_lengths(np.array([1, 7], dtype=np.int32), "tokens", str)
    check_lengths(np.array([], dtype=np.int64), "tokens", str)
    with pytest.raises(
        BiscaleError, match="1: tokens is 0; a length must be a whole number from 1"
    ):
        check_lengths(np.array([1, 0]), "tokens", str)
    with pytest.raises(BiscaleError, match=r"tokens is 4\.29497e"):
        check_lengths(np.array([2**32]), "tokens", str)
