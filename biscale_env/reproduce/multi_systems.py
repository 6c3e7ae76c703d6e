"""Who decides the clocks of a cluster's instances, and how its free parameters are chosen.

A system is a ladder of settings per phase, from the least careful on. The tuning rule is that of
the other cluster experiments: per phase the least careful setting that holds its bound on the
tuning workloads with 30 % of the allowed misses to spare, by bisection of both phases at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from agents.policy.features import cheapest_mhz
from agents.policy.numpy_policy import load_network
from biscale_env.config.cluster_layout import Placement
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_settings import ClusterPlant
from biscale_env.envs.cluster.whole_run import ClusterRun, run_cluster
from biscale_env.envs.plant import Plant
from biscale_env.policies import resolve_policy, with_parameters
from biscale_env.policies.checkpoint_source import PRICED_MARGINS, CheckpointSource, prices_of
from biscale_env.reproduce.systems import MARGINS
from biscale_env.traces import Trace
from controllers.placement.coarse_rules import TUNE_GUARD

PHASES: Final = ("prefill", "decode")
MAX, STATIC, TIER2, SHARED = "max", "static", "tier2", "shared"
INDEPENDENT, EACH = "independent", "independent-each"
TITLES: Final = {
    MAX: "max clock",
    STATIC: "best static clock per phase",
    TIER2: "BiScale's tier 2 (MPC, slack)",
    INDEPENDENT: "independent shipped agents",
    EACH: "the same, asked before every iteration",
    SHARED: "parameter-shared PPO",
}
NO_SHARED: Final = (
    "no shared agents are shipped: train some with 'biscale train multi --out FOLDER' and give "
    "--agent FOLDER"
)
COMPILED: Final = {"prefill": "mpc", "decode": "slack"}
KINDS: Final = {"static": "static", "policy": "static", "each": "external"}
N_PRICES: Final = 8


@dataclass(frozen=True)
class PhaseSetting:
    """How one phase is controlled.

    Attributes:
        kind: ``static``; ``rule`` (compiled, before every iteration); ``policy`` (at intervals);
            ``each`` (a policy, before every iteration).
        value: clock in MHz, margin of the rule, or the policy's name with its parameters.
    """

    kind: str
    value: float | str

    def words(self) -> str:
        """For tables."""
        if self.kind == "static":
            return f"{self.value:g} MHz"
        return (
            f"margin {self.value:g}" if self.kind == "rule" else str(self.value).partition(":")[2]
        )


Choice = Mapping[str, PhaseSetting]


def ladder(system: str, phase: str, plant: Plant, agent: str | None = None) -> list[PhaseSetting]:
    """Settings of a phase, the least careful first.

    Args:
        system: one of :data:`TITLES`.
        phase: prefill or decode.
        plant: an instance of the phase.
        agent: checkpoint of the shared agents for the phase.

    Raises:
        BiscaleError: an unknown system, or shared agents that were not given.
    """
    top = plant.clocks.freq_max_mhz
    if system == MAX:
        return [PhaseSetting("static", top)]
    if system == STATIC:
        least = cheapest_mhz(plant.model, phase, -1)
        levels = [f for f in plant.clocks.levels_mhz if f >= least]
        return [PhaseSetting("static", float(f)) for f in levels]
    if system == TIER2:
        return [PhaseSetting("rule", margin) for margin in MARGINS]
    if system == INDEPENDENT:
        return _prices("agent", phase)
    if system == EACH:
        return [PhaseSetting("each", one.value) for one in _prices("agent", phase)]
    if system == SHARED:
        if agent is None:
            raise BiscaleError(NO_SHARED)
        return _prices(agent, phase)
    raise BiscaleError(f"unknown system '{system}': choose {', '.join(TITLES)}")


def of_run(folder: Path) -> dict[str, str]:
    """Checkpoints of a run of ``biscale train multi`` per phase.

    Raises:
        BiscaleError: one is missing.
    """
    found = {phase: folder / f"{phase}.npz" for phase in PHASES}
    for path in found.values():
        if not path.is_file():
            raise BiscaleError(
                f"{folder} holds no {path.name}: let biscale train multi end a round"
            )
    return {phase: str(path) for phase, path in found.items()}


def _prices(name: str, phase: str) -> list[PhaseSetting]:
    prices = prices_of(load_network(CheckpointSource(name, name).path(phase)), N_PRICES)
    given = [{"price": p} for p in prices]
    given += [{"price": prices[-1], "margin": m} for m in PRICED_MARGINS[phase]]
    return [PhaseSetting("policy", with_parameters(name, one)) for one in given]


def with_clocks(placement: Placement, freq_mhz: Mapping[str, float]) -> Placement:
    """The placement with other base clocks in some phases."""
    groups = [
        g.model_copy(update={"freq_mhz": freq_mhz[g.phase]}) if g.phase in freq_mhz else g
        for g in placement.groups
    ]
    return placement.model_copy(update={"groups": tuple(groups)})


def run_choice(
    plant: ClusterPlant,
    placement: Placement,
    trace: Trace,
    choice: Choice,
    interval_s: float,
) -> ClusterRun:
    """A workload under a choice of settings.

    Args:
        plant: the cluster.
        placement: with one TP per phase.
        trace: the requests.
        choice: per phase.
        interval_s: time between decisions of policies, s.
    """
    settings: dict[str, object] = {}
    clocks: dict[str, float] = {}
    policies = {}
    tps: dict[str, int] = {g.phase: g.tp for g in placement.groups}
    for phase, setting in choice.items():
        settings[f"{phase}_policy"] = KINDS.get(setting.kind, COMPILED[phase])
        if setting.kind == "rule":
            settings[f"{phase}_margin"] = setting.value
        elif setting.kind == "static":
            clocks[phase] = float(setting.value)
        else:
            own = plant.plant(phase, tps[phase])
            policies[phase] = resolve_policy(str(setting.value), own)
    at_intervals = any(one.kind == "policy" for one in choice.values())
    if at_intervals and any(one.kind == "each" for one in choice.values()):
        raise BiscaleError("policies are asked at intervals or before every iteration, not both")
    changed = ClusterPlant(plant.settings.changed(**settings), plant.slo)
    return run_cluster(
        changed,
        with_clocks(placement, clocks),
        trace,
        policies=policies or None,
        interval_s=interval_s if at_intervals else None,
    )


def least_careful_of_both(
    lengths: Mapping[str, int], holds: Callable[[Mapping[str, int]], Mapping[str, bool]]
) -> tuple[dict[str, int], dict[str, bool]]:
    """Per phase the first rung that holds, by bisection of all phases at once.

    Args:
        lengths: rungs per phase.
        holds: runs a rung per phase and says which phases hold their bound.

    Returns:
        Rung per phase, and whether it holds; the last one where none does.
    """
    low, high = dict.fromkeys(lengths, 0), dict(lengths)
    while any(low[p] < high[p] for p in lengths):
        middle = {p: min((low[p] + high[p]) // 2, lengths[p] - 1) for p in lengths}
        held = holds(middle)
        for phase, rung in middle.items():
            if low[phase] < high[phase]:
                if held[phase]:
                    high[phase] = rung
                else:
                    low[phase] = rung + 1
    met = {p: low[p] < lengths[p] for p in lengths}
    return {p: min(low[p], lengths[p] - 1) for p in lengths}, met


def holds_bounds(runs: Sequence[ClusterRun]) -> dict[str, bool]:
    """Which phases hold their bound over several tuning runs, with something to spare."""
    counts = [len(run.requests) for run in runs]
    required = runs[0].slo.attainment
    least = required + TUNE_GUARD * (1.0 - required)
    return {
        phase: bool(np.average([r.attainment(phase) for r in runs], weights=counts) >= least)
        for phase in PHASES
    }
