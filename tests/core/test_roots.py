"""The one root finder: closed-form roots, the Illinois rule by hand, compiled = plain."""

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from biscale_env.core.jit import compiled
from biscale_env.core.roots import Bracket, bracket, false_position, narrowed


def solve(f, lo, hi, steps=60, tolerance=1e-13):
    """Root of a rising function, and the intervals on the way."""
    b = bracket(lo, f(lo), hi, f(hi))
    path = [b]
    x = lo
    for _ in range(steps):
        x = false_position(b)
        at = f(x)
        if abs(at) < tolerance:
            break
        b = narrowed(b, x, at)
        path.append(b)
    return x, path


@given(st.floats(-5.0, 5.0), st.floats(0.01, 50.0), st.floats(0.1, 3.0), st.floats(0.1, 3.0))
def test_a_line_is_solved_at_once(root, slope, below, above):
    b = bracket(root - below, -slope * below, root + above, slope * above)
    assert math.isclose(false_position(b), root, rel_tol=1e-9, abs_tol=1e-9)


@given(st.floats(0.01, 400.0), st.integers(2, 5))
def test_powers_have_their_root_and_it_stays_inside(value, power):
    x, path = solve(lambda x: x**power - value, 0.0, 400.0, steps=100)
    assert math.isclose(x, value ** (1.0 / power), rel_tol=1e-9)
    for before, after in itertools.pairwise(path):
        rounding = 4 * math.ulp(before.hi)  # of a chord between ends that nearly touch
        assert before.lo - rounding <= after.lo < after.hi <= before.hi + rounding
        assert after.at_lo < 0.0 < after.at_hi


def test_the_other_end_is_halved_only_when_one_end_moves_twice():
    b = bracket(0.0, -8.0, 1.0, 4.0)
    assert b.side == 0
    once = narrowed(b, 0.5, 2.0)
    assert once == Bracket(0.0, -8.0, 0.5, 2.0, 1)
    assert narrowed(once, 0.25, 1.0) == Bracket(0.0, -4.0, 0.25, 1.0, 1)
    turned = narrowed(once, 0.25, -1.0)
    assert turned == Bracket(0.25, -1.0, 0.5, 2.0, -1)
    assert narrowed(turned, 0.375, -0.5) == Bracket(0.375, -0.5, 0.5, 1.0, -1)
    assert narrowed(turned, 0.375, 0.5) == Bracket(0.25, -1.0, 0.375, 0.5, 1)


def test_the_rule_beats_plain_false_position_where_one_end_would_stick():
    _, path = solve(lambda x: math.exp(8.0 * x) - 2.0, 0.0, 1.0)
    stuck_lo, steps = 0.0, 0
    while abs(math.exp(8.0 * stuck_lo) - 2.0) > 1e-13 and steps < 10_000:
        low, high = math.exp(8.0 * stuck_lo) - 2.0, math.exp(8.0) - 2.0
        stuck_lo = (stuck_lo * high - low) / (high - low)
        steps += 1
    assert len(path) < 20 < 50 * len(path) < steps


@compiled
def cube_root(value: float) -> float:
    """Cube root of a number between 0 and 1000."""
    b = bracket(0.0, -value, 10.0, 1000.0 - value)
    x = 0.0
    for _ in range(60):
        x = false_position(b)
        at = x * x * x - value
        if abs(at) < 1e-12:
            break
        b = narrowed(b, x, at)
    return x


def test_compiled_is_plain_bit_for_bit():
    for value in np.linspace(0.5, 900.0, 57):
        plain, _ = solve(lambda x, v=value: x * x * x - v, 0.0, 10.0, tolerance=1e-12)
        assert cube_root(value) == plain
