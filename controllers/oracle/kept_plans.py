"""Plans of the oracle that were found before: a workload is solved once per machine.

Those of the benchmark's tasks come with the package (:mod:`controllers.oracle.shipped_plans`).

A plan takes seconds to minutes, and a benchmark, its verification and every comparison of one
operating point ask for the same ones. The key holds all that a plan depends on; names, actuation
delay and decision interval are not among it, since the oracle ignores them.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from biscale_env.core.jit import PACKAGE, python_files, source_digest
from biscale_env.core.user_cache import cache_root, mark_used, prune, recall, remember
from biscale_env.envs.plant import Plant
from biscale_env.traces import Trace
from controllers.oracle.make import make_oracle
from controllers.oracle.plan_replay import OraclePolicy, member_of
from controllers.oracle.shipped_plans import shipped_plan

KEPT_VERSIONS: Final = 4
"""Versions of the code whose plans stay; see :func:`biscale_env.core.user_cache.prune`."""


def kept_oracle(
    plant: Plant, trace: Trace, target_attainment: float | None = None, member: int | None = None
) -> tuple[OraclePolicy, dict[str, float]]:
    """:func:`controllers.oracle.make.make_oracle`, or what it found before on this machine.

    Args:
        plant: as there.
        trace: as there.
        target_attainment: as there.
        member: as there.

    Returns:
        As there; ``seconds`` is what finding the plan took then.
    """
    key = plan_key(plant, trace, target_attainment, member)
    path = _path(key)
    found = _known(path) or shipped_plan(key, plant, trace, member)
    if found is not None:
        plan_mhz, info = found
        return OraclePolicy(plant.clocks, np.asarray(plan_mhz)), info
    policy, info = make_oracle(plant, trace, target_attainment, member)
    if not path.parent.is_dir():
        mark_used(path.parent)
        prune(path.parent.parent, KEPT_VERSIONS)
    data = {"plan_mhz": policy.plan_mhz.tolist(), "info": {k: float(v) for k, v in info.items()}}
    remember(path, json.dumps(data))
    return policy, info


def plan_key(plant: Plant, trace: Trace, target: float | None, member: int | None) -> str:
    """Hash of all that a plan depends on beside the code.

    Args:
        plant: model with GPU and LLM, limits, idle rule, SLO, weight of a violation.
        trace: its content and length; not its name.
        target: attainment asked for.
        member: ensemble member.
    """
    ignored = {"actuation_delay_s", "min_decision_interval_s", "ensemble_member"}
    parts = [
        plant.phase,
        plant.model.digest,
        plant.settings.model_dump(mode="json", exclude=ignored),
        plant.slo.model_dump_json(),
        trace.sha256,
        trace.duration_s,
        target,
        member_of(plant, member),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _code() -> str:
    """Hash of the sources between a workload and its plan."""
    digest = hashlib.sha256(source_digest(PACKAGE, Path(__file__).parent).encode())
    for part in ("config", "models", "traces"):  # the simulator counts already
        for file in python_files(PACKAGE / part):
            digest.update(file.relative_to(PACKAGE).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _path(key: str) -> Path:
    return cache_root() / "oracle-plans" / _code() / f"{key}.json"


def _known(path: Path) -> tuple[list[float], dict[str, float]] | None:
    """A plan found before; None where there is none or the file is damaged."""
    kept: Any = recall(path)
    try:
        plan = [float(clock) for clock in kept["plan_mhz"]]
        info = {str(name): float(value) for name, value in kept["info"].items()}
    except (TypeError, KeyError, ValueError, AttributeError):
        return None
    complete = {"replay_j", "lower_bound_any_delay_j", "attainment"} <= info.keys()
    return (plan, info) if plan and np.isfinite(plan).all() and complete else None
