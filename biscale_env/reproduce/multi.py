"""Many agents: who chooses the clocks of a cluster's instances best, on workloads nobody has seen.

Every system runs the same workloads of the same clusters. Free parameters are chosen on other
workloads (:mod:`biscale_env.reproduce.multi_systems`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import pandas as pd

from agents.coarse.coarse_rollout import BOUNDS, Sums
from agents.multi.multi_config import ClusterScenario, MultiConfig
from biscale_env.config.slo import within
from biscale_env.core.errors import BiscaleError
from biscale_env.core.markdown import markdown_table
from biscale_env.envs.cluster.cluster_settings import ClusterPlant
from biscale_env.envs.cluster.whole_run import ClusterRun, cut
from biscale_env.envs.loads.workloads import WorkloadSource, generated
from biscale_env.jobs.workers import Workers, in_order
from biscale_env.reproduce.coarse import energy_against
from biscale_env.reproduce.multi_systems import (
    MAX,
    PHASES,
    TIER2,
    TITLES,
    Choice,
    holds_bounds,
    ladder,
    least_careful_of_both,
    run_choice,
)
from biscale_env.traces import Trace, load_named
from biscale_env.traces.download import cached_path

TUNE_ROOT, JUDGE_ROOT = 20_001, 20_002  # of generated workloads; training has its own seed
WINDOW_S: Final = 120.0
TRACE: Final = "azure-conv-2023"
TRACE_PROFILE: Final = "azure-conv-like"  # stands for it in training
N_TUNE, N_JUDGED = 3, 8


@dataclass(frozen=True)
class MultiCell:
    """A cluster at a load, with its workloads.

    Attributes:
        title: for people.
        scenario: cluster and generator.
        load: fraction of what the placement is predicted to serve.
        trace: of whose first half tuning takes its windows, and judgement of the second, instead
            of the generator's.
    """

    title: str
    scenario: ClusterScenario
    load: float = 0.75
    trace: str | None = None


@dataclass(frozen=True)
class MultiPlan:
    """How much is run.

    Attributes:
        interval_s: time between decisions of agents, s.
        window_s: length of a workload, s.
        n_tune: workloads that free parameters are chosen on.
        n_judged: workloads that are judged.
    """

    interval_s: float = 0.1
    window_s: float = WINDOW_S
    n_tune: int = N_TUNE
    n_judged: int = N_JUDGED


def cells_of(config: MultiConfig) -> list[MultiCell]:
    """Clusters of a training config at a load between the trained ones, and on the Azure trace.

    The trace is used where it is at hand; nothing was trained on it.
    """
    cells = [MultiCell(one.name, one) for one in config.scenarios]
    seen = cached_path(TRACE) is not None
    azure = [one for one in config.scenarios if one.profile == TRACE_PROFILE and not one.env]
    return [
        *cells,
        *(MultiCell(f"{one.name}, Azure trace", one, trace=TRACE) for one in azure if seen),
    ]


def workloads_of(cell: MultiCell, plan: MultiPlan, judged: bool, rate_rps: float) -> list[Trace]:
    """Workloads of a cell for tuning, or those that are judged.

    Raises:
        BiscaleError: a trace without enough windows.
    """
    count = plan.n_judged if judged else plan.n_tune
    if cell.trace is None:
        root = JUDGE_ROOT if judged else TUNE_ROOT
        source = WorkloadSource(generated(cell.scenario.profile), rate_rps, plan.window_s, root)
        return [source.workload(k) for k in range(count)]
    half = load_named(cell.trace).without_blocks().split(0.5)[int(judged)]
    whole = [
        piece
        for piece in cut(half.scaled_to(rate_rps, 0), plan.window_s)
        if piece.duration_s >= plan.window_s
    ]
    if len(whole) < count:
        raise BiscaleError(
            f"half of {cell.trace} has {len(whole)} windows of {plan.window_s:g} s, but {count} "
            "are asked for"
        )
    spread = np.linspace(0, len(whole) - 1, count).round().astype(int)
    return [whole[k] for k in spread]


class CellBench:
    """A cell with its cluster made and its load measured."""

    def __init__(self, cell: MultiCell, plan: MultiPlan) -> None:
        """Measure what the placement serves."""
        env = cell.scenario.make_env(1.0, 60.0, load=cell.load)
        self.cell, self.plan = cell, plan
        self.placement, self.rate_rps = env.placement, env.options.source.rate_rps
        self.plant: ClusterPlant = env.options.plant
        tps: dict[str, int] = {g.phase: g.tp for g in self.placement.groups}
        if any(g.tp != tps[g.phase] for g in self.placement.groups):
            raise BiscaleError(
                f"placement '{self.placement.name}' has several TP in a phase: give one with one"
            )
        self.plants = {phase: self.plant.plant(phase, tps[phase]) for phase in PHASES}

    def run(self, choice: Choice, workloads: Sequence[Trace]) -> list[ClusterRun]:
        """Every workload under a choice."""
        interval_s = self.plan.interval_s
        return [run_choice(self.plant, self.placement, w, choice, interval_s) for w in workloads]

    def tuned(self, system: str, agents: dict[str, str] | None) -> tuple[Choice, bool]:
        """Settings of a system, and whether they held the bounds while tuning."""
        given = agents or {}
        rungs = {p: ladder(system, p, self.plants[p], given.get(p)) for p in PHASES}
        if all(len(r) == 1 for r in rungs.values()):
            return {p: rungs[p][0] for p in PHASES}, True
        workloads = workloads_of(self.cell, self.plan, False, self.rate_rps)

        def holds(at: Any) -> dict[str, bool]:
            return holds_bounds(self.run({p: rungs[p][at[p]] for p in PHASES}, workloads))

        found, met = least_careful_of_both({p: len(rungs[p]) for p in PHASES}, holds)
        return {p: rungs[p][found[p]] for p in PHASES}, all(met.values())


def judged_rows(
    cell: MultiCell, plan: MultiPlan, system: str, agents: dict[str, str] | None
) -> list[dict[str, Any]]:
    """A system on the judged workloads of a cell, a row each; a task for workers."""
    bench = CellBench(cell, plan)
    choice, met = bench.tuned(system, agents)
    runs = bench.run(choice, workloads_of(cell, plan, True, bench.rate_rps))
    words = ", ".join(choice[p].words() for p in PHASES)
    told = {"policy": system, "setting": words, "tuned_met": met, "rate_rps": bench.rate_rps}
    return [
        {"split": cell.title, "service": cell.title, "day": k, "seed": 0, **told, **row_of(run)}
        for k, run in enumerate(runs)
    ]


def row_of(run: ClusterRun) -> dict[str, float]:
    """Sums of a run."""
    slo, energy = run.slo, run.energy
    return {
        "energy_j": energy.total_j,
        "prefill_j": energy.prefill_j,
        "decode_j": energy.decode_j,
        "prefill_idle_j": energy.prefill_idle_j,
        "decode_idle_j": energy.decode_idle_j,
        "requests": float(len(run.requests)),
        "late_ttft": float(np.sum(~within(run.ttft_s, slo.ttft_s))),
        "late_tpot": float(np.sum(~within(run.tpot_s, slo.tpot_s))),
        "stalls": float(run.stalls),
        "preemptions": float(run.preemptions),
        "requests_per_batch": len(run.requests) / max(run.prefill_batches, 1),
    }


def compare_multi(
    cells: Sequence[MultiCell],
    systems: Sequence[str],
    plan: MultiPlan,
    agents: dict[str, str] | None,
    workers: Workers,
    told: Callable[[int, int], None],
) -> pd.DataFrame:
    """Every system on the judged workloads of every cell, a row per workload.

    Args:
        cells: clusters.
        systems: names in :data:`biscale_env.reproduce.multi_systems.TITLES`.
        plan: how much is run.
        agents: checkpoint per phase of the shared agents; None: not among the systems.
        workers: where systems are run.
        told: called with (done, all) after each.
    """
    calls = [(cell, plan, system, agents) for cell in cells for system in systems]
    found = in_order(judged_rows, calls, workers, told)
    return pd.DataFrame([row for rows in found for row in rows])


def multi_markdown(frame: pd.DataFrame, required: float, reference: str = TIER2) -> str:
    """The table: a line per cell and system; struck through where the SLO is missed.

    Args:
        frame: rows of :func:`compare_multi`.
        required: attainment that the SLO asks for.
        reference: system that the others are compared with.
    """
    rows = []
    for split, part in frame.groupby("split", sort=False):
        most = part[part["policy"] == MAX]["energy_j"].sum()
        for system, mine in part.groupby("policy", sort=False):
            sums = Sums(*(float(mine[f.name].sum()) for f in fields(Sums)))
            kept = [sums.attained(bound) for bound in BOUNDS]
            against = ""
            if system != reference:
                change = energy_against(part, str(system), reference, np.random.default_rng(0))
                against = f"{change.estimate:+.1f} [{change.low:+.1f}, {change.high:+.1f}]"
            energy = f"{sums.energy_j / 1e6:.2f}"
            stages = [f"{mine[f'{p}_j'].sum() / 1e6:.2f}" for p in PHASES]
            rows.append(
                [
                    f"{split}, {mine['rate_rps'].iloc[0]:.1f}/s",
                    TITLES[str(system)],
                    mine["setting"].iloc[0],
                    energy if min(kept) >= required else f"~~{energy}~~",
                    f"{sums.energy_j / most:.3f}" if most else "",
                    against,
                    *stages,
                    *(f"{100 * a:.2f}" for a in kept),
                ]
            )
    heads = ["cluster and load", "clocks by", "setting", "MJ", "vs max", "against tier 2, %"]
    stages = ["prefill MJ", "decode MJ", "TTFT met, %", "TPOT met, %"]
    return markdown_table([*heads, *stages], rows, "lllr")
