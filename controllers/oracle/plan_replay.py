"""What the oracles of both phases share.

The plant they plan in, the policy that repeats a plan, and its exact cost in the simulator.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.contract import ClockRange
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant
from biscale_env.traces import Trace
from controllers.oracle.allowed_misses import missed_by_class

ROW = np.zeros(1, dtype=np.int64)


def oracle_plant(plant: Plant) -> Plant:
    """The same plant without actuation delay and with a decision at every iteration.

    Where the oracles plan and are replayed.
    """
    free = copy.copy(plant)
    free.settings = plant.settings.model_copy(
        update={"actuation_delay_s": 0.0, "min_decision_interval_s": 0.0}
    )
    return free


def member_of(plant: Plant, member: int | None) -> int:
    """Ensemble member to plan with.

    The given one, else that of the plant's settings, else (``random``) the nominal one.
    """
    if member is not None:
        return member
    setting = plant.settings.ensemble_member
    return -1 if isinstance(setting, str) else setting


class OraclePolicy:
    """Repeats a plan: one clock per decision, in order.

    A :class:`biscale_env.contract.Policy` that does not look.

    The plan belongs to one workload in a plant without actuation delay (:func:`oracle_plant`).
    After its end the last clock stays.
    """

    def __init__(self, clocks: ClockRange, plan_mhz: NDArray[np.float64]) -> None:
        """Keep the plan.

        Args:
            clocks: clock range that actions span.
            plan_mhz: clock of every decision, (decisions,), MHz.
        """
        self.plan_mhz = np.asarray(plan_mhz, dtype=np.float64)
        self._actions = clocks.to_action(self.plan_mhz)

    def predict(
        self,
        observation: NDArray[np.float32],
        state: Any = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[np.float32], Any]:
        """Next clock of the plan, whatever is observed.

        ``state`` counts the decisions of each row.
        """
        single = np.ndim(observation) == 1
        rows = 1 if single else len(observation)
        turn = np.zeros(rows, dtype=np.int64) if state is None else state
        if episode_start is not None:
            turn = np.where(episode_start, 0, turn)
        action = self._actions[np.minimum(turn, len(self._actions) - 1)]
        return (action if single else action[:, None]), turn + 1


@dataclass(frozen=True)
class PlanReplay:
    """A plan, run in the simulator.

    Attributes:
        cost: minus the sum of the rewards: energy in reference energies plus weighted violations.
            Without the idle energy before the first request, which no policy can change and the
            environment does not charge.
        energy_j: energy of the whole run, that included, J.
        violations: requests that completed too late.
        missed: how many of each SLO class; one number where there is one bound for all.
        attainment: fraction of all requests that were within the SLO (of the class that is worst
            off, where it has classes).
        decisions: steps it took.
    """

    cost: float
    energy_j: float
    violations: int
    missed: tuple[int, ...]
    attainment: float
    decisions: int

    @classmethod
    def of(cls, batch: Batch, cost: float, decisions: int) -> "PlanReplay":
        """What the one instance of a batch did until its end.

        Args:
            batch: made with ``record=True``.
            cost: as above, added up on the way.
            decisions: as above.
        """
        plant, state, pool = batch.plant, batch.states[0], batch.pool
        _, missed = missed_by_class(plant.slo, plant.phase, pool, batch.finish_s)
        latency = batch.finish_s - pool.arrival_s
        if plant.phase == "decode":
            latency = latency / (pool.output - 1)
        return cls(
            cost,
            float(state["energy_j"]),
            int(state["violations"]),
            tuple(int(n) for n in missed),
            plant.slo.attained(latency, plant.phase, pool.slo_class),
            decisions,
        )


def replay(
    plant: Plant, trace: Trace, plan_mhz: NDArray[np.float64], member: int | None = None
) -> PlanReplay:
    """Run a plan to the end of the episode, without actuation delay.

    After the last decision of the plan its last clock stays.
    """
    free = oracle_plant(plant)
    batch = Batch(free, 1, RequestTable.of(free, [trace]), record=True)
    batch.reset(ROW, ROW, np.array([member_of(plant, member)]))
    actions = free.clocks.to_action(plan_mhz)
    cost, decision = 0.0, 0
    while not batch.done[0]:
        k = min(decision, len(actions) - 1)
        batch.step(actions[k : k + 1])
        cost -= float(batch.reward[0])
        decision += 1
    return PlanReplay.of(batch, cost, decision)
