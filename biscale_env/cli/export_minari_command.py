"""`biscale export minari`: policies recorded as a data set for offline learning."""

from typing import Annotated, Any

import typer

from biscale_env.core.errors import BiscaleError
from biscale_env.core.extras import need_packages


def minari(
    phase: Annotated[str, typer.Argument(help="prefill or decode")],
    dataset: Annotated[str, typer.Argument(help="Name for Minari, e.g. biscale/decode/mixed-v1.")],
    *,
    policies: Annotated[
        str,
        typer.Option(
            help="Comma-separated policies that take turns; names as of biscale compare, "
            "or label=name."
        ),
    ] = "random,own,agent",
    episodes: Annotated[int, typer.Option(min=1, help="Episodes, all policies together.")] = 60,
    episode_s: Annotated[float, typer.Option(min=1.0, help="Length of an episode, s.")] = 120.0,
    load: Annotated[
        float | None, typer.Option(help="Fraction of capacity; default: the environment's.")
    ] = None,
) -> None:
    """Record policies in the environment; 'own' is BiScale's own controller of the phase.

    Stored under Minari's data folder, with dt and cost of every step and a way to make the
    environment again. Prints size and scores of each policy.
    """
    need_packages("data sets need", "offline", {"minari": "minari"})
    import gymnasium as gym

    from agents.training.dataset import export_dataset
    from biscale_env.evaluation.experiment.policy_list import named, split_list
    from biscale_env.policies import resolve_policy
    from biscale_env.policies.policy_source import BISCALE_OWN, PHASES

    if phase not in PHASES:
        raise BiscaleError(f"unknown phase '{phase}': give {' or '.join(PHASES)}")
    options: dict[str, Any] = {"episode_s": episode_s} | ({} if load is None else {"load": load})
    plant = gym.make(f"BiScale/{phase.capitalize()}-v1", **options).unwrapped.plant  # type: ignore[attr-defined]
    entries = [BISCALE_OWN[phase] if e == "own" else e for e in split_list(policies)]
    teachers = {one.label: resolve_policy(one.build, plant) for one in map(named, entries)}
    recorded = export_dataset(phase, teachers, dataset, episodes, **options)
    print(recorded.summary().to_string(float_format=lambda value: f"{value:.4f}"))
    print(f"{dataset}: {len(recorded.episodes)} episodes, {recorded.steps} steps")
