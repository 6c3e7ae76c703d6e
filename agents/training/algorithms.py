"""The algorithms by name, Stable-Baselines3's and our own, and a check of hyper-parameters."""

import difflib
import inspect
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from biscale_env.core.errors import BiscaleError

ALGORITHMS = {
    "ppo": ("stable_baselines3", "PPO"),
    "sac": ("stable_baselines3", "SAC"),
    "tqc": ("sb3_contrib", "TQC"),
    "dqn": ("stable_baselines3", "DQN"),
    "recurrent_ppo": ("sb3_contrib", "RecurrentPPO"),
    "policy_iteration": ("agents.training.policy_iteration", "PolicyIteration"),
}
OURS = (
    "self",
    "policy",
    "env",
    "seed",
    "device",
    "verbose",
    "tensorboard_log",
    "policy_kwargs",
    "_init_setup_model",
)  # set elsewhere


def algorithm(name: str) -> Any:
    """The class of an algorithm, SB3's or one derived from SB3's.

    Raises:
        BiscaleError: unknown name, or the optional packages are not installed.
    """
    if name not in ALGORITHMS:
        raise BiscaleError(f"unknown algorithm '{name}'; known: {', '.join(ALGORITHMS)}")
    module, cls = ALGORITHMS[name]
    try:
        return getattr(import_module(module), cls)
    except ImportError:
        raise BiscaleError(
            f"algorithm '{name}' needs {_library(name)}: install biscale-env[rl]"
        ) from None


def default_of(name: str, hyper: str) -> Any:
    """An algorithm's own value of a hyper-parameter."""
    return inspect.signature(algorithm(name).__init__).parameters[hyper].default


def _library(name: str) -> str:
    """The package that an algorithm comes from; ours is built on Stable-Baselines3."""
    module = ALGORITHMS[name][0]
    return "stable_baselines3" if module.startswith("agents.") else module


def check_hyper(name: str, hyper: Mapping[str, Any], where: str) -> None:
    """Refuse hyper-parameters that the algorithm does not have.

    Where the library of the algorithm is not installed, a config can still be read for its
    workloads; :func:`algorithm` says what is missing when training starts.

    Raises:
        BiscaleError: unknown algorithm; or names the key and the nearest known one.
    """
    if name in ALGORITHMS and find_spec(_library(name)) is None:
        return
    known = [p for p in inspect.signature(algorithm(name).__init__).parameters if p not in OURS]
    for key in hyper:
        if key in OURS:
            raise BiscaleError(
                f"{where}: '{key}' is not a hyper-parameter here: use the config's own keys"
            )
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise BiscaleError(
                f"{where}: {name} has no hyper-parameter '{key}'; the nearest known one is "
                f"'{near[0]}'"
            )
