"""Tier ``cluster``: which instances are in service, on days that nobody was tuned on."""

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agents.coarse.coarse_agent import CoarseAgent
from agents.coarse.coarse_config import CoarseConfig
from agents.coarse.coarse_rollout import Sums, least_careful, run_coarse_day, tuned_enough
from agents.coarse.coarse_run import N_PRICES
from agents.coarse.service_days import ServiceDay
from biscale_env.config.cluster_layout import Placement
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.cluster.cluster_env import ClusterEnv
from biscale_env.envs.cluster.cluster_options import fitting_tps
from biscale_env.evaluation.runs.provenance import file_hash
from biscale_env.policies import with_parameters
from biscale_env.policies.checkpoint_source import names_checkpoint
from biscale_env.policies.class_source import ClassSource, load_class
from biscale_env.policies.coarse_resolver import coarse_checkpoint, resolve_coarse
from biscale_env.policies.policy_source import AGENT, is_class_name, split_name
from biscale_env.reproduce.cluster_suite.cluster_tasks import PlacementTask, PlacementTier
from biscale_env.reproduce.cluster_suite.suite_rows import (
    BOUND,
    MAX,
    NOT_HELD,
    OWN,
    TierRules,
    judged_row,
)
from controllers.oracle.cluster_bound import cluster_bound, free_stages
from controllers.placement.coarse_rules import ALPHAS, RULES, CoarseMemory, CoarsePolicy, IlpRule

BOUND_S: Final = 1800.0  # windows of its fluid, s; shorter ones hardly raise it
ALL_AT_MAX: Final = {"prefill_policy": "static", "decode_policy": "static"}


class TimedPlacements:
    """A coarse policy whose decisions are timed."""

    def __init__(self, policy: CoarsePolicy) -> None:
        """``policy`` decides."""
        self._policy = policy
        self.times_s: list[float] = []

    def place(
        self, observation: NDArray[np.float32], memory: CoarseMemory | None
    ) -> tuple[Placement, CoarseMemory]:
        """See :class:`controllers.placement.coarse_rules.CoarsePolicy`."""
        begin = time.perf_counter()
        found = self._policy.place(observation, memory)
        self.times_s.append(time.perf_counter() - begin)
        return found


def config_of(tier: PlacementTier, task: PlacementTask, **env: Any) -> CoarseConfig:
    """What makes the environment of a task.

    Args:
        tier: what all tasks share.
        task: the task.
        **env: options that differ.
    """
    return CoarseConfig(
        env={**tier.env, **env},
        window_s=tier.window_s,
        windows=tier.windows,
        profile=tier.profile,
        services=(task.service,),
        days=task.tune_days,
        validation_days=task.judged_days,
        mean_rps=tier.mean_rps,
    )


def days_of(tier: PlacementTier, task: PlacementTask, judged: bool) -> list[ServiceDay]:
    """Days that are judged, or those that free parameters are chosen on."""
    days, seed = (task.judged_days, 0) if judged else (task.tune_days, 1)
    return [
        ServiceDay(task.service, day, tier.mean_rps, tier.profile, tier.seed + seed) for day in days
    ]


def settings_of(build: str, env: ClusterEnv) -> list[str]:
    """Names of a policy at the settings of its free parameter, the least careful first.

    One name where nothing is free.
    """
    made = resolve_coarse(build, env)
    if isinstance(made, IlpRule) and build == OWN["cluster"]:
        return [with_parameters(build, {"alpha": alpha}) for alpha in ALPHAS]
    if isinstance(made, CoarseAgent) and not split_name(build, {AGENT})[1]:
        low, high = made.checkpoint.prices
        prices = [float(f"{p:.3g}") for p in np.geomspace(low, high, N_PRICES)]
        return [with_parameters(build, {"price": price}) for price in prices]
    return [build]


