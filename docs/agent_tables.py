"""Tables of training runs for docs/agents.md: teachers and algorithms side by side."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from agents.training.progress.curves import learning_curves
from biscale_env.core.errors import BiscaleError
from biscale_env.core.markdown import markdown_table


def runs_markdown(head: str, runs: Mapping[str, pd.DataFrame]) -> str:
    """Held-out scores of several ways to train, of the training seeds that all have.

    Args:
        head: what the ways differ in.
        runs: learning curves by way.

    Raises:
        BiscaleError: no seed is in all of them.
    """
    common = set.intersection(*(set(frame["seed"]) for frame in runs.values()))
    if not common:
        raise BiscaleError(f"{' and '.join(runs)} have no training seed in common")
    rows = []
    for title, whole in runs.items():
        frame = whole[whole["seed"].isin(common)]
        seeds = frame.groupby("seed")["score"]
        figures = [_mean_and_range(one) for one in (seeds.first(), seeds.last(), seeds.min())]
        steps = f"{int(frame['step'].max()):,}"
        rows.append((title, str(len(seeds)), steps, *figures))
    heads = (head, "training seeds", "env steps", "cloned", "at the end", "best evaluation")
    return markdown_table(heads, rows, "lr")


def _beside_ppo(home: Path, folder: Path, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Curves of PPO as it is configured, and those of a folder, kept as ``curves-NAME.csv``."""
    mine = learning_curves(folder)
    mine.to_csv(home / f"curves-{name}.csv", index=False)
    return pd.read_csv(home / "curves-prefill-ppo.csv"), mine


def teachers(home: Path, folder: Path) -> str:
    """Prefill agents that began with plans of foresight, beside the others."""
    usual, mine = _beside_ppo(home, folder, "prefill-lookahead")
    return runs_markdown("teacher", {"MPC with its extras": usual, "plans that know 0.5 s": mine})


def policy_iteration(home: Path, folder: Path) -> str:
    """The shipped prefill agents, trained by policy iteration, beside those of PPO."""
    usual, mine = _beside_ppo(home, folder, "prefill")
    return runs_markdown("algorithm", {"PPO": usual, "policy iteration": mine})


def algorithms_markdown(folder: Path) -> str:
    """Training runs of all algorithms below a folder, each with its training seeds.

    Held-out score of the untrained network, the best one, energy and lowest attainment there; mean
    over seeds, and their range where there are several.
    """
    heads = (
        "phase",
        "algorithm",
        "seeds",
        "env steps",
        "score untrained",
        "best score",
        "energy ratio",
        "lowest attainment",
    )
    rows = []
    for path in sorted(
        (p for p in folder.iterdir() if p.is_dir()),
        key=lambda p: (p.name.split("-")[0] != "prefill", p.name),
    ):
        phase, _, name = path.name.partition("-")
        seeds = learning_curves(path).groupby("seed")
        first = seeds["score"].first()
        best = seeds.apply(lambda of: of.loc[of["score"].idxmin()], include_groups=False)
        figures = [first, best["score"], best["energy_ratio"], best["lowest_attainment"]]
        steps = f"{int(seeds['step'].last().max()):,}"
        rows.append((phase, name, str(len(best)), steps, *map(_mean_and_range, figures)))
    return markdown_table(heads, rows, "llr")


def _mean_and_range(values: pd.Series) -> str:
    mean = f"{values.mean():.4f}"
    return mean if len(values) == 1 else f"{mean} [{values.min():.4f}, {values.max():.4f}]"
