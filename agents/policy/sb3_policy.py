"""An SB3 model (``best.zip`` of a run) as a policy of this project."""

import json
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from agents.policy.action_map import ActionMap
from agents.policy.feature_parts import Floats32
from agents.policy.feature_policy import (
    Bools,
    ControlledPlant,
    FeaturePolicy,
    check_phase,
    check_price,
)
from agents.policy.features import feature_id
from agents.training.algorithms import algorithm
from agents.training.train_config import AgentConfig
from biscale_env.config.loader import load_yaml
from biscale_env.contract import spec_for
from biscale_env.core.errors import BiscaleError

SPEC_FILE = "observation.txt"
TRAINED_ON_FILE = "trained_on.json"


def config_beside(path: Path) -> AgentConfig:
    """The config of the run that a zip belongs to.

    Raises:
        BiscaleError: the zip was taken out of its run directory.
    """
    config = path.parent / "config.yaml"
    if not config.is_file():
        raise BiscaleError(
            f"{path} lies apart from its run's config.yaml: give the run directory or an .npz "
            "checkpoint"
        )
    return load_yaml(config, AgentConfig)


def trained_on_beside(path: Path, phase: str) -> dict[str, Any]:
    """What a run says of the plant it was trained on; nothing in runs of older versions.

    Raises:
        BiscaleError: it was made for another observation or other features, or the file is broken.
    """
    spec_file, facts_file = path.parent / SPEC_FILE, path.parent / TRAINED_ON_FILE
    if spec_file.is_file():
        spec_for(phase).check(spec_file.read_text().strip(), f"checkpoint {path}")
    if not facts_file.is_file():
        return {}
    try:
        facts = dict(json.loads(facts_file.read_text()))
    except (ValueError, TypeError):
        raise BiscaleError(
            f"{facts_file} cannot be read: corrupt, delete it or take the run's .npz checkpoint"
        ) from None
    if facts.get("features") != feature_id(phase):
        raise BiscaleError(
            f"checkpoint {path} was made for '{facts.get('features')}', but this version has "
            f"'{feature_id(phase)}'"
        )
    return facts


class Sb3Policy(FeaturePolicy):
    """``predict`` of an SB3 model on encoded observations.

    Recurrent models keep their memory in ``state``.
    """

    def __init__(
        self,
        model: Any,
        config: AgentConfig,
        plant: ControlledPlant,
        member: int = -1,
        price: float | None = None,
        margin: float | None = None,
        trained_on: dict[str, Any] | None = None,
    ) -> None:
        """Bind a model to a plant.

        Args:
            model: SB3 model.
            config: of its run.
            plant: gives phase, observation, clocks and the model that the features use.
            member: coefficients of that model; -1 nominal.
            price: SLO-violation penalty; None takes the middle of the config's range.
            margin: fraction of the bound that is kept free; None keeps none.
            trained_on: what the run says of its training plant.

        Raises:
            BiscaleError: a model of the other phase or of other features, an impossible price or
                margin.
        """
        check_phase(config.phase, plant.phase)
        outputs = getattr(model.action_space, "n", None)
        super().__init__(
            plant,
            ActionMap.of(config.action, config.span, plant.clocks, outputs),
            member,
            check_price(price, config.default_price if config.price else None),
            margin or 0.0,
            trained_on,
        )
        dim = self._features.dim + (config.price is not None)
        if model.observation_space.shape != (dim,):
            raise BiscaleError(
                f"the checkpoint takes {model.observation_space.shape[0]} features, but this "
                f"version makes {dim}"
            )
        self._model = model

    @classmethod
    def load(
        cls,
        path: Path,
        plant: ControlledPlant,
        member: int = -1,
        price: float | None = None,
        margin: float | None = None,
    ) -> "Sb3Policy":
        """Load ``best.zip`` or ``last.zip`` of a run directory; parameters as of the constructor.

        Raises:
            BiscaleError: missing, corrupt, or made for another observation.
        """
        if not path.is_file():
            raise BiscaleError(f"checkpoint {path} does not exist")
        config = config_beside(path)
        facts = trained_on_beside(path, config.phase)
        try:
            model = algorithm(config.algo).load(path, device="cpu")
        except Exception as error:  # SB3 raises many kinds here: bad zip, pickle, missing parts
            reason = str(error).splitlines()[0] if str(error) else "corrupt"
            raise BiscaleError(f"checkpoint {path} cannot be loaded: {reason}") from None
        return cls(model, config, plant, member, price, margin, facts)

    def output(
        self, features: Floats32, state: Any, episode_start: Bools | None, deterministic: bool
    ) -> tuple[NDArray[Any], Any]:
        """Output of the SB3 model, clipped to its action space by SB3."""
        output, state = self._model.predict(
            features, state=state, episode_start=episode_start, deterministic=deterministic
        )
        return output, state
