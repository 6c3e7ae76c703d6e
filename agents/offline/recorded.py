"""The data sets of an offline run: one per quality and group, written once, kept by Minari.

They lie in the run's own folder (``MINARI_DATASETS_PATH=RUN/data`` opens them anywhere).
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import gymnasium as gym
import pandas as pd

from agents.offline.offline_config import OfflineConfig
from agents.training.dataset import export_dataset
from agents.training.worlds.mixture import WorkloadGroup, make_groups
from biscale_env.contract import Policy
from biscale_env.core.exact_csv import read_exact
from biscale_env.core.files import write_whole
from biscale_env.envs.plant import Plant
from biscale_env.wrappers.last_step import phase_env

DATA: Final = "data"
DATASETS: Final = "datasets.csv"
MINARI_FOLDER: Final = "MINARI_DATASETS_PATH"
MakePolicy = Callable[[str, Plant], Policy]
Say = Callable[[str], None]


class GroupData(NamedTuple):
    """A group of the mixture and the environment that its episodes are recorded in.

    Attributes:
        group: as the trainer knows it.
        options: of the public environment that is the same.
    """

    group: WorkloadGroup
    options: dict[str, Any]


def groups_of(config: OfflineConfig) -> list[GroupData]:
    """All groups of a run, in the order of the mixture."""
    base = config.agent_config()
    found: list[GroupData] = []
    for number, part in enumerate(base.mixture):
        one = base.model_copy(update={"mixture": (part,)})
        loads = [{"load": x} for x in part.loads] + [{"rate_rps": x} for x in part.rates_rps]
        given = part.model_dump(
            include={"profile", "slo", "gpu", "llm", "tp", "ep", "dtype", "idle"},
            exclude_none=True,
        )
        options = given | {
            "episode_s": config.episode_s,
            "workload_seed": number,
            "min_decision_interval_s": base.decision_interval_s,
        }
        groups, _ = make_groups(one)
        found += [
            GroupData(group, options | load) for group, load in zip(groups, loads, strict=True)
        ]
    return found


def dataset_id(phase: str, quality: str, group: str) -> str:
    """Minari's name of one data set, e.g. ``biscale/prefill/mpc-azure-conv-like-50-v1``."""
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in f"{quality}-{group}")
    return f"biscale/{phase}/{plain}-v1"


@contextmanager
def minari_in(folder: Path) -> Iterator[None]:
    """Minari reads and writes in a folder meanwhile."""
    before = os.environ.get(MINARI_FOLDER)
    os.environ[MINARI_FOLDER] = str(folder.absolute())
    try:
        yield
    finally:
        if before is None:
            del os.environ[MINARI_FOLDER]
        else:
            os.environ[MINARI_FOLDER] = before


def record_all(config: OfflineConfig, folder: Path, make: MakePolicy, say: Say) -> pd.DataFrame:
    """Record what is not there yet; sizes and scores of every data set and policy.

    Args:
        config: of the run.
        folder: of the run; data sets go to ``data`` in it, the table to ``datasets.csv``.
        make: a policy by name for a plant.
        say: takes a line per data set.

    Returns:
        A row per quality, group and policy: ``quality``, ``group``, ``dataset``, ``policy``,
        ``episodes``, ``steps``, ``mean_return``, ``energy_ratio``, ``attainment``.
    """
    path = folder / DATASETS
    table = pd.DataFrame({"dataset": []})
    if path.is_file():
        table = read_exact(path)
    groups = groups_of(config)
    wanted = [(quality, one) for quality in config.qualities for one in groups]
    with minari_in(folder / DATA):
        for count, (quality, one) in enumerate(wanted, start=1):
            name = dataset_id(config.phase, quality, one.group.name)
            if name in set(table["dataset"]):
                continue
            shutil.rmtree(folder / DATA / name, ignore_errors=True)  # broken off while written
            rows = _record(config, quality, one, name, make)
            table = rows if table.empty else pd.concat([table, rows], ignore_index=True)
            write_whole(path, table.to_csv(index=False))
            say(f"data set {count} of {len(wanted)}: {name}, {rows['steps'].sum()} steps")
    return table


def _record(
    config: OfflineConfig, quality: str, one: GroupData, name: str, make: MakePolicy
) -> pd.DataFrame:
    env = gym.make(f"BiScale/{config.phase.capitalize()}-v1", kpis=False, **one.options)
    plant = phase_env(env, "an offline run").plant
    policies = {label: make(label, plant) for label in config.qualities[quality]}
    recorded = export_dataset(config.phase, policies, name, config.episodes, **one.options)
    rows = recorded.summary().reset_index()
    return rows.assign(quality=quality, group=one.group.name, dataset=name)
