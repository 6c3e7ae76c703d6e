"""The two pictures of the README: energy against attainment, and a burst that runs as it is read.

`python docs/update.py readme` makes both, the first from docs/experiment-main.csv, the second by
simulating a burst.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from biscale_env.core.files import write_whole
from biscale_env.core.svg import save_svg, svg_axes
from biscale_env.envs.plant import Plant, PlantSettings
from biscale_env.evaluation.experiment.interactive import second_by_second
from biscale_env.evaluation.report.drawing.figdata import binned_timeline, busiest_window, nines
from biscale_env.evaluation.report.drawing.palette import GRID, INK, LIMIT, MUTED, Style, styles
from biscale_env.evaluation.rollouts.rollout import Rollout, rollout
from biscale_env.policies import resolve_policy
from biscale_env.traces import Trace, generate

POINT = ("azure-conv", 0.75)
"""Operating point of the first figure: scenario, share of capacity."""
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "cross": "P"}
MARKERS |= {"x": "X", "star": "*"}
TICKS = (0.9, 0.98, 0.99, 0.995, 0.999, 1.0)
STEP_S = 0.1
PLAY_S = 16.0
"""How long the animation takes, s, of which the last quarter stands still."""
MOVING = 0.75


def energy(csv: Path, out: Path) -> None:
    """Energy against attainment of every controller at one operating point, both phases.

    Args:
        csv: the summary that `docs/update.py experiment:main` writes.
        out: the SVG.
    """
    summary = pd.read_csv(csv)
    at = summary[(summary["scenario"] == POINT[0]) & (summary["load"] == POINT[1])]
    figure, axes = svg_axes(1, 2, (10.2, 4.0))
    figure.set_layout_engine("constrained")
    for ax, phase in zip(axes, ("prefill", "decode"), strict=True):
        rows = at[at["phase"] == phase].sort_values("energy_ratio", ascending=False)
        look = styles(sorted(set(at["policy"])))
        for row in rows.to_dict("records"):
            _point(ax, row, look[row["policy"]])
        ax.axvline(nines(0.99), color=LIMIT, lw=1.2, ls="--")
        ax.set_xticks([float(nines(t)) for t in TICKS], [f"{100 * t:g}" for t in TICKS])
        least = min(0.985, float(rows["attainment"].min()) - 0.005)
        ax.set_xlim(float(nines(least)), float(nines(1.0)) + 0.12)
        ax.set_ylim(bottom=0.4, top=1.04)
        ax.set_title(f"{phase}: {'TTFT' if phase == 'prefill' else 'TPOT'}", color=INK, fontsize=11)
        ax.set_xlabel("requests within the SLO, %", color=INK)
        ax.grid(color=GRID)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(
            loc="upper left",
            bbox_to_anchor=(1.0, 1.02),
            fontsize=8,
            frameon=False,
            handletextpad=0.2,
        )
    axes[0].set_ylabel("energy relative to max clock", color=INK)
    figure.patch.set_facecolor("white")
    save_svg(figure, out, bbox_inches="tight")


def _point(ax: Any, row: dict[str, Any], style: Style) -> None:
    """A controller: marker, 95 % intervals, hollow where it misses the target."""
    x, y = float(nines(row["attainment"])), row["energy_ratio"]
    span_x = [[x - float(nines(row["attainment_ci_low"]))]]
    span_x.append([float(nines(row["attainment_ci_high"])) - x])
    span_y = [[y - row["energy_ratio_ci_low"]], [row["energy_ratio_ci_high"] - y]]
    _, _, bars = ax.errorbar(
        [x],
        [y],
        xerr=np.nan_to_num(np.maximum(span_x, 0.0)),
        yerr=np.nan_to_num(np.maximum(span_y, 0.0)),
        fmt=MARKERS[style.symbol],
        color=style.color,
        mfc=style.color if row["target_met"] else "white",
        ms=7,
        elinewidth=0.7,
        label=f"{row['policy']}  {y:.2f}",
        zorder=3,
    )
    for bar in bars:
        bar.set_alpha(0.35)


@dataclass(frozen=True)
class Seen:
    """What a burst looks like under one controller, on a grid of time.

    Attributes:
        name: of the controller.
        color: of its lines.
        lines: requests that wait for their first token, clock (MHz, NaN while idle), power per GPU
            (W, idle included).
        energy_kj: used so far.
        late: requests that have missed their SLO so far.
    """

    name: str
    color: str
    lines: dict[str, NDArray[np.float64]]
    energy_kj: NDArray[np.float64]
    late: NDArray[np.float64]


def burst_trace() -> Trace:
    """Some calm seconds, the busiest ones of ten minutes, and what follows.

    At about 70 % of what one instance serves at max clock within the SLO.
    """
    whole = generate("azure-conv-like", rate_rps=2.2, duration_s=600.0, seed=2)
    start, end = busiest_window(
        whole.arrival_s, whole.prompt_tokens, whole.duration_s, width_s=24.0, core_s=6.0
    )
    return whole.window(start, end)


def look(name: str, color: str, plant: Plant, trace: Trace, end_s: float) -> Seen:
    """Run a controller on the burst."""
    run = rollout(resolve_policy(name, plant), plant, [trace], time_probe=False)[0]
    frame = second_by_second(run, STEP_S)
    grid = np.arange(0.0, end_s, STEP_S)
    power = _power_w(run, grid, plant.settings.tp)
    late_s = _late_s(run, plant.slo.bound_s("prefill"))
    wide = frame.reindex(range(len(grid)))
    return Seen(
        name,
        color,
        {
            "clock": wide["freq_mhz"].to_numpy(dtype=np.float64),
            "power": power,
            "queue": _waiting(run, grid),
        },
        np.cumsum(np.nan_to_num(power)) * STEP_S * plant.settings.tp / 1e3,
        np.searchsorted(late_s, grid, side="right").astype(np.float64),
    )


def _power_w(run: Rollout, grid: NDArray[np.float64], tp: int) -> NDArray[np.float64]:
    """Mean power per GPU in each cell of the grid, W, idle time included."""
    means = binned_timeline(run.timeline, 0.0, STEP_S * len(grid), len(grid), tp)
    assert means is not None  # one instance: iterations do not overlap
    power = means["power_w"].to_numpy(dtype=np.float64)
    begins_s = float(run.timeline["time_s"][0])
    return np.where(grid + STEP_S < begins_s, np.nan, power)  # nothing has come yet


def _waiting(run: Rollout, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Requests that have arrived and have no first token yet, at each time of the grid."""
    came = np.sort(np.asarray(run.requests["arrival_s"], dtype=np.float64))
    served = np.sort(np.asarray(run.requests["first_token_s"], dtype=np.float64))
    left = np.searchsorted(came, grid, side="right") - np.searchsorted(served, grid, side="right")
    return left.astype(np.float64)


