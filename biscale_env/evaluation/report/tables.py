"""The summary as a table: on the console, in Markdown, and as cells for the report."""

import math
from collections.abc import Mapping
from typing import Any, Final

import pandas as pd
from rich.console import Console
from rich.table import Table

from biscale_env.evaluation.report.verdicts import compared_at_equal_attainment, verdict
from biscale_env.evaluation.report.words import (
    MISSING,
    duration,
    interval,
    metrics_of,
    number,
    ratio_text,
    share,
    slo_words,
)
from biscale_env.evaluation.runs.record import (
    BOUND_FAMILY,
    REFERENCE_POLICY,
    SCENARIO_COLUMNS,
    is_bound,
)
from biscale_env.evaluation.runs.results import scenario_label, summarise

_BOUND_MARK: Final = " (hindsight)"


def as_summary(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame itself when it is a summary, else the summary of a results frame."""
    return frame if "label" in frame.columns or frame.empty else summarise(frame)


def ordered(summary: pd.DataFrame) -> pd.DataFrame:
    """Rows of one operating point as they are read.

    Max clock, those that hold the target by energy, others, bounds. Where there are curves, energy
    is that at equal attainment, and it counts whether a curve reaches it.
    """
    curves = compared_at_equal_attainment(summary)
    held = summary["equal_ratio"].notna() if curves else summary["target_met"].astype(bool)
    rank = (~held).astype(int) + 1
    rank = rank.mask(summary["policy"].map(is_bound), 3)
    rank = rank.mask(summary["policy"].eq(REFERENCE_POLICY) & summary["variant"].eq(""), 0)
    first = ["equal_ratio"] if curves else []
    by = ["_rank", *first, "energy_ratio", "energy_per_output_token_j", "label"]
    return summary.assign(_rank=rank).sort_values(by, kind="stable").drop(columns="_rank")


def points_of(summary: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Operating points of a summary with their rows in reading order."""
    if summary.empty:
        return []
    groups = summary.groupby(list(SCENARIO_COLUMNS), dropna=False, sort=False)
    return [(scenario_label(group.iloc[0].to_dict()), ordered(group)) for _, group in groups]


def cells(row: Mapping[str, Any], curves: bool = False) -> dict[str, str]:
    """Formatted cells of one summary row, by column heading.

    Args:
        row: the row.
        curves: whether policies are compared at equal attainment.
    """
    found = {
        "controller": shown_name(row),
        **(equal_cells(row) if curves else {}),
        "J/output token": number(float(row["energy_per_output_token_j"])),
        "vs max": ratio_text(float(row["energy_ratio"])),
        "SLO attainment, %": share(float(row["attainment"])),
    }
    if "member_ratio_low" in row:
        found["vs max over members"] = ends(row, "member_ratio")
    for metric in metrics_of(str(row["phase"])):
        for q in (50, 90, 99):
            found[f"{metric.upper()} P{q}, ms"] = number(1e3 * float(row[f"{metric}_p{q}_s"]))
    found["decision latency"] = duration(float(row["decision_time_median_s"]))
    found["decision latency P99"] = duration(float(row["decision_time_p99_s"]))
    found["fallbacks"] = str(int(row["solver_failures"]))
    found["SLO"] = slo_words(row)
    return found


def shown_name(row: Mapping[str, Any], mark: str = _BOUND_MARK) -> str:
    """Name of a row: its label; of a plan made with the future known, what it is and its bound.

    In decode such a plan is the best one that was found, and no optimum.
    """
    if not is_bound(str(row["policy"])):
        return str(row["label"])
    found = row["policy"] == BOUND_FAMILY and row["phase"] == "decode"
    below = float(row.get("bound_below", math.nan))
    beside = f", bound {100 * below:.1f} % below" if math.isfinite(below) else ""
    return f"{'best plan found' if found else row['label']}{mark}{beside}"


def equal_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Energy at the SLO's attainment against max clock and the best static clock in hindsight.

    With 95 % intervals. A dash where no setting reaches it; ``≥`` where even the least setting lies
    above it, so that the policy gives more than was asked.
    """
    return {
        "at SLO vs max": equal_text(row, "equal_ratio"),
        "at SLO vs best static": equal_text(row, "static_ratio"),
    }


def equal_text(row: Mapping[str, Any], name: str) -> str:
    """One ratio at equal attainment with its interval."""
    ratio = float(row[name])
    if not math.isfinite(ratio):
        return MISSING
    above = ABOVE_MARK if row.get("equal_state") == "above" and row["policy"] != "max" else ""
    within = interval(row, name, 1.0, 3)
    return f"{ratio:.3f}{above}" + (f" [{within}]" if within else "")


def ends(row: Mapping[str, Any], name: str) -> str:
    """``low–high`` of a range; a dash where there is none, nothing where it has no width."""
    low, high = float(row[f"{name}_low"]), float(row[f"{name}_high"])
    if not math.isfinite(low):
        return MISSING
    return "" if low == high == 1.0 else f"{low:.3f}–{high:.3f}"


def load_caption(rows: pd.DataFrame) -> str:
    """What the load is a share of, in requests per second; empty where nobody said."""
    first = rows.iloc[0]
    if "capacity_rps" not in rows or math.isnan(first["load"]):
        return ""
    own, tune = float(first["capacity_rps"]), float(first["tune_capacity_rps"])
    load = f"{100 * first['load']:.0f} %"
    text = f"Load: {load} of the {number(own)} requests/s that max clock serves within the SLO"
    if not first["one_trace"]:
        return f"{text}."
    days = int(first["days"]) if "days" in rows else rows["day"].nunique() if "day" in rows else 0
    if days:
        return (
            f"{text} on {days} judged days, all windows at one multiple of their own rates; tuned "
            f"at {load} of the {number(tune)} requests/s that it serves on the other days."
        )
    return (
        f"{text} on the evaluated part of the trace; tuned at {load} of the {number(tune)} "
        "requests/s that it serves on the tuning part."
    )


ABOVE_MARK: Final = " ↑"
_LEFT: Final = ("controller", "SLO")
_SHORT: Final = {
    "J/output token": "J per\ntoken",
    "SLO attainment, %": "in SLO\n%",
    "vs max": "vs\nmax",
    "at SLO vs max": "at SLO\nvs max",
    "at SLO vs best static": "at SLO vs\nbest static",
    "vs max over members": "over\nmembers",
    "decision latency": "deci-\nsion",
    "decision latency P99": "its\nP99",
    "fallbacks": "fell\nback",
} | {
    f"{metric} P{q}, ms": f"{metric}\nP{q} ms" for metric in ("TTFT", "TPOT") for q in (50, 90, 99)
}
_EQUAL_NOTE: Final = (
    "at SLO: energy interpolated to the SLO's attainment; –: no setting reaches it; ↑: every "
    "setting attains more"
)
_ROOM_FOR_CURVES: Final = (  # columns that the console gives up for those of curves
    "TTFT P50, ms",
    "TTFT P90, ms",
    "TPOT P50, ms",
    "TPOT P90, ms",
    "decision latency",
    "decision latency P99",
    "fallbacks",
)


def _plain(row: "pd.Series[Any]") -> dict[str, Any]:
    return {str(name): value for name, value in row.to_dict().items()}


def _narrow(row: Mapping[str, str]) -> dict[str, str]:
    """Cells for a console of 80 columns: fewer of them, and an interval below its number."""
    return {
        head: text.removesuffix("]").replace(" [", "\n").replace("–", "–\n" if over else "–")
        for head, text in row.items()
        for over in [head == "vs max over members" and text != MISSING]
        if head not in _ROOM_FOR_CURVES
    }


def _table(rows: pd.DataFrame) -> list[dict[str, str]]:
    """Cells of all rows; the column of fallbacks only where a solver had to be replaced."""
    curves = compared_at_equal_attainment(rows)
    shown = [cells(_plain(row), curves) for _, row in rows.iterrows()]
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
        caption = load_caption(rows)
        parts.append("\n".join([*lines, "", *([caption, ""] if caption else []), verdict(rows)]))
    return "\n\n".join(parts) + ("\n" if parts else "")


def print_table(frame: pd.DataFrame, console: Console | None = None) -> None:
    """Print a summary (or a results frame) to the console, one table per operating point.

    Args:
        frame: summary or results.
        console: where to print; standard output by default.
    """
    out = console or Console()
    for title, rows in points_of(as_summary(frame)):
        shown, curves = _table(rows), compared_at_equal_attainment(rows)
        if curves:
            shown = [_narrow(row) for row in shown]
        table = Table(
            title=title, title_justify="left", title_style="bold", header_style="dim", box=None
        )
        table.padding, table.pad_edge = (0, 1, 0, 0), False
        for head in shown[0]:
            table.add_column(
                _SHORT.get(head, head),
                justify="left" if head in _LEFT else "right",
                no_wrap=head != "controller",
                overflow="fold",
            )
        for row, met in zip(shown, rows["target_met"], strict=True):
            row["controller"] = row["controller"].replace(_BOUND_MARK, "*")
            row["SLO"] = f"[{'green' if met else 'red'}]{row['SLO']}[/]"
            table.add_row(*row.values(), style="" if met else "dim")
        out.print(table)
        if caption := load_caption(rows):
            out.print(caption, style="dim", highlight=False)
        if curves:
            out.print(_EQUAL_NOTE, style="dim", highlight=False)
        if rows["policy"].map(is_bound).any():
            out.print(
                "* a plan made with the whole future known and no actuation delay; no controller",
                style="dim",
                highlight=False,
            )
        out.print(verdict(rows), style="bold", highlight=False)
        out.print()
