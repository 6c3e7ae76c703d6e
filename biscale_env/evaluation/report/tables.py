"""The summary as a table: on the console, in Markdown, and as cells for the report."""

import math
from collections.abc import Mapping
from typing import Any, Final

import pandas as pd
from rich.console import Console
from rich.table import Table

from biscale_env.evaluation.runs.record import REFERENCE_POLICY, SCENARIO_COLUMNS, is_bound
from biscale_env.evaluation.runs.results import scenario_label, summarise

MISSING: Final = "–"
_BOUND_MARK: Final = " (hindsight)"


def as_summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame itself when it is a summary, else the summary of a results frame."""
    return frame if "label" in frame.columns or frame.empty else summarise(frame)


def ordered(summary: pd.DataFrame) -> pd.DataFrame:
    """Rows of one operating point as they are read.

    Max clock, those that hold the target by energy, others, bounds.
    """
    rank = (~summary["target_met"].astype(bool)).astype(int) + 1
    rank = rank.mask(summary["policy"].map(is_bound), 3)
    rank = rank.mask(summary["policy"].eq(REFERENCE_POLICY) & summary["variant"].eq(""), 0)
    by = ["_rank", "energy_ratio", "energy_per_output_token_j", "label"]
    return summary.assign(_rank=rank).sort_values(by, kind="stable").drop(columns="_rank")


def points_of(summary: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Operating points of a summary with their rows in reading order."""
    if summary.empty:
        return []
    groups = summary.groupby(list(SCENARIO_COLUMNS), dropna=False, sort=False)
    return [(scenario_label(group.iloc[0].to_dict()), ordered(group)) for _, group in groups]


def number(value: float, digits: int = 3) -> str:
    """A number with some significant digits, no exponent; a dash when there is none."""
    if not math.isfinite(value):
        return MISSING
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{decimals}f}"


def ratio_text(ratio: float) -> str:
    """An energy ratio with three decimals; a dash when there is none."""
    return f"{ratio:.3f}" if math.isfinite(ratio) else MISSING


def duration(seconds: float) -> str:
    """A short time with its unit: 2.1 ms, 9.0 µs."""
    if not math.isfinite(seconds):
        return MISSING
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if abs(seconds) * scale >= 1.0 or unit == "µs":
            return f"{number(seconds * scale, 2)} {unit}"
    return MISSING


def interval(row: Mapping[str, Any], name: str, scale: float, decimals: int) -> str:
    """Confidence interval of a column as ``low–high``.

    Empty when there is none or it has no width.
    """
    low, high = (float(row.get(f"{name}_ci_{side}", math.nan)) for side in ("low", "high"))
    if not (math.isfinite(low) and math.isfinite(high)) or low == high:
        return ""
    return f"{low * scale:.{decimals}f}–{high * scale:.{decimals}f}"


def share(value: float) -> str:
    """A share as a percentage with two decimals, never rounded up to 100 %."""
    return f"{math.floor(1e4 * value + 1e-9) / 100:.2f}" if math.isfinite(value) else MISSING


def slo_words(row: Mapping[str, Any]) -> str:
    """``met``, ``as max`` (missed, but by no more than max clock and the allowance) or ``missed``.

    A ``?`` stands behind it when the interval of the attainment holds the requirement.
    """
    low, high = (float(row.get(f"attainment_ci_{side}", math.nan)) for side in ("low", "high"))
    if row["slo_met"]:
        word, asked = "met", float(row["slo_attainment"])
    else:
        word, asked = ("as max" if row["target_met"] else "missed"), float(row["target"])
    return word + ("?" if low < asked <= high else "")


