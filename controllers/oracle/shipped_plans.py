"""Plans of the oracle that come with the package: those of the benchmark's frozen tasks.

Finding them takes a quarter of an hour of one core, and they are the same on every machine: tasks
and workloads of a suite are frozen. A plan counts only while the simulator, given it, uses the
energy and misses the requests that are written beside it; a change of the models or of the
transition ends that, and the oracle is solved again. Made by ``python docs/update.py plans``.
"""

import json
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.files import open_whole
from biscale_env.envs.plant import Plant
from biscale_env.traces import Trace
from controllers.oracle.plan_replay import replay

FILE: Final = Path(str(files("controllers"))) / "oracle" / "plans" / "core.npz"
NO_PLANS: Final = "BISCALE_NO_SHIPPED_PLANS"
"""Set in the environment, no shipped plan counts: everything is solved."""
SAME: Final = 1e-9
"""Relative difference of energies that rounding on another processor may make (assumed)."""

Plan = NDArray[np.float64]


def pack_plans(kept: Iterable[Path], path: Path) -> int:
    """Put plans that :mod:`controllers.oracle.kept_plans` has kept into one file.

    Args:
        kept: its files, one per plan; their names are the keys.
        path: of the file to write, ``.npz``.

    Returns:
        Number of plans.
    """
    plans = {file.stem: json.loads(file.read_text()) for file in sorted(kept)}
    clocks = [np.asarray(one["plan_mhz"], dtype=np.float64) for one in plans.values()]
    ends = np.cumsum([len(plan) for plan in clocks])
    said = json.dumps({key: one["info"] for key, one in plans.items()})

    with open_whole(path) as partial, partial.open("wb") as out:
        together = np.concatenate(clocks)
        np.savez_compressed(out, plan_mhz=together, ends=ends, said=np.array(said))
    return len(plans)


@lru_cache(maxsize=2)
def read_plans(path: Path = FILE) -> Mapping[str, tuple[Plan, dict[str, float]]]:
    """Plans of a file by key, each with what the oracle said of it; none where there is no file."""
    if not path.is_file():
        return {}
    with np.load(path) as data:
        said = json.loads(str(data["said"]))
        plans = np.split(data["plan_mhz"], data["ends"][:-1])
    return {key: (plan, said[key]) for key, plan in zip(said, plans, strict=True)}


def shipped_plan(
    key: str, plant: Plant, trace: Trace, member: int | None = None
) -> tuple[Plan, dict[str, float]] | None:
    """A plan that came with the package, if the simulator still does with it what it did then.

    Args:
        key: of :func:`controllers.oracle.kept_plans.plan_key`.
        plant: as there.
        trace: as there.
        member: as there.
    """
    known = None if os.environ.get(NO_PLANS) else read_plans().get(key)
    if known is None:
        return None
    plan_mhz, said = known
    done = replay(plant, trace, plan_mhz, member)
    same = abs(done.energy_j - said["replay_j"]) <= SAME * said["replay_j"]
    return known if same and done.violations == said["violations"] else None
