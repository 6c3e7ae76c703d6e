"""From the rows of the headline experiment to its tables.

Ratios to DistServe on the same work, intervals, feasibility.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from biscale_env.evaluation.stats.bootstrap import student_interval
from biscale_env.reproduce.paper import OWN_LENGTHS, PAPER_LENGTHS

KEY = ["point", "variation", "member", "seed"]
NOMINAL = -1
STAGES = ("prefill", "decode", "total")
# without waiting instances; without spare GPUs
OTHER = ("prefill_busy", "decode_busy", "in_service")
SETTING = (
    "workload",
    "dtype",
    "load",
    "lengths",
    "arrivals",
    "rate_rps",
    "placement",
    "alpha",
    "gpus_mean",
)
SUBSAMPLED = "B"
"""Workload whose seeds are subsamples of one stretch of time, and so no independent evidence."""
ENSEMBLE = (0.05, 0.95)

# Energy against DistServe as BiScale reports it (arXiv 2602.18755; second-hand, may be mis-copied):
# (lowest, highest), %.
PUBLISHED = {
    ("A", None, "prefill", "placeonly"): (-31, -20),
    ("A", None, "prefill", "biscale"): (-36, -27),
    ("B", 0.67, "prefill", "placeonly"): (-29, -16),
    ("B", 0.67, "prefill", "biscale"): (-39, -28),
    ("B", 0.67, "decode", "placeonly"): (-45, -37),
    ("B", 0.67, "decode", "biscale"): (-48, -44),
}
PUBLISHED_TIER2 = {
    "prefill": (-15, -29, -9),
    "decode": (-6, -20, 4),
}  # (mean, best, worst) on top of tier 1, %


def with_ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """Add ``<stage>_ratio``: energy per output token relative to DistServe.

    Each run is compared on the same work in the same plant. Co-located servers have no stages; only
    their total compares.
    """
    frame = frame.assign(variation=frame["variation"].fillna(""))
    frame = frame.assign(
        in_service_j_per_token=frame["total_j_per_token"] - frame["spare_j_per_token"]
    )
    columns = [f"{s}_j_per_token" for s in (*STAGES, *OTHER)]
    reference = frame[frame["system"] == "distserve"].set_index(KEY)[columns].add_suffix("_ref")
    joined = frame.join(reference, on=KEY)
    for stage in (*STAGES, *OTHER):
        joined[f"{stage}_ratio"] = (
            joined[f"{stage}_j_per_token"] / joined[f"{stage}_j_per_token_ref"]
        )
    for stage in ("prefill", "decode", "prefill_busy", "decode_busy"):
        joined.loc[joined["system"].str.startswith("colocated"), f"{stage}_ratio"] = np.nan
    known = [f"{s}_ratio" for s in (*STAGES, *OTHER) if s != "prefill"]
    joined.loc[joined["system"] == "oracle-prefill", known] = np.nan
    return joined


def attainment(group: pd.DataFrame) -> tuple[float, float]:
    """TTFT and TPOT attainment over the runs of a group, requests weighted alike."""
    weights = group["requests"]
    return tuple(
        float(np.average(group[f"attainment_{m}"], weights=weights)) for m in ("ttft", "tpot")
    )  # type: ignore[return-value]


def summarise(frame: pd.DataFrame, required: float = 0.99) -> pd.DataFrame:
    """One row per (point, variation, system).

    Nominal mean and interval, range over the ensemble, attainment.

    Args:
        frame: rows with ratios, from :func:`with_ratios`.
        required: fraction of requests that must meet each bound.
    """
    rows = []
    for (point, variation, system), group in frame.groupby(
        ["point", "variation", "system"], sort=False
    ):
        nominal = group[group["member"] == NOMINAL]
        members = group[group["member"] != NOMINAL]
        row: dict[str, Any] = {"point": point, "variation": variation, "system": system}
        row |= {name: (nominal if len(nominal) else group)[name].iloc[0] for name in SETTING}
        for stage in STAGES:
            row |= _stage_columns(stage, nominal, members)
        row |= {stage: float(nominal[f"{stage}_ratio"].mean()) for stage in OTHER}
        row["requests_per_prefill_batch"] = float(nominal["requests_per_prefill_batch"].mean())
        rows.append(row | _slo_columns(nominal, members, required))
    return pd.DataFrame(rows)


def _stage_columns(stage: str, nominal: pd.DataFrame, members: pd.DataFrame) -> dict[str, float]:
    """Mean and interval of a stage's ratio in the nominal plant, its range over the ensemble.

    No interval for workload B: its seeds are subsamples of one half of a trace.
    """
    mean, low, high = student_interval(nominal[f"{stage}_ratio"])
    if (nominal["workload"] == SUBSAMPLED).any():
        low = high = np.nan
    per_member = members.groupby("member")[f"{stage}_ratio"].mean().dropna()
    ends = per_member.quantile(list(ENSEMBLE)).tolist() if len(per_member) else [np.nan, np.nan]
    return {
        stage: mean,
        f"{stage}_low": low,
        f"{stage}_high": high,
        f"{stage}_member_low": ends[0],
        f"{stage}_member_high": ends[1],
        f"{stage}_j_per_token": float(nominal[f"{stage}_j_per_token"].mean()),
    }


def _slo_columns(
    nominal: pd.DataFrame, members: pd.DataFrame, required: float
) -> dict[str, float | bool]:
    """Attainment and P99 in the nominal plant, and the fraction of members that are feasible."""
    ttft, tpot = attainment(nominal) if len(nominal) else (np.nan, np.nan)
    met = [min(attainment(group)) >= required for _, group in members.groupby("member")]
    return {
        "attainment_ttft": ttft,
        "attainment_tpot": tpot,
        "feasible": min(ttft, tpot) >= required,
        "ttft_p99_s": nominal["ttft_p99_s"].mean(),
        "tpot_p99_s": nominal["tpot_p99_s"].mean(),
        "members_feasible": float(np.mean(met)) if met else np.nan,
    }


def percent(ratio: float) -> str:
    """A ratio as a change, e.g. ``-28``; a dash where there is none."""
    return "–" if not np.isfinite(ratio) else f"{100 * (ratio - 1):+.0f}".replace("-", "−")


def span(values: Iterable[float]) -> str:
    """Range of changes, e.g. ``−28..−31 %``; a dash without values."""
    finite = sorted(v for v in values if np.isfinite(v))
    if not finite:
        return "–"
    ends = [percent(finite[-1]), percent(finite[0])]
    return f"{ends[0]} %" if ends[0] == ends[1] else f"{ends[0]}..{ends[1]} %"


def published(low_high: tuple[int, int] | None) -> str:
    """The paper's range in the same form."""
    if low_high is None:
        return "–"
    return f"−{-low_high[1]}..−{-low_high[0]} %"


