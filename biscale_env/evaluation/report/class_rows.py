"""What each SLO class was given, as a table of the report, the console and a file."""

from pathlib import Path
from typing import Any, Final

import pandas as pd
from rich.console import Console
from rich.table import Table

from biscale_env.core.files import write_whole
from biscale_env.evaluation.report.words import metrics_of, number, share
from biscale_env.evaluation.runs import run_files
from biscale_env.evaluation.runs.class_columns import class_table
from biscale_env.evaluation.runs.record import SCENARIO_COLUMNS
from biscale_env.evaluation.runs.results import policy_label, scenario_label
from biscale_env.evaluation.runs.run_view import Run

CLASSES_NOTE: Final = (
    "Requests of each SLO class, the share of them within their own bound and the share that was "
    "promised. The attainment above is that of the class that is worst off, where a miss counts as "
    "much as it uses up of what its class may miss."
)


def class_rows(classes: pd.DataFrame) -> list[dict[str, str]]:
    """Formatted rows of one operating point."""
    return [_cells(row) for row in classes.to_dict("records")]


def _cells(row: dict[Any, Any]) -> dict[str, str]:
    held = row["attainment"] >= row["asked"] * (1 - 1e-12)
    cells = {
        "controller": policy_label(row),
        "class": str(row["slo_class"]),
        "requests": f"{row['n_counted']:,}",
        "within the bound, %": share(float(row["attainment"])),
        "promised, %": share(float(row["asked"])),
        "held": "yes" if held else "no",
    }
    for metric in metrics_of(str(row["phase"])):
        cells[f"{metric.upper()} P99, ms"] = number(1e3 * row[f"{metric}_p99_s"])
        cells[f"{metric.upper()} bound, ms"] = number(1e3 * row[f"{metric}_bound_s"])
    return cells


def print_classes(run: Run, console: Console | None = None) -> None:
    """Print a table per operating point with classes; nothing without."""
    out, found = console or Console(), class_table(run.results)
    for _, rows in found.groupby(list(SCENARIO_COLUMNS), dropna=False, sort=False):
        shown = class_rows(rows)
        title = f"{scenario_label(rows.iloc[0].to_dict())}, by SLO class"
        table = Table(title=title, title_justify="left", title_style="bold", box=None)
        for k, head in enumerate(shown[0]):
            table.add_column(head, justify="left" if k < 2 else "right")
        for row in shown:
            table.add_row(*row.values())
        out.print(table)


def write_classes(run: Run) -> Path | None:
    """Write ``classes.csv`` of a run directory; None where the SLO has one bound for all."""
    found = class_table(run.results)
    if found.empty:
        return None
    target = run.path / run_files.CLASSES
    write_whole(target, found.to_csv(index=False))
    return target
