"""Offline data sets: policies recorded in the environment and stored with Minari."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import gymnasium as gym
import numpy as np
import pandas as pd
from gymnasium.error import Error as GymnasiumError

import biscale_env
from agents import load_agent
from biscale_env.contract import Policy
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant
from controllers.base import context_of
from controllers.registry import make_policy

AGENT: Final = "agent"
RANDOM: Final = "random"
INFOS: Final = ("dt", "cost")
"""What is kept of ``info`` at every step: length, s, and requests that missed the SLO."""


@dataclass(frozen=True)
class RecordedData:
    """What was stored.

    Attributes:
        dataset_id: Minari's name.
        episodes: one row per episode: ``policy``, ``steps``, ``reward`` (sum), ``energy_ratio``
            (energy per token over that of max clock), ``attainment``.
    """

    dataset_id: str
    episodes: pd.DataFrame

    @property
    def steps(self) -> int:
        """Steps of all episodes."""
        return int(self.episodes["steps"].sum())

    def summary(self) -> pd.DataFrame:
        """Per policy: episodes, steps, and means of return, energy ratio and attainment."""
        return self.episodes.groupby("policy", sort=False).agg(
            episodes=("steps", "size"),
            steps=("steps", "sum"),
            mean_return=("reward", "mean"),
            energy_ratio=("energy_ratio", "mean"),
            attainment=("attainment", "mean"),
        )


def export_dataset(
    phase: str,
    policy: str | Sequence[str] | Mapping[str, Policy],
    dataset_id: str,
    episodes: int = 10,
    **options: Any,
) -> RecordedData:
    """Record one or more policies and store the episodes under Minari's data folder.

    Episode k is that of seed k, whichever policy runs it; several policies take turns, so that the
    data are of mixed quality. The environment can be made again from the data
    set (``recover_environment``); ``infos`` hold ``dt`` and ``cost`` of every step; where the
    random policy is among several, Minari's reference scores are its mean return and the best.

    Args:
        phase: ``prefill`` or ``decode``.
        policy: a reference policy (``mpc:margin=0.2``), ``agent`` or a checkpoint; several of
            them; or policies by the name that the data are to give them.
        dataset_id: Minari's name, e.g. ``biscale/prefill/mpc-v1``.
        episodes: how many, all policies together.
        **options: of the environment (profile, load, episode_s, ...).

    Raises:
        BiscaleError: Minari is not installed, a name that it does not take, or a data set of that
            name is there already.
    """
    _check_name(dataset_id)
    env = gym.make(f"BiScale/{phase.capitalize()}-v1", **options)
    plant: Plant = env.unwrapped.plant  # type: ignore[attr-defined]
    names = [policy] if isinstance(policy, str) else list(policy)
    teachers = {
        name: policy[name] if isinstance(policy, Mapping) else _teacher(name, plant)
        for name in names
    }
    if not 0 < len(teachers) <= episodes:
        raise BiscaleError(
            f"{episodes} episodes cannot hold {len(teachers)} policies: give at least one each"
        )
    buffers, rows = [], []
    for k in range(episodes):
        name = names[k % len(names)]
        buffer, told = _episode(env, teachers[name], k)
        buffers.append(buffer)
        rows.append({"policy": name, **told})
    recorded = RecordedData(dataset_id, pd.DataFrame(rows))
    _store(recorded, buffers, env, options)
    return recorded


def _check_name(dataset_id: str) -> None:
    """Refuse before anything is made: Minari leaves folders behind."""
    try:
        import minari
        from minari.dataset.minari_dataset import parse_dataset_id
    except ImportError:
        raise BiscaleError("data sets need minari: install biscale-env[offline]") from None
    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError, GymnasiumError):  # without a version; from old Minari
        raise BiscaleError(
            f"'{dataset_id}' is no name of a Minari data set: write it as "
            "biscale/prefill/mpc-v1, a version at its end"
        ) from None
    if dataset_id in minari.list_local_datasets():
        raise BiscaleError(
            f"data set '{dataset_id}' is there already: choose another name or delete it"
        )


def _teacher(name: str, plant: Plant) -> Policy:
    if name == AGENT:
        shipped = Path(str(files("agents"))) / "checkpoints" / f"{plant.phase}.npz"
        return load_agent(shipped, plant)
    if Path(name).suffix in (".npz", ".zip"):
        return load_agent(Path(name), plant)
    return make_policy(name, context_of(plant))


def _store(recorded: RecordedData, buffers: Sequence[Any], env: gym.Env, options: Any) -> None:
    import minari

    table = recorded.summary()
    scores: dict[str, float] = {}
    if RANDOM in table.index and len(table) > 1:
        least = float(table.loc[RANDOM, "mean_return"])  # type: ignore[arg-type]
        scores = {"ref_min_score": least, "ref_max_score": float(table["mean_return"].max())}
    told = "; ".join(
        f"{row.Index}: {row.episodes} episodes, {row.steps} steps, mean return "
        f"{row.mean_return:.1f}, energy {row.energy_ratio:.3f} of max clock, attainment "
        f"{row.attainment:.2%}"
        for row in table.itertuples()
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* is set to None")  # author, address, links
        minari.create_dataset_from_buffers(
            dataset_id=recorded.dataset_id,
            buffer=list(buffers),
            env=env,
            algorithm_name=", ".join(map(str, table.index)),
            description=f"biscale-env {biscale_env.__version__}, options {options}; {told}",
            data_format="arrow",
            requirements=["biscale-env"],
            **scores,
        )


def _episode(env: gym.Env, teacher: Policy, number: int) -> tuple[Any, dict[str, float]]:
    """One recorded episode and its key figures; Minari's own collector would need jax."""
    from minari.data_collector import EpisodeBuffer

    observation, info = env.reset(seed=number)
    observations, actions, rewards, state, done = [observation], [], [], None, False
    infos: dict[str, list[float]] = {key: [float(info.get(key, 0.0))] for key in INFOS}
    while not done:
        action, state = teacher.predict(observation, state=state)
        observation, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        observations.append(observation)
        actions.append(np.asarray(action, dtype=env.action_space.dtype))
        rewards.append(float(reward))
        for key in INFOS:
            infos[key].append(float(info[key]))
    n = len(rewards)
    buffer = EpisodeBuffer(
        id=number,
        seed=number,
        observations=np.array(observations),
        actions=np.array(actions),
        rewards=rewards,
        terminations=[False] * (n - 1) + [bool(terminated)],
        truncations=[False] * (n - 1) + [bool(truncated)],
        infos=infos,  # as lists: Minari 0.5 cannot read flat arrays back
    )
    kpis = info["kpis"]
    return buffer, {
        "steps": n,
        "reward": sum(rewards),
        "energy_ratio": kpis["energy_ratio"],
        "attainment": kpis["attainment"],
    }
