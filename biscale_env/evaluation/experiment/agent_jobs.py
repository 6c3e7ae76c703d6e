"""Checkpoints of learned agents as policies and jobs of a comparison."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from biscale_env.contract import Policy
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.experiment.compare import ComparisonJob

SHIPPED = Path(find_spec("agents").submodule_search_locations[0]) / "checkpoints"  # type: ignore[union-attr, index]
AGENT = "agent"
N_PRICES = 14  # as many settings as a margin has in `controllers.base.MARGINS`
# times the lowest trained price: at the edge of what it knows an agent loses requests faster than
# energy (assumed)
PRICE_FLOOR = 2.5
SUFFIXES = (".npz", ".zip")
PARAMETERS = ("price", "margin")
BISCALE_OWN = {"prefill": "mpc", "decode": "slack"}


def split_build(build: str) -> tuple[str, dict[str, float]]:
    """Checkpoint (``agent`` or a path) and settings of a build string such as ``agent:price=40`` or
    ``agent:margin=0.2``.

    Raises:
        BiscaleError: another parameter, or a value that is no number.
    """
    name = _name(build)
    rest = build[len(name) + 1 :]
    settings: dict[str, float] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        try:
            if key not in PARAMETERS:
                raise ValueError
            settings[key] = float(value)
        except ValueError:
            raise BiscaleError(
                f"'{build}': a learned agent takes price=<number> and margin=<number>"
            ) from None
    return name, settings


def _name(build: str) -> str:
    """Build string without the settings behind it; they need not be an agent's."""
    at = next((build.rfind(f":{key}=") for key in PARAMETERS if f":{key}=" in build), len(build))
    return AGENT if build.startswith(f"{AGENT}:") else build[:at]


def is_checkpoint(build: str) -> bool:
    """Whether a build string names a learned agent: ``agent``, or the path of a checkpoint.

    Settings may follow.
    """
    return _name(build) == AGENT or Path(_name(build)).suffix in SUFFIXES


def is_file(build: str) -> bool:
    """Whether a build string is a checkpoint's path, and the file is there."""
    return Path(_name(build)).suffix in SUFFIXES and Path(_name(build)).is_file()


def setting_grid(build: str, phase: str) -> list[dict[str, float]]:
    """Settings that tuning may try: the checkpoint's margins, else prices it was trained on.

    None when there are none or one is given.
    """
    name, given = split_build(build)
    path = checkpoint_path(name, phase)
    if given or path.suffix != ".npz":
        return []
    from agents.policy.numpy_policy import load_network

    network = load_network(path)
    config = network.card.get("config", {})
    if config.get("margins"):
        return [{"margin": float(m)} for m in config["margins"]]
    if network.price is None:
        return []
    low, high = config.get("price") or (1.0, 100.0)
    return [{"price": float(f"{p:.3g}")} for p in np.geomspace(PRICE_FLOOR * low, high, N_PRICES)]


def checkpoint_path(name: str, phase: str) -> Path:
    """File of ``agent`` or of a path.

    Raises:
        BiscaleError: no agent is shipped for the phase.
    """
    if name != AGENT:
        return Path(name)
    path = SHIPPED / f"{phase}.npz"
    if not path.is_file():
        raise BiscaleError(
            f"no agent is shipped for {phase}: train one with 'biscale train {phase}'"
        )
    return path


def ships(phase: str) -> bool:
    """Whether an agent comes with the package for a phase."""
    return (SHIPPED / f"{phase}.npz").is_file()


def load_agent(build: str, context: Any) -> Policy:
    """Policy of a build string in a controller's context.

    Raises:
        BiscaleError: missing, corrupt, or made for another phase or observation.
    """
    from agents import load_agent as load

    name, settings = split_build(build)
    return load(checkpoint_path(name, context.phase), context, context.member, **settings)


def phase_of(path: Path) -> str:
    """Phase that a checkpoint was trained for."""
    if path.suffix == ".zip":
        from agents.policy.sb3_policy import config_beside

        return str(config_beside(path).phase)
    from agents.policy.numpy_policy import load_network

    return load_network(path).phase


def training_seed(path: Path) -> int:
    """Seed that a checkpoint was trained with; -1 when its card does not say."""
    if path.suffix == ".zip":
        from agents.policy.sb3_policy import config_beside

        return int(config_beside(path).seed)
    from agents.policy.numpy_policy import load_network

    return int(load_network(path).card.get("seed", -1))


def shipped_seeds() -> dict[str, int]:
    """Training seed of the shipped agent per phase."""
    return {phase: training_seed(SHIPPED / f"{phase}.npz") for phase in BISCALE_OWN if ships(phase)}


def checkpoints_of(target: str) -> list[tuple[int, Path]]:
    """``(training seed, checkpoint)`` of a run directory, a directory of seeds, a checkpoint, or
    the shipped agents.

    Raises:
        BiscaleError: nothing there.
    """
    path = Path(target)
    if target == AGENT:
        found = [p for p in (SHIPPED / "prefill.npz", SHIPPED / "decode.npz") if p.is_file()]
    elif path.is_file() and path.suffix in SUFFIXES:
        found = [path]
    elif path.is_dir():
        folders = [path, *sorted(path.glob("seed-*"))]
        found = [
            next(p for p in (f / "best.npz", f / "best.zip") if p.is_file())
            for f in folders
            if any(f.glob("best.*"))
        ]
    else:
        raise BiscaleError(
            f"{target} is neither a run directory nor a checkpoint (.npz or .zip) nor 'agent'"
        )
    if not found:
        raise BiscaleError(
            f"{target} holds no best.npz or best.zip yet: let biscale train reach its first evaluation"
        )
    return [(training_seed(p), p) for p in found]


def scenario_jobs(
    name: str,
    phase: str,
    found: list[tuple[int, Path]],
    policies: str | None,
    changes: Mapping[str, Any],
    tuned: bool,
    oracle_seeds: int | None = None,
) -> list[ComparisonJob]:
    """Jobs of one scenario and phase.

    The references, and every checkpoint of that phase under the name ``agent``.
    """
    from biscale_env.config.loader import validate
    from biscale_env.evaluation.experiment.policy_jobs import parse, plan
    from biscale_env.evaluation.experiment.scenarios import Scenario, load_scenario, resolve

    scenario = validate(
        load_scenario(name).model_dump() | dict(changes), Scenario, f"scenario {name}"
    )
    case = resolve(scenario, phase)
    chosen = parse(policies or f"max,static-best,{BISCALE_OWN[phase]}", (phase,))[phase]
    jobs = plan(scenario, case, chosen, tuned, oracle_seeds)
    seeds = tuple(range(scenario.seeds))
    return jobs + [
        ComparisonJob(
            scenario,
            phase,
            AGENT,
            str(path),
            member,
            seeds,
            training_seed=seed,
            variant="tuned" if tuned and setting_grid(str(path), phase) else "",
        )
        for seed, path in found
        if phase_of(path) == phase
        for member in scenario.members
    ]
