"""What is left to learn: one step of policy improvement over any prefill policy, without foresight.

At every decision each clock is tried in the simulator on sampled futures
(:mod:`controllers.oracle.sampled_futures`), the base policy deciding from then on, and the one of
least mean cost is taken::

    cost = energy + late_j x late requests

This is the rollout policy of Bertsekas: with exact means it is at least as good as its base, and
level with it only where the base is optimal. It sees the plant's own model and no request before it
arrives, so what it saves is what a better causal policy could save; what it does not save needs
foresight (or several changes at once, or a better guess of what comes). It is slow, a measuring
device and no controller.
"""

from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.contract import Policy
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant
from biscale_env.sim.state import RATE_WINDOWS_S
from biscale_env.traces import Trace
from controllers.oracle.plan_replay import ROW, PlanReplay, member_of
from controllers.oracle.sampled_futures import SampledFutures

Floats = NDArray[np.float64]
LEAST_GAIN: Final = 0.5  # standard errors of the mean difference; less is no reason to change
ROOM: Final = 512  # requests that wait or may come, of each future


class Improver:
    """Chooses clocks by trying them.

    Attributes:
        actions: the clocks that are tried beside the base's own, as actions, (clocks,).
        decisions: made so far.
        changed: how many of them are not the base's.
    """

    def __init__(
        self,
        plant: Plant,
        base: Policy,
        futures: SampledFutures,
        late_j: float,
        *,
        samples: int = 64,
        clocks: int = 13,
    ) -> None:
        """Allocate the copies.

        Args:
            plant: a prefill plant.
            base: decides after the first clock; without memory.
            futures: what may come.
            late_j: cost of a late request, J.
            samples: futures per decision.
            clocks: evenly spread over the control range.

        Raises:
            BiscaleError: a decode plant, a prefix cache or SLO classes.
        """
        if plant.phase != "prefill" or plant.slo.classes:
            raise BiscaleError("improvement by trying clocks is for prefill and one SLO bound")
        self.plant, self.base, self.futures, self.late_j = plant, base, futures, late_j
        self.actions = np.linspace(-1.0, 1.0, clocks, dtype=np.float32)
        self.decisions = self.changed = 0
        self._samples, self._tried = samples, clocks + 1
        size, begins = samples * ROOM, np.arange(samples, dtype=np.int64) * ROOM
        self._table = RequestTable(
            arrival_s=np.zeros(size),
            prompt=np.ones(size, dtype=np.int32),
            output=np.full(size, 2, dtype=np.int32),
            cumulative=np.arange(size + 1),
            begins=begins,
            ends=begins + 1,
            durations_s=np.ones(samples),
        )
        rows = np.arange(samples * self._tried)
        self._batch = Batch(plant, len(rows), self._table)
        self._batch.reset(rows, rows % samples, np.full(len(rows), member_of(plant, None)))
        self._low_w = plant.waiting_power_w(member_of(plant, None), plant.clocks.freq_min_mhz)

    def decide(self, state: Any, pool: RequestTable, observation: NDArray[np.float32]) -> float:
        """The action to ask for.

        Args:
            state: record of the instance, a batch about to start.
            pool: the requests that it runs; only those that have arrived are looked at.
            observation: what the base sees, (1, dim).
        """
        own = np.float32(np.ravel(self.base.predict(observation)[0])[0])
        tried = np.append(self.actions, own)
        cost = self._costs(state, pool, tried)
        best = int(cost.mean(axis=1).argmin())
        gain = cost[-1] - cost[best]
        if gain.mean() <= LEAST_GAIN * gain.std() / np.sqrt(self._samples):
            best = len(tried) - 1
        self.decisions += 1
        self.changed += best != len(tried) - 1
        return float(tried[best])

    def _costs(self, state: Any, pool: RequestTable, tried: NDArray[np.float32]) -> Floats:
        """Cost of every action on every future, J, (tried, samples)."""
        batch, now_s = self._batch, float(state["time_s"])
        self._place(state, pool, now_s)
        batch.params["end_s"], batch.params["drain"] = now_s + self.futures.horizon_s, 1
        energy_j, late = np.zeros(len(batch.states)), np.zeros(len(batch.states))
        actions = np.repeat(tried, self._samples)
        while True:
            batch.step(actions)
            energy_j += batch.told.energy_j
            late += batch.told.cost
            if batch.done.all():
                break
            asked = self.base.predict(batch.obs.copy())[0]
            actions = np.ascontiguousarray(asked, dtype=np.float32).reshape(-1)
        ended_s = batch.states["time_s"]
        energy_j += self._low_w * (ended_s.max() - ended_s)
        return np.asarray(energy_j + self.late_j * late).reshape(self._tried, self._samples)

    def _place(self, state: Any, pool: RequestTable, now_s: float) -> None:
        """Copy the state; its queue and a future behind it stand in every place of the table."""
        head, tail = int(state["head"]), int(state["tail"])
        waiting, table, batch = tail - head, self._table, self._batch
        ends = np.empty(self._samples, dtype=np.int64)
        for k, future in enumerate(self.futures(self._rates(state, now_s), self._samples)):
            begin = k * ROOM
            middle, end = begin + waiting, begin + min(waiting + len(future.prompt), ROOM)
            if middle > begin + ROOM:
                raise BiscaleError(f"more than {ROOM} requests wait: the load is beyond capacity")
            table.arrival_s[begin:middle] = pool.arrival_s[head:tail]
            table.prompt[begin:middle] = pool.prompt[head:tail]
            table.arrival_s[middle:end] = now_s + future.after_s[: end - middle]
            table.prompt[middle:end] = future.prompt[: end - middle]
            ends[k] = end
        first = np.tile(table.begins, self._tried)
        batch.states[:] = state
        for name, value in (("begin", first), ("head", first), ("tail", first + waiting)):
            batch.states[name] = value
        batch.states["end"] = np.tile(ends, self._tried)

    @staticmethod
    def _rates(state: Any, now_s: float) -> Floats:
        """The simulator's own decayed rates, brought to the present, (3,)."""
        age_s = now_s - float(state["rate_time_s"])
        return np.asarray(state["rate_sum"] * np.exp(-age_s / np.array(RATE_WINDOWS_S)))


def run_improved(improver: Improver, trace: Trace) -> PlanReplay:
    """Run a workload to its end, every decision improved."""
    plant = improver.plant
    pool = RequestTable.of(plant, [trace])
    if pool.reuses:
        raise BiscaleError("improvement by trying clocks knows no prefix cache: turn it off")
    batch = Batch(plant, 1, replace(pool), record=True)
    batch.reset(ROW, ROW, np.array([member_of(plant, None)]))
    cost, steps = 0.0, 0
    while not batch.done[0]:
        action = improver.decide(batch.states[0].copy(), pool, batch.obs.copy())
        batch.step(np.array([action], dtype=np.float32))
        cost, steps = cost - float(batch.reward[0]), steps + 1
    return PlanReplay.of(batch, cost, steps)