def metrics_of(phase: str) -> tuple[str, ...]:
    """Which latencies a phase has."""
    return {"prefill": ("ttft",), "decode": ("tpot",)}.get(phase, ("ttft", "tpot"))


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Formatted cells of one summary row, by column heading."""
    found = {
        "controller": str(row["label"]) + (_BOUND_MARK if is_bound(str(row["policy"])) else ""),
        "J/output token": number(float(row["energy_per_output_token_j"])),
        "vs max": ratio_text(float(row["energy_ratio"])),
        "SLO attainment, %": share(float(row["attainment"])),
    }
    for metric in metrics_of(str(row["phase"])):
        for q in (50, 90, 99):
            found[f"{metric.upper()} P{q}, ms"] = number(1e3 * float(row[f"{metric}_p{q}_s"]))
    found["decision latency"] = duration(float(row["decision_time_median_s"]))
    found["decision latency P99"] = duration(float(row["decision_time_p99_s"]))
    found["fallbacks"] = str(int(row["solver_failures"]))
    found["SLO"] = slo_words(row)
    return found


def requirement(row: Mapping[str, Any]) -> str:
    """The SLO in words."""
    bounds = [
        f"{metric.upper()} ≤ {1e3 * row[f'slo_{metric}_s']:.4g} ms"
        for metric in metrics_of(str(row["phase"]))
    ]
    joint = " jointly" if row["slo_statistic"] == "joint" and len(bounds) > 1 else ""
    return f"{' and '.join(bounds)} for {100 * row['slo_attainment']:.4g} % of requests{joint}"


def infeasible(rows: pd.DataFrame) -> bool:
    """Whether max clock itself was run and misses the SLO here."""
    return bool(rows["feasible"].fillna(True).eq(False).any())


def verdict(rows: pd.DataFrame) -> str:
    """One sentence on one operating point.

    Who saves most while meeting the SLO, and what the bound is.
    """
    able = rows[rows["target_met"].astype(bool) & ~rows["policy"].map(is_bound)]
    if infeasible(rows):
        return _verdict_beside_max(rows, able)
    if able.empty:
        return "No controller meets the SLO here."
    if able["policy"].eq(REFERENCE_POLICY).all() and len(rows) > 1:
        return (
            "Only max clock meets the SLO here: no controller saves energy and keeps the promise."
        )
    first = able.sort_values(["energy_ratio", "energy_per_output_token_j"]).iloc[0].to_dict()
    energy = number(first["energy_per_output_token_j"])
    text = f"Least energy while meeting the SLO: {first['label']}, {energy} J per token"
    if math.isfinite(first["energy_ratio"]):
        text += f", {_change(first['energy_ratio'])} max clock"
    bound = rows[rows["policy"].map(is_bound) & rows["slo_met"].astype(bool)]
    if len(bound) and math.isfinite(bound["energy_ratio"].min()):
        text += f"; with the future known {_change(bound['energy_ratio'].min())} max clock"
    return text + "."


def _verdict_beside_max(rows: pd.DataFrame, able: pd.DataFrame) -> str:
    """Where max clock itself misses the SLO.

    Who saves most without losing more than the allowance to it.
    """
    reached = rows.loc[rows["policy"].eq(REFERENCE_POLICY), "attainment"].iloc[0]
    text = (
        f"Infeasible: max clock itself reaches only {share(float(reached))} % where the SLO asks "
        f"for {requirement(_plain(rows.iloc[0]))}; "
        f"controllers are judged by {share(float(rows['target'].iloc[0]))} % here"
    )
    others = able[~able["policy"].eq(REFERENCE_POLICY)].sort_values(
        ["energy_ratio", "energy_per_output_token_j"]
    )
    if others.empty:
        return f"{text}, and none holds it."
    first = others.iloc[0]
    change = _change(first["energy_ratio"])
    return f"{text}; least energy among those that hold it: {first['label']}, {change} max clock."


def _change(ratio: float) -> str:
    percent = 100 * (1 - ratio)
    return (
        f"{percent:.1f} % below"
        if percent >= 0.05
        else f"{-percent:.1f} % above"
        if percent <= -0.05
        else "equal to"
    )


_LEFT: Final = ("controller", "SLO")
_SHORT: Final = {
    "J/output token": "J per\ntoken",
    "SLO attainment, %": "in SLO\n%",
    "vs max": "vs\nmax",
    "decision latency": "deci-\nsion",
    "decision latency P99": "its\nP99",
    "fallbacks": "fell\nback",
} | {
    f"{metric} P{q}, ms": f"{metric}\nP{q} ms" for metric in ("TTFT", "TPOT") for q in (50, 90, 99)
}


def _plain(row: "pd.Series[Any]") -> dict[str, Any]:
    return {str(name): value for name, value in row.to_dict().items()}


def _table(rows: pd.DataFrame) -> list[dict[str, str]]:
    """Cells of all rows; the column of fallbacks only where a solver had to be replaced."""
    shown = [cells(_plain(row)) for _, row in rows.iterrows()]
    if all(row["fallbacks"] == "0" for row in shown):
        for row in shown:
            del row["fallbacks"]
    return shown


def summary_markdown(frame: pd.DataFrame) -> str:
    """Tables of a summary (or a results frame) in GitHub Markdown.

    One per operating point, each with its verdict.
    """
    parts = []
    for title, rows in points_of(as_summary(frame)):
        table = _table(rows)
        heads = list(table[0])
        lines = [f"**{title}**", "", "| " + " | ".join(heads) + " |"]
        lines.append(
            "| " + " | ".join("---" if head == "controller" else "---:" for head in heads) + " |"
        )
        lines += [
            "| " + " | ".join(row[head].replace("|", "\\|") for head in heads) + " |"
            for row in table
        ]
        parts.append("\n".join([*lines, "", verdict(rows)]))
    return "\n\n".join(parts) + ("\n" if parts else "")


def print_table(frame: pd.DataFrame, console: Console | None = None) -> None:
    """Print a summary (or a results frame) to the console, one table per operating point.

    Args:
        frame: summary or results.
        console: where to print; standard output by default.
    """
    out = console or Console()
    for title, rows in points_of(as_summary(frame)):
        shown = _table(rows)
        table = Table(
            title=title, title_justify="left", title_style="bold", header_style="dim", box=None
        )
        table.padding, table.pad_edge = (0, 1, 0, 0), False
        for head in shown[0]:
            table.add_column(
                _SHORT.get(head, head),
                justify="left" if head in _LEFT else "right",
                no_wrap=head != "controller",
            )
        for row, met in zip(shown, rows["target_met"], strict=True):
            row["controller"] = row["controller"].replace(_BOUND_MARK, "*")
            row["SLO"] = f"[{'green' if met else 'red'}]{row['SLO']}[/]"
            table.add_row(*row.values(), style="" if met else "dim")
        out.print(table)
        if rows["policy"].map(is_bound).any():
            out.print(
                "* a plan made with the whole future known and no actuation delay; no controller",
                style="dim",
                highlight=False,
            )
        out.print(verdict(rows), style="bold", highlight=False)
        out.print()
