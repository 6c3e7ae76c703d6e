"""What foresight is worth: energies at the SLO's attainment, a row per operating point.

`python docs/update.py experiment:foresight=RUN` draws it from docs/experiment-foresight.csv.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from biscale_env.core.markdown import markdown_table
from biscale_env.core.svg import save_svg, svg_axes
from biscale_env.evaluation.report.drawing.palette import GRID, INK, styles
from biscale_env.policies.policy_source import ORACLE, is_lookahead

LOOKS = {  # policy: label, marker; from what knows least to what knows all
    "mpc": ("BiScale's own", "s"),
    "agent": ("agent", "o"),
    "lookahead:seconds=0": ("plan, 0 s known", "$0$"),
    "lookahead:seconds=0.1": ("plan, 0.1 s", "$.1$"),
    "lookahead:seconds=0.5": ("plan, 0.5 s", "$.5$"),
    "lookahead:seconds=2": ("plan, 2 s", "$2$"),
    "oracle": ("optimum, all known, no delay", "*"),
}

BESIDE = {"$0$": 0.33, "$.1$": 0.11, "$.5$": -0.11, "$2$": -0.33}
"""Where plans are drawn within their row: they often need nearly the same energy."""


def of_points(csv: Path) -> pd.DataFrame:
    """Energy and attainment by operating point and policy: columns (policy, energy | attainment).

    Controllers with a dial: interpolated to the SLO's attainment, NaN where no setting reaches it.
    Plans and the optimum, whose weights are chosen with hindsight to hold it: as they ended.
    """
    summary = pd.read_csv(csv)
    summary["point"] = summary["scenario"] + ", " + (100 * summary["load"]).map("{:.0f} %".format)
    planned = summary["policy"].map(lambda name: name == ORACLE or is_lookahead(name))
    summary["energy"] = summary["equal_ratio"].where(~planned, summary["energy_ratio"])
    summary["met"] = summary["attainment"].where(planned)
    summary["missed"] = planned & ~summary["target_met"].astype(bool)
    table = summary[summary["policy"].isin(LOOKS)].pivot_table(
        index="point",
        columns="policy",
        values=["energy", "met", "missed"],
        sort=False,
        dropna=False,
        aggfunc="first",
    )
    return table.swaplevel(axis=1)


def _policies(table: pd.DataFrame) -> list[str]:
    return [name for name in LOOKS if name in table.columns.get_level_values(0)]


def draw(csv: Path, out: Path) -> None:
    """The figure; pale where the attainment is missed."""
    table = of_points(csv)
    names = _policies(table)
    figure, axis = svg_axes(1, 1, (8.4, 0.6 * len(table) + 1.6))
    figure.set_layout_engine("constrained")
    rows = list(range(len(table)))[::-1]
    look = styles(names)
    for name in names:
        label, marker = LOOKS[name]
        colour = INK if marker.startswith("$") else look[name].color
        seen, y = table[name], np.array(rows) + BESIDE.get(marker, 0.0)
        held = ~seen["missed"].astype(bool)
        for which, alpha in ((held, 1.0), (~held, 0.3)):
            axis.scatter(
                seen["energy"].astype(float)[which],
                y[which],
                color=colour,
                marker=marker,
                s=56,
                alpha=alpha,
            )
        axis.scatter([], [], color=colour, marker=marker, s=56, label=label)
    axis.set_yticks(rows, [str(point) for point in table.index])
    axis.set_xlabel("energy relative to max clock")
    axis.grid(color=GRID)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    figure.patch.set_facecolor("white")
    out.parent.mkdir(exist_ok=True)
    save_svg(figure, out, bbox_inches="tight")


def _cell(energy: float, met: float, missed: bool) -> str:
    if pd.isna(energy):
        return "–"
    text = f"{energy:.3f}" if pd.isna(met) else f"{energy:.3f} ({100 * met:.2f})"
    return f"~~{text}~~" if missed else text


def markdown(csv: Path) -> str:
    """The same as a table; in brackets the attainment, struck through where it is missed."""
    table = of_points(csv)
    names = _policies(table)
    rows = [
        (
            str(point),
            *(_cell(*(line[name][k] for k in ("energy", "met", "missed"))) for name in names),
        )
        for point, line in table.iterrows()
    ]
    return markdown_table(("operating point", *(LOOKS[name][0] for name in names)), rows, "lr")
