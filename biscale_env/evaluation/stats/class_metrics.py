"""Requests by SLO class: which class is worst off, and what each was given."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from biscale_env.config.slo import Slo, per_class
from biscale_env.evaluation.runs.record import Column, RunRecord
from biscale_env.evaluation.stats.judging import (
    class_of_each,
    judge,
    judged_latency_s,
    quantiles,
)

Floats = NDArray[np.float64]

CLASSES: Final = "slo_classes"
"""Column of results: the SLO's classes in JSON, in the order of their numbers from 1 on."""


def slo_of(row: Mapping[Any, Any]) -> Slo:
    """The SLO that a results row was judged by."""
    return Slo(
        name=row["slo"],
        ttft_s=row["slo_ttft_s"],
        tpot_s=row["slo_tpot_s"],
        attainment=row["slo_attainment"],
        statistic=row["slo_statistic"],
        classes=json.loads(told) if isinstance(told := row.get(CLASSES), str) else {},
    )


def worst_class(
    runs: Sequence[tuple[Mapping[str, Column], float]], slo: Slo, phase: str
) -> tuple[float, int]:
    """Attainment over several runs of the class that is worst off, and its number.

    Args:
        runs: requests of each run, and its end, s.
        slo: what they were promised; it has classes.
        phase: ``prefill`` or ``decode``.
    """
    n = len(slo.class_names)
    counted, missed = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    for requests, end_s in runs:
        verdict = judge(requests, slo, phase, end_s)
        judged = verdict["counted"]
        found = per_class(class_of_each(requests)[judged], ~verdict["met"][judged], n)
        counted, missed = counted + found[0], missed + found[1]
    return slo.worst_off(counted, missed)


class JudgedCounts(NamedTuple):
    """What windows add up of a run's requests, one number each."""

    counted: Floats
    met: Floats


def judged_counts(
    requests: Mapping[str, Column],
    verdict: Mapping[str, NDArray[np.bool_]],
    slo: Slo,
    worst: int | None = None,
) -> JudgedCounts:
    """Requests that count and that met the SLO, as numbers whose sums give the attainment.

    With classes these are the requests of the class that is worst off, a miss as much as it uses up
    of what the SLO itself allows: ``sum(met) / sum(counted)`` is :meth:`Slo.worst_off` of them.

    Args:
        requests: the requests of a run.
        verdict: from :func:`judge`.
        slo: what they were promised.
        worst: number of the class; None: the one that is worst off in this run.
    """
    counted, met = verdict["counted"], verdict["met"]
    if not slo.classes:
        return JudgedCounts(counted.astype(np.float64), (counted & met).astype(np.float64))
    numbers = class_of_each(requests)
    if worst is None:
        worst = slo.worst_off(*per_class(numbers[counted], ~met[counted], len(slo.class_names)))[1]
    mine = counted & (numbers == worst)
    n = mine.astype(np.float64)
    return JudgedCounts(n, n - (mine & ~met) / slo.allowed(worst))


def class_columns(
    record: RunRecord, verdict: Mapping[str, NDArray[np.bool_]], numbers: NDArray[np.int64]
) -> dict[str, Any]:
    """What each class with requests was given; nothing where there is one bound for all."""
    slo = record.slo
    if not slo.classes:
        return {}
    told = {name: one.model_dump(exclude_none=True) for name, one in slo.classes.items()}
    columns: dict[str, Any] = {CLASSES: json.dumps(told)}
    for k in np.unique(numbers).tolist():
        name, mine = slo.class_names[k], verdict["counted"] & (numbers == k)
        columns[f"n_counted_{name}"] = int(np.sum(mine))
        columns[f"n_missed_{name}"] = int(np.sum(mine & ~verdict["met"]))
        for metric, absent in (("ttft", "decode"), ("tpot", "prefill")):
            if record.phase != absent:
                values = judged_latency_s(record.requests, metric, mine, record.duration_s)
                columns[f"{metric}_p99_{name}_s"] = quantiles(values, (0.99,))[0]
    return columns
