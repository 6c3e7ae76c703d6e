"""Offline data sets: a reference policy recorded in the environment and stored with Minari."""

from typing import Any

import numpy as np

from biscale_env.contract import Policy
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.single import PhaseEnv
from controllers.base import context_of
from controllers.registry import make_policy


def export_dataset(
    phase: str, policy: str, dataset_id: str, episodes: int = 10, **options: Any
) -> int:
    """Record a policy and store the episodes under Minari's data folder.

    Args:
        phase: ``prefill`` or ``decode``.
        policy: build string of a reference policy, e.g. ``mpc:margin=0.2``.
        dataset_id: Minari's name, e.g. ``biscale/prefill-mpc-v0``.
        episodes: how many.
        **options: of the environment (profile, load, episode_s, ...).

    Returns:
        Steps recorded.

    Raises:
        BiscaleError: Minari is not installed, or a data set of that name is there already.
    """
    try:
        import minari
    except ImportError:
        raise BiscaleError("data sets need minari: install biscale-env[offline]") from None
    if dataset_id in minari.list_local_datasets():
        raise BiscaleError(
            f"data set '{dataset_id}' is there already: choose another name or delete it"
        )
    env = PhaseEnv(phase, **options)
    teacher = make_policy(policy, context_of(env.plant))
    buffers = [_episode(env, teacher, k) for k in range(episodes)]
    made = minari.create_dataset_from_buffers(
        dataset_id=dataset_id,
        buffer=buffers,
        observation_space=env.observation_space,
        action_space=env.action_space,
        algorithm_name=policy,
        description=(
            f"{policy} in the {phase} environment of biscale-env, {episodes} episodes, "
            f"options {options}"
        ),
        data_format="arrow",
    )
    return int(made.total_steps)


def _episode(env: PhaseEnv, teacher: Policy, number: int) -> Any:
    """One recorded episode; Minari's own collector would need jax."""
    from minari.data_collector import EpisodeBuffer

    observation, _ = env.reset(seed=number)
    observations, actions, rewards, state, done = [observation], [], [], None, False
    while not done:
        action, state = teacher.predict(observation, state=state)
        observation, reward, _, done, _ = env.step(action)
        observations.append(observation)
        actions.append(action)
        rewards.append(reward)
    n = len(rewards)
    return EpisodeBuffer(
        id=number,
        seed=number,
        observations=np.array(observations),
        actions=np.array(actions),
        rewards=np.array(rewards).tolist(),
        terminations=[False] * n,
        truncations=[False] * (n - 1) + [True],
    )
