"""Learning from a teacher, as a warm start for SB3's on-policy algorithms.

Behaviour cloning and DAgger (Ross, Gordon and Bagnell, AISTATS 2011) of a reference policy.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.policy.features import plants_of, with_price
from agents.training.lookahead_teacher import LookaheadTeacher
from agents.training.train_config import WarmStart
from agents.training.worlds.training_env import AgentVecEnv
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.traces import Trace
from controllers.base import context_of
from controllers.oracle.make import make_oracle, oracle_plant
from controllers.registry import is_lookahead, make_policy


class Teacher:
    """A reference policy in every plant of a training environment, each told its own model."""

    def __init__(self, name: str, env: AgentVecEnv) -> None:
        """Make the policy once per kind of instance.

        Args:
            name: the policy with its parameters, e.g. ``mpc:margin=0.3``.
            env: gives the groups.

        Raises:
            BiscaleError: an unknown policy, or a parameter it does not have.
        """
        specs = [g.plant.settings.instance for g in env.groups]
        kinds = list(dict.fromkeys(spec.model_dump_json() for spec in specs))
        self._kind = np.array([kinds.index(spec.model_dump_json()) for spec in specs])
        plants = {int(k): g.plant for k, g in zip(self._kind, env.groups, strict=True)}
        self._policies = {k: make_policy(name, context_of(plant)) for k, plant in plants.items()}
        self._env = env

    def __call__(self, obs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Actions in [-1, 1], (n,), of the environment's encoded observations (n, dim)."""
        kind, out = self._kind[self._env.group], np.empty(len(obs), dtype=np.float32)
        for k in np.unique(kind):
            rows = kind == k
            out[rows] = self._policies[int(k)].predict(obs[rows])[0][:, 0]
        return out


def collect(
    env: AgentVecEnv,
    teacher: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    steps: int,
    student: Callable[[NDArray[np.float32]], NDArray[Any]] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Run the environment and ask the teacher at every state.

    Args:
        env: the training environment; it is reset.
        teacher: labels every state: actions (n,) of encoded observations (n, dim).
        steps: states to collect, over all sub-environments.
        student: who acts (DAgger), network outputs of features; None lets the teacher act.

    Returns:
        Features (steps, F) and the network outputs (steps,) that reproduce the teacher.
    """
    features = env.reset()
    kept: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    for _ in range(max(steps // env.num_envs, 1)):
        wanted = output_for(env, teacher(env.batch.obs.copy()))
        kept.append((features, wanted))
        env.step_async(wanted if student is None else student(features))
        features, _, _, _ = env.step_wait()
    return np.concatenate([k[0] for k in kept]), np.concatenate([k[1] for k in kept])


def output_for(env: AgentVecEnv, action: NDArray[np.float32]) -> NDArray[np.float32]:
    """Network output that makes the environment take an action (n,)."""
    return env.actions.output_for(action, env.rule)


def oracle_data(
    env: AgentVecEnv, per_group: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """States and network outputs of the plans with hindsight of some training workloads.

    In the plant that they are made for, without delay.

    Args:
        env: the training environment.
        per_group: workloads per group, the same as training uses.
    """
    kept = [
        _planned(env, g, env.groups[g].source.workload(k))
        for g in range(len(env.groups))
        for k in range(per_group)
    ]
    return np.concatenate([k[0] for k in kept]), np.concatenate([k[1] for k in kept])


def _planned(
    env: AgentVecEnv, number: int, workload: Trace
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    group, zero = env.groups[number], np.zeros(1, dtype=np.int64)
    policy, _ = make_oracle(group.plant, workload, group.attainment)
    plant = oracle_plant(group.plant)
    batch, state, seen = Batch(plant, 1, RequestTable.of(plant, [workload])), None, []
    batch.reset(zero, zero, zero - 1)
    while not batch.done.all():
        observation = batch.obs.copy()
        action, state = policy.predict(observation, state=state)
        seen.append((observation[0], np.float32(np.ravel(action)[0])))
        batch.step(np.asarray(action, dtype=np.float32).reshape(1))
    observations, actions = np.stack([s[0] for s in seen]), np.array([s[1] for s in seen])
    nominal = plants_of(group.plant, group.plant.phase, [-1])
    features, rule, _ = env.features(observations, *nominal)
    if env.config.price is not None:
        features = with_price(features, env.sampler.prices(len(features)))
    return features, env.actions.output_for(actions, rule)


def warm_start(
    model: Any, env: AgentVecEnv, plan: WarmStart, report: Callable[[str], None]
) -> list[float]:
    """Fit the actor of an SB3 actor-critic model to the plan's teacher.

    Returns the loss after every round.

    Raises:
        BiscaleError: another algorithm than ppo and policy_iteration, or discrete actions: only
            these can be cloned into here.
    """
    import torch

    policy = model.policy
    if (
        not hasattr(policy, "action_net")
        or env.config.action == "levels"
        or env.config.algo not in ("ppo", "policy_iteration")
    ):
        raise BiscaleError(
            "warm_start works with ppo, policy_iteration and continuous actions, not with "
            f"{env.config.algo}: remove it from the config"
        )

    def act(features: NDArray[np.float32]) -> NDArray[Any]:
        return np.asarray(policy.predict(features, deterministic=True)[0]).reshape(env.num_envs)

    optimiser = torch.optim.Adam(
        [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()],
        lr=plan.learning_rate,
    )
    features, outputs = np.empty((0, env.dim), np.float32), np.empty(0, np.float32)
    if plan.oracle_workloads:
        features, outputs = oracle_data(env, plan.oracle_workloads)
        report(f"warm start: {len(outputs)} decisions of plans with hindsight")
    losses: list[float] = []
    teacher = (LookaheadTeacher if is_lookahead(plan.teacher) else Teacher)(plan.teacher, env)
    for k in range(plan.rounds):
        more = collect(env, teacher, plan.steps, None if k == 0 else act)
        features, outputs = np.concatenate([features, more[0]]), np.concatenate([outputs, more[1]])
        losses.append(_fit(policy, optimiser, features, outputs, plan.epochs, env.sampler.rng))
        report(
            f"warm start, round {k + 1} of {plan.rounds}: rms error {losses[-1] ** 0.5:.4f} of "
            "the control range's half"
        )
    return losses


def _fit(
    policy: Any,
    optimiser: Any,
    features: NDArray[Any],
    outputs: NDArray[Any],
    epochs: int,
    rng: np.random.Generator,
) -> float:
    import torch

    x, y = torch.as_tensor(features), torch.as_tensor(outputs)
    last = float("nan")
    for _ in range(epochs):
        order, total = torch.as_tensor(rng.permutation(len(x))), 0.0
        for chunk in order.split(4096):
            mean = policy.action_net(policy.mlp_extractor.policy_net(x[chunk]))[:, 0]
            loss = ((mean - y[chunk]) ** 2).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(chunk)
        last = total / len(x)
    return last
