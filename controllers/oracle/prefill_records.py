"""Records and groups of arrays of the prefill oracle's dynamic programme.

:mod:`controllers.oracle.prefill_kernels` computes on them.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biscale_env.models.physics import Coefficients
from controllers.records import Records, record_dtype

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

EXACT = 0  # labels carry their true time: the cheapest path is a plan that the simulator repeats
# a label may be anywhere in its cell, whichever is best: a lower bound without actuation delay
CELLS = 1
# and clocks may be mixed within a batch, and waiting costs the power of the lowest clock
CELLS_ANY_DELAY = 2

OK, OUT_OF_SLOTS, OUT_OF_LABELS = 0, 1, 2
EMPTY = 0.0  # cost of a cell without a label; every real label has used energy


class Programme:
    """Settings and results of one dynamic programme, a record of :data:`RUN_DTYPE`.

    Attributes:
        mode: EXACT, CELLS or CELLS_ANY_DELAY.
        cell_s: width of a time cell, s.
        price: penalty of an SLO violation, in reference energies.
        early_price: penalty of a request that completes later than a share of its bound, in
            addition.
        early_share: that share.
        beyond_w: what a second after the end of the episode is worth, reference energies; 0 but
            where the end is that of what is known.
        clocks: time cells are kept apart by the clock that a label departs at; 1: they are not.
        margin: a label dearer by this than an earlier one of the same position is dropped.
        floor_w: least power of a waiting instance, in reference energies per second.
        status: OK or what ran out.
        free_slot: first free slot.
        n_labels: labels kept for the way back.
        expanded: labels expanded.
        most_expanded: labels after which a bounding programme gives up.
        late: transitions dropped because they fall behind the window of their position.
        best_cost: cheapest way to the end.
        best_parent: its last label.
        best_clock: its last clock.
    """

    mode: int
    cell_s: float
    price: float
    early_price: float
    early_share: float
    beyond_w: float
    clocks: int
    margin: float
    floor_w: float
    status: int
    free_slot: int
    n_labels: int
    expanded: int
    most_expanded: int
    late: int
    best_cost: float
    best_parent: int
    best_clock: int


class Slot:
    """An open position: request and tokens of it done, its first cell, the cells in use."""

    head: int
    head_done: int
    base: int
    lo: int
    hi: int
    next: int


class ClockOption:
    """A choice of a batch: its duration (least and most), energy, idle power after it, clock."""

    d: float
    d_max: float
    e: float
    idle_w: float
    clock: int


RUN_DTYPE = record_dtype(Programme)
SLOT_DTYPE = record_dtype(Slot)
OPTION_DTYPE = record_dtype(ClockOption)
CELL_DTYPE = np.dtype(
    [
        ("cost", np.float64),
        ("time_s", np.float64),
        ("ramp_until_s", np.float64),
        ("parent", np.int32),
        ("clock", np.int32),
    ]
)
IDLE_DTYPE = np.dtype([("cost", np.float64), ("parent", np.int32), ("clock", np.int32)])
LABEL_DTYPE = np.dtype([("parent", np.int32), ("clock", np.int16)])


class PlannedWorkload(NamedTuple):
    """What is known of the workload and the instance.

    Attributes:
        c: coefficients.
        p: engine parameters; their delay is that of plans (bounds have none of their own), their
            decision interval is not used.
        arrival_s: arrival times (n,).
        prompt: new tokens of each prompt (n,).
        prefix: cached tokens before them (n,).
        slo_class: SLO class of each (n,); empty where there is one bound for all.
        earliest_s: lower bound on the time at which all requests before r can be complete (n,).
        s_per_token: least seconds per token.
    """

    c: Coefficients
    p: Any  # a record of `biscale_env.sim.state.PARAMS_DTYPE`
    arrival_s: Floats
    prompt: NDArray[np.int32]
    prefix: NDArray[np.int32]
    slo_class: NDArray[np.int8]
    earliest_s: Floats
    s_per_token: float


class OpenLabels(NamedTuple):
    """Labels that are not expanded yet.

    Attributes:
        slots: open positions; all free at first, chained by ``next``.
        first: first open slot of each request (n,), all -1 at first.
        cells: time cells of the slots, all empty at first.
        idle: label at the arrival of each request that comes to an empty instance (n,); infinite
            at first but for the first.
    """

    slots: Records
    first: Ints
    cells: Records
    idle: Records


class Scratch(NamedTuple):
    """Clocks to choose among, rising, GHz, and room for the options of a batch.

    Attributes:
        grid_ghz: supported clocks.
        hull: options on the convex hull.
        options: options of the present batch.
        batch: the last batch of the present position, 8 integers (see :func:`expand`).
    """

    grid_ghz: Floats
    hull: Records
    options: Records
    batch: Ints


class Work(NamedTuple):
    """A batch: new tokens, attention token-pairs, requests, time of it at the lowest clock."""

    tokens: int
    attn: float
    n_seq: int
    ramp_s: float


class Departure(NamedTuple):
    """A label about to start its batch, between ``low_s`` and ``high_s``, at a cost so far.

    Until ``ramp_until_s`` the instance runs at the lowest clock; ``clock`` is the one it has, which
    counts where a change takes time.
    """

    low_s: float
    high_s: float
    cost: float
    parent: int
    ramp_until_s: float
    clock: int


class Arrival(NamedTuple):
    """Where a batch leads: slot of the position, requests before and after, queue empty then."""

    slot: int
    head: int
    new_head: int
    empty: bool
