"""Where the savings come from, as a table."""

from pathlib import Path
from typing import Any, Final

import pandas as pd

from biscale_env.core.files import write_whole
from biscale_env.core.markdown import markdown_table
from biscale_env.evaluation.runs import run_files
from biscale_env.evaluation.runs.record import REFERENCE_POLICY, SCENARIO_COLUMNS
from biscale_env.evaluation.runs.results import policy_label, scenario_label
from biscale_env.evaluation.runs.run_view import Run
from biscale_env.evaluation.stats.decomposition import decompose

HEADS: Final = (
    "controller",
    "energy, % of max clock",
    "clock",
    "batches",
    "idle",
    "iterations",
    "J per iteration of the same work",
)
NOTE: Final = (
    "Change of the energy against max clock in % of it, and its parts, which add up: fewer joules "
    "per iteration of the same work (clock), fewer and larger iterations (batches), idle power. "
    "Last two columns: relative to max clock."
)


def decomposition_rows(parts: pd.DataFrame) -> list[dict[str, str]]:
    """Formatted rows of one operating point, least energy first; max clock itself is left out."""
    shown = parts[~(parts["policy"].eq(REFERENCE_POLICY) & parts["variant"].eq(""))]
    rows = shown.sort_values("total", kind="stable").to_dict("records")
    return [dict(zip(HEADS, _cells(row), strict=True)) for row in rows]


def _cells(row: dict[Any, Any]) -> tuple[str, ...]:
    changes = (f"{100 * row[name]:+.1f}" for name in ("total", "clock", "batches", "idle"))
    factors = (f"{row[name]:.3f}" for name in ("iterations", "clock_factor"))
    return (policy_label(row), *changes, *factors)


def decomposition_markdown(results: pd.DataFrame) -> str:
    """Tables of a results frame in GitHub Markdown, one per operating point; empty without any."""
    parts = decompose(results)
    if parts.empty:
        return ""
    texts = []
    for _, rows in parts.groupby(list(SCENARIO_COLUMNS), dropna=False, sort=False):
        table = markdown_table(HEADS, [list(row.values()) for row in decomposition_rows(rows)])
        texts.append(f"**{scenario_label(rows.iloc[0].to_dict())}**\n\n{table}")
    return "\n\n".join([*texts, NOTE]) + "\n"


def write_decomposition(run: Run) -> Path | None:
    """Write ``decomposition.csv`` of a run directory; None where nothing can be decomposed."""
    parts = decompose(run.results)
    if parts.empty:
        return None
    target = run.path / run_files.DECOMPOSITION
    write_whole(target, parts.to_csv(index=False))
    return target
