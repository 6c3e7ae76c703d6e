"""Pages of experiments: every table of a run, phase by phase.

A run of one phase renews that phase's part of a page and leaves the other as it is: nothing in a
phase depends on the other.
"""

import io
import math
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from biscale_env.core.markdown import markdown_table
from biscale_env.evaluation.report.fold_table import (
    matrix_markdown,
    ranges_markdown,
    winners_markdown,
)
from biscale_env.evaluation.report.tables import summary_markdown
from biscale_env.evaluation.runs.results import scenario_label
from biscale_env.evaluation.runs.run_view import Run
from biscale_env.policies.policy_source import PHASES

HEADLINE = {
    "prefill": ("static-hindsight", "mpc", "mpc-plus", "agent", "oracle"),
    "decode": ("static-hindsight", "slack", "slack-plus", "agent", "oracle"),
}

PART = re.compile(r"<!-- begin:(\w+) -->\n(.*?)<!-- end:\1 -->", re.DOTALL)


def write_csv(path: Path, summary: pd.DataFrame) -> None:
    """Ratios, attainments and intervals; rows of phases that are not in the summary stay."""
    equal = ("equal_", "static_ratio", "member_ratio")
    columns = [c for c in summary if c.endswith(("_ci_low", "_ci_high")) or c.startswith(equal)]
    keys = [
        "phase",
        "scenario",
        "load",
        "slo",
        "policy",
        "energy_ratio",
        "attainment",
        "slo_met",
        "target",
        "target_met",
    ]
    rows = summary[list(dict.fromkeys([*keys, *columns]))].round(4)
    if path.is_file():
        as_text = {"dtype": str, "keep_default_na": False}
        kept = pd.read_csv(path, **as_text)
        kept = kept[~kept["phase"].isin(rows["phase"])]
        fresh = pd.read_csv(io.StringIO(rows.to_csv(index=False)), **as_text)
        rows = pd.concat([fresh, kept]).fillna("")
        rows = rows.sort_values("phase", key=lambda of: of.map(PHASES.index), kind="stable")
    path.write_text(rows.to_csv(index=False))


def write_page(path: Path, name: str, run: Run) -> None:
    """The whole tables of a run, a part per phase; parts of other phases stay.

    Raises:
        SystemExit: a page of another form is there.
    """
    kept = dict(PART.findall(path.read_text())) if path.is_file() else {}
    if path.is_file() and not kept:
        raise SystemExit(f"{path} has no parts between markers of phases: delete it")
    for phase, (summary, results) in by_phase(run).items():
        blocked = [one for one in run.infeasible if one["phase"] == phase]
        kept[phase] = _part(phase, summary, results, blocked)
    parts = (
        f"<!-- begin:{phase} -->\n{kept[phase].strip()}\n<!-- end:{phase} -->\n"
        for phase in PHASES
        if phase in kept
    )
    path.write_text(
        f"# Experiment `{name}`\n\nMade by `biscale compare --experiment {name}`; 95 % intervals"
        f" are in `experiment-{name}.csv`. What the columns mean and how settings were chosen:"
        " [How we compare](how-we-compare.md).\n\n" + "\n".join(parts)
    )


