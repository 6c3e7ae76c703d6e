"""BiScale's slack-aware decode rule, and what a good engineer would add to it.

Law (arXiv 2602.18755), for the predicted interval ``T(f)`` of the next iteration at clock f::

    f = min { f in levels : T(f) <= SLO (1 - margin) }     (the highest where none meets it)
    f = f_max while KV use > kv_guard

:mod:`biscale_env.laws.slack_law` holds it; the extras below change T, the limit, or add a floor.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from biscale_env.core.jit import compiled, inlined
from biscale_env.laws.level_search import interval_limit_s, table_latency_s
from biscale_env.laws.slack_law import slack_level
from controllers.base import MARGINS, Amount, Controller, Floats, Fraction, PolicyContext, Positive
from controllers.columns import DECODE
from controllers.surrogates.scan import LevelScan, LevelTable, next_work, search_grid


@compiled
def slack_clocks(
    latency: Floats,
    limit: Floats,
    kv_use: Floats,
    kv_guard: float,
    clocks_mhz: Floats,
    freq: Floats,
) -> None:
    """The law of :func:`biscale_env.laws.slack_law.slack_level` for every row.

    ``latency`` is (n, clocks), ``limit``, ``kv_use`` and ``freq`` (the result, MHz) are (n,), the
    clocks rise.
    """
    for i in range(freq.size):
        above = kv_use[i] > kv_guard
        level = slack_level(table_latency_s, latency[i], clocks_mhz.size, limit[i], above)
        freq[i] = clocks_mhz[level]


@compiled
def raise_to_cheapest(energy: Floats, clocks_mhz: Floats, freq: Floats) -> None:
    """Never below the clock of least energy.

    ``energy`` is (n, clocks), ``freq`` (n,) is changed in place.

    Where every clock costs infinitely much, the highest is taken.
    """
    for i in range(freq.size):
        best = clocks_mhz.size - 1
        for k in range(clocks_mhz.size - 2, -1, -1):
            if energy[i, k] < energy[i, best]:
                best = k
        freq[i] = max(freq[i], clocks_mhz[best])


@inlined
def nearest_level(clocks_mhz: Floats, freq_mhz: float) -> int:
    """Index of the clock nearest to a given one."""
    best = 0
    for k in range(1, clocks_mhz.size):
        if abs(clocks_mhz[k] - freq_mhz) < abs(clocks_mhz[best] - freq_mhz):
            best = k
    return best


@compiled
def look_ahead(latency: Floats, clocks_mhz: Floats, x: Floats, work: Floats) -> None:
    """Work of the first iteration that runs wholly at a clock requested now, in place.

    ``work`` (n, 4) is that of the next iteration. Until the new clock takes effect the newest one
    requested before is taken to apply: every running request gains a token per iteration, and what
    is on its way arrives.
    """
    for i in range(latency.shape[0]):
        at_old = latency[i, nearest_level(clocks_mhz, x[i, DECODE.freq_pending])]
        lead = max(x[i, DECODE.time_to_apply], x[i, DECODE.actuation_delay])
        steps = np.ceil(lead / at_old - 1e-9) if at_old > 0.0 else 0.0
        work[i, 2] += steps * work[i, 3]
        work[i, 0] += x[i, DECODE.incoming_requests]
        work[i, 3] += x[i, DECODE.incoming_requests]


@compiled
def resist_lowering(latency: Floats, clocks_mhz: Floats, x: Floats, hysteresis: float) -> None:
    """Stretch the latency of clocks below the newest one requested.

    Going down must then leave a fraction ``hysteresis`` of the limit free.
    """
    for i in range(latency.shape[0]):
        for k in range(nearest_level(clocks_mhz, x[i, DECODE.freq_pending])):
            latency[i, k] /= 1.0 - hysteresis


@compiled
def mean_power_under_load(
    latency: Floats,
    energy: Floats,
    latency2: Floats,
    energy2: Floats,
    x: Floats,
    kv_limit: float,
    clocks_mhz: Floats,
    power: Floats,
) -> None:
    """Mean power at each clock once the batch has settled there.

    The tokens asked for per second do not depend on the clock, so slower iterations gather larger
    batches (Little's law): ``B = rate T(B)``. Latency and energy are taken as linear in the batch,
    through the tables of the present batch and of twice it; the rate is that of the present batch
    at the level nearest to the newest clock requested. With the present batch as unit, ``b = T(b) /
    T_old``. Where no batch is large enough, or it would use more than ``kv_limit`` of the KV cache,
    the power is infinite.

    Args:
        latency: predictions for the present batch, (n, clocks), s.
        energy: of its energy, J.
        latency2: predictions for a batch twice as large.
        energy2: of its energy.
        x: physical observations (n, dim).
        kv_limit: fraction of the KV cache that the settled batch may use.
        clocks_mhz: clocks of the tables.
        power: (n, clocks), W, written.
    """
    for i in range(power.shape[0]):
        at_old = latency[i, nearest_level(clocks_mhz, x[i, DECODE.freq_pending])]
        for k in range(power.shape[1]):
            per_batch = latency2[i, k] - latency[i, k]
            room = at_old - per_batch
            b = (latency[i, k] - per_batch) / room if room > 0.0 else np.inf
            t = latency[i, k] + per_batch * (b - 1.0)
            fits = room > 0.0 and b * x[i, DECODE.kv_use] <= kv_limit
            above = (energy2[i, k] - energy[i, k]) * (b - 1.0)
            power[i, k] = (energy[i, k] + above) / t if fits else np.inf


class SlackRule(Controller):
    """BiScale's slack-aware decode rule (arXiv 2602.18755).

    Scan the clocks upward and take the lowest whose predicted next interval between tokens meets
    the TPOT SLO; with KV use above a threshold, take the highest clock until drained. As in the
    paper: the 7 levels, and the next interval as a conservative stand-in for TPOT. The threshold is
    not published; 0.9 is assumed.

    Beyond the paper, each off by default:

    * ``energy_floor``: never below the level that costs the least energy for this batch (below it
      both time and energy are lost).
    * ``load_floor``: never below the level that costs the least power for the present load. Unlike
      the floor above it knows that slower iterations gather larger batches and so are fewer: at a
      given load a lower clock can pay although each iteration costs more. Nor does it allow a clock
      at which the batch of this load would outgrow ``kv_guard`` of the KV cache.
    * ``fine``: scan every fourth clock of the grid (60 MHz) down to the lowest, instead of the
      levels.
    * ``accumulated``: the interval may be as long as the tightest running request can afford over
      ``lookahead`` further intervals, counting the time it has saved so far (``tpot_slack_min``),
      instead of one SLO.
    * ``delay_aware``: look at the first interval that a clock requested now can govern, with the
      context grown until then; and a lower clock must meet the limit with ``hysteresis`` to spare
      (no flutter around a threshold).

    A ``kv_guard`` of 1 or more switches the guard off.
    """

    phases: ClassVar[tuple[str, ...]] = ("decode",)
    TUNABLE: ClassVar[Mapping[str, tuple[Any, ...]]] = MARGINS

    def __init__(
        self,
        context: PolicyContext,
        *,
        margin: Fraction = 0.0,
        kv_guard: Amount = 0.9,
        energy_floor: bool = False,
        load_floor: bool = False,
        fine: bool = False,
        accumulated: bool = False,
        lookahead: Positive = 16.0,
        delay_aware: bool = False,
        hysteresis: Fraction = 0.05,
    ) -> None:
        """Prepare the scan.

        Args:
            context: what it may know.
            margin: fraction of the SLO kept free.
            kv_guard: KV use above which the highest clock is taken (assumed).
            energy_floor: never below the energy-optimal level.
            load_floor: never below the level of least power at the present load.
            fine: scan the grid instead of the levels.
            accumulated: spend the slack that the running requests have saved.
            lookahead: intervals over which saved slack is spent (assumed).
            delay_aware: look at the interval that a clock requested now governs.
            hysteresis: fraction of the limit that a lower clock must leave free, with
                ``delay_aware`` (assumed).
        """
        super().__init__(context)
        self.margin, self.kv_guard = float(margin), float(kv_guard)
        self.energy_floor, self.load_floor = bool(energy_floor), bool(load_floor)
        self.accumulated, self.lookahead = bool(accumulated), float(lookahead)
        self.delay_aware, self.hysteresis = bool(delay_aware), float(hysteresis)
        self._scan = LevelScan(context, search_grid(context) if fine else None)

    def limit_s(self, x: Floats) -> Floats:
        """Longest next interval allowed, (n,), s."""
        limit = interval_limit_s(x[:, DECODE.slo], self.margin)
        if self.accumulated:
            limit = limit * (1.0 + x[:, DECODE.tpot_slack_min] / self.lookahead)
        return np.asarray(limit)

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """Lowest level that meets the limit."""
        clocks = self._scan.clocks_mhz
        work = next_work(x, "decode")
        table = self._scan(work)
        floor = self._floor_cost(x, work, table)
        latency = table.latency_s
        if self.delay_aware:
            look_ahead(latency, clocks, x, work)
            latency = self._scan(work).latency_s
            resist_lowering(latency, clocks, x, self.hysteresis)
        freq = np.empty(len(x))
        slack_clocks(latency, self.limit_s(x), x[:, DECODE.kv_use], self.kv_guard, clocks, freq)
        if floor is not None:
            raise_to_cheapest(floor, clocks, freq)
        return freq, None

    def _floor_cost(self, x: Floats, work: Floats, now: LevelTable) -> Floats | None:
        """What the floor minimises, (n, clocks): energy per iteration or power under load.

        None without a floor.
        """
        if not self.load_floor:
            return now.energy_j if self.energy_floor else None
        power = np.empty_like(now.latency_s)
        twice = self._scan(2.0 * work)
        mean_power_under_load(*now, *twice, x, self.kv_guard, self._scan.clocks_mhz, power)
        return power
