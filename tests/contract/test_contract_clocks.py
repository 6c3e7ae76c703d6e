"""Clocks and actions: the map, the grid, and that Python and compiled code agree on both."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from reference_sim import Settings

from biscale_env.config import load_gpu
from biscale_env.contract import ClockRange
from biscale_env.envs.kernels import asked_ghz
from biscale_env.sim.clock import snap_ghz

CLOCKS = ClockRange.of(load_gpu())


def test_ends_and_middle() -> None:
    np.testing.assert_allclose(CLOCKS.to_freq_mhz([-1, 0, 1, -7, 7]), [510, 1245, 1980, 510, 1980])
    np.testing.assert_allclose(CLOCKS.to_action([510, 1245, 1980]), [-1, 0, 1])


def test_grid() -> None:
    grid = CLOCKS.grid_mhz
    assert (grid[0], grid[-1], len(grid)) == (510, 1980, 99)
    np.testing.assert_allclose(np.diff(grid), 15)
    np.testing.assert_array_equal(grid, load_gpu().clocks_mhz)
    assert set(CLOCKS.levels_mhz) <= set(grid)
    np.testing.assert_array_equal(CLOCKS.snap_mhz(grid), grid)


@pytest.mark.parametrize("step", [15.0, 40.0, 100.0])
def test_a_range_that_is_no_multiple_of_the_step_never_leaves_it(step: float) -> None:
    odd = ClockRange(510.0, 1980.0, step, (600.0, 1980.0))
    assert odd.grid_mhz[0] >= 510.0
    snapped = odd.snap_mhz(np.linspace(400, 2100, 500))
    assert snapped.min() >= 510.0
    assert set(np.round(snapped, 6)) == set(np.round(odd.grid_mhz, 6))


@given(some.floats(510, 1980))
def test_snapped_is_the_nearest(freq_mhz: float) -> None:
    snapped = float(CLOCKS.snap_mhz(freq_mhz))
    assert abs(snapped - freq_mhz) <= 7.5 + 1e-9
    assert snapped in CLOCKS.grid_mhz


def test_every_clock_survives_the_way_through_an_action() -> None:
    """Clock -> float32 action -> asked -> snapped is the same clock, in Python and in the env's own
    code.
    """
    p = Settings()
    for freq_mhz in CLOCKS.grid_mhz:
        action = CLOCKS.to_action(freq_mhz)
        assert CLOCKS.snap_mhz(CLOCKS.to_freq_mhz(action)) == freq_mhz
        assert snap_ghz(p, asked_ghz(p, float(action))) * 1e3 == pytest.approx(freq_mhz, rel=1e-12)


@given(some.floats(-3, 3, width=32))
def test_python_and_env_map_an_action_alike(action: float) -> None:
    p = Settings()
    assert asked_ghz(p, action) * 1e3 == pytest.approx(float(CLOCKS.to_freq_mhz(action)), rel=1e-12)
    assert snap_ghz(p, asked_ghz(p, action)) * 1e3 == pytest.approx(
        float(CLOCKS.snap_mhz(CLOCKS.to_freq_mhz(action))), rel=1e-9
    )


def test_nan_is_the_highest_clock() -> None:
    assert asked_ghz(Settings(), float("nan")) == 1.98
