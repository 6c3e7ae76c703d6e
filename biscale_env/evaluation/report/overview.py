"""The first tables of a report: every controller at every operating point of a phase."""

import math
from typing import Any

import pandas as pd

from biscale_env.evaluation.report import tables, verdicts, words
from biscale_env.evaluation.report.drawing.figure_style import at_point, without_variants
from biscale_env.evaluation.runs.run_view import Run


def point_title(point: dict[str, Any]) -> str:
    """Short title of an operating point."""
    where = f"{str(point['phase']).capitalize()}: {point['scenario']}{_load(point)}"
    return f"{where}, SLO {point['slo']}"


def _load(point: dict[str, Any]) -> str:
    return "" if pd.isna(point["load"]) else f" at {100 * point['load']:.0f} % load"


def overviews(run: Run) -> list[dict[str, Any]]:
    """Energy relative to max clock of every policy at every operating point, a table per phase.

    A policy that is there in several settings shows its default, else the best of those that meet
    the SLO. Rows name the SLO only where the run has several.
    """
    numbered = list(enumerate(run.points()))
    summary = run.summary()
    one_slo = len({point["slo"] for _, point in numbered}) == 1
    found = []
    for phase in dict.fromkeys(point["phase"] for _, point in numbered):
        here = [(number, point) for number, point in numbered if point["phase"] == phase]
        of_points = [without_variants(tables.ordered(at_point(summary, p))) for _, p in here]
        labels = list(dict.fromkeys(pd.concat(of_points)["policy"]))
        rows = []
        for (number, point), shown in zip(here, of_points, strict=True):
            by_name = shown.drop_duplicates("policy").set_index("policy")
            slo = "" if one_slo else f", SLO {point['slo']}"
            rows.append(
                {
                    "id": f"point-{number}",
                    "title": f"{point['scenario']}{_load(point)}{slo}",
                    "cells": [
                        _cell(by_name.loc[name]) if name in by_name.index else None
                        for name in labels
                    ],
                    "infeasible": verdicts.infeasible(by_name),
                }
            )
        curves = verdicts.compared_at_equal_attainment(pd.concat(of_points))
        title = str(phase).capitalize()
        found.append({"title": title, "labels": labels, "rows": rows, "curves": curves})
    return found


def _cell(row: Any) -> dict[str, Any]:
    """Energy at equal attainment where there are curves, else as it is with its attainment."""
    if row.get("equal_state"):
        named = {**row.to_dict(), "policy": row.name}
        return {
            "text": tables.equal_text(named, "equal_ratio").partition(" [")[0],
            "met": bool(math.isfinite(row["equal_ratio"])),
            "attainment": "",
        }
    ratio = float(row["energy_ratio"])
    text = (
        words.ratio_text(ratio)
        if math.isfinite(ratio)
        else words.number(float(row["energy_per_output_token_j"]))
    )
    return {
        "text": text,
        "met": bool(row["target_met"]),
        "attainment": words.share(float(row["attainment"])),
    }
