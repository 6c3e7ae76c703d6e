"""Compiled forward dynamic programme of the prefill oracle.

:mod:`controllers.oracle.prefill_optimum` says what it computes and why.

A *label* is a way to arrive at a batch start: position (request, tokens of it already done), time,
cost so far. Positions are worked off in the order of their tokens, which every batch raises, so a
position is complete when its turn comes. The labels of a position lie in cells of the time grid,
the cheapest one per cell. When the queue is empty the instance idles to the next arrival: all ways
to get there meet in one label at that exact time, which resets every discretisation error.
"""

from typing import Any

import numpy as np

from biscale_env.core.jit import compiled, inlined
from biscale_env.models.physics import idle_power_w
from biscale_env.sim.clock import under_cap
from biscale_env.sim.prefill import form_batch

EXACT = 0  # labels carry their true time: the cheapest path is a plan that the simulator repeats
# a label may be anywhere in its cell, whichever is best: a lower bound without actuation delay
CELLS = 1
CELLS_ANY_DELAY = (
    2  # and clocks may be mixed within a batch, and waiting costs the power of the lowest clock
)

OK, OUT_OF_SLOTS, OUT_OF_LABELS = 0, 1, 2
EMPTY = 0.0  # cost of a cell without a label; every real label has used energy

RUN_DTYPE = np.dtype(
    [
        ("mode", np.int64),
        ("cell_s", np.float64),
        ("price", np.float64),  # cost of a violation, in units of the reference energy
        (
            "margin",
            np.float64,
        ),  # a label dearer by this than an earlier one of the same position is dropped
        (
            "floor_w",
            np.float64,
        ),  # idle power of the instance at the lowest clock, in reference energies per second
        ("status", np.int64),
        ("free_slot", np.int64),
        ("n_labels", np.int64),
        ("expanded", np.int64),
        ("most_expanded", np.int64),  # labels after which a bounding programme gives up
        (
            "late",
            np.int64,
        ),  # transitions dropped because they fall behind the window of their position
        ("best_cost", np.float64),  # cheapest way to the end
        ("best_parent", np.int64),
        ("best_clock", np.int64),
    ]
)
SLOT_DTYPE = np.dtype(
    [
        ("head", np.int64),
        ("head_done", np.int64),
        ("base", np.int64),
        ("lo", np.int64),
        ("hi", np.int64),
        ("next", np.int64),
    ]
)
CELL_DTYPE = np.dtype(
    [("cost", np.float64), ("time_s", np.float64), ("parent", np.int32), ("clock", np.int32)]
)
OPTION_DTYPE = np.dtype(
    [
        ("d", np.float64),
        ("d_max", np.float64),
        ("e", np.float64),
        ("idle_w", np.float64),
        ("clock", np.int64),
    ]
)
IDLE_DTYPE = np.dtype([("cost", np.float64), ("parent", np.int32), ("clock", np.int32)])
LABEL_DTYPE = np.dtype([("parent", np.int32), ("clock", np.int16)])


