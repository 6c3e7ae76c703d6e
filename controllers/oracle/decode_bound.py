"""A lower bound on the energy of a decode instance, with the whole workload known.

Valid for every policy at every actuation delay.

An exact dynamic programme is out of reach: the state is the multiset of running requests. The bound
relaxes the run to a fluid.

*One iteration.* :mod:`controllers.oracle.decode_cuts` finds certified triples (mu, nu, kappa):
whatever the policy and the delay, the energy above P0 (the least power of a waiting instance) is at
least mu (busy time) + nu (tokens made) + kappa (cached tokens read), over any period.

*The run.* Time is divided into windows (an iteration across a border is divided in proportion).
Per window: busy time b, tokens x, cached tokens read w, energy above P0. What no policy can change:

* every request makes ``output - 1`` tokens here, at most one per shortest iteration: cumulative x
  and w stay below an arrival curve;
* a request that meets the SLO has all its tokens at ``arrival + tpot (output - 1)``: cumulative x
  and w stay above a deadline curve, less the largest ``m`` amounts due by then when ``m`` requests
  may violate it (with SLO classes: the bound and the number of its own class);
* the instance iterates whenever a request is there, and a request is there for at least
  ``output - 1`` shortest iterations: b is at least the covered part of the window, and at most the
  window.

The least sum of the windows' energies under these constraints and all cuts is a linear programme;
adding ``P0`` times the length of the episode gives the bound. What it loses: batches of any size up
to max_seqs can be mixed at any time (they really depend on how slow the instance has been), and any
order of requests may be served.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import RequestTable
from biscale_env.envs.plant import Plant
from biscale_env.traces import Trace
from controllers.oracle.allowed_misses import AllowedMisses
from controllers.oracle.decode_cuts import Iterations, find_cuts
from controllers.oracle.plan_replay import member_of

Floats = NDArray[np.float64]
WINDOW_S = 10.0
# fractions of SLO-violating requests between which the objective is bounded
FRACTIONS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SOLVER_TOLERANCE = 1e-6  # relative; taken off the optimum that the solver reports


def arrival_curve(pool: RequestTable, borders_s: Floats, shortest_s: float) -> Floats:
    """Most ``(tokens, cached tokens read)`` possible by each border, (2, windows)."""
    tokens = pool.output.astype(np.float64) - 1.0
    most = np.zeros((2, len(borders_s)))
    for k, border in enumerate(borders_s):
        made = np.clip((border - pool.arrival_s) / shortest_s, 0.0, tokens)
        whole = np.ceil(made)
        most[:, k] = made.sum(), (whole * pool.prompt + 0.5 * whole * (whole + 1.0)).sum()
    return most


def deadline_curve(
    pool: RequestTable,
    borders_s: Floats,
    tpot_s: float,
    misses: int,
    mine: NDArray[np.bool_] | None = None,
) -> Floats:
    """Least ``(tokens, cached tokens read)`` necessary by each border, (2, windows).

    Args:
        pool: the workload.
        borders_s: borders of the windows, s.
        tpot_s: bound, s.
        misses: requests that may violate it.
        mine: requests that the bound is for, those of one SLO class; None: all.
    """
    tokens = pool.output.astype(np.float64) - 1.0
    reads = tokens * pool.prompt + 0.5 * tokens * (tokens + 1.0)
    due_s = pool.arrival_s + tpot_s * tokens
    if mine is not None:
        tokens, reads, due_s = tokens[mine], reads[mine], due_s[mine]
    least = np.zeros((2, len(borders_s)))
    if misses >= len(tokens):
        return least
    for k, border in enumerate(borders_s):
        due = due_s <= border
        for row, amount in enumerate((tokens, reads)):
            owed = amount[due]
            kept = len(owed) - misses
            least[row, k] = (
                np.partition(owed, kept)[:kept].sum()
                if 0 < kept < len(owed)
                else owed.sum() * (kept > 0)
            )
    return least


def coverage(begin_s: Floats, length_s: Floats, borders_s: Floats) -> Floats:
    """Time within each window that the intervals ``[begin, begin + length]`` cover, s.

    Begins rise.
    """
    end = np.maximum.accumulate(begin_s + length_s)
    gap = np.maximum(begin_s[1:] - end[:-1], 0.0)
    times = np.column_stack([begin_s[1:] - gap, begin_s[1:]]).ravel()
    covered = np.column_stack([begin_s[1:] - gap, begin_s[1:] - gap]).ravel() - np.repeat(
        np.cumsum(gap) - gap, 2
    )
    times = np.concatenate([[begin_s[0]], times, [end[-1]]])
    covered = np.concatenate([[0.0], covered - begin_s[0], [end[-1] - gap.sum() - begin_s[0]]])
    return np.diff(np.interp(borders_s, times, covered), prepend=0.0)


def least_energy(
    cuts: Floats,
    borders_s: Floats,
    most: Floats,
    least: Floats,
    busy_s: Floats,
    floor_w: float,
    last_open: bool,
    instances: float = 1,
) -> float:
    """Solve the linear programme over the windows; J above the floor power.

    Variables, per window: cumulative tokens and reads, busy time, energy. ``last_open``: the last
    window reaches beyond the end of the episode, and its busy time, which makes the run longer,
    costs the floor power too. ``instances`` that are alike may be busy at once.
    """
    k, n = len(borders_s), len(cuts)
    scale = np.maximum(most.max(axis=1), 1.0)
    window = instances * np.diff(borders_s, prepend=0.0)
    upper = np.where(np.arange(k) == k - 1, np.inf, window) if last_open else window
    bounds = [
        *zip(least[0] / scale[0], most[0] / scale[0], strict=True),
        *zip(least[1] / scale[1], most[1] / scale[1], strict=True),
        *zip(np.minimum(busy_s, upper), upper, strict=True),
        *[(0.0, None)] * k,
    ]
    rows, columns, values = [], [], []
    for j in range(2):  # both cumulative amounts rise
        at = np.arange(1, k)
        rows += [j * (k - 1) + at - 1] * 2
        columns += [j * k + at - 1, j * k + at]
        values += [np.ones(k - 1), -np.ones(k - 1)]
    row = 2 * (k - 1) + np.arange(n * k)
    cut, at = np.divmod(np.arange(n * k), k)
    later = at > 0
    for j in range(2):
        slope = cuts[cut, j + 1] * scale[j]
        rows += [row, row[later]]
        columns += [j * k + at, j * k + at[later] - 1]
        values += [slope, -slope[later]]
    rows += [row, row]
    columns += [2 * k + at, 3 * k + at]
    values += [cuts[cut, 0], -np.ones(n * k)]
    matrix = coo_matrix(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))),
        shape=(2 * (k - 1) + n * k, 4 * k),
    )
    cost = np.concatenate([np.zeros(3 * k), np.ones(k)])
    cost[3 * k - 1] = floor_w if last_open else 0.0
    found = linprog(cost, matrix.tocsr(), np.zeros(matrix.shape[0]), bounds=bounds, method="highs")
    if not found.success:
        raise BiscaleError(f"the linear programme of the decode bound failed: {found.message}")
    return float(found.fun)


class DecodeFluid:
    """The fluid relaxation of one workload in one plant."""

    def __init__(
        self, plant: Plant, trace: Trace, member: int | None = None, window_s: float = WINDOW_S
    ) -> None:
        """Prepare cuts and curves.

        Args:
            plant: a decode plant; delay and decision interval do not matter.
            trace: the workload.
            member: ensemble member, None that of the plant.
            window_s: length of the windows, s; shorter ones tighten the bound a little.

        Raises:
            BiscaleError: a prefill plant.
        """
        if plant.phase != "decode":
            raise BiscaleError(f"the decode bound needs a decode plant, got {plant.phase}")
        self.plant, self.pool = plant, RequestTable.of(plant, [trace])
        self.everything = AllowedMisses.of(plant.slo, self.pool, None)
        self.drain = plant.settings.drain
        tokens = self.pool.output.astype(np.float64) - 1.0
        reads = tokens * self.pool.prompt + 0.5 * tokens * (tokens + 1.0)
        k = member_of(plant, member)
        rows = Iterations(plant, self.pool, k)
        self.cuts = find_cuts(rows, float(reads.sum() / tokens.sum()))
        end_s = trace.duration_s
        inner = np.arange(window_s, end_s - 1e-3 * window_s, window_s)
        self.borders_s = np.concatenate([inner, [end_s], [np.inf] if self.drain else []])
        self.most = arrival_curve(self.pool, self.borders_s, rows.shortest_s)
        finite = np.where(np.isfinite(self.borders_s), self.borders_s, 1e12)
        self.busy_s = coverage(self.pool.arrival_s, tokens * rows.shortest_s, finite)
        # waiting at the highest clock before the first decision
        start_w = plant.waiting_power_w(k, plant.clocks.freq_max_mhz)
        self.before_j = start_w * float(self.pool.arrival_s[0])
        self.floor_w = rows.floor_w
        self.floor_j = rows.floor_w * (end_s - float(self.pool.arrival_s[0]))

    def energy_j(self, misses: int | Sequence[int] | NDArray[np.int64]) -> float:
        """Least energy if at most ``misses`` requests miss the SLO (or are not finished), J.

        Idling before the first request included. With SLO classes there is a number for each.
        """
        least = self.deadlines(np.atleast_1d(np.asarray(misses, dtype=np.int64)))
        if self.drain:
            least[:, -1] = self.most[:, -1]
        # a deadline that the arrival curve cannot meet is violated under any policy
        least = np.minimum(least, self.most)
        above = least_energy(
            self.cuts, self.borders_s, self.most, least, self.busy_s, self.floor_w, self.drain
        )
        return self.before_j + self.floor_j + above * (1.0 - SOLVER_TOLERANCE)

    def deadlines(self, misses: NDArray[np.int64]) -> Floats:
        """Deadline curve of all classes together, (2, windows)."""
        slo = self.plant.slo
        if not slo.classes:
            return deadline_curve(self.pool, self.borders_s, slo.tpot_s, int(misses[0]))
        curves = [
            deadline_curve(
                self.pool, self.borders_s, slo.of_class(k).tpot_s, int(m), self.pool.slo_class == k
            )
            for k, m in enumerate(misses)
        ]
        return np.asarray(np.sum(curves, axis=0))

    def cost(self, price: float) -> float:
        """Least cost in reference energies at a penalty (price) per SLO violation.

        Idling before the first request is left out, as in the rewards. Between two numbers of
        misses at least the energy of the larger and the penalty of the smaller is due. Without
        draining, requests that are cut off at the end never become violations, so nothing is known
        about their number.
        """
        n, ref = self.everything.weighted, self.plant.energy_ref_j
        misses = sorted(
            {float(np.ceil(part * n)) for part in (FRACTIONS if self.drain else (0.0, 1.0))}
        )
        most = [self.everything.within_weight(m) for m in misses]
        energies = [(self.energy_j(m) - self.before_j) / ref for m in most[1:]]
        due = [
            energy + price * m * self.drain for energy, m in zip(energies, misses[:-1], strict=True)
        ]
        return min([*due, (self.energy_j(most[0]) - self.before_j) / ref] if self.drain else due)


@dataclass(frozen=True)
class DecodeBound:
    """What no policy can beat at any actuation delay.

    Attributes:
        energy_j: least energy with at most the allowed misses, J.
        cost: least cost of the environment (reference energies, price = the plant's
            ``violation_weight``).
        violations_allowed: misses that the attainment allows; all requests without one.
        cuts: number of cuts used.
        seconds: wall time.
    """

    energy_j: float
    cost: float
    violations_allowed: int
    cuts: int
    seconds: float


def solve_decode_bound(
    plant: Plant,
    trace: Trace,
    attainment: float | None = None,
    member: int | None = None,
    window_s: float = WINDOW_S,
) -> DecodeBound:
    """Bound the energy and the cost of a workload from below; see the module for the relaxation.

    Args:
        plant: a decode plant.
        trace: the workload.
        attainment: fraction of requests that must meet the SLO; None constrains nothing.
        member: ensemble member, None that of the plant.
        window_s: length of the windows of the fluid, s.
    """
    begin = time.perf_counter()
    fluid = DecodeFluid(plant, trace, member, window_s)
    allowed = AllowedMisses.of(plant.slo, fluid.pool, attainment)
    energy = fluid.energy_j(allowed.counts)
    cost = fluid.cost(plant.settings.violation_weight)
    return DecodeBound(energy, cost, allowed.total, len(fluid.cuts), time.perf_counter() - begin)
