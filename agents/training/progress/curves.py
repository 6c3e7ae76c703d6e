"""Learning curves over training seeds, from the ``evaluations.csv`` of every run.

One frame, one figure.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from biscale_env.core.errors import BiscaleError
from biscale_env.core.svg import save_svg, svg_axes

EVALUATIONS = "evaluations.csv"
COLUMNS = ("seed", "step", "score", "energy_ratio", "lowest_attainment")


def _one(path: Path, seed: int) -> pd.DataFrame:
    try:
        raw = pd.read_csv(path)
        raw["step"], raw["score"]
    except (ValueError, KeyError):
        raise BiscaleError(
            f"{path} is empty or damaged: leave this run out, or let it go on with --resume"
        ) from None
    energy, attained = raw.filter(like="energy_ratio:"), raw.filter(like="attainment:")
    return pd.DataFrame(
        {
            "seed": seed,
            "step": raw["step"],
            "score": raw["score"],
            "energy_ratio": energy.mean(axis=1).round(5),
            "lowest_attainment": attained.min(axis=1).round(5),
        }
    )


def learning_curves(folder: Path) -> pd.DataFrame:
    """All held-out evaluations of a run, or of the seeds below a folder (``train --seeds``).

    :data:`COLUMNS`, one row per evaluation; a run alone is seed 0.

    Raises:
        BiscaleError: no run there.
    """
    if (folder / EVALUATIONS).is_file():
        return _one(folder / EVALUATIONS, 0)
    paths = sorted(
        folder.glob(f"seed-*/{EVALUATIONS}"), key=lambda p: int(p.parent.name.removeprefix("seed-"))
    )
    if not paths:
        raise BiscaleError(f"{folder} holds no seed-*/{EVALUATIONS}: train with --seeds")
    return pd.concat(
        [_one(p, int(p.parent.name.removeprefix("seed-"))) for p in paths], ignore_index=True
    )


def spread(curves: pd.DataFrame, column: str = "score") -> pd.DataFrame:
    """Per evaluation the quartiles over seeds, the extremes and the number of seeds.

    Indexed by env step. Seeds are matched by the number of their evaluation, since a run may
    evaluate a little later.
    """
    numbered = curves.assign(number=curves.groupby("seed").cumcount())
    groups = numbered.groupby("number")
    found = groups[column].quantile(np.array([0.0, 0.25, 0.5, 0.75, 1.0])).unstack()
    found.columns = pd.Index(["low", "q25", "median", "q75", "high"])
    found["seeds"] = groups.size()
    found.index = pd.Index(groups["step"].median().astype(np.int64), name="step")
    return found


def draw(by_phase: dict[str, pd.DataFrame], path: Path) -> None:
    """One panel per phase: the held-out score by env step.

    Median, quartiles and range over seeds (needs Matplotlib).
    """
    figure, axes = svg_axes(1, len(by_phase), (4.6 * len(by_phase), 3.2), squeeze=False)
    for axis, (phase, curves) in zip(axes[0], by_phase.items(), strict=True):
        s = spread(curves)
        x = s.index.to_numpy() / 1e6
        axis.fill_between(
            x, s["low"], s["high"], color="#0072b2", alpha=0.15, linewidth=0, label="range"
        )
        axis.fill_between(
            x, s["q25"], s["q75"], color="#0072b2", alpha=0.35, linewidth=0, label="quartiles"
        )
        axis.plot(x, s["median"], color="#0072b2", marker="o", markersize=3, label="median")
        axis.set_title(f"{phase}, {int(s['seeds'].max())} training seeds", fontsize=10)
        axis.set_xlabel("million env steps")
        axis.grid(color="#e4e7ed")
    axes[0][0].set_ylabel("held-out score (lower is better)")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_svg(figure, path)