def _late_s(run: Rollout, bound_s: float) -> NDArray[np.float64]:
    """When each late request got its first token, sorted, s."""
    first = np.asarray(run.requests["first_token_s"], dtype=np.float64)
    return np.sort(first[first - np.asarray(run.requests["arrival_s"]) > bound_s])


def burst(out: Path) -> None:
    """The burst under max clock and MPC as an animated SVG; without animation it shows the end."""
    plant = Plant(PlantSettings.of("prefill", actuation_delay_s=0.05, drain=True))
    trace = burst_trace()
    look_of = styles(["max", "mpc"])
    end_s = trace.duration_s
    seen = [look(n, look_of[n].color, plant, trace, end_s) for n in ("max", "mpc")]
    write_whole(out, animated(seen, end_s))


ROWS = (
    ("queue", "requests without their first token", None),
    ("clock", "clock, MHz", (400.0, 2000.0)),
    ("power", "power per GPU, W", (0.0, 720.0)),
)
LEFT, RIGHT, TOP, HEIGHT, GAP, WIDE = 62, 20, 64, 92, 20, 760


def animated(seen: list[Seen], end_s: float) -> str:
    """The SVG: panels whose lines are uncovered from left to right, and counters above."""
    tall = TOP + len(ROWS) * (HEIGHT + GAP) + 24
    inner = WIDE - LEFT - RIGHT
    run = f'dur="{PLAY_S:g}s" repeatCount="indefinite" keyTimes="0;{MOVING};1"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {tall}" width="{WIDE}" '
        f'font-family="sans-serif" font-size="12" role="img">',
        "<title>A burst of requests under max clock and under MPC: queue, clock, power</title>",
        f'<rect width="{WIDE}" height="{tall}" fill="white"/>',
        f'<clipPath id="seen"><rect x="{LEFT}" y="0" width="{inner}" height="{tall}">'
        f'<animate attributeName="width" values="0;{inner};{inner}" {run}/></rect></clipPath>',
    ]
    for k, (name, title, bounds) in enumerate(ROWS):
        top = TOP + k * (HEIGHT + GAP)
        high = max(float(np.nanmax(s.lines[name])) for s in seen)
        parts += _panel(top, title, bounds or (0.0, max(high, 1.0)))
        drawn = [_path(s, name, top, bounds or (0.0, max(high, 1.0)), end_s) for s in seen]
        parts.append(f'<g clip-path="url(#seen)">{"".join(drawn)}</g>')
    bottom = TOP + len(ROWS) * (HEIGHT + GAP) - GAP
    parts += [
        f'<text x="{LEFT + inner * t / end_s:.1f}" y="{bottom + 16}" text-anchor="middle" '
        f'fill="{MUTED}">{t:g} s</text>'
        for t in np.arange(0.0, end_s + 0.1, 5.0)
    ]
    parts += [text for n, s in enumerate(seen) for text in _counter(s, n, end_s)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(top: int, title: str, bounds: tuple[float, float]) -> list[str]:
    low, high = bounds
    lines = [f'<text x="{LEFT}" y="{top - 5}" fill="{INK}">{title}</text>']
    for value in (low, high):
        y = top + HEIGHT * (high - value) / (high - low)
        lines += [
            f'<path d="M{LEFT} {y:g}H{WIDE - RIGHT}" stroke="{GRID}"/>',
            f'<text x="{LEFT - 6}" y="{y + 4:g}" text-anchor="end" fill="{MUTED}">{value:g}</text>',
        ]
    return lines


def _path(s: Seen, name: str, top: int, bounds: tuple[float, float], end_s: float) -> str:
    """A line in steps; where there is no value it is broken."""
    low, high = bounds
    inner = WIDE - LEFT - RIGHT
    words: list[str] = []
    last: float | None = None
    for k, value in enumerate(s.lines[name]):
        x = LEFT + inner * k * STEP_S / end_s
        if not np.isfinite(value):
            last = None
            continue
        y = round(top + HEIGHT * (high - min(max(value, low), high)) / (high - low), 1)
        wide = inner * STEP_S / end_s
        if last is None:
            words.append(f"M{x:.1f} {y:g}h{wide:.1f}")
        else:
            words.append((f"V{y:g}" if y != last else "") + f"H{x + wide:.1f}")
        last = y
    return f'<path d="{"".join(words)}" fill="none" stroke="{s.color}" stroke-width="1.8"/>'


def _counter(s: Seen, line: int, end_s: float, frames: int = 24) -> list[str]:
    """Energy and late requests so far; one text per frame, of which one is shown at a time."""
    y = 18 + 18 * line
    label = "max clock" if s.name == "max" else s.name.upper()
    found = [
        f'<path d="M{LEFT} {y - 4}h24" stroke="{s.color}" stroke-width="3"/>',
        f'<text x="{LEFT + 32}" y="{y}" fill="{INK}" font-weight="bold">{label}</text>',
    ]
    for k in range(1, frames + 1):
        at = min(int(k / frames * len(s.energy_kj)), len(s.energy_kj)) - 1
        begin, end = MOVING * (k - 1) / frames, MOVING * k / frames
        last = k == frames
        times = f"0;{begin:.4f};{1 if last else end:.4f}" + ("" if last else ";1")
        values = "0;1;1" if last else "0;1;0;0"
        if k == 1:
            times, values = f"0;{end:.4f};1", "1;0;0"
        text = f"{s.energy_kj[at]:.1f} kJ, {s.late[at]:.0f} late"
        found.append(
            f'<text x="{LEFT + 120}" y="{y}" fill="{INK}" opacity="{1 if last else 0}">{text}'
            f'<animate attributeName="opacity" calcMode="discrete" dur="{PLAY_S:g}s" '
            f'repeatCount="indefinite" keyTimes="{times}" values="{values}"/></text>'
        )
    return found


def draw(docs: Path) -> None:
    """Both pictures into docs/readme."""
    home = docs / "readme"
    home.mkdir(exist_ok=True)
    energy(docs / "experiment-main.csv", home / "energy.svg")
    burst(home / "burst.svg")
