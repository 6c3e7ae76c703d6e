"""BiScale's slack-aware decode rule, and what a good engineer would add to it."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from biscale_env.core.jit import compiled, inlined
from biscale_env.laws.level_search import interval_limit_s, table_latency_s
from biscale_env.laws.slack_law import slack_level
from controllers.base import MARGINS, Amount, Controller, Floats, PolicyContext, Positive, Share
from controllers.surrogates.scan import Belief, NextWork, search_grid


@compiled
def slack_clocks(
    latency: Any, limit: Any, kv_use: Any, kv_guard: float, clocks_mhz: Any, freq: Any
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
def raise_to_cheapest(energy: Any, clocks_mhz: Any, freq: Any) -> None:
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
def nearest(clocks_mhz: Any, freq_mhz: float) -> int:
    """Index of the clock nearest to a given one."""
    best = 0
    for k in range(1, clocks_mhz.size):
        if abs(clocks_mhz[k] - freq_mhz) < abs(clocks_mhz[best] - freq_mhz):
            best = k
    return best


@compiled
def look_ahead(
    latency: Any,
    clocks_mhz: Any,
    x: Any,
    pending: int,
    wait: int,
    delay: int,
    incoming: int,
    work: Any,
) -> None:
    """Turn work (n, 4) of the next iteration into that of the first one that runs wholly at a clock
    asked for now, in place.

    Until then the newest clock asked for before is taken to be in force: every running request
    gains a token per iteration, and what is on its way arrives. The integers are columns of x.
    """
    for i in range(latency.shape[0]):
        at_old = latency[i, nearest(clocks_mhz, x[i, pending])]
        lead = max(x[i, wait], x[i, delay])
        steps = np.ceil(lead / at_old - 1e-9) if at_old > 0.0 else 0.0
        work[i, 2] += steps * work[i, 3]
        work[i, 0] += x[i, incoming]
        work[i, 3] += x[i, incoming]


@compiled
def resist_lowering(latency: Any, clocks_mhz: Any, x: Any, pending: int, hysteresis: float) -> None:
    """Stretch the latency of clocks below the newest one asked for, so that going down leaves
    ``hysteresis`` of the limit free.
    """
    for i in range(latency.shape[0]):
        for k in range(nearest(clocks_mhz, x[i, pending])):
            latency[i, k] /= 1.0 - hysteresis


@compiled
def mean_power_under_load(
    latency: Any, energy: Any, latency2: Any, energy2: Any, x: Any, pending: int, kv_use: int, kv_limit: float, clocks_mhz: Any,
    power: Any,
) -> None:  # fmt: skip
    """Mean power at each clock once the batch has settled there; ``power`` (n, clocks) in W.

    The tokens asked for per second do not depend on the clock, so slower iterations gather larger
    batches (Little's law): ``B = rate T(B)``. Latency and energy are taken as linear in the batch,
    through the tables of the present batch and of twice it; the rate is that of the present batch
    at the level nearest to the newest clock asked for. With the present batch as unit, ``b = T(b) /
    T_old``. Where no batch is large enough, or it would use more than ``kv_limit`` of the KV cache,
    the power is infinite.
    """
    for i in range(latency.shape[0]):
        at_old = latency[i, nearest(clocks_mhz, x[i, pending])]
        for k in range(latency.shape[1]):
            slope = latency2[i, k] - latency[i, k]
            room = at_old - slope
            b = (latency[i, k] - slope) / room if room > 0.0 else np.inf
            t = latency[i, k] + slope * (b - 1.0)
            fits = room > 0.0 and b * x[i, kv_use] <= kv_limit
            power[i, k] = (
                (energy[i, k] + (energy2[i, k] - energy[i, k]) * (b - 1.0)) / t if fits else np.inf
            )


class SlackRule(Controller):
    """BiScale's slack-aware decode rule (arXiv 2602.18755).

    Scan the clocks upward and take the lowest whose predicted next interval between tokens meets
    the TPOT SLO; with KV use above a threshold, take the highest clock until drained. As in the
    paper: the 7 levels, and the next interval as a conservative stand-in for TPOT. The threshold is
    not published; 0.9 is assumed.

    Beyond the paper, each off by default:

    * ``energy_floor``: never below the level that costs the least energy for this batch (below it both time and energy are lost).
    * ``load_floor``: never below the level that costs the least power for the present load. Unlike the floor above it knows that slower
      iterations gather larger batches and so are fewer: at a given load a lower clock can pay
      although each iteration costs more. Nor does it allow a clock at which the batch of this load
      would outgrow ``kv_guard`` of the KV cache.
    * ``fine``: scan every fourth clock of the grid (60 MHz) down to the lowest, instead of the 7 levels.
    * ``accumulated``: the interval may be as long as the tightest running request can afford over ``lookahead`` further intervals,
      counting the time it has saved so far (``tpot_slack_min``), instead of one SLO.
    * ``delay_aware``: look at the first interval that a clock asked for now can govern, with the context grown until then; and a lower
      clock must meet the limit with ``hysteresis`` to spare (no flutter around a threshold).

    A ``kv_guard`` of 1 or more switches the guard off.
    """

    phases: ClassVar[tuple[str, ...]] = ("decode",)
    TUNABLE: ClassVar[Mapping[str, tuple[Any, ...]]] = MARGINS

    def __init__(
        self,
        context: PolicyContext,
        margin: Share = 0.0,
        kv_guard: Amount = 0.9,
        energy_floor: bool = False,
        load_floor: bool = False,
        fine: bool = False,
        accumulated: bool = False,
        lookahead: Positive = 16.0,
        delay_aware: bool = False,
        hysteresis: Share = 0.05,
    ) -> None:
        """Prepare the scan.

        Args:
            context: what it may know.
            margin: share of the SLO kept free.
            kv_guard: KV use above which the highest clock is taken (assumed).
            energy_floor: never below the energy-optimal level.
            load_floor: never below the level of least power at the present load.
            fine: scan the grid instead of the levels.
            accumulated: spend the slack that the running requests have saved.
            lookahead: intervals over which saved slack is spent (assumed).
            delay_aware: look at the interval in which a clock asked for now is in force.
            hysteresis: share of the limit that a lower clock must leave free, with ``delay_aware``
                (assumed).
        """
        super().__init__(context)
        self.margin, self.kv_guard, self.energy_floor = (
            float(margin),
            float(kv_guard),
            bool(energy_floor),
        )
        self.accumulated, self.lookahead = bool(accumulated), float(lookahead)
        self.delay_aware, self.hysteresis = bool(delay_aware), float(hysteresis)
        self.load_floor = bool(load_floor)
        self._belief, self._work = (
            Belief(context, search_grid(context) if fine else None),
            NextWork(context),
        )
        index = context.spec.index
        self._slo, self._kv, self._slack = index("slo"), index("kv_use"), index("tpot_slack_min")
        self._clock_columns = tuple(
            index(name)
            for name in ("freq_pending", "time_to_apply", "actuation_delay", "incoming_requests")
        )

    def limit_s(self, x: Floats) -> Floats:
        """Longest next interval allowed, (n,), s."""
        limit = interval_limit_s(x[:, self._slo], self.margin)
        if self.accumulated:
            limit = limit * (1.0 + x[:, self._slack] / self.lookahead)
        return np.asarray(limit)

    def decide(
        self, x: Floats, memory: Floats | None, deterministic: bool
    ) -> tuple[Floats, Floats | None]:
        """Lowest level that meets the limit."""
        clocks = self._belief.clocks_mhz
        work = self._work(x)
        latency, energy = self._belief.levels(work)
        floor = self._floor_cost(x, work, latency, energy)
        if self.delay_aware:
            look_ahead(latency, clocks, x, *self._clock_columns, work)
            latency = self._belief.levels(work)[0]
            resist_lowering(latency, clocks, x, self._clock_columns[0], self.hysteresis)
        freq = np.empty(len(x))
        slack_clocks(latency, self.limit_s(x), x[:, self._kv], self.kv_guard, clocks, freq)
        if floor is not None:
            raise_to_cheapest(floor, clocks, freq)
        return freq, None

    def _floor_cost(
        self, x: Floats, work: Floats, latency: Floats, energy: Floats
    ) -> Floats | None:
        """What the floor minimises, (n, clocks): energy per iteration or power under load.

        None without a floor.
        """
        if not self.load_floor:
            return energy if self.energy_floor else None
        power, pending = np.empty_like(latency), self._clock_columns[0]
        twice = self._belief.levels(2.0 * work)
        mean_power_under_load(
            latency, energy, *twice, x, pending, self._kv, self.kv_guard, self._belief.clocks_mhz, power
        )  # fmt: skip
        return power
