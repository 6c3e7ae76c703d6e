"""The conflating clock queue against a list of events, and the grid against its definition."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from biscale_env.core import clockqueue
from biscale_env.core.clockqueue import ClockQueue
from biscale_env.core.jit import compiled

FREQS = (510.0, 990.0, 1305.0, 1980.0)


@compiled
def replay(start: float, times_s: Any, freqs: Any, delay_s: float, applied: Any, waits: Any) -> Any:
    """Requests one after another, by compiled code."""
    q = clockqueue.settled_at(start)
    for k in range(times_s.size):
        q = clockqueue.advance_to(q, times_s[k], delay_s)
        q = clockqueue.request(q, freqs[k], times_s[k], delay_s)
        applied[k] = q.applied
        waits[k] = clockqueue.wait_s(q, times_s[k], delay_s)
    return q


def by_events(
    start: float, requests: list[tuple[float, float]], delay_s: float
) -> list[tuple[float, float]]:
    """(time, clock) of every change, from the rules in words: one in flight, newest waits."""
    changes: list[tuple[float, float]] = []
    newest, flying, waiting = start, False, None
    pending = [*requests, (math.inf, math.nan)]
    for at_s, freq in pending:
        while flying and changes[-1][0] <= at_s:
            flying = waiting is not None
            if waiting is not None:
                changes.append((changes[-1][0] + delay_s, waiting))
                waiting = None
        if math.isinf(at_s) or freq == newest:
            continue
        newest = freq
        if flying:
            waiting = freq if freq != changes[-1][1] else None
        else:
            changes.append((at_s + delay_s, freq))
            flying = True
            if delay_s == 0.0:
                flying = False
    return changes


requests = some.lists(
    some.tuples(some.integers(0, 30), some.sampled_from(FREQS)), min_size=1, max_size=12
)


@given(requests, some.sampled_from([0.0, 1.0, 2.5, 40.0]))
def test_the_queue_changes_the_clock_when_the_rules_say(
    rows: list[tuple[int, float]], delay_s: float
) -> None:
    rows = sorted(rows, key=lambda r: r[0])
    q = clockqueue.settled_at(1980.0)
    for k, (at_s, freq) in enumerate(rows):
        changes = by_events(1980.0, [(float(t), f) for t, f in rows[: k + 1]], delay_s)
        q = clockqueue.advance_to(q, at_s, delay_s)
        q = clockqueue.request(q, freq, at_s, delay_s)
        assert q.requested == freq
        due = [f for t, f in changes if t <= at_s]
        assert q.applied == (due[-1] if due else 1980.0)
    settled = clockqueue.advance_to(q, math.inf, delay_s)
    assert settled == clockqueue.settled_at(rows[-1][1])
    if changes:
        last_s = float(rows[-1][0])
        wait = clockqueue.wait_s(q, last_s, delay_s)
        assert wait == pytest.approx(max(changes[-1][0] - last_s, 0.0))


@settings(deadline=None)  # the first example compiles
@given(requests, some.sampled_from([0.0, 1.0, 2.5]))
def test_compiled_and_python_agree(rows: list[tuple[int, float]], delay_s: float) -> None:
    rows = sorted(rows, key=lambda r: r[0])
    times, freqs = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    outs = [np.zeros(len(rows)) for _ in range(4)]
    last = replay(1980.0, times, freqs, delay_s, outs[0], outs[1])
    plain = getattr(replay, "py_func", replay)(1980.0, times, freqs, delay_s, outs[2], outs[3])
    assert last == plain
    np.testing.assert_array_equal(outs[0], outs[2])
    np.testing.assert_array_equal(outs[1], outs[3])


def test_one_flies_and_the_newest_waits() -> None:
    q = clockqueue.request(clockqueue.settled_at(1980.0), 990.0, 10.0, 0.2)
    assert q == ClockQueue(1980.0, 990.0, 990.0, 10.2)
    q = clockqueue.request(q, 510.0, 10.05, 0.2)
    q = clockqueue.request(q, 1305.0, 10.1, 0.2)
    assert q == ClockQueue(1980.0, 990.0, 1305.0, 10.2)
    assert clockqueue.wait_s(q, 10.1, 0.2) == pytest.approx(0.3)
    assert clockqueue.advance_to(q, 10.19, 0.2) == q
    q = clockqueue.advance_to(q, 10.2, 0.2)
    assert q == ClockQueue(990.0, 1305.0, 1305.0, 10.2 + 0.2)
    assert clockqueue.advance_to(q, 11.0, 0.2) == clockqueue.settled_at(1305.0)


def test_a_request_taken_back_in_time_costs_no_change() -> None:
    q = clockqueue.request(clockqueue.settled_at(1980.0), 990.0, 0.0, 1.0)
    q = clockqueue.request(clockqueue.request(q, 510.0, 0.5, 1.0), 990.0, 0.6, 1.0)
    assert clockqueue.wait_s(q, 0.6, 1.0) == pytest.approx(0.4)
    assert clockqueue.advance_to(q, 1.0, 1.0) == clockqueue.settled_at(990.0)


def test_at_rest_nothing_waits() -> None:
    assert clockqueue.wait_s(clockqueue.settled_at(990.0), 5.0, 1.0) == 0.0


grids = some.tuples(
    some.sampled_from([210.0, 345.0, 510.0]),
    some.sampled_from([1410.0, 1980.0]),
    some.sampled_from([15.0, 40.0, 7.5]),
)


@given(grids, some.floats(0.0, 3000.0))
def test_snapping_finds_the_nearest_clock_of_the_grid(
    grid: tuple[float, float, float], freq: float
) -> None:
    clocks = clockqueue.grid(*grid)
    snapped = clockqueue.snapped(freq, *grid)
    assert snapped in clocks
    assert abs(snapped - freq) == pytest.approx(np.abs(clocks - freq).min())
    up = clockqueue.snapped_up(freq, *grid, 1e-6)
    above = clocks[clocks >= freq - 1e-6]
    assert up == (above[0] if len(above) else clocks[-1])


@given(grids)
def test_the_grid_counts_down_from_the_highest(grid: tuple[float, float, float]) -> None:
    low, high, step = grid
    clocks = clockqueue.grid(*grid)
    assert clocks[-1] == high
    assert low <= clocks[0] < low + step
    np.testing.assert_allclose(np.diff(clocks), step)
    np.testing.assert_array_equal(clockqueue.snapped(clocks, *grid), clocks)
    np.testing.assert_array_equal(clockqueue.snapped_up(clocks, *grid, 0.0), clocks)


def test_arrays_snap_like_numbers() -> None:
    grid = (510.0, 1980.0, 15.0)
    freqs = np.linspace(400.0, 2100.0, 333).reshape(3, 111)
    one_by_one = [clockqueue.snapped(f, *grid) for f in freqs.ravel().tolist()]
    np.testing.assert_array_equal(clockqueue.snapped(freqs, *grid), np.reshape(one_by_one, (3, -1)))
