"""Learned policies by name: the shipped agents, run directories and files of ``biscale train``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np

from agents import load_agent
from agents.policy.numpy_policy import Network, load_network
from agents.policy.sb3_policy import config_beside
from biscale_env.contract import Policy
from biscale_env.core.errors import BiscaleError
from biscale_env.policies.plain_sb3 import is_plain, load_plain, phase_of_plain
from biscale_env.policies.policy_source import AGENT, PHASES, SUFFIXES
from controllers.base import PolicyContext
from controllers.registry import parse_parameters

SHIPPED: Final = Path(str(files("agents"))) / "checkpoints"
PARAMETERS: Final = ("price", "margin")
N_PRICES: Final = 14  # as many settings as a margin has in `controllers.base.MARGINS`
# of the bound, tried with the upper half of the prices
PRICED_MARGINS: Final = {"prefill": (0.2, 0.4), "decode": (0.3, 0.5)}
# Times the lowest trained price: at the edge of what it knows an agent loses attainment faster
# than it saves energy (assumed).
PRICE_FLOOR: Final = 2.5


@dataclass(frozen=True)
class CheckpointSource:
    """A learned policy.

    Attributes:
        name: the whole name.
        base: ``agent`` (the shipped one of the phase), a run directory or a file.
        params: ``price`` and ``margin``, as far as they are given.
    """

    name: str
    base: str
    params: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, base: str, rest: str) -> "CheckpointSource":
        """The source of a name that was cut in parts.

        Raises:
            BiscaleError: another parameter, or a value that is no number.
        """
        return cls(name, base, _numbers(name, parse_parameters(name, rest, "margin")))

    @property
    def phases(self) -> tuple[str, ...]:
        """The phase that it was trained for; of ``agent``, those with a shipped one."""
        if self.base == AGENT:
            return tuple(phase for phase in PHASES if ships(phase))
        return (phase_of(checkpoint_in(self.base)),)

    def path(self, phase: str) -> Path:
        """File of the checkpoint for a phase.

        Raises:
            BiscaleError: there is none.
        """
        if self.base != AGENT:
            return checkpoint_in(self.base)
        if not ships(phase):
            raise BiscaleError(
                f"no agent is shipped for {phase}: train one with 'biscale train {phase}'"
            )
        return SHIPPED / f"{phase}.npz"

    def settings(self, phase: str) -> list[dict[str, Any]]:
        """The checkpoint's margins, else prices that it was trained on.

        The higher prices are offered with a margin as well: the last tenths of attainment are
        rarer than a price can teach. None when there are none, or when one is given.
        """
        path = self.path(phase)
        if self.params or path.suffix != ".npz":
            return []
        network = load_network(path)
        config = network.card.get("config", {})
        if config.get("margins"):
            return [{"margin": float(m)} for m in config["margins"]]
        if network.price is None:
            return []
        prices = prices_of(network, N_PRICES)
        careful = [
            {"price": p, "margin": m}
            for m in PRICED_MARGINS[phase]
            for p in prices[N_PRICES // 2 :]
        ]
        return [*({"price": p} for p in prices), *careful]

    def make(self, context: PolicyContext, **params: Any) -> Policy:
        """The agent in a controller's context.

        Raises:
            BiscaleError: missing, corrupt, made for another phase or observation, an impossible
                price or margin.
        """
        given = {**self.params, **_numbers(self.name, params)}
        path = self.path(context.phase)
        if is_plain(path):
            if given:
                raise BiscaleError(
                    f"policy '{self.name}': a model of plain Stable-Baselines3 takes no parameters"
                )
            return load_plain(path, context)
        return load_agent(path, context, context.member, **given)


def prices_of(network: Network, count: int) -> list[float]:
    """Prices to try a network at, rising: from just inside the range that it was trained on."""
    low, high = network.card.get("config", {}).get("price") or (1.0, 100.0)
    return [float(f"{p:.3g}") for p in np.geomspace(PRICE_FLOOR * low, high, count)]


def _numbers(name: str, params: Mapping[str, Any]) -> dict[str, float]:
    for key, value in params.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key not in PARAMETERS or not number:
            raise BiscaleError(
                f"policy '{name}': a learned agent takes price=<number> and margin=<number>"
            )
    return {key: float(value) for key, value in params.items()}


def names_checkpoint(base: str) -> bool:
    """Whether a base means a checkpoint: by its suffix, as a folder, or written as a path."""
    path = Path(base)
    return path.suffix in SUFFIXES or path.is_dir() or len(path.parts) > 1


def ships(phase: str) -> bool:
    """Whether an agent comes with the package for a phase."""
    return (SHIPPED / f"{phase}.npz").is_file()


def checkpoint_in(target: str) -> Path:
    """The checkpoint of a run directory (its best), or the file itself.

    Raises:
        BiscaleError: nothing there, or runs of several seeds.
    """
    path = Path(target)
    if path.is_file() and path.suffix in SUFFIXES:
        return path
    if not path.is_dir():
        if path.suffix in SUFFIXES:
            raise BiscaleError(f"there is no checkpoint at {target}")
        raise BiscaleError(
            f"{target} is neither a run directory nor a checkpoint (.npz or .zip) nor '{AGENT}'"
        )
    best = best_of(path)
    if best is not None:
        return best
    seeds = sorted(p for p in path.glob("seed-*") if best_of(p) is not None)
    if seeds:
        raise BiscaleError(
            f"{target} holds runs of {len(seeds)} seeds: name one of them, e.g. {seeds[0]}"
        )
    raise BiscaleError(
        f"{target} holds no best.npz or best.zip yet: let biscale train reach its first evaluation"
    )


def best_of(folder: Path) -> Path | None:
    """The best checkpoint of a run directory; None when there is none yet."""
    files_of = (folder / f"best{suffix}" for suffix in SUFFIXES)
    return next((path for path in files_of if path.is_file()), None)


def phase_of(path: Path) -> str:
    """Phase that a checkpoint was trained for.

    Raises:
        BiscaleError: it cannot be read, or fits no observation of this version.
    """
    if path.suffix != ".zip":
        return load_network(path).phase
    return phase_of_plain(path) if is_plain(path) else str(config_beside(path).phase)


def training_seed(path: Path) -> int:
    """Seed that a checkpoint was trained with; -1 when nothing says so."""
    if path.suffix != ".zip":
        return int(load_network(path).card.get("seed", -1))
    return -1 if is_plain(path) else int(config_beside(path).seed)


def shipped_seeds() -> dict[str, int]:
    """Training seed of the shipped agent per phase."""
    return {phase: training_seed(SHIPPED / f"{phase}.npz") for phase in PHASES if ships(phase)}
