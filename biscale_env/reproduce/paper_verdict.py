"""What of the paper's results is reproduced, and what is not: computed from the rows.

By how much it is not, and which changed assumption closes the difference.
"""

import numpy as np
import pandas as pd

from biscale_env.core.markdown import markdown_table
from biscale_env.reproduce.paper import OWN_LENGTHS
from biscale_env.reproduce.paper_tables import (
    COLUMNS,
    PUBLISHED,
    PUBLISHED_TIER2,
    chosen,
    percent,
    span,
    tier2_gain,
)

CLOSE = 1.0  # percentage points: nearer than that is said to be within a point of the range
CARRIES = 10.0  # percentage points between the lowest and the highest rate: more depends on load
ROUNDED = 0.5  # percentage points: what rounds to the end of the range reaches it

TITLES = {
    "distserve": "DistServe (max clock)",
    "static-best": "static best clock per phase",
    "placeonly": "PlaceOnly (tier 1)",
    "biscale": "BiScale (tier 1 + 2)",
    "tier2-only": "tier 2 only",
    "ecofreq": "EcoFreq",
    "throttllem": "throttLL'eM",
    "colocated": "co-located, max clock",
    "colocated-best": "co-located, best clock",
    "oracle-prefill": "prefill oracle (no delay)",
}


def one(summary: pd.DataFrame, point: str, system: str, variation: str = "") -> pd.Series | None:
    """The row of a system at a point, if it was run."""
    found = (
        summary["point"].eq(point)
        & summary["system"].eq(system)
        & summary["variation"].eq(variation)
    )
    return summary[found].iloc[0] if found.any() else None


def gap(ours: tuple[float, float], paper: tuple[float, float]) -> float:
    """Percentage points between two ranges.

    0 where they overlap, negative where ours saves more.
    """
    low, high = min(ours), max(ours)
    if low > paper[1]:
        return low - paper[1]
    return high - paper[0] if high < paper[0] else 0.0


def verdict(summary: pd.DataFrame, rows: pd.DataFrame) -> str:
    """The section that says what is reproduced and what carries the rest."""
    lines = []
    for (workload, load, stage, system), paper in PUBLISHED.items():
        for column in COLUMNS:
            if column.lengths == OWN_LENGTHS:
                continue  # the paper's lengths are not the trace's
            found = chosen(summary, workload, load, system, column).dropna(subset=[stage])
            if not len(found):
                continue
            where = f"{workload}{'' if load is None else f' {100 * load:.0f} %'}"
            title = f"- {where}, {stage}, {TITLES[system]}, {column.title}"
            served = found[found["feasible"].astype(bool)]
            missed = len(found) - len(served)
            if not len(served):
                lines.append(
                    f"{title}: misses the SLO at every point, so it does not compare "
                    f"({span(found[stage])})."
                )
                continue
            said = _compared(summary, served, stage, system, paper)
            besides = f" It misses the SLO at {missed} of {len(found)} points." if missed else ""
            lines.append(f"{title}: {span(served[stage])} {said}{besides}")
    parts = [
        _load(summary),
        _too_much(summary),
        _rules(summary),
        _tier2(rows, summary),
        _static(summary),
    ]
    parts += [_fallbacks(summary)]
    text = "\n".join(lines).replace("(-", "(−").replace("..-", "..−")
    return "\n\n".join(p for p in ["## Reproduced and not reproduced", text, *parts] if p)


def _compared(
    summary: pd.DataFrame, found: pd.DataFrame, stage: str, system: str, paper: tuple[int, int]
) -> str:
    apart = gap((100 * (found[stage].min() - 1), 100 * (found[stage].max() - 1)), paper)
    its = f"the paper's range ({paper[0]}..{paper[1]} %)"
    if apart == 0:
        return f"overlaps {its}."
    if abs(apart) < CLOSE:
        return f"lies within a point of {its}."
    less = "less" if apart > 0 else "more"
    text = f"saves {abs(apart):.1f} points {less} than {its}"
    members = span([*found[f"{stage}_member_low"], *found[f"{stage}_member_high"]])
    text += f" (members of the model ensemble: {members})" if members != "–" else ""
    return f"{text}; {_closers(summary, list(found['point']), stage, system, paper, apart > 0)}"


