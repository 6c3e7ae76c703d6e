"""An SB3 model (``best.zip`` of a run) as a policy of this project.

Features in front, the rule's action behind.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.policy.features import FeatureMap, check_margin, tighten, with_price
from agents.training.algorithms import algorithm
from agents.training.train_config import AgentConfig
from biscale_env.config.loader import load_yaml
from biscale_env.contract import spec_for
from biscale_env.core.errors import BiscaleError

SPEC_FILE = "observation.txt"


def config_beside(path: Path) -> AgentConfig:
    """The config of the run that a zip belongs to.

    Raises:
        BiscaleError: the zip was taken out of its run directory.
    """
    config = path.parent / "config.yaml"
    if not config.is_file():
        raise BiscaleError(
            f"{path} lies apart from its run's config.yaml: give the run directory or an .npz checkpoint"
        )
    return load_yaml(config, AgentConfig)


class Sb3Policy:
    """``predict`` of an SB3 model on encoded observations.

    Recurrent models keep their memory in ``state``.
    """

    def __init__(
        self,
        model: Any,
        config: AgentConfig,
        plant: Any,
        member: int = -1,
        price: float | None = None,
        margin: float | None = None,
    ) -> None:
        """Bind a model to a plant.

        Raises:
            BiscaleError: a model of the other phase, or of other features.
        """
        if config.phase != plant.phase:
            raise BiscaleError(
                f"the checkpoint is for {config.phase}, but the environment is {plant.phase}"
            )
        self._model, self._config, self._spec = model, config, plant.spec
        self.margin = check_margin(margin or 0.0, plant.phase)
        self._features = FeatureMap(plant.phase, plant.spec, plant.clocks)
        dim = self._features.dim + (config.price is not None)
        if model.observation_space.shape != (dim,):
            raise BiscaleError(
                f"the checkpoint takes {model.observation_space.shape[0]} features, but this version makes {dim}"
            )
        self.price = (
            price
            if price is not None or config.price is None
            else float(np.sqrt(config.price[0] * config.price[1]))
        )
        self._coefs, self._cheapest = self._features.belief(plant.model, [member])
        self._levels = plant.clocks.to_action(np.array(plant.clocks.levels_mhz))

    @classmethod
    def load(
        cls,
        path: Path,
        plant: Any,
        member: int = -1,
        price: float | None = None,
        margin: float | None = None,
    ) -> "Sb3Policy":
        """Load ``best.zip`` or ``last.zip`` of a run directory.

        Raises:
            BiscaleError: missing, corrupt, or made for another observation.
        """
        if not path.is_file():
            raise BiscaleError(f"checkpoint {path} does not exist")
        config = config_beside(path)
        made_for = path.parent / SPEC_FILE
        if made_for.is_file():
            spec_for(config.phase).check(made_for.read_text().strip(), f"checkpoint {path}")
        try:
            model = algorithm(config.algo).load(path, device="cpu")
        except Exception as error:  # SB3 raises many kinds here: bad zip, pickle, missing parts
            reason = str(error).splitlines()[0] if str(error) else "corrupt"
            raise BiscaleError(f"checkpoint {path} cannot be loaded: {reason}") from None
        return cls(model, config, plant, member, price, margin)

    def predict(
        self,
        observation: NDArray[np.float32],
        state: Any = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[np.float32], Any]:
        """Choose clocks; see :class:`biscale_env.contract.Policy`."""
        rows = np.ascontiguousarray(
            observation[None] if observation.ndim == 1 else observation, dtype=np.float32
        )
        rows = tighten(rows, self._spec, self.margin)
        features, rule, _ = self._features(rows, self._coefs, self._cheapest)
        if self.price is not None:
            features = with_price(features, self.price)
        output, state = self._model.predict(
            features, state=state, episode_start=episode_start, deterministic=deterministic
        )
        if self._config.action == "levels":
            action = self._levels[np.asarray(output).reshape(len(rows))]
        else:
            action = np.asarray(output, dtype=np.float32).reshape(len(rows))
            if self._config.action == "rule":
                action = rule + np.float32(2.0 * self._config.span) * action
            action = np.clip(action, -1.0, 1.0)
        return (action if observation.ndim == 1 else action[:, None]), state
