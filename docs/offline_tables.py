"""Tables of docs/offline.md, of the run directories of ``biscale offline``."""

from pathlib import Path

import pandas as pd
import yaml

from agents.offline.recipe import SCORES
from agents.offline.recorded import DATASETS
from agents.training.run import CONFIG
from biscale_env.core.markdown import markdown_table

MISSING = "–"
DATA_HEAD = (
    "phase", "data set", "policy", "groups", "episodes", "decisions", "return", "energy ratio",
    "attainment",
)  # fmt: skip
SCORE_HEAD = (
    "phase", "policy", "learned from", "held-out score", "energy ratio", "attainment missing",
)  # fmt: skip


def phase_of(run: Path) -> str:
    """Phase of a run directory."""
    return str(yaml.safe_load((run / CONFIG).read_text())["phase"])


def data_markdown(run: Path) -> str:
    """Size and scores of what was recorded, means over groups."""
    table, phase = pd.read_csv(run / DATASETS), phase_of(run)
    rows = []
    for (quality, policy), mine in table.groupby(["quality", "policy"], sort=False):
        means = mine[["mean_return", "energy_ratio", "attainment"]].mean()
        rows.append(
            (
                phase, quality, f"`{policy}`", f"{mine['group'].nunique()}",
                f"{mine['episodes'].sum():,}", f"{mine['steps'].sum():,}",
                f"{means['mean_return']:.0f}", f"{means['energy_ratio']:.3f}",
                f"{100 * means['attainment']:.2f} %",
            )
        )  # fmt: skip
    return markdown_table(DATA_HEAD, rows, "lllr")


def scores_markdown(run: Path) -> str:
    """Held-out scores of what was learned and of what was recorded, best first."""
    rows = []
    for row in pd.read_csv(run / SCORES).sort_values("score").itertuples():
        recorded = row.data == "-"
        rows.append(
            (
                phase_of(run),
                f"{row.policy}, as recorded" if recorded else row.policy,
                MISSING if recorded else row.data,
                f"{row.score:.4f}",
                f"{row.energy_ratio:.4f}",
                f"{100 * row.shortfall:.3f} points",
            )
        )
    return markdown_table(SCORE_HEAD, rows, "lllr")
