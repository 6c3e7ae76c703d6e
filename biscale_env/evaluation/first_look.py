"""A first look at a policy: some episodes of an environment, a row of key figures each."""

from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd

from biscale_env.contract import Policy
from biscale_env.core.errors import BiscaleError
from biscale_env.policies import resolve_policy


def evaluate(
    policy: str | Policy, env: str | gym.Env[Any, Any], *, episodes: int = 5, seed: int = 0
) -> pd.DataFrame:
    """Run whole episodes of an environment under a policy.

    Two policies with the same seed meet the same requests. For tables with intervals and tuned
    parameters there is ``biscale compare``.

    Args:
        policy: a name (``mpc``, ``agent``, a checkpoint, ``mine:Rule``), or anything with
            ``predict``, e.g. a model of Stable-Baselines3.
        env: an environment of this package, wrapped or not, or its id.
        episodes: number of episodes.
        seed: of the first reset; the others continue its sequence.

    Returns:
        A row per episode with the key figures that ``info["kpis"]`` has at its end: for one
        instance ``energy_per_token_j``, ``energy_ratio`` (against max clock on the same requests),
        ``attainment`` (fraction), ``ttft_p99_s`` or ``tpot_p99_s``, and what they are made of.

    Raises:
        BiscaleError: fewer than one episode, an unknown policy, a name for an environment whose
            observation or action is not that of one instance, or an environment without figures.
    """
    if episodes < 1:
        raise BiscaleError(f"evaluate: episodes must be at least 1, got {episodes}")
    own = isinstance(env, str)
    world: gym.Env[Any, Any] = gym.make(env) if isinstance(env, str) else env
    try:
        made = _named(policy, world) if isinstance(policy, str) else policy
        rows = [_episode(made, world, seed if k == 0 else None) for k in range(episodes)]
    finally:
        if own:
            world.close()
    return pd.DataFrame(rows)


def _named(name: str, env: gym.Env[Any, Any]) -> Policy:
    """A policy by name, where the environment shows and takes what such policies do."""
    inner: Any = env.unwrapped
    plant = getattr(inner, "plant", None)
    if plant is None:
        raise BiscaleError(
            f"evaluate: '{name}' controls one instance, {_what(env)} has none; give an object with "
            "predict"
        )
    box = isinstance(env.action_space, gym.spaces.Box) and env.action_space.shape == (1,)
    if not box or env.observation_space != inner.observation_space:
        raise BiscaleError(
            f"evaluate: '{name}' needs the observation of BiScale/{plant.phase.capitalize()}-v1 and"
            f" an action in [-1, 1]; {_what(env)} has others, give an object with predict"
        )
    return resolve_policy(name, plant)


def _what(env: gym.Env[Any, Any]) -> str:
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__


def _episode(policy: Policy, env: gym.Env[Any, Any], seed: int | None) -> dict[str, float]:
    """Key figures of one episode."""
    observation, info = env.reset(seed=seed)
    state, over, start = None, False, np.array([True])
    while not over:
        action, state = policy.predict(
            observation, state=state, episode_start=start, deterministic=True
        )
        observation, _, terminated, truncated, info = env.step(action)
        over, start = terminated or truncated, np.array([False])
    if "kpis" in info:
        return dict(info["kpis"])
    if not hasattr(env.unwrapped, "kpis"):
        raise BiscaleError(f"evaluate: {_what(env)} tells no key figures (info['kpis'])")
    return dict(env.unwrapped.kpis())  # a wrapper has cut the episode off
