"""What a controller believes about the next iteration at each of a few clocks.

One compiled pass, or any model's own methods.
"""

from typing import Any

import numpy as np

from biscale_env.core.jit import compiled
from biscale_env.models import COEFFICIENT_DTYPE, IterationModel
from biscale_env.models.physics import effective_freq_ghz, iteration_energy_j, latency_s
from controllers.base import Floats, PolicyContext

CLOCK_STRIDE = 4  # assumed: every fourth clock of the grid, 60 MHz


def search_grid(context: PolicyContext) -> Floats:
    """Clocks that are searched, rising and with the highest, MHz."""
    grid = context.clocks.grid_mhz
    return grid[(len(grid) - 1) % CLOCK_STRIDE :: CLOCK_STRIDE]


@compiled
def scan(
    coef: Any, work: Any, clocks_ghz: Any, freq_min_ghz: float, latency: Any, energy: Any
) -> None:
    """Latency (s) and instance energy (J) of each row of work (n, 4) at each clock, under the power
    cap.

    Both outputs are (n, levels). No work takes no time.
    """
    c = coef[0]
    for i in range(work.shape[0]):
        tokens, attn_work, cached, n_seq = work[i, 0], work[i, 1], work[i, 2], work[i, 3]
        if tokens <= 0.0:
            latency[i, :] = 0.0
            energy[i, :] = 0.0
            continue
        for k in range(clocks_ghz.size):
            f = clocks_ghz[k]
            t = latency_s(c, tokens, attn_work, cached, n_seq, f)
            e = iteration_energy_j(c, tokens, attn_work, cached, t, f)
            if e > c.p_cap_w * t:
                f = effective_freq_ghz(c, tokens, attn_work, cached, n_seq, f, freq_min_ghz)
                t = latency_s(c, tokens, attn_work, cached, n_seq, f)
                e = iteration_energy_j(c, tokens, attn_work, cached, t, f)
            latency[i, k] = t
            energy[i, k] = e * c.n_gpus


class Belief:
    """Latency and energy of given work at a fixed set of clocks, as the controller's model has
    them.
    """

    def __init__(self, context: PolicyContext, clocks_mhz: Any = None) -> None:
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
            self._coef = np.array(
                [tuple(context.model.member(context.member))], dtype=COEFFICIENT_DTYPE
            )
            self._clocks_ghz = self.clocks_mhz * 1e-3
            self._freq_min_ghz = context.clocks.freq_min_mhz * 1e-3

    def levels(self, work: Floats) -> tuple[Floats, Floats]:
        """Latency (s) and energy (J) of each piece of work at each clock.

        Args:
            work: (n, 4): tokens, attn_work, cached, n_seq.

        Returns:
            Two arrays (n, clocks).
        """
        if self._compiled:
            latency = np.empty((len(work), self.clocks_mhz.size))
            energy = np.empty((len(work), self.clocks_mhz.size))
            scan(self._coef, work, self._clocks_ghz, self._freq_min_ghz, latency, energy)
            return latency, energy
        columns = [work[:, k, None] for k in range(4)]
        model, member = self.context.model, self.context.member
        some = columns[0] > 0.0
        latency = model.latency_s(*columns, self.clocks_mhz, member)
        return np.where(some, latency, 0.0), np.where(
            some, model.energy_j(*columns, self.clocks_mhz, member), 0.0
        )


@compiled
def prefill_work(x: Any, tokens: int, attn_work: int, requests: int, work: Any) -> None:
    """Work (n, 4) of the next prefill batch from the physical observation.

    The integers are columns of x.
    """
    for i in range(x.shape[0]):
        work[i, 0] = x[i, tokens]
        work[i, 1] = x[i, attn_work]
        work[i, 2] = 0.0
        work[i, 3] = x[i, requests]


@compiled
def decode_work(x: Any, batch: int, recompute: int, cached: int, work: Any) -> None:
    """Work (n, 4) of the next decode iteration from the physical observation.

    The integers are columns of x.
    """
    for i in range(x.shape[0]):
        work[i, 0] = x[i, batch] + x[i, recompute]
        work[i, 1] = 0.5 * x[i, recompute] * x[i, recompute]
        work[i, 2] = x[i, cached]
        work[i, 3] = x[i, batch]


class NextWork:
    """Reads the work of the next iteration out of the physical observation."""

    def __init__(self, context: PolicyContext) -> None:
        """Find the columns."""
        decode = context.phase == "decode"
        prefill_names = ("batch_tokens", "batch_attn", "batch_requests")
        names = ("batch", "recompute_tokens", "cached_tokens") if decode else prefill_names
        self._columns = [context.spec.index(name) for name in names]
        self._read = decode_work if decode else prefill_work

    def __call__(self, x: Floats) -> Floats:
        """Work (n, 4) of the next iteration: tokens, attn_work, cached, n_seq.

        The attention work of recomputed requests is known only in sum; it is taken as that of one
        prompt, an upper bound.
        """
        work = np.empty((len(x), 4))
        self._read(x, *self._columns, work)
        return work