@inlined
def clock_options(
    run: Any, c: Any, p: Any, grid_ghz: Any, options: Any, tokens: int, attn: float, n_seq: int
) -> int:
    """Durations and energies of a batch at each clock, fastest first.

    All clocks above the power cap are one.
    """
    count = 0
    for k in range(grid_ghz.size):
        freq, d, joules = under_cap(c, p, tokens, attn, 0.0, n_seq, grid_ghz[k])
        o = options[count]
        o.d = d
        o.d_max = d
        o.e = joules * c.n_gpus / p.energy_ref_j
        o.idle_w = idle_power_w(c, grid_ghz[k]) * c.n_gpus / p.energy_ref_j
        o.clock = k
        count += 1
        if freq < grid_ghz[k]:
            break
    for k in range(count // 2):
        a, b = options[k], options[count - 1 - k]
        d, d_max, e, w, clock = a.d, a.d_max, a.e, a.idle_w, a.clock
        a.d, a.d_max, a.e, a.idle_w, a.clock = b.d, b.d_max, b.e, b.idle_w, b.clock
        b.d, b.d_max, b.e, b.idle_w, b.clock = d, d_max, e, w, clock
    return count


@inlined
def convexify(options: Any, count: int) -> int:
    """Keep the options on the lower convex hull of (duration, energy), in place; durations rise."""
    kept = 0
    for k in range(count):
        o = options[k]
        d, e, w, clock = o.d, o.e, o.idle_w, o.clock
        while kept >= 2:
            a, b = options[kept - 2], options[kept - 1]
            if (b.e - a.e) * (d - a.d) < (e - a.e) * (b.d - a.d):
                break
            kept -= 1
        o = options[kept]
        o.d, o.d_max, o.e, o.idle_w, o.clock = d, d, e, w, clock
        kept += 1
    return kept


@inlined
def hull_energy(hull: Any, count: int, d: float) -> float:
    """Least energy of a mix of clocks that takes ``d``; beyond the ends, that of the end."""
    if d <= hull[0].d:
        return hull[0].e
    for k in range(1, count):
        if d <= hull[k].d:
            share = (d - hull[k - 1].d) / (hull[k].d - hull[k - 1].d)
            return hull[k - 1].e + share * (hull[k].e - hull[k - 1].e)
    return hull[count - 1].e


@inlined
def mixed_options(run: Any, hull: Any, n_hull: int, options: Any) -> int:
    """Whole cells of duration, each with the least energy of any mix of clocks in ``(m - 1, m +
    1)`` cells.
    """
    best = 0
    for k in range(n_hull):
        if hull[k].e < hull[best].e:
            best = k
    d_best = hull[best].d
    first = int(np.floor(hull[0].d / run.cell_s - 1e-9))
    last = int(np.ceil(hull[n_hull - 1].d / run.cell_s))
    count = 0
    for m in range(first, last + 1):
        low, high = (m - 1) * run.cell_s, (m + 1) * run.cell_s
        o = options[count]
        o.d = m * run.cell_s
        o.d_max = high
        o.e = hull_energy(hull, n_hull, min(max(d_best, low), high))
        o.idle_w = run.floor_w
        o.clock = 0
        count += 1
        if count == options.size:
            break
    return count


@inlined
def list_options(
    run: Any,
    c: Any,
    p: Any,
    grid_ghz: Any,
    hull: Any,
    options: Any,
    tokens: int,
    attn: float,
    n_seq: int,
) -> int:
    """Choices of a batch in this mode, into ``options``; returns how many."""
    if run.mode != CELLS_ANY_DELAY:
        return clock_options(run, c, p, grid_ghz, options, tokens, attn, n_seq)
    n_hull = convexify(hull, clock_options(run, c, p, grid_ghz, hull, tokens, attn, n_seq))
    return mixed_options(run, hull, n_hull, options)


@inlined
def find_slot(
    run: Any,
    slots: Any,
    first: Any,
    earliest_s: Any,
    arrival_s: Any,
    head: int,
    done: int,
    rate: float,
) -> int:
    """The slot of a position, opened if it has none; -1 when no slot is left."""
    s = first[head]
    while s >= 0:
        if slots[s].head_done == done:
            return s
        s = slots[s].next
    s = run.free_slot
    if s < 0:
        run.status = OUT_OF_SLOTS
        return -1
    slot = slots[s]
    run.free_slot = slot.next
    slot.head = head
    slot.head_done = done
    slot.base = (
        int(np.floor((max(earliest_s[head], arrival_s[head]) + rate * done) / run.cell_s)) - 1
    )
    slot.lo = 1 << 60
    slot.hi = -1
    slot.next = first[head]
    first[head] = s
    return s


@inlined
def put(
    run: Any,
    slots: Any,
    cells: Any,
    s: int,
    cell: int,
    time_s: float,
    cost: float,
    parent: int,
    clock: int,
) -> None:
    """Offer a label to a cell of a position."""
    k = max(cell - slots[s].base, 0)
    if k >= cells.shape[1]:
        run.late += 1
        return
    x = cells[s, k]
    if x.cost == EMPTY or cost < x.cost:
        x.cost = cost
        x.time_s = time_s
        x.parent = parent
        x.clock = clock
        slots[s].lo = min(slots[s].lo, k)
        slots[s].hi = max(slots[s].hi, k)


@inlined
def put_end(run: Any, cost: float, parent: int, clock: int) -> None:
    """Offer a label to the end of the episode."""
    if cost < run.best_cost:
        run.best_cost = cost
        run.best_parent = parent
        run.best_clock = clock


@inlined
def count_late(p: Any, arrival_s: Any, head: int, new_head: int, time_s: float) -> int:
    """Requests ``head .. new_head - 1`` that miss the SLO when they complete at this time (arrivals
    rise).
    """
    late = 0
    while head + late < new_head and time_s - arrival_s[head + late] > p.slo_s:
        late += 1
    return late


@inlined
def go(
    run: Any, p: Any, arrival_s: Any, slots: Any, cells: Any, idle: Any, o: Any, s: int, head: int, new_head: int, empty: bool,
    low_s: float, high_s: float, cost: float, parent: int, best: float,
) -> float:  # fmt: skip
    """All that may follow one option of one label that starts its batch between ``low_s`` and
    ``high_s``; returns the least excess.
    """
    low, high = low_s + o.d, high_s + o.d
    late_s = (
        arrival_s[new_head] if empty and new_head < arrival_s.size else np.inf
    )  # idle when the batch ends before this
    last = high_s + o.d_max
    cost += o.e
    if empty and low < late_s:
        total = cost + run.price * count_late(p, arrival_s, head, new_head, low)
        if late_s <= p.end_s or (p.drain == 1 and new_head < arrival_s.size):
            total += o.idle_w * (late_s - min(last, late_s))
            x = idle[new_head]
            if total < x.cost:
                x.cost = total
                x.parent = parent
                x.clock = o.clock
        else:
            put_end(run, total + o.idle_w * max(p.end_s - last, 0.0), parent, o.clock)
    if not empty:
        late_s = low
    if run.mode == EXACT and low < late_s:
        return best
    if new_head == arrival_s.size or high < late_s:
        return best
    low = max(low, late_s)
    cost += run.price * count_late(p, arrival_s, head, new_head, low)
    if p.drain == 0 and high >= p.end_s:
        put_end(run, cost, parent, o.clock)
        if low >= p.end_s:
            return best
    excess = cost - run.floor_w * low
    if excess > best + run.margin:
        return best
    first = int(np.floor(low / run.cell_s))
    final = first if run.mode == EXACT else int(np.floor(high / run.cell_s - 1e-9))
    for cell in range(first, max(final, first) + 1):
        put(run, slots, cells, s, cell, low, cost, parent, o.clock)
    return min(best, excess)


@inlined
def expand(
    run: Any, c: Any, p: Any, arrival_s: Any, prompt: Any, earliest_s: Any, grid_ghz: Any, slots: Any, first: Any, cells: Any,
    idle: Any, hull: Any, options: Any, batch: Any, rate: float, head: int, done: int, tail: int, low_s: float, high_s: float,
    cost: float, parent: int,
) -> None:  # fmt: skip
    """Start the batch that ``tail`` allows and follow every option.

    ``batch`` remembers the last batch of this position.
    """
    if batch[0] == 0 or (batch[1] != tail and batch[7] == 0):
        tokens, attn, n_seq, new_head, new_done = form_batch(
            prompt, head, done, tail, p.token_budget, p.max_seqs
        )
        batch[0] = 1
        batch[2] = new_head
        batch[3] = new_done
        batch[4] = list_options(run, c, p, grid_ghz, hull, options, tokens, attn, n_seq)
        batch[5] = (
            find_slot(run, slots, first, earliest_s, arrival_s, new_head, new_done, rate)
            if new_head < prompt.size
            else 0
        )
        batch[7] = 1 if tokens == p.token_budget or n_seq == p.max_seqs else 0
        if batch[5] < 0:
            return
    batch[1] = tail
    new_head = batch[2]
    empty = new_head >= tail and batch[3] == 0
    best = np.inf
    for k in range(batch[4]):
        best = go(
            run, p, arrival_s, slots, cells, idle, options[k], batch[5], head, new_head, empty, low_s, high_s, cost, parent, best,
        )  # fmt: skip


@inlined
def add_label(run: Any, labels: Any, parent: int, clock: int) -> int:
    """Remember a label that is about to be expanded, for the way back; only exact plans need it."""
    run.expanded += 1
    if run.mode != EXACT:
        if run.expanded > run.most_expanded:
            run.status = OUT_OF_LABELS
        return 0
    n = run.n_labels
    if n == labels.size:
        run.status = OUT_OF_LABELS
        return 0
    labels[n].parent = parent
    labels[n].clock = clock
    run.n_labels = n + 1
    return n


@inlined
def expand_slot(
    run: Any, c: Any, p: Any, arrival_s: Any, prompt: Any, earliest_s: Any, grid_ghz: Any, slots: Any, first: Any, cells: Any,
    idle: Any, hull: Any, options: Any, batch: Any, labels: Any, rate: float, s: int, best: float,
) -> None:  # fmt: skip
    """Expand the labels of a position in the order of time and clear its cells."""
    slot = slots[s]
    head, done = slot.head, slot.head_done
    tail = head + 1 if done > 0 else head
    for k in range(slot.lo, slot.hi + 1):
        x = cells[s, k]
        cost = x.cost
        x.cost = EMPTY
        if cost == EMPTY or run.status != OK:
            continue
        low_s = x.time_s
        high_s = low_s
        if run.mode != EXACT:
            low_s = max((slot.base + k) * run.cell_s, arrival_s[head])
            high_s = (slot.base + k + 1) * run.cell_s
        if cost - run.floor_w * low_s > best + run.margin:
            continue
        best = min(best, cost - run.floor_w * low_s)
        label = add_label(run, labels, x.parent, x.clock)
        while tail < arrival_s.size and arrival_s[tail] <= low_s:
            tail += 1
        while True:
            begin = max(low_s, arrival_s[tail - 1])
            expand(
                run, c, p, arrival_s, prompt, earliest_s, grid_ghz, slots, first, cells, idle, hull, options, batch, rate, head,
                done, tail, begin, high_s, cost, label,
            )  # fmt: skip
            if (
                run.status != OK
                or tail == arrival_s.size
                or not arrival_s[tail] < high_s
                or batch[7] == 1
            ):
                break
            tail += 1


@compiled
def prefill_oracle(
    run: Any, c: Any, p: Any, arrival_s: Any, prompt: Any, earliest_s: Any, grid_ghz: Any, slots: Any, first: Any, cells: Any,
    idle: Any, hull: Any, options: Any, batch: Any, labels: Any, rate: float,
) -> None:  # fmt: skip
    """Find the cheapest way from the first arrival to the end of the episode.

    Args:
        run: settings and results (``RUN_DTYPE``).
        c: coefficients.
        p: engine parameters; their delay and decision interval are not used.
        arrival_s: arrival times (n,).
        prompt: prompt lengths (n,).
        earliest_s: lower bound on the time at which all requests before r can be complete (n,).
        grid_ghz: supported clocks, rising.
        slots: open positions; all free, chained by ``next``.
        first: first open slot of each request (n,), all -1.
        cells: time cells of the slots, all empty.
        idle: label at the arrival of each request that comes to an empty instance (n,); infinite
            but for the first.
        hull: scratch.
        options: scratch.
        batch: scratch, 8 integers.
        labels: labels for the way back.
        rate: least seconds per token.
    """
    for head in range(arrival_s.size):
        batch[0] = 0
        best = np.inf
        x = idle[head]
        if np.isfinite(x.cost):
            now = arrival_s[head]
            label = add_label(run, labels, x.parent, x.clock)
            tail = head + 1
            while tail < arrival_s.size and arrival_s[tail] <= now:
                tail += 1
            best = x.cost - run.floor_w * now
            expand(
                run, c, p, arrival_s, prompt, earliest_s, grid_ghz, slots, first, cells, idle, hull, options, batch, rate, head,
                0, tail, now, now, x.cost, label,
            )  # fmt: skip
        while first[head] >= 0 and run.status == OK:
            s = first[head]
            k = slots[s].next
            while k >= 0:
                if slots[k].head_done < slots[s].head_done:
                    s = k
                k = slots[k].next
            if slots[s].head_done > 0:
                batch[0] = 0
                best = np.inf
            expand_slot(
                run, c, p, arrival_s, prompt, earliest_s, grid_ghz, slots, first, cells, idle, hull, options, batch, labels, rate,
                s, best,
            )  # fmt: skip
            if first[head] == s:
                first[head] = slots[s].next
            else:
                k = first[head]
                while slots[k].next != s:
                    k = slots[k].next
                slots[k].next = slots[s].next
            slots[s].next = run.free_slot
            run.free_slot = s
        if run.status != OK:
            return
