"""What every iteration of a decode instance costs at least.

The cuts of :mod:`controllers.oracle.decode_bound`.

With ``n`` running requests, ``C`` cached tokens and clock ``f`` it takes ``T(n, C, f)`` and uses
``E(n, C, f)``; let ``e = E - P0 T`` be its energy above ``P0``, the least power of a waiting
instance (idle at the lowest clock, or parked where that is less). A *cut* ``(mu, nu, kappa)`` with

    e(n, C, f) >= mu T(n, C, f) + nu n + kappa C   for every n <= max_seqs, every C that fits, every
    clock                     (1)

holds for every iteration, also for one within which the clock changes (its e and T are the same
convex combination of those of the pure clocks), so it may be summed over any period: energy above
P0 >= mu (busy time) + nu (tokens made) + kappa (cached tokens read). (1) is linear in the cut; cuts
are found by small linear programmes and then *certified*: mu is lowered until (1) holds for all n,
all supported clocks and both ends of the range of C. The ends suffice: for a fixed n and f, e and T
are affine in what attention reads, which is C, or with windowed layers a rising concave function of
it. So ``e - mu T - kappa C`` is concave in C where ``e - mu T`` rises with what is read, and falls
in C where it does not, as kappa >= 0. An iteration at the power cap has ``e = (cap - P0) T`` and
takes at least as long as at the highest clock, which is one more row as long as mu <= cap - P0.

An iteration that also recomputes preempted requests has ``rec`` more rows, no more than the KV
cache holds, and at most ``rec M / 2`` more attention work (M: length of the longest request); there
is none where the requests that may run together always fit. Either e - mu T rises in both, and the
rows without any are the lowest; or mu exceeds what a second costs, and e - mu T is bounded from
below by functions that are concave on pieces ``[a, b]`` of ``rec``, whose corners suffice; the
right ones, since at a left one the piece before is lower. On a piece an operation costs what it
does at ``a``, all layers attend to everything, and the share of the experts that is read rises in
time as its tangent, which reaches 1 at ``rec = -1 / (skew log(miss))``, a border of pieces, and in
energy along its chord.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import RequestTable
from biscale_env.envs.plant import Plant
from biscale_env.models.physics import (
    FEW_ROWS,
    attended,
    experts_read,
    iteration_energy_j,
    latency_s,
    memory_stretch,
)

Floats = NDArray[np.float64]
N_SIZES, N_CLOCKS, CONTEXTS = (
    8,
    4,
    (0.7, 1.0, 1.4),
)  # directions of the cuts; context lengths are relative to the mean
PIECES = (256.0, 1024.0, 4096.0, 16384.0)  # borders of the bound of recomputing iterations, rows
SAFETY = 1e-9  # relative reduction of certified cuts, above the rounding errors of their evaluation


class Iterations:
    """All iterations that may occur, as rows of (1).

    ``energy >= mu time + nu n + kappa cached``.
    """

    def __init__(
        self, plant: Plant, pool: RequestTable, member: int, floor_w: float | None = None
    ) -> None:
        """Evaluate the physics at all batch sizes, both ends of the cache and all clocks.

        ``floor_w``: the power above which energy counts; None: the least of a waiting instance.
        """
        self.c = plant.model.member(member)
        self.clocks_ghz = clocks = plant.clocks.grid_mhz / 1e3
        self.n_gpus = float(self.c.n_gpus)
        self.floor_w = plant.least_power_w(member) if floor_w is None else floor_w
        self.capacity = float(plant.kv_capacity_tokens)
        size = np.arange(1.0, min(plant.settings.max_seqs, len(pool.prompt)) + 1.0)
        least = size * (float(pool.prompt.min()) + 1.0)
        size, least = size[least <= self.capacity], least[least <= self.capacity]
        lengths = np.sort(pool.prompt + pool.output)[::-1].astype(np.float64)
        self.longest = float(lengths[0])
        together = float(lengths[: plant.settings.max_seqs].sum())
        self.always_fit = together + plant.settings.max_seqs <= self.capacity
        most = np.minimum(size * self.longest, self.capacity)
        n, freq, end = (x.ravel() for x in np.meshgrid(size, clocks, [0, 1], indexing="ij"))
        k = n.astype(int) - 1
        self._rows = [self._plain(n, np.where(end == 0, least[k], most[k]), freq)]
        self.n_plain = len(n)
        self._rows += [self._capped(size, cached, clocks[-1]) for cached in (least, most)]
        for piece in () if self.always_fit else self._pieces():
            for attn in (0.0, 0.5 * piece[1] * self.longest):
                self._rows += self._recomputing(size, (least, most), piece, attn)
        self.energy, self.time, self.n, self.cached, self.freq = (
            np.concatenate(column) for column in zip(*self._rows, strict=True)
        )
        self.shortest_s = float(self.time.min())

    def _plain(self, n: Floats, cached: Floats, freq_ghz: Floats) -> tuple[Floats, ...]:
        duration = latency_s(self.c, n, 0.0, cached, n, freq_ghz)
        joules = self.n_gpus * iteration_energy_j(self.c, n, 0.0, cached, n, duration, freq_ghz)
        return joules - self.floor_w * duration, duration, n, cached, freq_ghz

    def _pieces(self) -> list[tuple[float, float]]:
        """Pieces of the range of recomputed rows."""
        inner = [*PIECES, self._all_read()]
        borders = [0.0, *sorted(r for r in inner if r < self.capacity), self.capacity]
        return list(pairwise(borders))

    def _all_read(self) -> float:
        """Recomputed rows at which the tangent of the share of experts reaches 1."""
        if self.c.experts_s <= 0.0 or self.c.expert_miss <= 0.0:
            return np.inf
        return float(-1.0 / (self.c.expert_skew * np.log(self.c.expert_miss)))

    def _recomputing(
        self,
        size: Floats,
        ends: tuple[Floats, Floats],
        piece: tuple[float, float],
        attn: float,
    ) -> list[tuple[Floats, ...]]:
        """The bound at the right end of a piece with ``attn`` more attention work."""
        c, (begin, rec) = self.c, piece
        found: list[tuple[Floats, ...]] = []
        for k, n in enumerate(size):
            before, share = (float(experts_read(c, rows)) for rows in (n, n + rec))
            saving = c.few_rows_saving * FEW_ROWS / (FEW_ROWS + n + begin)
            own = c._replace(
                few_rows_saving=0.0,
                e_flop_j=c.e_flop_j * (1.0 - saving),
                window_share=0.0,
                expert_miss=0.0,
                experts_s=c.experts_s * before,
                expert_bytes=c.expert_bytes * share,
                expert_core_bytes=c.expert_core_bytes * share,
            )
            freq = np.tile(self.clocks_ghz, 2)
            cached = np.repeat([ends[0][k], ends[1][k]], len(self.clocks_ghz))
            read = attended(c, n, 0.0, cached, n)[1]
            tangent = (1.0 - before) * min(rec / self._all_read(), 1.0)
            duration = latency_s(own, n + rec, attn, read, n, freq)
            duration = duration + c.experts_s * tangent * memory_stretch(c, freq)
            joules = iteration_energy_j(own, n + rec, attn, read, n, duration, freq)
            above = self.n_gpus * joules - self.floor_w * duration
            found.append((above, duration, np.full(len(freq), n), cached, freq))
        return found

    def _capped(self, n: Floats, cached: Floats, freq_ghz: float) -> tuple[Floats, ...]:
        duration = latency_s(self.c, n, 0.0, cached, n, freq_ghz)
        return (
            (self.n_gpus * float(self.c.p_cap_w) - self.floor_w) * duration,
            duration,
            n,
            cached,
            np.full(len(n), freq_ghz),
        )

    def directions(self, mean_context: float) -> Floats:
        """Mixes of ``(time, tokens, cached)`` that a run may show.

        Batch sizes, context lengths and clocks that are possible, (k, 3).
        """
        clocks = np.linspace(self.clocks_ghz[0], self.clocks_ghz[-1], N_CLOCKS)
        found = []
        for factor in CONTEXTS:
            context = factor * mean_context
            largest = max(min(float(self.n.max()), self.capacity / context), 1.0)
            for n in np.unique(np.rint(np.geomspace(1.0, largest, N_SIZES))):
                duration = latency_s(self.c, n, 0.0, n * context, n, clocks)
                found += [(d, n, n * context) for d in duration]
        return np.array(found)

    def sample(self) -> NDArray[np.int64]:
        """Rows that cuts are looked for on.

        Some batch sizes and clocks, the ends among them, without recomputing.
        """
        sizes = np.unique(np.rint(np.geomspace(1.0, self.n.max(), 16)))
        clocks = self.clocks_ghz[
            np.unique(np.linspace(0, len(self.clocks_ghz) - 1, 10).astype(int))
        ]
        return np.flatnonzero((np.isin(self.n, sizes) & np.isin(self.freq, clocks))[: self.n_plain])

    def cut(self, direction: Floats, sample: NDArray[np.int64]) -> Floats | None:
        """The certified cut that is tightest for a mix of ``(time, tokens, cached)``.

        None if the sample does not span that mix.
        """
        rows = np.column_stack([self.time, self.n, self.cached])[sample]
        scale = rows.max(axis=0)
        found = linprog(
            -direction / scale,
            rows / scale,
            self.energy[sample],
            bounds=[(None, None), (None, None), (0.0, None)],
            method="highs",
        )
        return self.certify(found.x / scale) if found.success else None

    def certify(self, cut: Floats) -> Floats:
        """Lower ``mu`` until every row holds; kappa is at least 0."""
        cut = np.array([cut[0], cut[1], max(cut[2], 0.0)])
        slack = (self.energy - self.n * cut[1] - self.cached * cut[2]) / self.time
        most = self.n_gpus * float(self.c.p_cap_w) - self.floor_w
        return np.array(
            [min(cut[0], slack.min() - SAFETY * abs(slack).max(), most), cut[1], cut[2]]
        )


def find_cuts(rows: Iterations, mean_context: float) -> Floats:
    """Certified cuts in the directions that a run may take, ``(k, 3)``.

    Mu (W), nu (J per token), kappa (J per cached token).
    """
    sample = rows.sample()
    found = [rows.cut(direction, sample) for direction in rows.directions(mean_context)]
    cuts = np.array([cut for cut in found if cut is not None])
    if not len(cuts):
        raise BiscaleError(
            "the decode bound found no cut: the iteration model is not one of energies that rise "
            "with work"
        )
    return np.unique(cuts.round(12), axis=0)