def _closers(
    summary: pd.DataFrame,
    points: list[str],
    stage: str,
    system: str,
    paper: tuple[int, int],
    falls_short: bool,
) -> str:
    """Which of the runs with one assumption changed reach the paper's range.

    And how far the others come.
    """
    varied = summary[
        summary["point"].isin(points) & (summary["variation"] != "") & (summary["system"] == system)
    ]
    varied = varied[varied["feasible"]]
    if not len(varied):
        return "no assumption was changed there."
    value = 100 * (varied[stage] - 1)
    above, below = value > paper[1] + ROUNDED, value < paper[0] - ROUNDED
    stays, passes = (above, below) if falls_short else (below, above)

    def named(which: "pd.Series[bool]") -> str:
        rows = varied[which].iterrows()
        return ", ".join(f"{row['variation']} ({percent(row[stage])} %)" for _, row in rows)

    inside, past, others = named(~(stays | passes)), named(passes), varied[stays]
    if not inside and not past:
        return (
            f"of the changed assumptions that were run there ({len(varied)}) none closes it "
            f"({span(varied[stage])})."
        )
    parts = [f"changing one assumption closes it: {inside}" if inside else ""]
    parts += [f"changing one goes past the range: {past}" if past else ""]
    if len(others):
        others_span = span(others[stage])
        parts += [f"the others that were run ({len(others)}) do not ({others_span})"]
    return "; ".join(part for part in parts if part) + "."


def _load(summary: pd.DataFrame) -> str:
    nominal = summary[
        (summary["variation"] == "")
        & (summary["workload"] == "A")
        & (summary["system"] == "biscale")
    ]
    a = nominal[nominal["feasible"] & (nominal["dtype"] == "bf16")].sort_values("rate_rps")
    if len(a) < 2:
        return ""
    first, last = a.iloc[0], a.iloc[-1]
    apart = 100 * (last["decode"] - first["decode"])
    runs = (
        f"from {percent(first['decode'])} % at {first['rate_rps']:g} requests/s to "
        f"{percent(last['decode'])} % at {last['rate_rps']:g} (bf16, lowest and highest "
        f"{span(a['decode'])})"
    )
    if abs(apart) < CARRIES:
        return (
            "**The load relative to DistServe's capacity does not carry the decode figure.** The "
            f"decode saving runs {runs}."
        )
    return (
        "**The load relative to DistServe's capacity carries the decode figure.** DistServe uses "
        f"all GPUs whatever the load, so the decode saving runs {runs}. What the paper's 67 % "
        "refers to is not known."
    )


def _too_much(summary: pd.DataFrame) -> str:
    """Loads of workload A that DistServe does not serve; whether the other number format does."""
    base = summary[
        (summary["variation"] == "")
        & (summary["workload"] == "A")
        & (summary["system"] == "distserve")
    ]
    served = {(row["dtype"], row["rate_rps"]): bool(row["feasible"]) for _, row in base.iterrows()}
    parts = []
    for (dtype, rate), met in served.items():
        other = {d: ok for (d, r), ok in served.items() if r == rate and d != dtype}
        if not met:
            saved = [d for d, ok in other.items() if ok]
            which = (
                f"; in {saved[0]} they are served, so the number format carries that"
                if saved
                else ""
            )
            parts.append(
                f"{rate:g} requests/s are beyond the cluster in {dtype}, even at the highest "
                f"clock{which}."
            )
    return "**The paper's highest rate.** " + " ".join(parts) if parts else ""


def _rules(summary: pd.DataFrame) -> str:
    """Where a simpler rule than MPC saves more in prefill on the same instances.

    And what the size of the batches has to do with it.
    """
    parts = []
    for point in summary.loc[
        (summary["variation"] == "") & (summary["workload"] == "B"), "point"
    ].unique():
        mpc, *others = (
            one(summary, point, name) for name in ("tier2-only", "ecofreq", "static-best")
        )
        if mpc is None:
            continue
        better = [
            r
            for r in others
            if r is not None and r["feasible"] and r["prefill"] < mpc["prefill"] - CLOSE / 100
        ]
        larger = all(
            r["requests_per_prefill_batch"] > mpc["requests_per_prefill_batch"] for r in better
        )
        if better and larger:
            parts.append(
                f"at {point} MPC {_batches(mpc)}, "
                + ", ".join(f"{TITLES[r['system']]} {_batches(r)}" for r in better)
            )
    if not parts:
        return ""
    return (
        "**A lower clock than MPC's can save more in prefill.** MPC takes the clocks of least "
        "energy for the batches it sees; a slower "
        "batch also lets more requests gather for the next, which share its fixed cost, and that "
        "is not in MPC's objective. "
        f"On DistServe's instances (requests per batch in brackets): {'; '.join(parts)}."
    )


