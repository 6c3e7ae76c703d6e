"""Tier ``multi``: the clock of every instance of a cluster, on workloads that nobody was tuned on.

Entrants: ``tier2`` (MPC and slack before every iteration), ``static-best`` (a clock per phase), a
folder with ``prefill.npz`` and ``decode.npz``, and any two policies as ``PREFILL+DECODE``, or one
that runs in both phases; every instance asks its policy before every iteration, as tier 2 does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from agents.multi.multi_config import ClusterScenario
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.experiment.input_digests import policy_inputs
from biscale_env.policies import phases_of, policy_settings, with_parameters
from biscale_env.policies.policy_source import AGENT, STATIC_BEST
from biscale_env.reproduce.cluster_suite.cluster_tasks import ClockTask, ClockTier
from biscale_env.reproduce.cluster_suite.suite_rows import (
    BOUND,
    MAX,
    NOT_HELD,
    TierRules,
    judged_row,
)
from biscale_env.reproduce.multi import CellBench, MultiCell, MultiPlan, row_of, workloads_of
from biscale_env.reproduce.multi_systems import (
    COMPILED,
    EACH,
    PHASES,
    SHARED,
    STATIC,
    TIER2,
    PhaseSetting,
    holds_bounds,
    ladder,
    least_careful_of_both,
    of_run,
)
from biscale_env.traces import Trace
from controllers.oracle.cluster_bound import cluster_bound, fixed_stage

BOTH: Final = "+"
CAREFUL: Final = ("margin", "price")
"""Parameters that rise with care, so that the least careful setting can be looked for."""


def bench_of(tier: ClockTier, task: ClockTask) -> CellBench:
    """The cluster of a task, with its load measured."""
    scenario = ClusterScenario(
        name=task.name,
        placement=task.placement,
        profile=task.profile,
        loads=(task.load,),
        env=task.env,
    )
    plan = MultiPlan(window_s=tier.window_s, n_tune=tier.n_tune, n_judged=tier.n_judged)
    return CellBench(MultiCell(task.name, scenario, task.load), plan)


def pair_of(build: str) -> dict[str, str]:
    """Name of the policy of each phase.

    Raises:
        BiscaleError: no such policy, or one that cannot run in its phase.
    """
    if Path(build).is_dir() and (Path(build) / "decode.npz").is_file():
        return of_run(Path(build))
    first, plus, second = build.partition(BOTH)
    pair = dict(zip(PHASES, (first, second if plus else first), strict=True))
    for phase, name in pair.items():
        if phase not in phases_of(name):
            raise BiscaleError(
                f"policy '{name}' does not run in {phase}: name one per phase, as in mpc+slack"
            )
    return pair


def rungs_of(build: str, phase: str, bench: CellBench) -> list[PhaseSetting]:
    """Settings of a phase under an entrant, the least careful first; one where nothing is free.

    A rule that the simulator has compiled is run so, whatever it is called.
    """
    plant = bench.plants[phase]
    if build == MAX:
        return ladder(build, phase, plant)
    if build == STATIC_BEST:
        return ladder(STATIC, phase, plant)
    name = COMPILED[phase] if build == TIER2 else pair_of(build)[phase]
    if name == AGENT:
        return ladder(EACH, phase, plant)
    if name.endswith(".npz"):
        return [PhaseSetting("each", one.value) for one in ladder(SHARED, phase, plant, name)]
    free = policy_settings(name, phase)
    main = next(iter(free[0]), "") if free else ""
    if main not in CAREFUL:
        return [PhaseSetting("each", name)]
    rising = sorted({float(one[main]) for one in free if main in one})
    if name == COMPILED[phase]:
        return [PhaseSetting("rule", value) for value in rising]
    return [PhaseSetting("each", with_parameters(name, {main: value})) for value in rising]


def tuned(
    rungs: Mapping[str, Sequence[PhaseSetting]], bench: CellBench, workloads: Sequence[Trace]
) -> tuple[dict[str, PhaseSetting], bool]:
    """The least careful settings that hold both bounds together, and whether any do.

    Bisection takes one phase's settings while the other's are still moving, so what it ends with
    is run, and a phase that misses is raised until both hold or its settings are used up.
    """

    def holds(at: Mapping[str, int]) -> dict[str, bool]:
        return holds_bounds(bench.run({p: rungs[p][at[p]] for p in PHASES}, workloads))

    lengths = {phase: len(each) for phase, each in rungs.items()}
    at, _ = least_careful_of_both(lengths, holds)
    while True:
        held = holds(at)
        raised = {p: at[p] + (not held[p]) for p in PHASES}
        if all(held.values()) or any(raised[p] == lengths[p] for p in PHASES):
            return {p: rungs[p][at[p]] for p in PHASES}, all(held.values())
        at = raised


def judged_workloads(tier: ClockTier, bench: CellBench, judged: bool) -> list[Trace]:
    """Workloads that are scored, or those that settings are chosen on, with their grace."""
    found = workloads_of(bench.cell, bench.plan, judged, bench.rate_rps)
    return [replace(one, duration_s=one.duration_s + tier.grace_s) for one in found]


def clock_rows(
    tier: ClockTier, task: ClockTask, key: str, label: str, build: str
) -> list[dict[str, Any]]:
    """Rows of an entrant, or of a reference, on a task; a task for workers.

    Args:
        tier: what all tasks share.
        task: the task.
        key: of the task.
        label: of the entrant; ``max`` is max clock everywhere, ``bound`` the bound.
        build: its name.

    Raises:
        BiscaleError: no such policy.
    """
    bench = bench_of(tier, task)
    judged, slo = judged_workloads(tier, bench, True), bench.plant.slo
    if label == BOUND:
        stages = {
            phase: fixed_stage(bench.plants[phase], len(bench.placement.instances(phase)))
            for phase in PHASES
        }
        spare_w = bench.plant.spare_power_w(bench.plants["prefill"])
        spare = bench.plant.settings.gpus - bench.placement.gpus
        spare_j = spare * spare_w * sum(one.duration_s for one in judged)
        found = cluster_bound(stages, judged, slo.attainment)
        return [judged_row(key, BOUND, BOUND, BOUND, energy_j=found.energy_j + spare_j)]
    rungs = {phase: rungs_of(MAX if label == MAX else build, phase, bench) for phase in PHASES}
    free, held = any(len(each) > 1 for each in rungs.values()), True
    choice = {phase: each[0] for phase, each in rungs.items()}
    if free:
        choice, held = tuned(rungs, bench, judged_workloads(tier, bench, False))
    kept = ("energy_j", "requests", "late_ttft", "late_tpot")
    words = ", ".join(choice[phase].words() for phase in PHASES)
    return [
        judged_row(
            key,
            label,
            build,
            f"workload {k}",
            **{name: value for name, value in row_of(run).items() if name in kept},
            setting=words if held else f"{words}{NOT_HELD}",
            tuned=free,
            required=slo.attainment,
        )
        for k, run in enumerate(bench.run(choice, judged))
    ]


def clock_inputs(build: str) -> dict[str, str]:
    """SHA-256 of the files of an entrant that are not part of this package, by their names."""
    if build in (MAX, TIER2, STATIC_BEST):
        return {}
    found: dict[str, str] = {}
    for phase, name in pair_of(build).items():
        found |= policy_inputs(name, phase)
    return found


def check_clocks(build: str) -> None:
    """Say before anything is run whether a name is an entrant.

    Raises:
        BiscaleError: it is not.
    """
    if build not in (MAX, TIER2, STATIC_BEST):
        pair_of(build)


CLOCKS: Final = TierRules(lambda tier: check_clocks, clock_inputs, clock_rows)
