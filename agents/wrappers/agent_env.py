"""The trainer's recipe on a public environment, for any library."""

from pathlib import Path
from typing import Any

import gymnasium as gym

from agents.training.export import to_network, training_facts
from agents.training.train_config import AgentConfig, load_config
from agents.wrappers.agent_features import AgentFeatures, RuleAction
from agents.wrappers.training_reward import UPDATE_EVERY, TrainingReward
from biscale_env.core.errors import BiscaleError
from biscale_env.wrappers import RandomisedPlant
from biscale_env.wrappers.last_step import phase_env

IDS = {"prefill": "BiScale/Prefill-v1", "decode": "BiScale/Decode-v1"}


def agent_env(
    phase: str,
    config: AgentConfig | str | None = None,
    n_workloads: int = 16,
    update_every: int = UPDATE_EVERY,
    **options: Any,
) -> "gym.Env[Any, Any]":
    """A public environment with the trainer's plants, features, price, reward and action.

    What the trainer has beside it: many copies in one compiled call, a mixture of workloads, LLMs
    and GPUs, and cloning of a reference before it learns.

    Args:
        phase: ``prefill`` or ``decode``.
        config: a config or its name; None takes PPO's of the phase.
        n_workloads: different workloads; max clock is run on each.
        update_every: steps between updates of the cost rate.
        **options: of the environment.

    Raises:
        BiscaleError: a config of the other phase, or an option that the environment does not have.
    """
    if phase not in IDS:
        raise BiscaleError(f"unknown phase '{phase}': choose prefill or decode")
    made = config if isinstance(config, AgentConfig) else load_config(config, phase)
    options.setdefault("min_decision_interval_s", made.decision_interval_s)
    env = gym.make(IDS[phase], n_workloads=n_workloads, kpis=False, **options)
    r = made.randomise
    share = r.nominal_share if phase_env(env, "agent_env").plant.model.n_members else 1.0
    env = RandomisedPlant(env, r.delay_s, r.slo_scale, share)
    env = TrainingReward(AgentFeatures(env, made.price), made, update_every)
    return RuleAction(env, made.action, made.span)


def save_agent(
    model: Any, env: "gym.Env[Any, Any]", path: str | Path, config: AgentConfig | str | None = None
) -> Path:
    """Write what a Stable-Baselines3 model learned in :func:`agent_env` as a policy of its own.

    Args:
        model: SB3 model of the config's algorithm and activation.
        env: it was trained in.
        path: ``.npz``; every command takes it as a policy.
        config: as for :func:`agent_env`.

    Raises:
        BiscaleError: a model that cannot be exported.
    """
    plant = phase_env(env, "save_agent").plant
    made = config if isinstance(config, AgentConfig) else load_config(config, plant.phase)
    price = made.default_price if made.price else None
    card = {"algo": made.algo, "config": made.model_dump(mode="json")}
    network = to_network(model, made, card, price, training_facts(made, plant))
    network.save(Path(path))
    return Path(path)
