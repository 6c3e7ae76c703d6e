"""From a trained SB3 model to a :class:`agents.policy.numpy_policy.Network`."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from agents.policy.features import feature_id
from agents.policy.numpy_policy import Network
from agents.training.train_config import AgentConfig
from biscale_env.config.instance import DEFAULT_GPU, DEFAULT_LLM
from biscale_env.contract import spec_for
from biscale_env.core.errors import BiscaleError
from biscale_env.envs.plant import Plant

BEST: Final = "best.npz"  # the deployable network in a run directory


def _linear_layers(modules: Any) -> tuple[list[Any], list[Any]]:
    import torch

    layers = [m for part in modules for m in part.modules() if isinstance(m, torch.nn.Linear)]
    weights = [
        np.ascontiguousarray(layer.weight.detach().cpu().numpy().T, dtype=np.float32)
        for layer in layers
    ]
    return weights, [layer.bias.detach().cpu().numpy().astype(np.float32) for layer in layers]


def to_network(
    model: Any,
    config: AgentConfig,
    card: Mapping[str, Any] | None = None,
    price: float | None = None,
    trained_on: Mapping[str, Any] | None = None,
) -> Network:
    """Take the deterministic actor out of an SB3 model.

    SAC and TQC squash their output with tanh; the network then carries that as its last step
    (activation ``tanh`` over one more layer).

    Raises:
        BiscaleError: a recurrent policy, which has a memory that this format does not hold.
    """
    policy = model.policy
    if config.algo == "recurrent_ppo":
        raise BiscaleError(
            "a recurrent policy cannot be exported to a plain network: evaluate its .zip instead"
        )
    if config.algo == "dqn":
        parts: tuple[Any, ...] = (policy.q_net.q_net,)
    elif config.algo in ("sac", "tqc"):
        parts = (policy.actor.latent_pi, policy.actor.mu)
    else:
        parts = (policy.mlp_extractor.policy_net, policy.action_net)
    weights, biases = _linear_layers(parts)
    activation = config.activation
    if config.algo in ("sac", "tqc"):
        if activation != "tanh":
            raise BiscaleError(
                "export of sac and tqc needs activation tanh: their output is squashed by tanh as "
                "well"
            )
        weights.append(np.eye(1, dtype=np.float32))
        biases.append(np.zeros(1, dtype=np.float32))
    return Network(
        phase=config.phase,
        spec_id=spec_for(config.phase).id,
        feature_id=feature_id(config.phase),
        action=config.action,
        span=config.span,
        activation=activation,
        weights=weights,
        biases=biases,
        card=dict(card or {}),
        price=price,
        trained_on=dict(trained_on or {}),
    )


def training_facts(config: AgentConfig, plant: Plant) -> dict[str, Any]:
    """What a checkpoint says of the plants it was trained on; ``plant`` is the run's first."""
    clocks = plant.clocks
    kinds = (part.instance_of(config.instance) for part in config.mixture)
    instances = dict.fromkeys(
        f"{spec.gpu or DEFAULT_GPU}/{spec.llm or DEFAULT_LLM} {spec.dtype} TP {spec.tp}"
        for spec in kinds
    )
    return {
        "spec": plant.spec.id,
        "features": feature_id(config.phase),
        "gpu": plant.gpu.name,
        "llm": plant.llm.name,
        "model": plant.model.name,
        "tp": plant.settings.tp,
        "dtype": plant.settings.dtype,
        "instances": list(instances),
        "freq_min_mhz": float(clocks.freq_min_mhz),
        "freq_max_mhz": float(clocks.freq_max_mhz),
        "freq_step_mhz": float(clocks.freq_step_mhz),
        "levels_mhz": [float(f) for f in clocks.levels_mhz],
    }
