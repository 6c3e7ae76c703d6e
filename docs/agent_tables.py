"""Tables of training runs for docs/agents.md: teachers and algorithms side by side."""

from pathlib import Path

import pandas as pd

from agents.training.progress.curves import learning_curves
from biscale_env.core.markdown import markdown_table


def teachers_markdown(usual: pd.DataFrame, foresight: pd.DataFrame) -> str:
    """Held-out scores by teacher, of the training seeds that both have.

    Args:
        usual: learning curves that began with the usual teacher.
        foresight: those that began with plans that know the next half second.
    """
    usual = usual[usual["seed"].isin(foresight["seed"])]
    rows = []
    for title, frame in (("MPC with its extras", usual), ("plans that know 0.5 s", foresight)):
        seeds = frame.groupby("seed")["score"]
        figures = [_mean_and_range(one) for one in (seeds.first(), seeds.last(), seeds.min())]
        rows.append((title, str(len(seeds)), *figures))
    heads = ("teacher", "training seeds", "cloned", "after 3 million steps", "best evaluation")
    return markdown_table(heads, rows, "lr")


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
