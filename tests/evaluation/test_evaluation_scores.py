"""Scores over operating points and training seeds: what their interval is made of."""

import math

import numpy as np
import pytest
from scipy import stats

from biscale_env.evaluation.stats.bootstrap import iqm
from biscale_env.evaluation.stats.scores import crossed_interval


def mean(values):
    return values.mean(axis=-1)


def still(scores, n_resamples=4000):
    """Windows that tell all alike: nothing moves under resampling."""
    return np.broadcast_to(scores, (n_resamples, *np.shape(scores)))


def test_training_seeds_have_students_interval():
    """Ten points per seed do not make up for few training seeds: the seeds are what is sampled."""
    per_seed = np.array([0.70, 0.74, 0.71, 0.78, 0.72])
    scores = np.tile(per_seed, (10, 1))
    found = crossed_interval(scores, still(scores, 20_000), np.random.default_rng(0), mean)
    half = stats.t.ppf(0.975, 4) * per_seed.std(ddof=1) / math.sqrt(5)
    assert found.estimate == pytest.approx(per_seed.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)


def test_windows_and_training_seeds_add_up():
    """Independent sources: variances add."""
    rng = np.random.default_rng(1)
    scores = rng.normal(0.7, 0.05, (4, 8))
    moved = scores + rng.normal(0.0, 0.03, (20_000, 1, 1))
    both = crossed_interval(scores, moved, rng, mean)
    seeds = crossed_interval(scores, still(scores, 20_000), rng, mean)
    spread = math.hypot(seeds.high - seeds.low, 2 * 1.96 * 0.03)
    assert both.high - both.low == pytest.approx(spread, rel=0.04)


def test_one_seed_speaks_of_itself_and_two_cannot_tell():
    rng = np.random.default_rng(2)
    one = crossed_interval(np.full((3, 1), 0.7), still(np.full((3, 1), 0.7)), rng)
    assert one == pytest.approx((0.7, 0.7, 0.7))
    two = crossed_interval(np.full((3, 2), 0.7), still(np.full((3, 2), 0.7)), rng)
    assert two.estimate == pytest.approx(0.7)
    assert math.isnan(two.low)


def test_a_lucky_seed_is_lucky_at_every_point():
    """The same seeds differ at ten points: ten points narrow nothing."""
    per_seed = np.array([0.6, 0.7, 0.8, 0.9])
    one, ten = (
        crossed_interval(scores, still(scores), np.random.default_rng(3), iqm)
        for scores in (per_seed[None], np.tile(per_seed, (10, 1)))
    )
    assert ten == pytest.approx(one, abs=0.02)


def test_interval_over_training_seeds_covers():
    """Five seeds at three points, seeds and windows both by chance."""
    rng = np.random.default_rng(4)
    hits = []
    for _ in range(400):
        lucky = rng.normal(0.0, 0.05, 5)
        scores = 0.7 + np.tile(lucky, (3, 1)) + rng.normal(0.0, 0.03)
        moved = scores + rng.normal(0.0, 0.03, (400, 1, 1))
        found = crossed_interval(scores, moved, rng, mean)
        hits.append(found.low <= 0.7 <= found.high)
    assert 0.92 <= np.mean(hits) <= 0.985
