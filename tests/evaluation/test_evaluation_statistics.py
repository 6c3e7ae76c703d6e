"""The mean of the middle half and percentiles, against known answers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biscale_env.evaluation.stats.bootstrap import iqm, percentile_interval, student_interval


def test_iqm_is_the_mean_of_the_middle_half():
    assert iqm([0, 1, 2, 3, 4, 5, 6, 1000]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert math.isnan(iqm([]))
    assert iqm(np.arange(16.0).reshape(2, 8)) == pytest.approx([3.5, 11.5])


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.floats(-10, 10), st.floats(0.1, 10)
)
def test_iqm_lies_within_the_data_and_moves_with_it(values, shift, scale):
    assert min(values) - 1e-9 <= iqm(values) <= max(values) + 1e-9
    moved = iqm([scale * v + shift for v in values])
    assert moved == pytest.approx(scale * iqm(values) + shift, abs=1e-6)


def test_students_interval_by_hand():
    """Values 1, 2, 3: mean 2, standard error 1 / sqrt(3), and t(0.975, 2) = 4.302653."""
    half = 4.302652729911275 / math.sqrt(3)
    assert student_interval([1.0, np.nan, 2.0, 3.0]) == pytest.approx((2.0, 2.0 - half, 2.0 + half))
    assert student_interval([1.0, 1.0]) == (1.0, 1.0, 1.0)
    assert student_interval([1.5]).estimate == 1.5
    assert math.isnan(student_interval([1.5]).low)
    assert math.isnan(student_interval([]).estimate)


def test_percentiles_of_what_is_known():
    values = [*np.arange(101.0), np.nan]
    assert percentile_interval(50.0, values) == pytest.approx((50.0, 2.5, 97.5))
    assert percentile_interval(50.0, values, 0.5) == pytest.approx((50.0, 25.0, 75.0))
    unknown = percentile_interval(1.0, [np.nan, np.nan])
    assert unknown.estimate == 1.0
    assert math.isnan(unknown.low)
    assert math.isnan(unknown.high)
