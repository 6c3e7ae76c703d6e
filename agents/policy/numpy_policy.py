"""A learned policy as one small file: fixed features, a plain NumPy forward pass, no torch.

Fast enough to decide every iteration.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.policy.action_map import ActionMap, within_range
from agents.policy.feature_parts import Floats32
from agents.policy.feature_policy import (
    Bools,
    ControlledPlant,
    FeaturePolicy,
    check_phase,
    check_price,
)
from agents.policy.features import feature_id
from biscale_env.contract import spec_for
from biscale_env.core.errors import BiscaleError
from biscale_env.core.files import open_whole

FORMAT = 1


@dataclass(frozen=True)
class Network:
    """A multilayer perceptron with what a policy needs to know about it.

    Attributes:
        phase: ``prefill`` or ``decode``.
        spec_id: observation it was made for.
        feature_id: features it was made for.
        action: ``rule``, ``clock`` or ``levels``, see
            :class:`agents.training.train_config.AgentConfig`.
        span: fraction of the control range that full output spans, with ``rule``.
        activation: ``tanh`` or ``relu``.
        weights: matrices (in, out), first to last layer.
        biases: vectors (out,).
        card: who made it, from what, with what result; free form.
        price: default SLO-violation penalty that the network is told; None: it takes none.
        trained_on: GPU, LLM, model and clocks of the training plant; empty in older checkpoints.
    """

    phase: str
    spec_id: str
    feature_id: str
    action: str
    span: float
    activation: str
    weights: Sequence[NDArray[np.float32]]
    biases: Sequence[NDArray[np.float32]]
    card: Mapping[str, Any] = field(default_factory=dict)
    price: float | None = None
    trained_on: Mapping[str, Any] = field(default_factory=dict)

    def forward(self, features: Floats32) -> Floats32:
        """Output of the last layer, (n, out), for features (n, in)."""
        x = features
        for w, b in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = x @ w + b
            x = np.tanh(x) if self.activation == "tanh" else np.maximum(x, 0.0)
        return x @ self.weights[-1] + self.biases[-1]

    def save(self, path: Path) -> None:
        """Write the file in one piece."""
        names = ("phase", "spec_id", "feature_id", "action", "span", "activation", "price")
        head = {"format": FORMAT, **{name: getattr(self, name) for name in names}}
        head |= {"card": dict(self.card), "trained_on": dict(self.trained_on)}
        arrays = {f"w{i}": w for i, w in enumerate(self.weights)} | {
            f"b{i}": b for i, b in enumerate(self.biases)
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_whole(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, head=np.array(json.dumps(head)), **arrays)


def load_network(path: Path) -> Network:
    """Read a checkpoint.

    Raises:
        BiscaleError: missing, corrupt, of another format, or made for another observation or other
            features.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            head = json.loads(str(stored["head"]))
            if head.get("phase") == "cluster":
                raise BiscaleError(
                    f"checkpoint {path} is for the coarse loop: give it to biscale reproduce coarse"
                )
            count = sum(name.startswith("w") for name in stored.files)
            weights = [
                np.ascontiguousarray(stored[f"w{i}"], dtype=np.float32) for i in range(count)
            ]
            biases = [np.asarray(stored[f"b{i}"], dtype=np.float32) for i in range(count)]
    except BiscaleError:
        raise
    except FileNotFoundError:
        raise BiscaleError(f"checkpoint {path} does not exist") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise BiscaleError(
            f"checkpoint {path} cannot be read: corrupt, or not a checkpoint of biscale train"
        ) from None
    if head.get("format") != FORMAT:
        raise BiscaleError(
            f"checkpoint {path} has format {head.get('format')}, but this version reads {FORMAT}"
        )
    spec = spec_for(head["phase"])
    spec.check(head["spec_id"], f"checkpoint {path}")
    if head["feature_id"] != feature_id(spec.name):
        raise BiscaleError(
            f"checkpoint {path} was made for '{head['feature_id']}', but this version has "
            f"'{feature_id(spec.name)}'"
        )
    if not all(np.isfinite(a).all() for a in (*weights, *biases)):
        raise BiscaleError(f"checkpoint {path} holds weights that are not finite: train again")
    fields = ("phase", "spec_id", "feature_id", "action", "span", "activation", "card", "price")
    missing = [name for name in fields if name not in head]
    if missing:
        raise BiscaleError(
            f"checkpoint {path} says nothing about its {missing[0]}: export it again"
        )
    known = {name: head[name] for name in fields}
    return Network(weights=weights, biases=biases, trained_on=head.get("trained_on", {}), **known)


class NumpyPolicy(FeaturePolicy):
    """A network with the ``predict`` of SB3, in a given context; it keeps no state."""

    def __init__(
        self,
        network: Network,
        plant: ControlledPlant,
        member: int = -1,
        price: float | None = None,
        margin: float | None = None,
    ) -> None:
        """Bind the network to a plant.

        Args:
            network: the checkpoint.
            plant: gives phase, observation, clocks and the model that the features use.
            member: coefficients of that model; -1 nominal.
            price: SLO-violation penalty, in energies of a mean request at max clock; None takes
                the checkpoint's own.
            margin: fraction of the bound that is kept free; None takes the
                checkpoint's own.

        Raises:
            BiscaleError: a checkpoint of the other phase or of another observation, an impossible
                price or margin.
        """
        check_phase(network.phase, plant.phase)
        plant.spec.check(network.spec_id, "the checkpoint")
        outputs = len(network.biases[-1])
        super().__init__(
            plant,
            ActionMap.of(network.action, network.span, plant.clocks, outputs),
            member,
            check_price(price, network.price),
            network.card.get("margin", 0.0) if margin is None else margin,
            network.trained_on,
        )
        self.network = network

    @classmethod
    def load(
        cls,
        path: Path,
        plant: ControlledPlant,
        member: int = -1,
        price: float | None = None,
        margin: float | None = None,
    ) -> "NumpyPolicy":
        """Load a checkpoint for a plant; parameters as of the constructor."""
        return cls(load_network(path), plant, member, price, margin)

    def output(
        self, features: Floats32, state: Any, episode_start: Bools | None, deterministic: bool
    ) -> tuple[NDArray[Any], Any]:
        """Best level, or the first output clipped to [-1, 1] as SB3 does."""
        raw = self.network.forward(features)
        if self.network.action == "levels":
            return np.argmax(raw, axis=1), state
        return within_range(raw[:, 0]), state
