"""Brute force and small plants for the tests of the oracles."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from biscale_env.config import Slo
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.traces import Trace

ROW = np.zeros(1, dtype=np.int64)


@lru_cache(maxsize=64)
def plant_of(phase: str, bound_s: float | None = None, **settings: Any) -> Plant:
    """A plant with another SLO bound; cached, since loading takes longer than a test."""
    slo = None
    if bound_s is not None:
        slo = Slo(name="test", ttft_s=bound_s, tpot_s=bound_s, attainment=0.99, source="test")
    return Plant(PlantSettings.of(phase, **settings), slo)


def trace_of(gaps_s: Any, prompts: Any, outputs: Any = None, tail_s: float = 0.0) -> Trace:
    """A trace from gaps between arrivals."""
    arrival = np.cumsum(np.asarray(gaps_s, dtype=np.float64))
    n = len(arrival)
    outputs = np.full(n, 2) if outputs is None else outputs
    return Trace(
        "tiny",
        arrival,
        np.asarray(prompts),
        np.asarray(outputs),
        "test",
        float(arrival[-1]) + tail_s,
    )


def every_end(plant: Plant, trace: Trace, clocks_mhz: Any) -> Iterator[tuple[Batch, float, float]]:
    """Every sequence of clocks, tried in the real simulator: the batch at its end, with cost (minus
    the sum of rewards) and energy (J) of the sequence. The batch goes on to the next one.
    """
    batch = Batch(plant, 1, RequestTable.of(plant, [trace]), record=True)
    batch.reset(ROW, ROW, np.array([-1]))
    actions = plant.clocks.to_action(np.asarray(clocks_mhz))
    decode = batch.running if plant.phase == "decode" else ()
    memory = (batch.states, batch.finish_s, *decode)

    def visit(cost: float, energy_j: float) -> Iterator[tuple[Batch, float, float]]:
        if batch.done[0]:
            yield batch, cost, energy_j
            return
        saved = [array.copy() for array in memory]
        for k in range(len(actions)):
            for array, copy in zip(memory, saved, strict=True):
                array[:] = copy
            batch.step(actions[k : k + 1])
            yield from visit(
                cost - float(batch.reward[0]),
                energy_j - float(batch.terms[0, 0]) * plant.energy_ref_j,
            )

    return visit(0.0, 0.0)


def every_outcome(plant: Plant, trace: Trace, clocks_mhz: Any) -> dict[int, float]:
    """Least energy (J) per number of violations over every sequence of clocks."""
    least: dict[int, float] = {}
    for batch, _, energy_j in every_end(plant, trace, clocks_mhz):
        violations = int(batch.states["violations"][0])
        least[violations] = min(energy_j, least.get(violations, np.inf))
    return least


def brute_force(plant: Plant, trace: Trace, clocks_mhz: Any, price: float) -> float:
    """Least cost over every sequence of clocks, in reference energies."""
    outcomes = every_outcome(plant, trace, clocks_mhz)
    return min(
        energy_j / plant.energy_ref_j + price * missed for missed, energy_j in outcomes.items()
    )


def run_policy(plant: Plant, trace: Trace, policy: Any) -> tuple[float, int]:
    """Cost (minus the sum of rewards) and violations of a policy in the environment's dynamics."""
    batch = Batch(plant, 1, RequestTable.of(plant, [trace]))
    batch.reset(ROW, ROW, np.array([-1]))
    cost, state, start = 0.0, None, np.ones(1, dtype=bool)
    while not batch.done[0]:
        action, state = policy.predict(batch.obs.copy(), state, start)
        batch.step(action[:, 0])
        start = np.zeros(1, dtype=bool)
        cost -= float(batch.reward[0])
    return cost, int(batch.states["violations"][0])
