"""Running the headline experiment.

One job is one operating point (or variation of it) in one plant, with every system on the same
work.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from biscale_env.envs.cluster.cluster_settings import ClusterPlant, ClusterSettings
from biscale_env.envs.cluster.whole_run import cluster_capacity
from biscale_env.reproduce.paper import TablesOf
from biscale_env.reproduce.systems import SYSTEMS, Bench, result_row, run_system, tune
from biscale_env.traces import Trace
from controllers.oracle.prefill_optimum import solve_prefill_oracle
from controllers.placement.capacity_table import TableRequest, capacity_table
from controllers.placement.ilp import CapacityTable, NoPlacementError, distserve_plan

ORACLE_MOST_REQUESTS = 6000


@dataclass(frozen=True)
class ReproductionJob:
    """One operating point in one plant.

    Attributes:
        labels: columns that go into every row (point, variation, member, ...).
        settings: the cluster.
        systems: names of systems.
        tune_workloads: workloads that the table is made and parameters are chosen on.
        workloads: workloads of the tables, one per seed.
        rate_rps: nominal rate.
        window_s: period of tier 1.
        spare_w: what BiScale's ILP takes an unused GPU to draw, W.
        alpha: headroom of tier 1; None: chosen on the tuning workloads.
        tables: ``window``: tier 1 plans with a table of the window before; ``workload``: with one
            of the first tuning workload throughout.
        oracle: solve the prefill stage of DistServe in hindsight too (first workload only).
    """

    labels: dict[str, Any]
    settings: ClusterSettings
    systems: tuple[str, ...]
    tune_workloads: tuple[Trace, ...]
    workloads: tuple[Trace, ...]
    rate_rps: float
    window_s: float
    spare_w: float = 0.0
    alpha: float | None = None
    tables: TablesOf = "workload"
    oracle: bool = False


def table_for(settings: ClusterSettings, trace: Trace) -> CapacityTable:
    """Capacity table of one workload in one plant."""
    return capacity_table(TableRequest(settings), trace)


def distserve_capacity_rps(settings: ClusterSettings, tune_part: Trace, part: Trace) -> float:
    """Load that DistServe's placement serves at max clock, requests/s.

    The placement is chosen on the tuning part, the load is that of the other part.

    Raises:
        NoPlacementError: it serves no load within the SLO.
    """
    plan = distserve_plan(table_for(settings, tune_part), 1.0, settings.gpus)
    rate = cluster_capacity(ClusterPlant(settings), plan.placement, part)
    if rate <= 0:
        raise NoPlacementError(
            f"{part.name}: DistServe's placement meets SLO '{settings.slo}' at no load"
        )
    return rate


def run_job(job: ReproductionJob) -> list[dict[str, Any]]:
    """Tune every system and run it on every workload; one row per (system, workload).

    Raises:
        NoPlacementError: nothing at all can be served there.
    """
    table = table_for(job.settings, job.tune_workloads[0])
    distserve_plan(table, job.rate_rps, job.settings.gpus)  # nothing else is compared without it
    bench = Bench(
        job.settings,
        table,
        job.rate_rps,
        job.window_s,
        job.spare_w,
        job.alpha,
        per_window=job.tables == "window",
    )
    rows = []
    for name in job.systems:
        system = SYSTEMS[name]
        tuned = tune(system, bench, job.tune_workloads)
        for seed, workload in enumerate(job.workloads):
            run, windows = run_system(system, tuned, bench, workload, seed)
            row = {
                **job.labels,
                "seed": seed,
                "rate_rps": job.rate_rps,
                **result_row(name, tuned, run, windows),
            }
            rows.append(row)
            if job.oracle and name == "distserve" and seed == 0:
                rows.append(
                    {
                        **row,
                        "system": "oracle-prefill",
                        **oracle_figures(job, run.requests, windows[0].placement, workload),
                    }
                )
    return rows


def routed_requests(mine: np.ndarray, workload: Trace) -> Trace:
    """Requests that a router sent to one instance, with the blocks that they have in the workload.

    Args:
        mine: their records, in the order of arrival.
        workload: the whole cluster's.
    """
    return Trace(
        "routed",
        mine["arrival_s"],
        mine["prompt_tokens"],
        mine["output_tokens"],
        "routed by DistServe",
        blocks=None if workload.blocks is None else workload.blocks.take(mine["request"]),
    )


def oracle_figures(
    job: ReproductionJob, requests: np.ndarray, placement: Any, workload: Trace
) -> dict[str, Any]:
    """Hindsight optimum of the prefill stage.

    Every instance solved on the requests that DistServe's router sent it.

    The energy is that of a plan which the simulator repeats, so it is attainable without actuation
    delay; ``oracle_gap`` is how far it may lie above the true optimum.
    """
    plant = ClusterPlant(job.settings).plant("prefill", placement.instances("prefill")[0].tp)
    energy, tokens, gap = 0.0, 0, 0.0
    for i in np.unique(requests["prefill"]):
        mine = requests[requests["prefill"] == i][:ORACLE_MOST_REQUESTS]
        trace = routed_requests(mine, workload)
        found = solve_prefill_oracle(
            plant, trace, attainment=plant.slo.attainment, member=job.settings.ensemble_member
        )
        energy += found.replay.energy_j
        tokens += int(mine["output_tokens"].sum())
        gap = max(gap, found.duality_gap)
    return {"prefill_j_per_token": energy / tokens, "oracle_gap": gap}
