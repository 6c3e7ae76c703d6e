"""Behaviour cloning, TD3+BC and implicit Q-learning: networks, losses and targets are TorchRL's."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.offline.offline_config import Learner
from agents.offline.priced_reward import PricedReward
from agents.offline.transitions import RecordedDecisions
from agents.policy.features import with_price
from biscale_env.core.errors import BiscaleError

REPORT_EVERY = 2000  # updates
CRITIC = (128, 128)  # hidden layers of every critic
ACTOR_EVERY = 2  # updates of the critics per update of the actor in TD3+BC, as published
Say = Callable[[str], None]
Layers = tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]


def need_torchrl() -> None:
    """Say what is missing.

    Raises:
        BiscaleError: TorchRL or Minari is not installed.
    """
    try:
        import minari  # noqa: F401
        import torchrl  # noqa: F401
    except ImportError:
        raise BiscaleError(
            "offline learning needs minari and torchrl: install biscale-env[offline-rl]"
        ) from None


def _critic(inputs: int, keys: list[str]) -> Any:
    from torchrl.modules import MLP, ValueOperator

    net = MLP(in_features=inputs, out_features=1, num_cells=list(CRITIC))
    return ValueOperator(net, in_keys=keys)


def _actor_net(dim: int, hidden: Sequence[int]) -> Any:
    """A perceptron with tanh behind every layer, the last one too: actions within [-1, 1]."""
    from torch import nn
    from torchrl.modules import MLP

    net = MLP(in_features=dim, out_features=1, num_cells=list(hidden), activation_class=nn.Tanh)
    return nn.Sequential(net, nn.Tanh())


def _loss(learner: Learner, actor_net: Any, dim: int) -> Any:
    """TorchRL's loss module of a learner."""
    from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
    from torch import nn
    from torchrl.data import Bounded
    from torchrl.modules import Actor, IndependentNormal, ProbabilisticActor
    from torchrl.objectives import BCLoss, IQLLoss, TD3BCLoss

    spec = Bounded(-1.0, 1.0, (1,))
    if learner.kind == "bc":
        return BCLoss(Actor(actor_net, spec=spec), loss_function="l2")
    of_action = _critic(dim + 1, ["observation", "action"])
    if learner.kind == "td3bc":
        actor = Actor(actor_net, spec=spec)
        loss = TD3BCLoss(
            actor,
            of_action,
            action_spec=spec,
            alpha=learner.alpha,
            loss_function="l2",
            deactivate_vmap=True,
        )
    else:
        module = nn.Sequential(actor_net, AddStateIndependentNormalScale(1))
        gaussian = ProbabilisticActor(
            TensorDictModule(module, ["observation"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=IndependentNormal,
        )
        loss = IQLLoss(
            gaussian,
            of_action,
            _critic(dim, ["observation"]),
            temperature=learner.temperature,
            expectile=learner.expectile,
            loss_function="l2",
            deactivate_vmap=True,  # small networks on a CPU are faster in a plain loop
        )
    loss.make_value_estimator(gamma=learner.gamma)
    return loss


class _Batches:
    """Random transitions as TorchRL reads them; with prices and rewards where there is a price."""

    def __init__(self, data: RecordedDecisions, learner: Learner, seed: int) -> None:
        self._data, self._size, self._rng = data, learner.batch_size, np.random.default_rng(seed)
        self._reward = None if learner.price is None else PricedReward(data, learner.price)

    def draw(self) -> Any:
        import torch
        from tensordict import TensorDict

        data = self._data
        rows = self._rng.integers(0, len(data), self._size)
        seen, then = data.features[rows], data.following[rows]
        found: dict[str, Any] = {"action": torch.as_tensor(data.action[rows, None])}
        if self._reward is not None:
            price = self._reward.draw(self._rng, len(rows))
            seen, then = with_price(seen, price), with_price(then, price)
            reward = torch.as_tensor(self._reward(rows, price)[:, None])
            never = torch.zeros_like(reward, dtype=torch.bool)  # episodes are cut, never terminal
            found["next"] = {
                "observation": torch.as_tensor(then),
                "reward": reward,
                "done": never,
                "terminated": never,
            }
        found["observation"] = torch.as_tensor(seen)
        return TensorDict(found, batch_size=[len(rows)])


def learn(
    learner: Learner, data: RecordedDecisions, hidden: Sequence[int], seed: int, say: Say
) -> Layers:
    """Learn one network.

    Args:
        learner: how.
        data: from what.
        hidden: layers of the network.
        seed: of weights and batches.
        say: takes a line now and then.

    Returns:
        Weights (in, out) and biases (out,), for the activation tanh and a last layer that only
        passes on, see :func:`agents.training.export.to_network`.

    Raises:
        BiscaleError: a loss that is not finite.
    """
    import torch
    from torchrl.objectives import SoftUpdate

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    dim = data.features.shape[1] + (learner.price is not None)
    net, batches = _actor_net(dim, hidden), _Batches(data, learner, seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*wasn't part of the annotations")
        loss = _loss(learner, net, dim)
    optimisers = {
        name: torch.optim.Adam(parameters, lr=learner.learning_rate)
        for name, parameters in _parameters(loss).items()
    }
    follow = None if learner.kind == "bc" else SoftUpdate(loss, tau=learner.tau)
    told: dict[str, float] = {}
    for k in range(1, learner.updates + 1):
        batch = batches.draw()
        losses = loss(batch)
        parts = {key: value for key, value in losses.items() if key.startswith("loss_")}
        sum(parts.values()).backward()
        for name, optimiser in optimisers.items():
            if name != "actor" or learner.kind != "td3bc" or k % ACTOR_EVERY == 0:
                optimiser.step()
            optimiser.zero_grad()
        if follow is not None:
            follow.step()
        if k % REPORT_EVERY == 0 or k == learner.updates:
            told |= {key.removeprefix("loss_"): float(v.detach()) for key, v in parts.items()}
            if not np.isfinite(list(told.values())).all():
                raise BiscaleError(
                    f"{learner.kind} broke at update {k}: a loss is not finite; lower learning_rate"
                )
            say(f"update {k}: " + ", ".join(f"{key} {v:.4g}" for key, v in told.items()))
    return _layers(net)


def _parameters(loss: Any) -> dict[str, list[Any]]:
    """What each optimiser moves, by the network's name; targets are not among it."""
    parts = {"actor": "actor_network", "action value": "qvalue_network", "value": "value_network"}
    held = {name: getattr(loss, f"{part}_params", None) for name, part in parts.items()}
    return {name: list(found.parameters()) for name, found in held.items() if found is not None}


def _layers(net: Any) -> Layers:
    import torch

    linear = [module for module in net.modules() if isinstance(module, torch.nn.Linear)]
    weights = [m.weight.detach().numpy().T.astype(np.float32).copy(order="C") for m in linear]
    biases = [m.bias.detach().numpy().astype(np.float32).copy() for m in linear]
    return [*weights, np.eye(1, dtype=np.float32)], [*biases, np.zeros(1, dtype=np.float32)]
