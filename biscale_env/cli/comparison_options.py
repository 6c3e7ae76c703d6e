"""Options that ``compare`` and ``evaluate`` share."""

from pathlib import Path
from typing import Annotated

import typer

PolicyList = Annotated[
    str | None,
    typer.Option(
        "--policies",
        help="Comma-separated list of name or label=name; "
        "'all', 'ablations', 'beliefs' for several.",
    ),
]
OnePolicy = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        help="One more policy, repeatable; commas in it belong to its parameters: "
        '--policy "mpc:margin=0.1,forecast=4". Names, agent, checkpoints, module:Class.',
    ),
]
PhaseName = Annotated[
    str | None, typer.Option("--phase", help="prefill or decode; default: all there are.")
]
SeedCount = Annotated[
    int | None, typer.Option("--seeds", help="Workload seeds instead of the scenario's.")
]
DelaySeconds = Annotated[
    float | None, typer.Option("--delay", help="Actuation delay, s; default: the scenario's.")
]
OutFolder = Annotated[
    Path | None, typer.Option("--out", help="Run directory; default: one under runs/.")
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with an interrupted run (--out, or the newest of these)."),
]
Jobs = Annotated[int | None, typer.Option("--jobs", help="Processes; default: all cores.")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="ADDRESS", help="Ray cluster instead of processes: auto or HOST:PORT."
    ),
]


def no_per_cent(load: float | None) -> float | None:
    """The value of ``--load``, unless it looks like per cent.

    Raises:
        BiscaleError: asks whether the hundredth was meant.
    """
    from biscale_env.config.load_share import checked_load

    return None if load is None else checked_load(load)


def policy_entries(policies: str | None, policy: list[str] | None) -> list[str]:
    """Entries of the comma-separated list and of the repeated option, in this order."""
    from biscale_env.evaluation.experiment.policy_list import split_list

    return [*split_list(policies or ""), *(policy or [])]
