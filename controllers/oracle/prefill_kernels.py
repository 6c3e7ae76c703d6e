"""Compiled forward dynamic programme of the prefill oracle.

:mod:`controllers.oracle.prefill_optimum` says what it computes and why.

A *label* is a way to arrive at a batch start: position (request, tokens of it already done), time,
cost so far. Positions are worked off in the order of their tokens, which every batch raises, so a
position is complete when its turn comes. The labels of a position lie in cells of the time grid,
the cheapest one per cell. When the queue is empty the instance idles to the next arrival: all ways
to get there meet in one label at that exact time, which resets every discretisation error.

A parked instance runs at the lowest clock until its ramp is over. An idle label knows to the digit
when that is, and an exact label remembers it; the bound without delay is asked for only where the
ramp is over before the first batch is (see :mod:`controllers.oracle.prefill_problem`).
"""

import numpy as np

from biscale_env.core.jit import compiled, inlined
from biscale_env.sim.clock import under_cap, waiting_power_w
from biscale_env.sim.prefill import form_batch
from controllers.oracle.prefill_records import (
    CELLS_ANY_DELAY,
    EMPTY,
    EXACT,
    OK,
    OUT_OF_LABELS,
    OUT_OF_SLOTS,
    Arrival,
    ClockOption,
    Departure,
    Floats,
    OpenLabels,
    PlannedWorkload,
    Programme,
    Scratch,
    Work,
)
from controllers.records import Records


@inlined
def clock_options(w: PlannedWorkload, grid_ghz: Floats, options: Records, work: Work) -> int:
    """Durations and energies of a batch at each clock, fastest first.

    All clocks above the power cap are one. The first ``work.ramp_s`` run at the lowest clock.
    """
    count = 0
    slow = under_cap(w.c, w.p, work.tokens, work.attn, 0.0, work.n_seq, w.p.freq_min_ghz)
    ramped = min(work.ramp_s / slow[1], 1.0)
    for k in range(grid_ghz.size):
        freq, d, joules = under_cap(w.c, w.p, work.tokens, work.attn, 0.0, work.n_seq, grid_ghz[k])
        if ramped > 0.0:
            d = ramped * slow[1] + (1.0 - ramped) * d
            joules = ramped * slow[2] + (1.0 - ramped) * joules
        o = options[count]
        o.d = d
        o.d_max = d
        o.e = joules * w.c.n_gpus / w.p.energy_ref_j
        o.idle_w = waiting_power_w(w.c, w.p, grid_ghz[k]) * w.c.n_gpus / w.p.energy_ref_j
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
def convexify(options: Records, count: int) -> int:
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
def hull_energy(hull: Records, count: int, d: float) -> float:
    """Least energy of a mix of clocks that takes ``d``; beyond the ends, that of the end."""
    if d <= hull[0].d:
        return hull[0].e
    for k in range(1, count):
        if d <= hull[k].d:
            fraction = (d - hull[k - 1].d) / (hull[k].d - hull[k - 1].d)
            return hull[k - 1].e + fraction * (hull[k].e - hull[k - 1].e)
    return hull[count - 1].e


