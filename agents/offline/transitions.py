"""Recorded episodes as transitions: features of observations, energy, time and lost requests.

The features are those of the shipped agents: they tell what a clock does relative to what the plant
can do, so that data of several LLMs and GPUs are one problem, and what is learned serves others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.offline.offline_config import OfflineConfig
from agents.offline.recorded import DATA, GroupData, dataset_id, groups_of, minari_in
from agents.policy.features import FeatureMap, plants_of
from agents.training.worlds.mixture import run_at_max
from biscale_env.wrappers.last_step import phase_env

Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]
NOMINAL = -1


@dataclass(frozen=True)
class RecordedDecisions:
    """Decisions of some data sets, arrays over n decisions.

    Attributes:
        features: before the decision, (n, F).
        following: after it, (n, F).
        action: recorded, in [-1, 1], (n,).
        energy: reference energies of the group, (n,).
        elapsed_s: length, s, (n,).
        lost: requests that became certain to miss their SLO, (n,): what missed it, plus what is
            late even at the highest clock after the decision, less what was so before.
        group: number of the group, (n,).
        source: number of the data set, (n,).
        request_cost: mean energy of a request at max clock, reference energies, (groups,).
    """

    features: Floats32
    following: Floats32
    action: Floats32
    energy: Floats32
    elapsed_s: Floats32
    lost: Floats32
    group: Ints
    source: Ints
    request_cost: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.action)


def load_transitions(
    config: OfflineConfig, folder: Path, qualities: Sequence[str]
) -> RecordedDecisions:
    """Decisions of the data sets of some qualities, of every group.

    Args:
        config: of the run.
        folder: of the run, with ``data`` in it.
        qualities: names of the config's.
    """
    groups, parts = groups_of(config), []
    with minari_in(folder / DATA):
        for k, quality in enumerate(qualities):
            for g, one in enumerate(groups):
                name = dataset_id(config.phase, quality, one.group.name)
                parts += [(*row, g, k * len(groups) + g) for row in _episodes(name)]
    columns = [np.concatenate([part[c] for part in parts]) for c in range(6)]
    sizes = [len(part[2]) for part in parts]
    numbers = [np.repeat([part[c] for part in parts], sizes).astype(np.int64) for c in (6, 7)]
    features, following, action, energy, elapsed_s, lost = columns
    return RecordedDecisions(
        features=features,
        following=following,
        action=action,
        energy=energy,
        elapsed_s=elapsed_s,
        lost=lost,
        group=numbers[0],
        source=numbers[1],
        request_cost=np.array([_request_cost(one) for one in groups]),
    )


def _request_cost(one: GroupData) -> float:
    """Mean energy of a request at max clock, in reference energies, of the first workload."""
    late, energy_j = run_at_max(one.group, one.group.source.workload(0))
    return energy_j / max(len(late), 1) / one.group.plant.energy_ref_j


def _episodes(name: str) -> list[tuple[Any, ...]]:
    """Columns of :class:`RecordedDecisions` of every episode of a data set, up to ``lost``."""
    import minari

    data = minari.load_dataset(name)
    plant = phase_env(data.recover_environment(), name).plant
    weight = float(plant.params(NOMINAL, 0.0)["violation_weight"])
    features, nominal = (
        FeatureMap(plant.phase, plant.spec),
        plants_of(plant, plant.phase, [NOMINAL]),
    )
    found = []
    for episode in data.iterate_episodes():
        seen = np.ascontiguousarray(episode.observations, dtype=np.float32)
        made, _, late = features(seen, *nominal)
        infos = {
            key: np.asarray(episode.infos[key], dtype=np.float64)[1:] for key in ("dt", "cost")
        }
        energy = -np.asarray(episode.rewards, dtype=np.float64) - weight * infos["cost"]
        lost = infos["cost"] + late[1:] - late[:-1]
        action = np.asarray(episode.actions, dtype=np.float32)[:, 0]
        numbers = (energy, infos["dt"], lost)
        found.append((made[:-1], made[1:], action, *(v.astype(np.float32) for v in numbers)))
    return found
