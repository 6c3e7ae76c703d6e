"""``biscale offline``: data sets recorded, networks learned from them alone, scored."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from biscale_env.cli.trace_options import told_on
from biscale_env.cli.train_command import check_resumable, run_folder
from biscale_env.core.extras import need_packages

OFFLINE_RL = {"torch": "torch", "torchrl": "torchrl", "minari": "minari"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("offline")(offline)


def offline(
    phase: Annotated[str, typer.Argument(help="prefill or decode")],
    *,
    config: Annotated[
        str | None, typer.Option(help="Config name or YAML file; default: the shipped one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory; default: runs/offline-<time>-<phase>.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in --out.")] = False,
) -> None:
    """Record policies as Minari data sets, learn from them alone, score what was learned.

    Behaviour cloning, TD3+BC and implicit Q-learning of TorchRL; each network is a policy for every
    command (<out>/bc-mixed). Data sets in <out>/data, scores on held-out workloads in
    <out>/scores.csv.
    """
    need_packages("offline learning needs", "offline-rl", OFFLINE_RL)
    from agents.offline.offline_config import load_offline_config
    from agents.offline.recipe import run_offline
    from biscale_env.policies import resolve_policy

    check_resumable(resume, out)
    mine = load_offline_config(config, phase)
    folder = run_folder(out, "offline", phase)
    with told_on(sys.stdout):
        table = run_offline(mine, folder, resume, resolve_policy, print)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4f}", na_rep="-"))
    print(f"networks, data and scores: {folder}")