@inlined
def mixed_options(run: Programme, hull: Records, n_hull: int, options: Records) -> int:
    """Whole cells of duration m, each with the least energy of any mix of clocks.

    A mix counts where it takes between ``m - 1`` and ``m + 1`` cells.
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
def list_options(run: Programme, w: PlannedWorkload, scratch: Scratch, work: Work) -> int:
    """Choices of a batch in this mode, into ``scratch.options``; returns how many."""
    if run.mode != CELLS_ANY_DELAY:
        return clock_options(w, scratch.grid_ghz, scratch.options, work)
    hull = scratch.hull
    n_hull = convexify(hull, clock_options(w, scratch.grid_ghz, hull, work))
    return mixed_options(run, hull, n_hull, scratch.options)


@inlined
def find_slot(run: Programme, w: PlannedWorkload, labels: OpenLabels, head: int, done: int) -> int:
    """The slot of a position, opened if it has none; -1 when no slot is left."""
    slots, first = labels.slots, labels.first
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
    earliest = max(w.earliest_s[head], w.arrival_s[head]) + w.s_per_token * done
    slot.base = int(np.floor(earliest / run.cell_s)) - 1
    slot.lo = 1 << 60
    slot.hi = -1
    slot.next = first[head]
    first[head] = s
    return s


@inlined
def put(
    run: Programme, labels: OpenLabels, s: int, cell: int, label: Departure, clock: int
) -> None:
    """Offer a label (a departure at ``low_s``) to a cell of a position."""
    slots, cells = labels.slots, labels.cells
    k = max(cell - slots[s].base, 0)
    if run.clocks > 1:
        k = k * run.clocks + clock
    if k >= cells.shape[1]:
        run.late += 1
        return
    x = cells[s, k]
    if x.cost == EMPTY or label.cost < x.cost:
        x.cost = label.cost
        x.time_s = label.low_s
        x.ramp_until_s = label.ramp_until_s
        x.parent = label.parent
        x.clock = clock
        slots[s].lo = min(slots[s].lo, k)
        slots[s].hi = max(slots[s].hi, k)


@inlined
def put_end(run: Programme, cost: float, parent: int, clock: int) -> None:
    """Offer a label to the end of the episode."""
    if cost < run.best_cost:
        run.best_cost = cost
        run.best_parent = parent
        run.best_clock = clock


@inlined
def count_late(w: PlannedWorkload, share: float, head: int, new_head: int, time_s: float) -> float:
    """Requests ``head .. new_head - 1`` that miss a share of their bound if they complete now.

    Arrivals rise. With SLO classes each counts as much as a miss of its class weighs.
    """
    late = 0.0
    k = head
    if w.p.classes == 0:
        while k < new_head and time_s - w.arrival_s[k] > w.p.slo_s * share:
            late += 1.0
            k += 1
    else:
        while k < new_head:
            own = w.slo_class[k]
            if time_s - w.arrival_s[k] > w.p.slo_s * share * w.p.class_scale[own]:
                late += w.p.class_weight[own]
            k += 1
    return late


@inlined
def late_cost(run: Programme, w: PlannedWorkload, head: int, new_head: int, time_s: float) -> float:
    """Penalties of requests ``head .. new_head - 1`` that complete at this time."""
    cost = run.price * count_late(w, 1.0, head, new_head, time_s)
    if run.early_price > 0.0:
        cost += run.early_price * count_late(w, run.early_share, head, new_head, time_s)
    return cost


@inlined
def delayed_option(w: PlannedWorkload, scratch: Scratch, count: int, k: int, clock: int) -> int:
    """Option ``k`` of a batch that begins at another clock until the change takes effect.

    It is put behind the ``count`` options; returns its place. What is left of the delay when the
    batch ends first is forgotten.
    """
    new, old = scratch.options[k], scratch.options[max(count - 1 - clock, 0)]
    o = scratch.options[scratch.options.size - 1]
    begun = min(w.p.delay_s / old.d, 1.0)
    o.d = begun * old.d + (1.0 - begun) * new.d
    o.d_max = o.d
    o.e = begun * old.e + (1.0 - begun) * new.e
    o.idle_w = new.idle_w
    o.clock = new.clock
    return scratch.options.size - 1


@inlined
def go_idle(
    run: Programme,
    w: PlannedWorkload,
    labels: OpenLabels,
    o: ClockOption,
    start: Departure,
    to: Arrival,
    next_s: float,
) -> None:
    """The batch empties the queue before the next arrival: idle until then, or end.

    ``start`` holds the times at which the batch ends and the cost with it, ``next_s`` the next
    arrival (infinite: none).
    """
    total = start.cost + late_cost(run, w, to.head, to.new_head, start.low_s)
    last = start.high_s
    if next_s <= w.p.end_s or (w.p.drain == 1 and to.new_head < w.arrival_s.size):
        total += o.idle_w * (next_s - min(last, next_s))
        x = labels.idle[to.new_head]
        if total < x.cost:
            x.cost = total
            x.parent = start.parent
            x.clock = o.clock
    else:
        total += o.idle_w * max(w.p.end_s - last, 0.0)
        if run.beyond_w > 0.0:
            total -= run.beyond_w * max(last - w.p.end_s, 0.0)
        put_end(run, total, start.parent, o.clock)


@inlined
def go(
    run: Programme,
    w: PlannedWorkload,
    labels: OpenLabels,
    o: ClockOption,
    start: Departure,
    to: Arrival,
    best: float,
) -> float:
    """All that may follow one option of one label; returns the least excess."""
    low, high = start.low_s + o.d, start.high_s + o.d
    # idle when the batch ends before this
    late_s = w.arrival_s[to.new_head] if to.empty and to.new_head < w.arrival_s.size else np.inf
    cost = start.cost + o.e
    if to.empty and low < late_s:
        end = Departure(low, start.high_s + o.d_max, cost, start.parent, 0.0, o.clock)
        go_idle(run, w, labels, o, end, to, late_s)
    if not to.empty:
        late_s = low
    if run.mode == EXACT and low < late_s:
        return best
    if to.new_head == w.arrival_s.size or high < late_s:
        return best
    low = max(low, late_s)
    cost += late_cost(run, w, to.head, to.new_head, low)
    if w.p.drain == 0 and high >= w.p.end_s:
        put_end(run, cost, start.parent, o.clock)
        if low >= w.p.end_s:
            return best
    excess = cost - run.floor_w * low
    if excess > best + run.margin:
        return best
    first = int(np.floor(low / run.cell_s))
    final = first if run.mode == EXACT else int(np.floor(high / run.cell_s - 1e-9))
    for cell in range(first, max(final, first) + 1):
        label = Departure(low, high, cost, start.parent, start.ramp_until_s, o.clock)
        put(run, labels, to.slot, cell, label, o.clock)
    return min(best, excess)


@inlined
def expand(
    run: Programme,
    w: PlannedWorkload,
    labels: OpenLabels,
    scratch: Scratch,
    at: tuple[int, int, int],
    start: Departure,
) -> None:
    """Start the batch that the queue allows and follow every option.

    ``at`` is (first request, tokens of it done, requests that have arrived). ``scratch.batch``
    remembers the last batch of this position: known, its tail, head and tokens behind it, number of
    options, slot, whether they hold part of a ramp, full.
    """
    head, done, tail = at
    batch = scratch.batch
    ramp_s = max(start.ramp_until_s - start.low_s, 0.0)
    same_ramp = ramp_s == 0.0 and batch[6] == 0
    if batch[0] == 0 or (batch[1] != tail and batch[7] == 0) or not same_ramp:
        tokens, attn, n_seq, new_head, new_done = form_batch(
            w.prompt, w.prefix, head, done, tail, w.p.token_budget, w.p.max_seqs
        )
        batch[0] = 1
        batch[2] = new_head
        batch[3] = new_done
        batch[4] = list_options(run, w, scratch, Work(tokens, attn, n_seq, ramp_s))
        batch[6] = 1 if ramp_s > 0.0 else 0
        more = new_head < w.prompt.size
        batch[5] = find_slot(run, w, labels, new_head, new_done) if more else 0
        batch[7] = 1 if tokens == w.p.token_budget or n_seq == w.p.max_seqs else 0
        if batch[5] < 0:
            return
    batch[1] = tail
    to = Arrival(batch[5], head, batch[2], batch[2] >= tail and batch[3] == 0)
    best = np.inf
    delayed = run.mode == EXACT and w.p.delay_s > 0.0
    for k in range(batch[4]):
        place = delayed_option(w, scratch, batch[4], k, start.clock) if delayed else k
        best = go(run, w, labels, scratch.options[place], start, to, best)


@inlined
def add_label(run: Programme, kept: Records, parent: int, clock: int) -> int:
    """Remember a label that is about to be expanded, for the way back; only exact plans need it."""
    run.expanded += 1
    if run.mode != EXACT:
        if run.expanded > run.most_expanded:
            run.status = OUT_OF_LABELS
        return 0
    n = run.n_labels
    if n == kept.size:
        run.status = OUT_OF_LABELS
        return 0
    kept[n].parent = parent
    kept[n].clock = clock
    run.n_labels = n + 1
    return n


@inlined
def expand_slot(
    run: Programme,
    w: PlannedWorkload,
    labels: OpenLabels,
    scratch: Scratch,
    kept: Records,
    s: int,
    best: float,
) -> None:
    """Expand the labels of a position in the order of time and clear its cells."""
    slot, arrival_s = labels.slots[s], w.arrival_s
    head, done = slot.head, slot.head_done
    tail = head + 1 if done > 0 else head
    for k in range(slot.lo, slot.hi + 1):
        x = labels.cells[s, k]
        cost = x.cost
        x.cost = EMPTY
        if cost == EMPTY or run.status != OK:
            continue
        low_s, ramp_until_s, clock = x.time_s, x.ramp_until_s, int(x.clock)
        high_s = low_s
        if run.mode != EXACT:
            ramp_until_s = 0.0
            low_s = max((slot.base + k) * run.cell_s, arrival_s[head])
            high_s = (slot.base + k + 1) * run.cell_s
        if cost - run.floor_w * low_s > best + run.margin:
            continue
        best = min(best, cost - run.floor_w * low_s)
        label = add_label(run, kept, x.parent, x.clock)
        while tail < arrival_s.size and arrival_s[tail] <= low_s:
            tail += 1
        while True:
            begin = max(low_s, arrival_s[tail - 1])
            start = Departure(begin, high_s, cost, label, ramp_until_s, clock)
            expand(run, w, labels, scratch, (head, done, tail), start)
            full = tail == arrival_s.size or scratch.batch[7] == 1
            if run.status != OK or full or not arrival_s[tail] < high_s:
                break
            tail += 1


@inlined
def next_slot(labels: OpenLabels, head: int) -> int:
    """Open slot of a request with the fewest tokens done."""
    s = labels.first[head]
    k = labels.slots[s].next
    while k >= 0:
        if labels.slots[k].head_done < labels.slots[s].head_done:
            s = k
        k = labels.slots[k].next
    return s


@inlined
def close_slot(run: Programme, labels: OpenLabels, head: int, s: int) -> None:
    """Take a slot out of its request's chain and free it."""
    slots, first = labels.slots, labels.first
    if first[head] == s:
        first[head] = slots[s].next
    else:
        k = first[head]
        while slots[k].next != s:
            k = slots[k].next
        slots[k].next = slots[s].next
    slots[s].next = run.free_slot
    run.free_slot = s


