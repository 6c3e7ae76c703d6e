"""What every iteration of a decode instance costs at least.

The cuts of :mod:`controllers.oracle.decode_bound`.

With ``n`` running requests, ``C`` cached tokens and clock ``f`` it takes ``T(n, C, f)`` and uses
``E(n, C, f)``; let ``e = E - P0 T`` be its energy above ``P0``, the least power of a waiting
instance (idle at the lowest clock, or parked). A *cut* ``(mu, nu, kappa)`` with

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

An iteration that also recomputes preempted requests has ``rec`` more rows and at most ``rec R / 2``
more attention work (R: KV capacity). Either e - mu T rises in both, and the rows without any are
the lowest; or mu exceeds what a second costs, and it is bounded from below by a function that is
concave, whose corners suffice. In that bound an operation costs no more than without ``rec``, all
layers attend to everything, and the share of the experts that is read rises in time as its tangent
up to ``r = -1 / (skew log(miss))`` rows, where the tangent reaches 1, and is 1 from there on; in
energy along its chords. The corners are those of the two pieces of the triangle (0, 0), (R, 0),
(R, R^2 / 2) below and above ``r``.
"""

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
SAFETY = 1e-9  # relative reduction of certified cuts, above the rounding errors of their evaluation


class Iterations:
    """All iterations that may occur, as rows of (1).

    ``energy >= mu time + nu n + kappa cached``.
    """

    def __init__(self, plant: Plant, pool: RequestTable, member: int) -> None:
        """Evaluate the physics at all batch sizes, both ends of the cache and all clocks."""
        self.c = plant.model.member(member)
        self.clocks_ghz = clocks = plant.clocks.grid_mhz / 1e3
        self.n_gpus = float(self.c.n_gpus)
        self.floor_w = plant.waiting_power_w(member, plant.clocks.freq_min_mhz)
        self.capacity = float(plant.kv_capacity_tokens)
        size = np.arange(1.0, min(plant.settings.max_seqs, len(pool.prompt)) + 1.0)
        least = size * (float(pool.prompt.min()) + 1.0)
        size, least = size[least <= self.capacity], least[least <= self.capacity]
        most = np.minimum(size * float((pool.prompt + pool.output).max()), self.capacity)
        n, freq, end = (x.ravel() for x in np.meshgrid(size, clocks, [0, 1], indexing="ij"))
        k = n.astype(int) - 1
        self._rows = [self._plain(n, np.where(end == 0, least[k], most[k]), freq)]
        self.n_plain = len(n)
        self._rows += [self._capped(size, cached, clocks[-1]) for cached in (least, most)]
        for rec in self._corners():
            for attn in (0.0, 0.5 * rec * self.capacity):
                self._rows += self._recomputing(size, (least, most), rec, attn)
        self.energy, self.time, self.n, self.cached, self.freq = (
            np.concatenate(column) for column in zip(*self._rows, strict=True)
        )
        self.shortest_s = float(self.time.min())

    def _plain(self, n: Floats, cached: Floats, freq_ghz: Floats) -> tuple[Floats, ...]:
        duration = latency_s(self.c, n, 0.0, cached, n, freq_ghz)
        joules = self.n_gpus * iteration_energy_j(self.c, n, 0.0, cached, n, duration, freq_ghz)
        return joules - self.floor_w * duration, duration, n, cached, freq_ghz

    def _corners(self) -> list[float]:
        """Numbers of recomputed rows at which the bound of recomputing iterations has corners."""
        spread = self.c.experts_s > 0.0 and self.c.expert_miss > 0.0
        all_read = -1.0 / (self.c.expert_skew * np.log(self.c.expert_miss)) if spread else np.inf
        return [all_read, self.capacity] if all_read < self.capacity else [self.capacity]

    def _recomputing(
        self, size: Floats, ends: tuple[Floats, Floats], rec: float, attn: float
    ) -> list[tuple[Floats, ...]]:
        """The bound of iterations with ``rec`` more rows and ``attn`` more work, at a corner."""
        c, clocks = self.c, self.clocks_ghz
        found = []
        for k, n in enumerate(size):
            before = float(experts_read(c, n))
            own = c._replace(
                few_rows_saving=0.0,
                e_flop_j=c.e_flop_j * (1.0 - c.few_rows_saving * FEW_ROWS / (FEW_ROWS + n)),
                window_share=0.0,
                expert_miss=0.0,
                experts_s=c.experts_s * before,
                expert_bytes=c.expert_bytes * float(experts_read(c, n + rec)),
                expert_core_bytes=c.expert_core_bytes * float(experts_read(c, n + rec)),
            )
            more_s = c.experts_s * (1.0 - before) * memory_stretch(c, clocks)
            for cached in (ends[0][k], ends[1][k]):
                read = attended(c, n, 0.0, cached, n)[1]
                duration = latency_s(own, n + rec, attn, read, n, clocks) + more_s
                joules = self.n_gpus * iteration_energy_j(
                    own, n + rec, attn, read, n, duration, clocks
                )
                above = joules - self.floor_w * duration
                ones = np.ones(len(clocks))
                found.append((above, duration, n * ones, cached * ones, clocks))
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
