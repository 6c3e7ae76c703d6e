"""An offline run in one directory: data sets, networks, scores; it goes on where it was broken off.

``data/`` and ``datasets.csv`` (:mod:`agents.offline.recorded`), a network per learner and data
(``bc-mixed/best.npz``), and ``scores.csv``: networks and recorded policies on held-out workloads.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from agents.offline.heldout_scores import (
    NetworkOnRows,
    PoliciesOnRows,
    Score,
    TriedSetting,
    best_score,
    settings_of,
)
from agents.offline.learners import Say, learn, need_torchrl
from agents.offline.offline_config import OfflineConfig
from agents.offline.recorded import MakePolicy, record_all
from agents.offline.transitions import load_transitions
from agents.policy.features import feature_id
from agents.policy.numpy_policy import Network, load_network
from agents.training.export import BEST, training_facts
from agents.training.heldout import HeldOut
from agents.training.run_config import open_config
from agents.training.worlds.mixture import make_groups, plant_of
from biscale_env.contract import spec_for
from biscale_env.core.exact_csv import read_exact
from biscale_env.core.files import lock, write_whole

SCORES: Final = "scores.csv"


def run_offline(
    config: OfflineConfig, folder: Path, resume: bool, make: MakePolicy, say: Say
) -> pd.DataFrame:
    """Record, learn and score what is not there yet.

    Args:
        config: of the run.
        folder: its directory.
        resume: go on with a run that is there.
        make: a policy by name for a plant.
        say: takes the lines of progress.

    Returns:
        Scores: a row per policy with ``policy``, ``data``, ``score``, ``energy_ratio`` and
        ``shortfall`` (means over groups), ``price`` and ``margin`` (best common setting).

    Raises:
        BiscaleError: a library is missing, or there is a run that may not be resumed.
    """
    need_torchrl()
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock", what=f"offline run {folder}"):
        open_config(folder, config.model_dump(mode="json"), resume, "offline run")
        record_all(config, folder, make, say)
        for name in config.learners:
            for data in config.data:
                if not network_path(folder, name, data).is_file():
                    _learn(config, folder, name, data, say)
        return _scores(config, folder, make, say)


def network_path(folder: Path, learner: str, data: str) -> Path:
    """File of a learned network; its folder is a run directory for every command."""
    return folder / f"{learner}-{data}" / BEST


def _learn(config: OfflineConfig, folder: Path, name: str, data: str, say: Say) -> None:
    learner = config.learners[name]
    mine = config.agent_config(learner)
    began_s = time.process_time()
    transitions = load_transitions(config, folder, config.qualities_of(data))
    say(f"{name} on {data}: {len(transitions)} decisions")
    weights, biases = learn(learner, transitions, mine.net_arch, config.seed, say)
    card: dict[str, Any] = {
        "algo": learner.kind,
        "seed": config.seed,
        "steps": len(transitions),  # env steps that it has seen, all of them recorded
        "cpu_minutes": round((time.process_time() - began_s) / 60.0, 3),
        "updates": learner.updates,
        "data": {quality: config.qualities[quality] for quality in config.qualities_of(data)},
        "margin": 0.0,
        "config": mine.model_dump(mode="json"),
    }
    Network(
        phase=config.phase,
        spec_id=spec_for(config.phase).id,
        feature_id=feature_id(config.phase),
        action=mine.action,
        span=mine.span,
        activation="tanh",
        weights=weights,
        biases=biases,
        card=card,
        price=mine.default_price if mine.price else None,
        trained_on=training_facts(mine, plant_of(mine)),
    ).save(network_path(folder, name, data))


def _scores(config: OfflineConfig, folder: Path, make: MakePolicy, say: Say) -> pd.DataFrame:
    path = folder / SCORES
    table = read_exact(path) if path.is_file() else pd.DataFrame()
    done = set() if table.empty else set(zip(table["policy"], table["data"], strict=True))
    base = config.agent_config()
    groups, _ = make_groups(base)
    held_out = HeldOut(base, groups, config.evaluation.workloads)

    def keep(policy: str, data: str, score: Score) -> None:
        nonlocal table
        row = _row(policy, data, score, held_out)
        table = pd.concat([table, pd.DataFrame([row])], ignore_index=True)
        write_whole(path, table.to_csv(index=False))
        say(f"{policy} on {data}: held-out score {row['score']:.4f}")

    for quality, names in config.qualities.items():
        if (quality, "-") not in done:
            keep(quality, "-", _recorded_score(held_out, groups, names, make))
    for name, learner in config.learners.items():
        for data in config.data:
            if (name, data) not in done:
                network = load_network(network_path(folder, name, data))
                rows = NetworkOnRows(network, held_out)
                settings = settings_of(config.agent_config(learner))
                keep(name, data, best_score(held_out, {s: rows.at(s) for s in settings}))
    return table


def _recorded_score(
    held_out: HeldOut, groups: Sequence[Any], names: Sequence[str], make: MakePolicy
) -> Score:
    """Recorded policies as they are, without tuning: per group the best of them."""
    tried = {name: PoliciesOnRows(name, groups, held_out, make) for name in names}
    return best_score(held_out, tried)


def _row(policy: str, data: str, score: Score, held_out: HeldOut) -> Mapping[str, Any]:
    metrics, setting = score.metrics, score.setting
    known = isinstance(setting, TriedSetting)
    return {
        "policy": policy,
        "data": data,
        "score": score.score,
        "energy_ratio": float(metrics.energy_ratio.mean()),
        "shortfall": float(np.maximum(held_out.targets - metrics.attainment, 0.0).mean()),
        "price": setting.price if known else None,
        "margin": setting.margin if known else None,
    }