def _batches(row: pd.Series) -> str:
    return f"{percent(row['prefill'])} % ({row['requests_per_prefill_batch']:.1f})"


def _tier2(rows: pd.DataFrame, summary: pd.DataFrame) -> str:
    """How much tier 2 adds where the headroom of tier 1 was fixed instead of chosen."""
    parts = []
    for variation in summary.loc[
        summary["variation"].str.contains("headroom"), "variation"
    ].unique():
        for point in summary.loc[summary["variation"] == variation, "point"].unique():
            pair = {v: _added(summary, point, v) for v in ("", variation)}
            if all(pair.values()):
                parts.append(f"{variation} at {point}: {pair[variation]} instead of {pair['']}")
    if not parts:
        return ""
    mean = {
        stage: f"{gain[0]:+.0f} %".replace("-", "−")
        for stage, gain in tier2_gain(rows, summary).items()
    }
    paper = {stage: f"{PUBLISHED_TIER2[stage][0]} %".replace("-", "−") for stage in mean}
    return (
        "**What tier 2 adds depends on the headroom of tier 1.** On top of tier 1 it changes "
        f"prefill by {mean.get('prefill')} on average "
        f"(paper {paper.get('prefill')}) and decode by {mean.get('decode')} (paper "
        f"{paper.get('decode')}). Here the headroom is the "
        "smallest that holds the SLO on the tuning workloads; with more, tier 1 runs faster and "
        "leaves more to tier 2 "
        f"(prefill / decode): {'; '.join(parts)}."
    )


def _added(summary: pd.DataFrame, point: str, variation: str) -> str:
    """Energy of BiScale against PlaceOnly, e.g. ``−20 / −7 %``.

    Empty where one of them was not run or misses the SLO.
    """
    both, tier1 = (one(summary, point, system, variation) for system in ("biscale", "placeonly"))
    if both is None or tier1 is None or not (both["feasible"] and tier1["feasible"]):
        return ""
    return " / ".join(percent(both[stage] / tier1[stage]) for stage in ("prefill", "decode")) + " %"


def _static(summary: pd.DataFrame) -> str:
    best, both = (
        summary[summary["system"].eq(name) & summary["variation"].eq("") & summary["feasible"]]
        for name in ("static-best", "biscale")
    )
    pairs = best.merge(both, on="point", suffixes=("_static", "_biscale"))
    if not len(pairs):
        return ""
    stages = " and ".join(
        f"{percent(float((pairs[f'{s}_biscale'] / pairs[f'{s}_static']).mean()))} % ({s})"
        for s in ("prefill", "decode")
    )
    return (
        "**A static clock is a strong rival.** Against DistServe's instances at the best static "
        "clock per phase, BiScale changes the "
        f"energy by {stages}, mean over the points that both serve ({len(pairs)})."
    )


def _fallbacks(summary: pd.DataFrame) -> str:
    """Points where tier 1 had nothing to offer: its placement is DistServe's, clocks included."""
    base = summary[summary["variation"] == ""]
    found = []
    for point in base["point"].unique():
        ref, plan = one(base, point, "distserve"), one(base, point, "placeonly")
        if (
            ref is not None
            and plan is not None
            and ref["placement"] == plan["placement"]
            and np.isclose(plan["total"], 1.0)
        ):
            found.append(point)
    if not found:
        return ""
    return (
        f"**Where tier 1 changes nothing** ({', '.join(found)}): by the table, no placement serves "
        "the forecast, so DistServe's is kept. "
        "R_c is what one instance serves alone; several behind one router serve more than their "
        "sum, which the programme cannot know."
    )


def tier2_table(rows: pd.DataFrame, summary: pd.DataFrame) -> str:
    """What tier 2 adds on top of tier 1, the paper's figure beside ours."""
    lines = []
    for stage, (mean, low, high) in tier2_gain(rows, summary).items():
        paper = PUBLISHED_TIER2[stage]
        lines.append(
            [
                stage,
                f"{paper[0]} % ({paper[1]}..{paper[2]})",
                f"{mean:+.0f} % ({low:+.0f}..{high:+.0f})",
            ]
        )
    head = [
        "tier 2 on top of tier 1",
        "paper (second-hand)",
        "ours, nominal plant, points that both serve",
    ]
    body = [
        [cell.replace("(-", "(−").replace("..-", "..−").replace("-", "−", 1) for cell in line]
        for line in lines
    ]
    return markdown_table(head, body, "l") if lines else ""
