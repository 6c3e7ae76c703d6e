"""Numbers and SLOs in the words of tables and reports."""

import math
from collections.abc import Mapping
from typing import Any, Final

from biscale_env.evaluation.stats.class_metrics import CLASSES, slo_of

MISSING: Final = "–"


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
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    ends = [f"{end * scale:.{decimals}f}" for end in (low, high)]
    return "" if ends[0] == ends[1] else "–".join(ends)


def share(value: float) -> str:
    """A share as a percentage with two decimals, never rounded up to 100 %."""
    return f"{math.floor(1e4 * value + 1e-9) / 100:.2f}" if math.isfinite(value) else MISSING


def slo_words(row: Mapping[str, Any]) -> str:
    """``met``, ``as max`` (missed, but by no more than max clock and the allowance) or ``missed``.

    ``unknown`` where no request could be judged.

    A ``?`` stands behind it when the interval of the attainment holds the requirement, or where
    there are too few windows of time for one.
    """
    low, high = (float(row.get(f"attainment_ci_{side}", absent)) for side, absent in _ENDS)
    if math.isnan(float(row.get("attainment", 0.0))):
        return "unknown"
    if row["slo_met"]:
        word, asked = "met", float(row["slo_attainment"])
    else:
        word, asked = ("as max" if row["target_met"] else "missed"), float(row["target"])
    return word + ("?" if low < asked <= high or math.isnan(low) else "")


_ENDS: Final = (("low", math.inf), ("high", -math.inf))
"""Where a frame has no intervals at all, words stand without a question mark."""


def metrics_of(phase: str) -> tuple[str, ...]:
    """Which latencies a phase has."""
    return {"prefill": ("ttft",), "decode": ("tpot",)}.get(phase, ("ttft", "tpot"))


def requirement(row: Mapping[str, Any]) -> str:
    """The SLO in words."""
    bounds = [
        f"{metric.upper()} ≤ {1e3 * row[f'slo_{metric}_s']:.4g} ms"
        for metric in metrics_of(str(row["phase"]))
    ]
    joint = " jointly" if row["slo_statistic"] == "joint" and len(bounds) > 1 else ""
    found = f"{' and '.join(bounds)} for {100 * row['slo_attainment']:.4g} % of requests{joint}"
    return found + classes_words(row)


def classes_words(row: Mapping[str, Any]) -> str:
    """What the SLO's classes are promised; empty without classes.

    Attainment is then that of the class that is worst off, in the SLO's own terms.
    """
    if not isinstance(row.get(CLASSES), str):
        return ""
    slo = slo_of(row)
    told = []
    for k, name in enumerate(slo.class_names[1:], start=1):
        own = slo.of_class(k)
        bounds = " and ".join(
            f"{metric.upper()} ≤ {1e3 * getattr(own, f'{metric}_s'):.6g} ms"
            for metric in metrics_of(str(row["phase"]))
        )
        told.append(f"{name} {bounds} for {100 * own.attainment:.4g} %")
    return f" ({'; '.join(told)}; attainment is that of the class worst off)"