@compiled
def prefill_oracle(
    run: Programme, w: PlannedWorkload, labels: OpenLabels, scratch: Scratch, kept: Records
) -> None:
    """Find the cheapest way from the first arrival to the end of the episode.

    Args:
        run: settings and results.
        w: the workload.
        labels: all empty but for the first request's.
        scratch: clocks, and room.
        kept: labels for the way back, `LABEL_DTYPE`.
    """
    for head in range(w.arrival_s.size):
        scratch.batch[0] = 0
        best = np.inf
        x = labels.idle[head]
        if np.isfinite(x.cost):
            now = w.arrival_s[head]
            label = add_label(run, kept, x.parent, x.clock)
            tail = head + 1
            while tail < w.arrival_s.size and w.arrival_s[tail] <= now:
                tail += 1
            best = x.cost - run.floor_w * now
            # in the bound for every delay a batch may be any mix of clocks, this one among them
            ramp_s = w.p.parked_ramp_s if w.p.parked == 1 and run.mode != CELLS_ANY_DELAY else 0.0
            waited = head > 0 or now > 0.0
            ramp_until_s = now + ramp_s if waited else 0.0
            start = Departure(now, now, x.cost, label, ramp_until_s, max(int(x.clock), 0))
            expand(run, w, labels, scratch, (head, 0, tail), start)
        while labels.first[head] >= 0 and run.status == OK:
            s = next_slot(labels, head)
            if labels.slots[s].head_done > 0:
                scratch.batch[0] = 0
                best = np.inf
            expand_slot(run, w, labels, scratch, kept, s, best)
            close_slot(run, labels, head, s)
        if run.status != OK:
            return
