"""Figures of the headline experiment, as SVG files.

They need Matplotlib; without it the page has tables only.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from biscale_env.core.svg import can_plot, save_svg, svg_axes
from biscale_env.reproduce.paper_tables import PUBLISHED

LINES = {
    "static-best": ("static best clock", "#7f7f7f", "s"),
    "tier2-only": ("tier 2 only", "#9467bd", "^"),
    "placeonly": ("PlaceOnly (tier 1)", "#1f77b4", "o"),
    "biscale": ("BiScale (tier 1 + 2)", "#d62728", "D"),
}
STAGES = ("prefill", "decode")


def plot_all(summary: pd.DataFrame, folder: Path) -> dict[str, str]:
    """Plot what the rows allow; returns captions by file name."""
    if not can_plot():
        return {}
    made = {}
    for dtype in ("bf16", "fp8"):
        name = f"workload-a-{dtype}.svg"
        if _workload_a(summary, dtype, folder / name):
            made[name] = (
                f"Workload A, {dtype}: energy per output token against DistServe by request rate. "
                "Lines: "
                "nominal plant; bands: 5 to 95 % of the "
                "model ensemble; grey: the paper's range for BiScale (prefill only); hollow: "
                "misses the SLO."
            )
    if _workload_b(summary, folder / "workload-b.svg"):
        made["workload-b.svg"] = (
            "Workload B: energy against DistServe; bars: nominal plant, whiskers: 5 to 95 % of the "
            "model ensemble, black brackets: the "
            "paper's range where there is one; hatched: misses the SLO."
        )
    if _sensitivity(summary, folder / "sensitivity.svg"):
        made["sensitivity.svg"] = (
            "BiScale's energy against DistServe when one assumption is changed; hollow: misses the "
            "SLO."
        )
    return made


def _workload_a(summary: pd.DataFrame, dtype: str, path: Path) -> bool:
    base = summary[
        (summary["workload"] == "A") & (summary["dtype"] == dtype) & (summary["variation"] == "")
    ]
    served = base[(base["system"] == "distserve") & base["feasible"]]["point"]
    base = base[base["point"].isin(served)]
    if base["rate_rps"].nunique() < 2:
        return False
    figure, axes = svg_axes(1, 2, (9.5, 3.8), sharex=True)
    for axis, stage in zip(axes, STAGES, strict=True):
        paper = PUBLISHED.get(("A", None, stage, "biscale"))
        if paper:
            axis.axhspan(*paper, color="#000000", alpha=0.1, lw=0)
        for system, (label, colour, mark) in LINES.items():
            rows = base[base["system"] == system].sort_values("rate_rps")
            if not len(rows):
                continue
            x, y = rows["rate_rps"].to_numpy(), 100 * (rows[stage].to_numpy() - 1)
            axis.plot(x, y, color=colour, lw=1.5, label=label)
            band = [100 * (rows[f"{stage}_member_{end}"].to_numpy() - 1) for end in ("low", "high")]
            axis.fill_between(x, *band, color=colour, alpha=0.12, lw=0)
            face = [colour if ok else "white" for ok in rows["feasible"]]
            axis.scatter(x, y, c=face, edgecolors=colour, marker=mark, zorder=3)
        axis.set_title(stage)
        axis.set_xlabel("requests/s")
        axis.grid(alpha=0.3)
        axis.axhline(0, color="black", lw=0.8)
    axes[0].set_ylabel("energy per output token\nagainst DistServe, %")
    axes[1].legend(fontsize=8, frameon=False)
    save_svg(figure, path, bbox_inches="tight")
    return True


def _workload_b(summary: pd.DataFrame, path: Path) -> bool:
    base = summary[(summary["workload"] == "B") & (summary["variation"] == "")]
    served = base[(base["system"] == "distserve") & base["feasible"]]["point"]
    points = [p for p in base["point"].unique() if p in set(served)]
    if not points:
        return False
    from matplotlib.patches import Patch

    figure, axes = svg_axes(2, 1, (9.5, 6), sharex=True)
    width = 0.8 / len(LINES)
    for axis, stage in zip(axes, STAGES, strict=True):
        for k, (system, (_, colour, _)) in enumerate(LINES.items()):
            rows = base[base["system"] == system].set_index("point").reindex(points)
            x = np.arange(len(points)) + (k - (len(LINES) - 1) / 2) * width
            y = 100 * (rows[stage].to_numpy(dtype=float) - 1)
            low, high = (
                100 * (rows[f"{stage}_member_{e}"].to_numpy(dtype=float) - 1)
                for e in ("low", "high")
            )
            bars = axis.bar(x, y, width * 0.92, color=colour)
            axis.vlines(x, low, high, color="black", lw=1)
            for bar, ok in zip(bars, rows["feasible"], strict=True):
                if not bool(ok) or pd.isna(ok):
                    bar.set_hatch("///")
                    bar.set_alpha(0.5)
            _brackets(axis, base, points, x, stage, system, width)
        axis.set_ylabel(f"{stage}: energy\nagainst DistServe, %")
        axis.grid(axis="y", alpha=0.3)
        axis.axhline(0, color="black", lw=0.8)
    axes[1].set_xticks(np.arange(len(points)), [p.replace("-", "\n") for p in points], fontsize=8)
    names = [Patch(color=colour, label=label) for label, colour, _ in LINES.values()]
    axes[0].legend(
        handles=names,
        fontsize=8,
        frameon=False,
        ncol=4,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
    )
    save_svg(figure, path, bbox_inches="tight")
    return True


def _brackets(
    axis: Any,
    base: pd.DataFrame,
    points: list[str],
    x: np.ndarray,
    stage: str,
    system: str,
    width: float,
) -> None:
    """The paper's range over its bar, where the setting is the paper's (ShareGPT lengths)."""
    for i, point in enumerate(points):
        row = base[base["point"] == point].iloc[0]
        paper = PUBLISHED.get(("B", float(row["load"]), stage, system))
        if paper is None or row["lengths"] == "own":
            continue
        left, right = x[i] - 0.4 * width, x[i] + 0.4 * width
        axis.plot(
            [left, right, right, left, left],
            [paper[0], paper[0], paper[1], paper[1], paper[0]],
            color="black",
            lw=1.6,
        )


def _sensitivity(summary: pd.DataFrame, path: Path) -> bool:
    rows = summary[(summary["variation"] != "") & (summary["system"] == "biscale")]
    if not len(rows):
        return False
    bases = summary[(summary["variation"] == "") & (summary["system"] == "biscale")].set_index(
        "point"
    )
    figure, axes = svg_axes(1, 2, (9.5, 0.32 * len(rows) + 1.2), sharey=True)
    y = np.arange(len(rows))[::-1]
    for axis, stage in zip(axes, STAGES, strict=True):
        start = 100 * (bases.loc[rows["point"], stage].to_numpy() - 1)
        end = 100 * (rows[stage].to_numpy() - 1)
        axis.hlines(y, start, end, color="#999999", lw=1)
        axis.scatter(start, y, marker="|", color="black", s=60, label="as assumed")
        face = ["#d62728" if ok else "white" for ok in rows["feasible"]]
        axis.scatter(end, y, c=face, edgecolors="#d62728", zorder=3)
        centre, half = (
            (np.nanmax([start, end]) + np.nanmin([start, end])) / 2,
            np.ptp([start, end]) / 2,
        )
        axis.set_xlim(centre - max(1.1 * half, 5.0), centre + max(1.1 * half, 5.0))
        axis.set_title(stage)
        axis.set_xlabel("energy against DistServe, %")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(
        y, [f"{v} ({p})" for v, p in zip(rows["variation"], rows["point"], strict=True)], fontsize=8
    )
    axes[1].scatter([], [], c="#d62728", label="changed")
    figure.legend(
        *axes[1].get_legend_handles_labels(),
        fontsize=8,
        frameon=False,
        ncol=2,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.93),
    )
    save_svg(figure, path, bbox_inches="tight")
    return True
