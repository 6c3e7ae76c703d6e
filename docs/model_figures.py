"""Figures of docs/models.md: the formula as lines, measurements as points."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from biscale_env.config import load_gpu
from biscale_env.core.svg import save_svg, svg_axes
from biscale_env.models.fit.gpu_evidence import KernelPoint, load_gpu_evidence
from biscale_env.models.fit.gpu_fit import predict_kernels
from biscale_env.models.fit.report import measured_servers
from biscale_env.models.gpu_layer import load_layer

STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "figure.facecolor": "white",
    "legend.frameon": False,
}
CAPTIONS = {
    "kernels": "Power and time of GEMMs by SM clock on H100 and B200: points measured, lines the "
    "fitted layer",
    "servers": "Median token interval and power per GPU by batch of every measured LLM on H100: "
    "points measured, lines the shipped model",
    "servers-b200": "The same on B200",
}
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b")
CLOCKS = np.arange(510.0, 1981.0, 15.0)


@mpl.rc_context(STYLE)
def draw(folder: Path) -> None:
    """Write every figure as SVG into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (
        ("kernels", kernels()),
        ("servers", servers("h100-sxm")),
        ("servers-b200", servers("b200-sxm")),
    ):
        save_svg(figure, folder / f"{name}.svg", bbox_inches="tight")


def kernels() -> Figure:
    """Measured GEMMs of each GPU: power above, time relative to the fastest below."""
    figure, axes = svg_axes(2, 2, (9, 6), sharex="col")
    figure.set_layout_engine("constrained")
    for column, gpu in enumerate(("h100-sxm", "b200-sxm")):
        for color, (label, points) in zip(COLORS, shapes(gpu), strict=False):
            one_shape(gpu, points, label, color, axes[0, column], axes[1, column])
        axes[0, column].set_title(gpu)
        axes[0, column].set_ylim(bottom=0)
        axes[1, column].set_xlabel("requested SM clock, MHz")
    axes[0, 0].set_ylabel("power, W")
    axes[1, 0].set_ylabel("time relative to the highest clock")
    axes[0, 0].legend(fontsize=7, loc="lower right")
    return figure


def shapes(gpu: str) -> Iterator[tuple[str, list[KernelPoint]]]:
    """The shapes that were measured at more than one clock, those of most rows first."""
    found: dict[tuple[float, float, float], list[KernelPoint]] = {}
    for p in load_gpu_evidence(gpu).kernels.points:
        found.setdefault((p.rows, p.k, p.n), []).append(p)
    several = {k: v for k, v in found.items() if len({p.freq_mhz for p in v}) > 1}
    chosen = [k for k in several if k[0] in (16384, 4096, 2048, 128, 32, 1)]
    for k in sorted(chosen, key=lambda k: (-k[0], -k[1] * k[2]))[: len(COLORS)]:
        yield f"{k[0]:.0f} x {k[1]:.0f} x {k[2]:.0f}", several[k]


def one_shape(
    gpu: str, points: list[KernelPoint], label: str, color: str, power: Axes, time: Axes
) -> None:
    """Points and lines of one shape."""
    layer, description = load_layer(gpu).values, load_gpu(gpu)
    clocks = CLOCKS[description.freq_max_mhz >= CLOCKS]
    line = [points[0].model_copy(update={"freq_mhz": float(f)}) for f in clocks]
    seconds, watts = predict_kernels(line, description, layer)
    power.plot(clocks, watts, color=color, lw=1.2)
    power.plot([p.freq_mhz for p in points], [p.power_w for p in points], "o", ms=4, color=color,
               label=label)  # fmt: skip
    reference = seconds[-1]
    time.plot(clocks, seconds / reference, color=color, lw=1.2)
    fastest = max(points, key=lambda p: p.freq_mhz).time_us
    time.plot([p.freq_mhz for p in points], [p.time_us / fastest for p in points], "o", ms=4,
              color=color)  # fmt: skip


def servers(gpu: str) -> Figure:
    """Measured servers: a pair of axes each."""
    found = list(measured_servers(gpu))
    columns = 4
    rows = -(-len(found) // columns)
    figure, axes = svg_axes(2 * rows, columns, (11, 3.6 * rows), squeeze=False)
    figure.set_layout_engine("constrained")
    for ax in axes.flat:
        ax.set_visible(False)
    for k, (server, itl, watts) in enumerate(found):
        row, column = 2 * (k // columns), k % columns
        upper, lower = axes[row, column], axes[row + 1, column]
        batch = [p.batch for p in server.group.points]
        upper.plot(batch, 1e3 * np.array(itl), color=COLORS[0], lw=1.2)
        upper.plot(batch, [1e3 * p.itl_p50_s for p in server.group.points], "o", ms=4,
                   color=COLORS[0])  # fmt: skip
        lower.plot(batch, watts, color=COLORS[1], lw=1.2)
        lower.plot(batch, [p.power_w for p in server.group.points], "o", ms=4, color=COLORS[1])
        upper.set_title(server.group.label.replace(" chat", "\nchat").replace(" gpqa", "\ngpqa"),
                        fontsize=8)  # fmt: skip
        for ax in (upper, lower):
            ax.set_visible(True)
            ax.set_ylim(bottom=0)
            ax.set_xscale("log", base=2)
            ax.set_xticks(batch, [f"{b:.0f}" for b in batch], fontsize=6)
            ax.minorticks_off()
        if column == 0:
            upper.set_ylabel("interval, ms")
            lower.set_ylabel("power, W")
        lower.set_xlabel("batch")
    return figure
