"""From a network file to SB3's actor and back, and what a run's two networks are called."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from agents.policy.numpy_policy import Network, load_network
from biscale_env.core.errors import BiscaleError

SHIPPED: Final = "shipped"
CHECKPOINTS: Final = Path(__file__).resolve().parents[1] / "checkpoints"


def start_network(name: str, phase: str) -> Network:
    """Network to start from: the shipped one of a single instance, or a file.

    Raises:
        BiscaleError: no such file, or a network of the other phase.
    """
    network = load_network(CHECKPOINTS / f"{phase}.npz" if name == SHIPPED else Path(name))
    if network.phase != phase:
        raise BiscaleError(f"{name} is for {network.phase}, but {phase} starts from it")
    return network


def take_actor(model: Any, network: Network) -> None:
    """Put the weights of a network into the actor of an SB3 model.

    Raises:
        BiscaleError: other layers.
    """
    import torch

    policy = model.policy
    layers = [m for m in policy.mlp_extractor.policy_net if isinstance(m, torch.nn.Linear)]
    layers.append(policy.action_net)
    shapes = [tuple(layer.weight.T.shape) for layer in layers]
    if shapes != [w.shape for w in network.weights]:
        raise BiscaleError(
            f"the network to start from has layers {[w.shape for w in network.weights]}, but the "
            f"config's are {shapes}"
        )
    with torch.no_grad():
        for layer, w, b in zip(layers, network.weights, network.biases, strict=True):
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(w.T)))
            layer.bias.copy_(torch.from_numpy(b))


def learn_actor(model: Any, learns: bool) -> None:
    """Let the actor learn, or hold it still while the critic does."""
    policy = model.policy
    for part in (policy.mlp_extractor.policy_net, policy.action_net):
        part.requires_grad_(learns)
    policy.log_std.requires_grad_(learns)


def card_of(config: Any, phase: str, rounds: int, steps: int) -> Mapping[str, Any]:
    """What a network says of its training."""
    agent = config.agent(phase)
    return {
        "algo": agent.algo,
        "seed": config.seed,
        "rounds": rounds,
        "steps": steps,
        "multi": config.model_dump(mode="json"),
        "config": agent.model_dump(mode="json"),
    }
