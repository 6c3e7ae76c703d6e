"""The hindsight optimum by phase: the only controller that is given the trace.

Prefill: the optimum itself, bracketed by a plan that can be replayed and a bound
(:mod:`controllers.oracle.prefill_optimum`). Decode: the best plan that a search finds
(:mod:`controllers.oracle.decode_search`) and a bound that nobody can beat
(:mod:`controllers.oracle.decode_bound`).

Plans are made for, and must be run in, :func:`controllers.oracle.plan_replay.oracle_plant`: clocks
change at once and every iteration is a decision. In prefill a plant with delay can do a little
better than that one (its clock may change while idle), so a comparison at a delay should show
``lower_bound_any_delay_j`` beside the oracle's row. The decode bound holds at any delay. The
prefill bound prunes nothing (except where ``bound_pruned`` says so); the plan does.
"""

import time

import numpy as np
from numpy.typing import NDArray

from biscale_env.envs.plant import Plant
from biscale_env.traces import Trace
from controllers.oracle.decode_bound import DecodeFluid
from controllers.oracle.decode_search import search_decode_plan
from controllers.oracle.plan_replay import OraclePolicy, oracle_plant
from controllers.oracle.prefill_optimum import solve_prefill_oracle

__all__ = ["OraclePolicy", "make_oracle", "oracle_plant"]


def make_oracle(
    plant: Plant, trace: Trace, target_attainment: float | None = None, member: int | None = None
) -> tuple[OraclePolicy, dict[str, float]]:
    """Plan a workload with hindsight.

    Args:
        plant: prefill or decode plant; delay and decision interval are ignored, ``drain`` is not.
        trace: the workload, as it will be run.
        target_attainment: fraction of requests that must meet the SLO at least energy; None
            minimises the environment's objective.
        member: ensemble member, None that of the plant's settings.

    Returns:
        The policy, to be run in ``oracle_plant(plant)``, and a dictionary of floats: ``replay_j``
        (energy of the plan, J), ``violations``, ``attainment``, ``feasible`` (1: the target is
        met), ``lower_bound_j`` (no policy without delay and with no more violations than allowed
        uses less, J), ``lower_bound_any_delay_j`` (nor at any delay), ``gap`` (``replay_j /
        lower_bound_j - 1``), ``bound_pruned`` (1: a prefill workload far too large for a bound
        without pruning; it is then checked, not proven), ``dropped`` (labels that the prefill bound
        had to leave out; unless 0, there is no bound and it is NaN), ``violations_allowed`` (the
        target's; without one, the plan's own), ``price`` (reference energies per violation),
        ``seconds``.
    """
    begin = time.perf_counter()
    solve = _prefill if plant.phase == "prefill" else _decode
    plan_mhz, info = solve(plant, trace, target_attainment, member)
    info["gap"] = info["replay_j"] / info["lower_bound_j"] - 1.0
    info["seconds"] = time.perf_counter() - begin
    return OraclePolicy(plant.clocks, plan_mhz), info


def _prefill(
    plant: Plant, trace: Trace, target_attainment: float | None, member: int | None
) -> tuple[NDArray[np.float64], dict[str, float]]:
    found = solve_prefill_oracle(plant, trace, target_attainment, member)
    return found.plan_mhz, {
        "replay_j": found.replay.energy_j,
        "violations": float(found.replay.violations),
        "attainment": found.replay.attainment,
        "feasible": float(found.feasible),
        "lower_bound_j": found.energy_bound_j,
        "lower_bound_any_delay_j": found.energy_bound_any_delay_j,
        "violations_allowed": float(found.violations_allowed),
        "price": found.price,
        "bound_pruned": float(found.bound_pruned),
        "dropped": float(found.dropped),
    }


def _decode(
    plant: Plant, trace: Trace, target_attainment: float | None, member: int | None
) -> tuple[NDArray[np.float64], dict[str, float]]:
    plan = search_decode_plan(plant, trace, target_attainment, member)
    allowed = plan.allowed.exactly(plan.missed)
    if target_attainment is not None:
        allowed = plan.allowed.or_these(plan.missed)
    bound_j = DecodeFluid(plant, trace, member).energy_j(allowed.counts)
    return plan.clocks_mhz, {
        "replay_j": plan.energy_j,
        "violations": float(plan.violations),
        "attainment": plan.attainment,
        "feasible": float(plan.feasible),
        "lower_bound_j": bound_j,
        "lower_bound_any_delay_j": bound_j,
        "violations_allowed": float(allowed.total),
        "price": plan.price,
        "bound_pruned": 0.0,
        "dropped": 0.0,
    }
