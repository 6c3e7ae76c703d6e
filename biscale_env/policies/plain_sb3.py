"""Models of plain Stable-Baselines3, trained on the environments themselves.

Such a ``.zip`` has no run directory around it. Its spaces say whether it fits: the encoded
observation of a phase, and a clock in [-1, 1] or the number of a clock level.
"""

import json
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.contract import DECODE_SPEC, PREFILL_SPEC
from biscale_env.core.errors import BiscaleError
from controllers.base import Bools, PolicyContext

# Module of the policy class (its beginning), attribute that only this algorithm saves, algorithm.
ALGORITHMS_BY_CONTENT: Final = (
    ("sb3_contrib.common.recurrent", "", "sb3_contrib:RecurrentPPO"),
    ("sb3_contrib.tqc", "", "sb3_contrib:TQC"),
    ("sb3_contrib.qrdqn", "", "sb3_contrib:QRDQN"),
    ("sb3_contrib.crossq", "", "sb3_contrib:CrossQ"),
    ("sb3_contrib.ars", "", "sb3_contrib:ARS"),
    ("sb3_contrib.common.maskable", "", "sb3_contrib:MaskablePPO"),
    ("", "cg_max_steps", "sb3_contrib:TRPO"),
    ("", "clip_range", "stable_baselines3:PPO"),
    ("", "target_entropy", "stable_baselines3:SAC"),
    ("", "policy_delay", "stable_baselines3:TD3"),
    ("", "exploration_fraction", "stable_baselines3:DQN"),
    ("", "gae_lambda", "stable_baselines3:A2C"),
)


def is_plain(path: Path) -> bool:
    """Whether a checkpoint is a zip without the ``config.yaml`` of ``biscale train`` beside it."""
    return path.suffix == ".zip" and not (path.parent / "config.yaml").is_file()


def contents(path: Path) -> dict[str, Any]:
    """What the zip says of its model.

    Raises:
        BiscaleError: missing, or no file of Stable-Baselines3.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return dict(json.loads(file.read("data")))
    except FileNotFoundError:
        raise BiscaleError(f"checkpoint {path} does not exist") from None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        raise BiscaleError(
            f"checkpoint {path} cannot be read: corrupt, or not a model of Stable-Baselines3"
        ) from None


def phase_of_plain(path: Path) -> str:
    """Phase whose observation a model takes.

    Raises:
        BiscaleError: it takes another observation.
    """
    shape = tuple((contents(path).get("observation_space") or {}).get("_shape") or ())
    for spec, phase in ((PREFILL_SPEC, "prefill"), (DECODE_SPEC, "decode")):
        if shape == (spec.dim,):
            return phase
    raise BiscaleError(
        f"checkpoint {path} has no config.yaml of biscale train beside it, and its observations of "
        f"shape {shape} are neither those of prefill ({PREFILL_SPEC.dim},) nor of decode "
        f"({DECODE_SPEC.dim},)"
    )


def algorithm_of(path: Path) -> Any:
    """Class of Stable-Baselines3 or its contrib package that wrote a zip.

    Raises:
        BiscaleError: an algorithm that is not known here, or the package is not installed.
    """
    data = contents(path)
    module = str((data.get("policy_class") or {}).get("__module__", ""))
    for begins, attribute, place in ALGORITHMS_BY_CONTENT:
        if module.startswith(begins) and (not attribute or attribute in data):
            package, _, name = place.partition(":")
            try:
                return getattr(import_module(package), name)
            except ImportError:
                raise BiscaleError(
                    f"checkpoint {path} needs {package}: install biscale-env[rl]"
                ) from None
    raise BiscaleError(f"checkpoint {path} was written by an algorithm that is not known here")


def load_plain(path: Path, context: PolicyContext) -> "PlainSb3Policy":
    """The policy of a zip.

    Raises:
        BiscaleError: missing, corrupt, or its spaces are not those of the context's phase.
    """
    phase = phase_of_plain(path)
    if phase != context.phase:
        raise BiscaleError(f"checkpoint {path} is for {phase}, not for {context.phase}")
    try:
        model = algorithm_of(path).load(path, device="cpu")
    except BiscaleError:
        raise
    except Exception as error:  # SB3 raises many kinds here: bad zip, pickle, missing parts
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BiscaleError(f"checkpoint {path} cannot be loaded: {reason}") from None
    return PlainSb3Policy(model, context, str(path))


class PlainSb3Policy:
    """``predict`` of an SB3 model whose observations and actions are the environment's own."""

    def __init__(self, model: Any, context: PolicyContext, where: str) -> None:
        """Keep the model.

        Args:
            model: SB3 model.
            context: gives the clocks.
            where: named in errors.

        Raises:
            BiscaleError: its actions are neither a clock nor the number of a clock level.
        """
        space, levels = model.action_space, context.clocks.levels_mhz
        n = getattr(space, "n", None)
        if n is None and space.shape != (1,):
            raise BiscaleError(
                f"checkpoint {where} answers with {space}, but the environments take one clock"
            )
        if n is not None and int(n) != len(levels):
            raise BiscaleError(
                f"checkpoint {where} chooses among {n} clock levels, but this GPU has {len(levels)}"
            )
        self._model = model
        self._levels = None if n is None else context.clocks.to_action(np.asarray(levels))

    def predict(
        self,
        observation: NDArray[np.float32],
        state: Any = None,
        episode_start: Bools | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[np.float32], Any]:
        """Choose clocks; see :class:`biscale_env.contract.Policy`."""
        action, state = self._model.predict(observation, state, episode_start, deterministic)
        if self._levels is not None:
            action = self._levels[np.asarray(action, dtype=np.int64)][..., None]
        return np.asarray(action, dtype=np.float32), state