class Column(NamedTuple):
    """What the points of one column of the headline table have in common.

    Attributes:
        title: what the column is called.
        dtype: number format.
        lengths: length profile.
        generated: workload B's arrivals are generated, not those of the experiment's trace.
    """

    title: str
    dtype: str
    lengths: str = PAPER_LENGTHS
    generated: bool = False

    @property
    def of_b_only(self) -> bool:
        """Whether workload A has no such points."""
        return self.generated or self.lengths == OWN_LENGTHS


COLUMNS = (
    Column("bf16", "bf16"),
    Column("fp8", "fp8"),
    Column("bf16, Azure 2024 code-like arrivals", "bf16", generated=True),
    Column("bf16, the trace's own lengths", "bf16", OWN_LENGTHS),
)


def chosen(
    summary: pd.DataFrame, workload: str, load: float | None, system: str, column: Column
) -> pd.DataFrame:
    """Nominal rows of one cell of the headline table, where DistServe itself is feasible."""
    rows = summary[
        (summary["variation"] == "")
        & (summary["workload"] == workload)
        & (summary["dtype"] == column.dtype)
    ]
    rows = rows[
        (rows["lengths"] == column.lengths) & ((rows["arrivals"] != "") == column.generated)
    ]
    if load is not None:
        rows = rows[np.isclose(rows["load"].astype(float), load)]
    served = set(rows[(rows["system"] == "distserve") & rows["feasible"]]["point"])
    return rows[(rows["system"] == system) & rows["point"].isin(served)]


def headline(summary: pd.DataFrame) -> list[list[str]]:
    """Rows of the table in the form of the paper's.

    Stage, system, the paper's range, ours per setting.
    """
    lines = []
    for workload, load in (("A", None), ("B", 0.67), ("B", 0.85)):
        for stage in ("prefill", "decode"):
            for system in ("placeonly", "biscale"):
                cells = []
                for column in COLUMNS:
                    if workload == "A" and column.of_b_only:
                        cells.append("–")
                        continue
                    rows = chosen(summary, workload, load, system, column)
                    cells.append(_cell(rows, stage))
                name = {"placeonly": "PlaceOnly", "biscale": "BiScale"}[system]
                where = "A" if load is None else f"B {100 * load:.0f} %"
                paper = published(PUBLISHED.get((workload, load, stage, system)))
                lines.append([f"{where} {stage}", name, paper, *cells])
    return lines


def _cell(rows: pd.DataFrame, stage: str) -> str:
    if not len(rows):
        return "–"
    ensemble = span([*rows[f"{stage}_member_low"], *rows[f"{stage}_member_high"]])
    missed = (~rows["feasible"]).sum()
    note = f" (misses the SLO at {missed} of {len(rows)})" if missed else ""
    return (
        f"{span(rows[stage])} [{ensemble}]{note}"
        if ensemble != "–"
        else f"{span(rows[stage])}{note}"
    )


def tier2_gain(frame: pd.DataFrame, summary: pd.DataFrame) -> dict[str, tuple[float, float, float]]:
    """Energy of BiScale against PlaceOnly per stage, nominal plant, points that both serve.

    (mean, lowest, highest), %.
    """
    base = summary[(summary["variation"] == "") & summary["feasible"]]
    served = set.intersection(
        *(set(base[base["system"] == s]["point"]) for s in ("biscale", "placeonly", "distserve"))
    )
    rows = frame[
        (frame["variation"] == "") & (frame["member"] == NOMINAL) & frame["point"].isin(served)
    ]
    gains = {}
    for stage in ("prefill", "decode"):
        wide = rows.pivot_table(
            index="point", columns="system", values=f"{stage}_ratio", aggfunc="mean"
        )
        if not {"biscale", "placeonly"} <= set(wide.columns):
            continue
        change = 100 * (wide["biscale"] / wide["placeonly"] - 1).dropna()
        gains[stage] = (float(change.mean()), float(change.min()), float(change.max()))
    return gains
