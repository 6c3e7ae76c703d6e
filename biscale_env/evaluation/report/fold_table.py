"""Both ways of a trace side by side: tuned on the first half and judged on the second, and back.

And their mean, which is what is claimed: a favourable order of the halves cannot be chosen.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pandas as pd

from biscale_env.core.markdown import markdown_table
from biscale_env.evaluation.report.verdicts import compared_at_equal_attainment
from biscale_env.evaluation.report.words import MISSING, share
from biscale_env.evaluation.runs.record import REFERENCE_POLICY, is_bound
from biscale_env.policies.policy_source import STATIC_BEST, STATIC_HINDSIGHT

POINT: Final = ["phase", "workload", "idle", "slo", "load", "tp", "dtype"]
"""Columns that name an operating point whichever half is judged."""
FOLDS: Final = ("forward", "backward")
HEADINGS: Final = {"forward": "second half judged", "backward": "first half judged"}
_EQUAL: Final = ("equal_ratio", "static_ratio")


def fold_means(summary: pd.DataFrame) -> pd.DataFrame:
    """One row per operating point and policy: every fold, and their mean.

    The mean is formed only where every fold that was run has a number. Its interval takes the folds
    as independent (they share no request): half-widths add as squares.

    Args:
        summary: of a run whose points have the columns ``workload`` and ``fold``.

    Returns:
        Columns of :data:`POINT`, ``policy``, ``folds`` (of ``of_folds`` that there could be; one
        may be infeasible) and for each of ``equal_ratio`` and
        ``static_ratio``: ``<name>`` (mean), ``<name>_ci_low``, ``<name>_ci_high``,
        ``<name>_forward``, ``<name>_backward``; ``tuned_ratio`` and ``attainment`` as tuned, means
        too; ``held`` in how many folds the tuned setting held the target.
    """
    if "idle" not in summary:
        summary = summary.assign(idle="last-clock")
    keys = [*POINT, "policy"]
    return pd.DataFrame(
        [
            dict(zip(keys, values, strict=True)) | _over_folds(rows)
            for values, rows in summary.groupby(keys, dropna=False, sort=False)
        ]
    )


def _over_folds(rows: pd.DataFrame) -> dict[str, Any]:
    by_fold = {str(row["fold"]): row for row in rows.to_dict("records")}
    found: dict[str, Any] = {
        "folds": len(by_fold),
        "of_folds": len(FOLDS) if bool(rows["one_trace"].iloc[0]) else 1,
        "tuned_ratio": float(rows["energy_ratio"].mean()),
        "attainment": float(rows["attainment"].mean()),
        "held": int(rows["target_met"].astype(bool).sum()),
    }
    for name in _EQUAL:
        found |= {f"{name}_{fold}": float(row[name]) for fold, row in by_fold.items()}
        found |= dict(
            zip((name, f"{name}_ci_low", f"{name}_ci_high"), _mean(rows, name), strict=True)
        )
    return found


def _mean(rows: pd.DataFrame, name: str) -> tuple[float, float, float]:
    values, n = rows[name].to_numpy(dtype=float), len(rows)
    mean = float(values.mean())  # NaN as soon as one fold has no number
    if not math.isfinite(mean):
        return math.nan, math.nan, math.nan
    lower, upper = (
        math.sqrt(float(((rows[f"{name}_ci_{side}"].to_numpy(dtype=float) - values) ** 2).sum()))
        / n
        for side in ("low", "high")
    )
    return mean, mean - lower, mean + upper


def matrix_markdown(summary: pd.DataFrame, name: str = "equal_ratio") -> str:
    """Policies down, workloads and loads across, a table per phase and idle rule.

    A cell is the mean over folds with its interval, below it the folds themselves (second half
    judged / first half judged); the least of a column is bold, bounds and max clock aside.

    Args:
        summary: of a tuned run.
        name: ``equal_ratio`` (against max clock) or ``static_ratio`` (against the best static clock
            in hindsight).
    """
    if not compared_at_equal_attainment(summary):
        return ""
    means = fold_means(summary)
    parts = []
    for (phase, idle), rows in means.groupby(["phase", "idle"], sort=False):
        points = list(dict.fromkeys(zip(rows["workload"], rows["load"], strict=True)))
        shown = rows[~rows["policy"].map(is_bound) & ~rows["policy"].eq(STATIC_BEST)]
        order = shown.groupby("policy")[name].mean().sort_values(na_position="last").index
        heads = ["controller", *(f"{w}, {load:.0%}" for w, load in points)]
        cells = []
        best = {point: _least(shown, point, name) for point in points}
        for policy in order:
            mine = {
                (row["workload"], row["load"]): row
                for row in shown[shown["policy"].eq(policy)].to_dict("records")
            }
            texts = [_cell(mine.get(point), name, policy == best[point]) for point in points]
            cells.append([str(policy), *texts])
        if name == "equal_ratio":
            cells += _bound_rows(rows, points)
        title = f"**{phase}, idle at {IDLE_WORDS[str(idle)]}**"
        parts.append(f"{title}\n\n{markdown_table(heads, cells)}")
    return "\n\n".join(parts)


def _bound_rows(rows: pd.DataFrame, points: list[tuple[str, float]]) -> list[list[str]]:
    """Plans that know the future are cut to the SLO's attainment already: as they are."""
    lines = []
    for policy, mine in rows[rows["policy"].map(is_bound)].groupby("policy", sort=False):
        ratios = {(r["workload"], r["load"]): r["tuned_ratio"] for r in mine.to_dict("records")}
        cells = [f"{ratios[point]:.3f}" if point in ratios else "" for point in points]
        lines.append([f"*{policy}*", *cells])
    return lines