def by_phase(run: Run) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Summary and results of each phase, with a column ``point`` that tells its points apart.

    A phase that cannot be served at any point has none in either.
    """
    summary, results = run.summary(), run.results
    blocked = {str(one["phase"]) for one in run.infeasible}
    found = {}
    for phase in PHASES:
        parts = [frame[frame["phase"] == phase].copy() for frame in (summary, results)]
        if parts[0].empty and phase not in blocked:
            continue
        varied = [c for c in ("scenario", "slo", "load") if parts[0][c].nunique() > 1]
        for frame in parts:
            frame["point"] = frame[varied or ["scenario"]].astype(str).agg(", ".join, axis=1)
        found[phase] = (parts[0], parts[1])
    return found


def _part(
    phase: str,
    summary: pd.DataFrame,
    results: pd.DataFrame,
    infeasible: list[Mapping[str, object]],
) -> str:
    if summary.empty:
        return f"## {phase}\n" + _infeasible(infeasible)
    return (
        f"## {phase}\n\n"
        + both_ways(summary)
        + summary_markdown(summary)
        + _infeasible(infeasible)
        + "\n### Energy while iterations run, idling left out, relative to max clock\n\n"
        + busy_matrix(phase, results)
        + "\n"
        + oracle_facts(phase, results)
    )


def _infeasible(points: list[Mapping[str, object]]) -> str:
    return "".join(
        f"\n**{scenario_label(point)}**: infeasible, since {point['reason']}.\n" for point in points
    )


def blocks(name: str, run: Run) -> dict[str, str]:
    """Blocks of docs/results.md by name: the matrix per phase, the ranges of the main table."""
    found = {}
    for phase, (summary, results) in by_phase(run).items():
        if summary.empty:
            continue
        if name == "main":
            found[f"ranges-{phase}"] = ranges_markdown(summary, {phase: HEADLINE[phase]})
            found[f"main-{phase}"] = matrix_markdown(summary)
        else:
            found[f"{name}-{phase}"] = matrix(phase, summary, results)
    return found


def cell(row: pd.Series) -> str:
    """Energy ratio of one controller at one point.

    At equal attainment where there are curves (a dash where none of its settings reaches it); else
    as it is, with attainment (never rounded up), struck through where the target is missed.
    """
    if "equal_ratio" in row and row["equal_state"]:
        if not math.isfinite(row["equal_ratio"]):
            return "–"
        half = 0.5 * (row["equal_ratio_ci_high"] - row["equal_ratio_ci_low"])
        return f"{row['equal_ratio']:.3f}" + (f" ±{1e3 * half:.0f}" if half >= 5e-4 else "")
    attainment = math.floor(1e4 * row["attainment"] + 1e-9) / 100
    half = 0.5 * (row["energy_ratio_ci_high"] - row["energy_ratio_ci_low"])
    spread = f" ±{1e3 * half:.0f}" if row["policy"] != "max" and math.isfinite(half) else ""
    text = f"{row['energy_ratio']:.3f}{spread} ({attainment:.2f})"
    return text if row["target_met"] else f"~~{text}~~"


def table(cells: pd.DataFrame, heads: list[str]) -> str:
    """Markdown of policies (index) by operating points (columns)."""
    rows = [(policy, *row) for policy, row in cells.fillna("").iterrows()]
    return markdown_table(["controller", *heads], rows)


def bounds(results: pd.DataFrame) -> dict[str, str]:
    """Energy ratio below which no controller can go at any delay, per point of a phase."""
    found = {}
    if "oracle_lower_bound_any_delay_j" in results:
        tops = results[results["policy"] == "max"].set_index(
            ["point", "workload_seed", "ensemble_member"]
        )["energy_j"]
        for point, rows in results[results["policy"] == "oracle"].groupby("point", sort=False):
            ratios = [
                r["oracle_lower_bound_any_delay_j"]
                / tops[(point, r["workload_seed"], r["ensemble_member"])]
                for _, r in rows.iterrows()
            ]
            found[str(point)] = f"{sum(ratios) / len(ratios):.3f}"
    return found


def natural(text: str) -> list[tuple[float, str]]:
    """Sorting key that counts: 50 ms comes before 100 ms."""
    return [
        (float(part), "") if re.fullmatch(r"[0-9.]+", part) else (math.inf, part)
        for part in re.split(r"([0-9.]+)", text)
        if part
    ]


def matrix(phase: str, summary: pd.DataFrame, results: pd.DataFrame) -> str:
    """A phase: policies down, operating points across; then the bound."""
    heads = sorted(dict.fromkeys(summary["point"]), key=natural)
    blocked = set(summary.loc[summary["feasible"].eq(False), "point"])
    means = summary.groupby("policy")["energy_ratio"].mean().sort_values(ascending=False)
    cells = pd.DataFrame(
        {
            p: {r["policy"]: cell(r) for _, r in summary[summary["point"] == p].iterrows()}
            for p in heads
        }
    ).reindex(list(means.index))
    low = bounds(results)
    if low:
        cells.loc["*lower bound*"] = [low.get(p, "") for p in heads]
    return f"**{phase}**\n\n" + table(cells, [f"{p} †" if p in blocked else str(p) for p in heads])


def busy_matrix(phase: str, results: pd.DataFrame) -> str:
    """Energy of a phase while iterations run, idling left out, relative to max clock."""
    frame = results.assign(busy_j=results["energy_j"] - results["energy_idle_j"])
    sums = frame.groupby(["policy", "point"], sort=False)["busy_j"].mean().unstack()
    ratios = (sums / sums.loc["max"]).round(3)[sorted(sums.columns, key=natural)]
    ratios = ratios.sort_values(ratios.columns[0], ascending=False)
    return f"**{phase}**\n\n" + table(ratios, list(ratios.columns))


def oracle_facts(phase: str, results: pd.DataFrame) -> str:
    """How far plan and bound of a phase's optimum lie apart, per point.

    Empty where no optimum was computed.
    """
    rows = results[results["policy"] == "oracle"]
    if rows.empty:
        return ""
    heads = (
        "phase",
        "point",
        "workloads",
        "plan above its bound, % (worst)",
        "time of one workload, s (worst)",
    )
    cells = []
    for point, group in rows.groupby("point", sort=False):
        gap, seconds = 100 * group["oracle_gap"], group["oracle_seconds"]
        shown = [f"{x.mean():.{n}f} ({x.max():.{n}f})" for x, n in ((gap, 2), (seconds, 1))]
        cells.append((phase, point, len(group), *shown))
    return (
        "\n### How good the optimum is\n\nPrefill: the plan is that of an exact programme on cells"
        " of time, so what lies between it and the bound is the cells and the multiplier (the"
        " duality gap). Decode: between the best plan of a search and the bound of a"
        " relaxation.\n\n" + markdown_table(heads, cells, "llr") + "\n"
    )


def both_ways(summary: pd.DataFrame) -> str:
    """Both folds and their mean, and who wins; empty where only one was run."""
    if "fold" not in summary or summary["fold"].nunique() < 2:
        return ""
    return (
        "### Least energy at the SLO's attainment\n\n"
        + winners_markdown(summary)
        + "\n\n### Relative to max clock, mean (second half judged / first half judged)\n\n"
        + matrix_markdown(summary)
        + "\n\n### Relative to the best static clock in hindsight\n\n"
        + matrix_markdown(summary, "static_ratio")
        + "\n\n### Every operating point\n\n"
    )
