"""The lists of running requests against a plain model.

Wheel, order of admission, free slots, keys.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as some

from biscale_env.core.jit import as_records
from biscale_env.sim.decode import NO_SLOT, clear_running, enter, leave
from biscale_env.sim.state import DECODE_DTYPE, running_requests, tree_size, wheel_size

MAX_SEQS = 6
LONGEST = 5
P = SimpleNamespace(slo_s=0.1)

moves = some.lists(
    some.tuples(some.booleans(), some.integers(0, MAX_SEQS - 1), some.integers(1, LONGEST)),
    max_size=40,
)


def linked(first: int, slots: Any, forward: str, backward: str) -> list[int]:
    """Slots of a list from its head on; every backward link must undo a forward one."""
    found, before, slot = [], NO_SLOT, first
    while slot != NO_SLOT:
        assert slots[backward][slot] == before
        found.append(int(slot))
        before, slot = slot, slots[forward][slot]
    return found


def check(st: Any, run: Any, model: dict[int, tuple[int, float]], order: list[int]) -> None:
    """Every list holds exactly what the model says."""
    size = run.wheel.size
    buckets: dict[int, set[int]] = {}
    for slot, (end, _) in model.items():
        buckets.setdefault(end % size, set()).add(slot)
    for at in range(size):
        found = linked(run.wheel[at], run.slots, "wheel_next", "wheel_prev")
        assert set(found) == buckets.get(at, set())
    assert linked(st.admitted_last, run.slots, "older", "newer") == order[::-1]
    free, slot = set(), st.free_slot
    while slot != NO_SLOT:
        assert slot not in free
        free.add(int(slot))
        slot = run.slots["wheel_next"][slot]
    assert free == set(range(MAX_SEQS)) - set(model)
    keys = [key for _, key in model.values()]
    assert run.tree[1] == min(keys, default=np.inf)
    assert st.batch == len(model)
    np.testing.assert_allclose(st.key_sum, sum(keys), atol=1e-9)


@given(moves)
def test_whatever_enters_and_leaves_the_lists_stay_whole(
    rows: list[tuple[bool, int, int]],
) -> None:
    """Requests leave from anywhere: the head, the middle and the end of a bucket."""
    run = as_records(running_requests((), MAX_SEQS, LONGEST))
    st: Any = np.zeros(1, dtype=DECODE_DTYPE).view(np.recarray)[0]
    clear_running(st, run)
    model: dict[int, tuple[int, float]] = {}
    order: list[int] = []
    for number, (enters, which, total) in enumerate(rows):
        if enters and len(model) < MAX_SEQS:
            slot = int(st.free_slot)
            enter(st, P, run, 0.01 * number, number, 0, total)
            model[slot] = (int(st.iterations) + total, 0.01 * number - P.slo_s * st.iterations)
            order.append(slot)
            assert run.slots["request"][slot] == number
        elif model:
            slot = order.pop(which % len(order))
            end, _ = model.pop(slot)
            leave(st, run, slot, end - int(run.slots["origin"][slot]))
        else:
            st.iterations += 1  # nothing is linked: a lap may go on
        check(st, run, model, order)


def test_sizes_are_powers_of_two_and_large_enough() -> None:
    for longest in (0, 1, 2, 5, 6, 7, 1000):
        size = wheel_size(longest)
        assert size >= longest + 2
        assert size & (size - 1) == 0
        assert size < 2 * (longest + 2)
    for seqs in (1, 2, 3, 256, 257):
        leaves = tree_size(seqs) // 2
        assert seqs <= leaves < 2 * seqs
