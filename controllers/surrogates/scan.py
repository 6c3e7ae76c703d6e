"""Latency and energy of the next work at each of a few clocks, by a controller's nominal model.

For every clock f, with ``f_eff = min(f, clock at which the power cap is reached)``::

    latency = T(work, f_eff)        energy = n_gpus E(work, f_eff)

(`biscale_env.models.physics`), in one compiled pass, or by any other model's own methods.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from biscale_env.core.jit import compiled
from biscale_env.models import COEFFICIENT_DTYPE, IterationModel
from biscale_env.models.physics import iteration_under_cap
from controllers.base import Floats, PolicyContext
from controllers.columns import DECODE, PREFILL
from controllers.records import Records

CLOCK_STRIDE = 4  # assumed: every fourth clock of the grid, 60 MHz


class LevelTable(NamedTuple):
    """Predictions for n pieces of work at some clocks, each (n, clocks).

    Attributes:
        latency_s: duration, s.
        energy_j: energy of the instance, J.
    """

    latency_s: Floats
    energy_j: Floats


def search_grid(context: PolicyContext) -> Floats:
    """Clocks that are searched, rising and with the highest, MHz."""
    grid = context.clocks.grid_mhz
    return grid[(len(grid) - 1) % CLOCK_STRIDE :: CLOCK_STRIDE]


@compiled
def scan(
    coef: Records,
    work: Floats,
    clocks_ghz: Floats,
    freq_min_ghz: float,
    latency: Floats,
    energy: Floats,
) -> None:
    """Latency (s) and instance energy (J) of work (n, 4) at each clock, under the power cap.

    Both outputs are (n, clocks). No work takes no time.
    """
    c = coef[0]
    for i in range(work.shape[0]):
        tokens, attn_work, cached, n_seq = work[i, 0], work[i, 1], work[i, 2], work[i, 3]
        if tokens <= 0.0:
            latency[i, :] = 0.0
            energy[i, :] = 0.0
            continue
        for k in range(clocks_ghz.size):
            _, t, e = iteration_under_cap(
                c, tokens, attn_work, cached, n_seq, clocks_ghz[k], freq_min_ghz
            )
            latency[i, k] = t
            energy[i, k] = e * c.n_gpus


class LevelScan:
    """Latency and energy of given work at a fixed set of clocks, by the nominal model."""

    def __init__(self, context: PolicyContext, clocks_mhz: ArrayLike | None = None) -> None:
        """Prepare the scan.

        Args:
            context: gives model, member and clocks.
            clocks_mhz: clocks to scan, rising; None takes the GPU's control levels.
        """
        self.context = context
        self.clocks_mhz = np.asarray(
            context.clocks.levels_mhz if clocks_mhz is None else clocks_mhz, dtype=np.float64
        )
        self._compiled = isinstance(context.model, IterationModel)
        if self._compiled:
            member = context.model.member(context.member)
            self._coef = np.array([tuple(member)], dtype=COEFFICIENT_DTYPE)
            self._clocks_ghz = self.clocks_mhz * 1e-3
            self._freq_min_ghz = context.clocks.freq_min_mhz * 1e-3

    def __call__(self, work: Floats) -> LevelTable:
        """Predictions for work (n, 4): tokens, attention token-pairs, cached, n_seq."""
        if self._compiled:
            latency = np.empty((len(work), self.clocks_mhz.size))
            energy = np.empty((len(work), self.clocks_mhz.size))
            scan(self._coef, work, self._clocks_ghz, self._freq_min_ghz, latency, energy)
            return LevelTable(latency, energy)
        columns = [work[:, k, None] for k in range(4)]
        model, member = self.context.model, self.context.member
        some = columns[0] > 0.0
        latency = model.latency_s(*columns, self.clocks_mhz, member)
        energy = model.energy_j(*columns, self.clocks_mhz, member)
        return LevelTable(np.where(some, latency, 0.0), np.where(some, energy, 0.0))


@compiled
def prefill_work(x: Floats, work: Floats) -> None:
    """Work (n, 4) of the next prefill batch from the physical observation (n, dim)."""
    for i in range(x.shape[0]):
        work[i, 0] = x[i, PREFILL.batch_tokens]
        work[i, 1] = x[i, PREFILL.batch_attn]
        work[i, 2] = 0.0
        work[i, 3] = x[i, PREFILL.batch_requests]


@compiled
def decode_work(x: Floats, work: Floats) -> None:
    """Work (n, 4) of the next decode iteration from the physical observation (n, dim)."""
    for i in range(x.shape[0]):
        redo = x[i, DECODE.recompute_tokens]
        work[i, 0] = x[i, DECODE.batch] + redo
        work[i, 1] = 0.5 * redo * redo
        work[i, 2] = x[i, DECODE.cached_tokens]
        work[i, 3] = x[i, DECODE.batch]


def next_work(x: Floats, phase: str) -> Floats:
    """Work of the next iteration of physical observations (n, dim).

    The attention work of recomputed requests is known only in sum; it is taken as that of one
    prompt, an upper bound.

    Returns:
        (n, 4): tokens, attention token-pairs, cached tokens, requests.
    """
    work = np.empty((len(x), 4))
    if phase == "decode":
        decode_work(x, work)
    else:
        prefill_work(x, work)
    return work