def placement_rows(
    tier: PlacementTier, task: PlacementTask, key: str, label: str, build: str
) -> list[dict[str, Any]]:
    """Rows of an entrant, or of a reference, on a task; a task for workers.

    Args:
        tier: what all tasks share.
        task: the task.
        key: of the task.
        label: of the entrant; ``max`` is every GPU in service at max clock, ``bound`` the bound.
        build: its name for the resolver.

    Raises:
        BiscaleError: no such policy.
    """
    if label == BOUND:
        return [_bound_row(tier, task, key)]
    top = label == MAX
    env = config_of(tier, task, **(ALL_AT_MAX if top else {})).make_env()
    required = env.plant.slo.attainment
    names = settings_of("largest" if top else build, env)
    chosen, held = names[0], True
    if len(names) > 1:
        tuning = days_of(tier, task, judged=False)

        def is_enough(at: float) -> bool:
            policy = resolve_coarse(names[int(at)], env)
            rows = [run_coarse_day(env, policy, day).row() for day in tuning]
            return tuned_enough(Sums.of(_all_counted(row) for row in rows), required)

        index, held = least_careful(range(len(names)), is_enough)
        chosen = names[int(index)]
    rows = []
    for day in days_of(tier, task, judged=True):
        timed = TimedPlacements(resolve_coarse(chosen, env))
        row = _all_counted(run_coarse_day(env, timed, day).row())
        rows.append(
            judged_row(
                key,
                label,
                build,
                f"day {day.day}",
                **{name: row[name] for name in ("energy_j", "requests", "late_ttft", "late_tpot")},
                setting=chosen.partition(":")[2] + NOT_HELD * (not held),
                tuned=len(names) > 1,
                required=required,
                decision_s=float(np.median(timed.times_s)),
            )
        )
    return rows


def _all_counted(row: dict[str, Any]) -> dict[str, Any]:
    """A day whose requests in flight at its end count as missed, since nobody finishes them."""
    left = row["unfinished"]
    return {
        **row,
        "requests": row["requests"] + left,
        "late_ttft": row["late_ttft"] + left,
        "late_tpot": row["late_tpot"] + left,
    }


def _bound_row(tier: PlacementTier, task: PlacementTask, key: str) -> dict[str, Any]:
    env = config_of(tier, task).make_env()
    plants = {
        phase: [env.plant.plant(phase, tp) for tp in fitting_tps(env.plant.settings, phase)]
        for phase in ("prefill", "decode")
    }
    spare_w = env.plant.spare_power_w(plants["prefill"][0])
    stages = free_stages(plants, env.plant.settings.gpus, spare_w)
    traces = [day.trace(tier.windows, tier.window_s) for day in days_of(tier, task, judged=True)]
    found = cluster_bound(stages, traces, env.plant.slo.attainment, window_s=BOUND_S)
    return judged_row(key, BOUND, BOUND, BOUND, energy_j=found.energy_j)


def placement_inputs(build: str) -> dict[str, str]:
    """SHA-256 of the files of an entrant that are not part of this package, by their names."""
    base = split_name(build, {*RULES, AGENT})[0]
    if is_class_name(base):
        files = ClassSource(build, load_class(base), {}).files()
        return {
            f"policy {base.rpartition(':')[0]} ({file.name})": file_hash(file) for file in files
        }
    if names_checkpoint(base):
        file = coarse_checkpoint(base)
        return {f"checkpoint {base} ({file.name})": file_hash(file)}
    return {}


def check_placements(tier: PlacementTier) -> Callable[[str], None]:
    """Says before anything is run whether a name is a coarse policy.

    Args:
        tier: what all tasks share.

    Returns:
        Raises a BiscaleError for a name that is none.
    """
    task = next(task for tasks in tier.splits.values() for task in tasks)
    env = config_of(tier, task).make_env()

    def check(build: str) -> None:
        if not build:
            raise BiscaleError("the name of a coarse policy is empty")
        resolve_coarse(build, env)

    return check


PLACEMENTS: Final = TierRules(check_placements, placement_inputs, placement_rows)
