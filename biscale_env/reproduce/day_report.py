"""The page of a day of a cluster: totals, and load, power and GPUs over time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biscale_env.core.files import open_whole, write_whole
from biscale_env.reproduce.paper_tables import markdown

COLOURS = ("#7f7f7f", "#1f77b4", "#d62728", "#2ca02c")


def write_day(
    days: Mapping[str, Sequence[Mapping[str, Any]]],
    totals: Mapping[str, Mapping[str, float]],
    about: str,
    folder: Path,
) -> Path:
    """Write ``day.md`` and ``day/day.svg``; returns the page.

    Args:
        days: rows per window, by system (DistServe first).
        totals: sums by system.
        about: what was run.
        folder: where the page goes.
    """
    (folder / "day").mkdir(parents=True, exist_ok=True)
    drawn = _member(days, folder / "day" / "day.svg")
    reference = next(iter(totals.values()))
    lines = []
    for name, t in totals.items():
        change = 100 * (t["j_per_token"] / reference["j_per_token"] - 1)
        lines.append(
            [name, f"{t['energy_j'] / 3.6e6:.1f}", f"{t['j_per_token']:.3f}", f"{change:+.0f} %".replace("-", "−"),
             f"{100 * t['attainment_ttft']:.2f} / {100 * t['attainment_tpot']:.2f} %", f"{t['changes']:.0f}",
             f"{t['seconds']:.0f} s", f"{t['memory_mb']:.0f} MB"]
        )  # fmt: skip
    head = ["system", "kWh", "J per output token, all GPUs", "against DistServe", "TTFT / TPOT met", "placement changes",
            "simulated in", "peak memory"]  # fmt: skip
    parts = ["# A day of the cluster", about, markdown(head, lines)]
    if drawn:
        parts.append("![Load, power of all GPUs, and GPUs in service over the day](day/day.svg)")
    page = folder / "day.md"
    write_whole(page, "\n\n".join(parts) + "\n")
    return page


def _member(days: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "biscale"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(9.5, 6.5), sharex=True)
    for (name, rows), colour in zip(days.items(), COLOURS, strict=False):
        inside = [r for r in rows if r["index"] >= 0]
        hours = np.cumsum([r["duration_s"] for r in inside]) / 3600
        if axes[0].lines == () or not len(axes[0].lines):
            axes[0].step(hours, [r["rate_rps"] for r in inside], color="black", lw=1)
        axes[1].step(hours, [r["power_w"] / 1e3 for r in inside], color=colour, lw=1.2, label=name)
        axes[2].step(hours, [r["gpus"] for r in inside], color=colour, lw=1.2)
    for axis, text in zip(
        axes, ("load, requests/s", "power of all GPUs, kW", "GPUs in the placement"), strict=True
    ):
        axis.set_ylabel(text)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[1].legend(
        fontsize=8, frameon=False, ncol=len(days), loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )
    axes[2].set_xlabel("hour")
    with open_whole(path) as temporary:
        figure.savefig(temporary, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    return True