IDLE_WORDS: Final = {"last-clock": "the last clock", "parked": "the same parked power for all"}


def _least(rows: pd.DataFrame, point: tuple[str, float], name: str) -> str:
    here = rows[
        rows["workload"].eq(point[0])
        & rows["load"].eq(point[1])
        & ~rows["policy"].eq(REFERENCE_POLICY)
        & rows[name].notna()
    ]
    return "" if here.empty else str(here.sort_values(name)["policy"].iloc[0])


def _cell(row: Mapping[Any, Any] | None, name: str, bold: bool) -> str:
    if row is None:
        return ""
    folds = [float(row[f"{name}_{fold}"]) for fold in FOLDS if f"{name}_{fold}" in row]
    each = [f"{value:.3f}" if math.isfinite(value) else MISSING for value in folds]
    mean = float(row[name])
    if not math.isfinite(mean):
        return " / ".join(each) if len(each) > 1 else MISSING
    half = 0.5 * (float(row[f"{name}_ci_high"]) - float(row[f"{name}_ci_low"]))
    spread = f" ±{1e3 * half:.0f}" if half >= 5e-4 else ""
    text = f"**{mean:.3f}**{spread}" if bold else f"{mean:.3f}{spread}"
    if row["folds"] > 1:
        return f"{text} ({' / '.join(each)})"
    return f"{text}, one half" if row["of_folds"] > 1 else text


def winners_markdown(summary: pd.DataFrame) -> str:
    """Who needs least energy at the SLO's attainment, per operating point and idle rule.

    A cell names the policy, its energy against max clock and against the best static clock in
    hindsight (means over folds), whether that differs from it, and what its tuned setting did.
    """
    if not compared_at_equal_attainment(summary):
        return ""
    means = fold_means(summary)
    rules = list(dict.fromkeys(means["idle"]))
    heads = ["phase", "workload, load", *(f"idle at {IDLE_WORDS[r]}" for r in rules)]
    cells = []
    for (phase, workload, load), rows in means.groupby(["phase", "workload", "load"], sort=False):
        point = (str(workload), float(str(load)))
        texts = [_winner(rows[rows["idle"].eq(rule)], point) for rule in rules]
        cells.append([str(phase), f"{workload}, {point[1]:.0%}", *texts])
    return markdown_table(heads, cells, "l")


def ranges_markdown(summary: pd.DataFrame, policies: Mapping[str, Sequence[str]]) -> str:
    """Energy of a few policies over all operating points: least to most, a row per idle rule.

    Args:
        summary: of a tuned run.
        policies: per phase the policies to show, bounds among them; as many for each phase.

    Returns:
        A table; in brackets at how many operating points a policy has a number in every fold.
    """
    means = fold_means(summary)
    kinds = zip(*policies.values(), strict=True)
    heads = ["phase, idle GPUs", *(" / ".join(dict.fromkeys(names)) for names in kinds)]
    cells = []
    for (phase, idle), rows in means.groupby(["phase", "idle"], sort=False):
        points = len(rows[["workload", "load"]].drop_duplicates())
        texts = [_range(rows[rows["policy"].eq(name)], points) for name in policies[str(phase)]]
        cells.append([f"{phase}, {IDLE_WORDS[str(idle)]}", *texts])
    return markdown_table(heads, cells)


def _range(rows: pd.DataFrame, points: int) -> str:
    bounded = rows["policy"].map(is_bound).any()
    values = rows["tuned_ratio" if bounded else "equal_ratio"].dropna()
    if values.empty:
        return MISSING
    reached = "" if len(values) == points else f" ({len(values)} of {points})"
    return f"{values.min():.2f}–{values.max():.2f}{reached}"


def _winner(rows: pd.DataFrame, point: tuple[str, float]) -> str:
    own = rows[
        ~rows["policy"].map(is_bound) & ~rows["policy"].isin([STATIC_BEST, STATIC_HINDSIGHT])
    ]
    name = _least(own, point, "equal_ratio")
    if not name:
        return "no controller in both folds"
    row = own[own["policy"].eq(name)].iloc[0].to_dict()
    text = f"{name}: {row['equal_ratio']:.3f} of max clock"
    if math.isfinite(row["static_ratio"]):
        low, high = row["static_ratio_ci_low"], row["static_ratio_ci_high"]
        apart = "" if math.isnan(low) or not low <= 1.0 <= high else ", not told apart"
        text += f", {row['static_ratio']:.3f} of best static{apart}"
    return f"{text}; as tuned {tuned_words(row)}"


def tuned_words(row: Mapping[Any, Any]) -> str:
    """A policy as tuned, over folds: ratio, attainment, in how many folds it held the target."""
    return (
        f"{row['tuned_ratio']:.3f} at {share(float(row['attainment']))} % "
        f"(held in {row['held']} of {row['folds']})"
    )
