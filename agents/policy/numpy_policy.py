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

from agents.policy.features import FeatureMap, check_margin, feature_id, tighten, with_price
from biscale_env.contract import ClockRange, ObservationSpec, spec_for
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
        span: share of the control range that full output spans, with ``rule``.
        activation: ``tanh`` or ``relu``.
        weights: matrices (in, out), first to last layer.
        biases: vectors (out,).
        card: who made it, from what, with what result; free form.
        price: default price of a lost request that the network is told; None: it takes none.
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

    def forward(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Output of the last layer, (n, out), for features (n, in)."""
        x = features
        for w, b in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = x @ w + b
            x = np.tanh(x) if self.activation == "tanh" else np.maximum(x, 0.0)
        return x @ self.weights[-1] + self.biases[-1]

    def save(self, path: Path) -> None:
        """Write the file in one piece."""
        head = {
            "format": FORMAT, "phase": self.phase, "spec_id": self.spec_id, "feature_id": self.feature_id, "action": self.action,
            "span": self.span, "activation": self.activation, "card": dict(self.card), "price": self.price,
        }  # fmt: skip
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
            count = sum(name.startswith("w") for name in stored.files)
            weights = [
                np.ascontiguousarray(stored[f"w{i}"], dtype=np.float32) for i in range(count)
            ]
            biases = [np.asarray(stored[f"b{i}"], dtype=np.float32) for i in range(count)]
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
            f"checkpoint {path} was made for '{head['feature_id']}', but this version has '{feature_id(spec.name)}'"
        )
    if not all(np.isfinite(a).all() for a in (*weights, *biases)):
        raise BiscaleError(f"checkpoint {path} holds weights that are not finite: train again")
    fields = ("phase", "spec_id", "feature_id", "action", "span", "activation", "card", "price")
    missing = [name for name in fields if name not in head]
    if missing:
        raise BiscaleError(
            f"checkpoint {path} says nothing about its {missing[0]}: export it again"
        )
    return Network(weights=weights, biases=biases, **{name: head[name] for name in fields})


class NumpyPolicy:
    """A network with the ``predict`` of SB3, in a given context."""

    def __init__(
        self,
        network: Network,
        phase: str,
        spec: ObservationSpec,
        clocks: ClockRange,
        model: Any,
        member: int = -1,
        price: float | None = None,
        margin: float | None = None,
    ) -> None:
        """Bind the network to a plant.

        Args:
            network: the checkpoint.
            phase: phase of the environment.
            spec: its observation.
            clocks: its control range.
            model: latency model that the features believe in.
            member: coefficients of that model; -1 nominal.
            price: price of a lost request, in reference energies; None takes the checkpoint's own.
            margin: share of the TTFT bound that is kept free (prefill); None takes the checkpoint's
                own.

        Raises:
            BiscaleError: a checkpoint of the other phase or of another observation.
        """
        if network.phase != phase:
            raise BiscaleError(
                f"the checkpoint is for {network.phase}, but the environment is {phase}"
            )
        spec.check(network.spec_id, "the checkpoint")
        if price is not None and network.price is None:
            raise BiscaleError(
                "the checkpoint was trained at one constraint and takes no price: leave the price out"
            )
        if price is not None and not price > 0:
            raise BiscaleError(f"the price of a lost request must be positive, got {price}")
        self.price = network.price if price is None else float(price)
        self.margin = check_margin(
            network.card.get("margin", 0.0) if margin is None else margin, phase
        )
        self.network, self.spec = network, spec
        self._features = FeatureMap(phase, spec, clocks)
        self._coefs, self._cheapest = self._features.belief(model, [member])
        self._levels = clocks.to_action(np.array(clocks.levels_mhz))

    @classmethod
    def load(
        cls,
        path: Path,
        plant: Any,
        member: int = -1,
        price: float | None = None,
        margin: float | None = None,
    ) -> "NumpyPolicy":
        """Load a checkpoint for a plant (an object with ``phase``, ``spec``, ``clocks``,
        ``model``).
        """
        return cls(
            load_network(path),
            plant.phase,
            plant.spec,
            plant.clocks,
            plant.model,
            member,
            price,
            margin,
        )

    def predict(
        self,
        observation: NDArray[np.float32],
        state: Any = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[np.float32], Any]:
        """Choose clocks; see :class:`biscale_env.contract.Policy`.

        It keeps no state and is always deterministic.

        Raises:
            BiscaleError: an observation of another length.
        """
        rows = observation[None] if observation.ndim == 1 else observation
        if rows.shape[-1] != self.spec.dim:
            raise BiscaleError(
                f"observation has {rows.shape[-1]} values, but {self.spec.id} has {self.spec.dim}: wrong phase?"
            )
        rows = tighten(np.ascontiguousarray(rows, dtype=np.float32), self.spec, self.margin)
        features, rule, _ = self._features(rows, self._coefs, self._cheapest)
        if self.price is not None:
            features = with_price(features, self.price)
        action = decode_output(self.network, self.network.forward(features), rule, self._levels)
        return (action if observation.ndim == 1 else action[:, None]), state


def decode_output(
    network: Network,
    output: NDArray[np.float32],
    rule: NDArray[np.float32],
    levels: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Action (n,) in [-1, 1] of the raw output (n, out) of a network.

    SB3 clips the output to [-1, 1] before it is used.
    """
    if network.action == "levels":
        return levels[np.argmax(output, axis=1)]
    flat = np.clip(output[:, 0], -1.0, 1.0)
    if network.action == "rule":
        flat = rule + np.float32(2.0 * network.span) * flat
    return np.clip(flat, -1.0, 1.0)
