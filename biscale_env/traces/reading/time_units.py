"""In which unit a numeric time is: as documented, as the column says, or as the numbers prove.

Two readings that are both plausible are refused, and the option is named: a factor of a thousand
in the arrival rate would go unnoticed otherwise.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.rows.layouts import NS_PER_UNIT, Layout, TimeUnit

UNIX_TIME_S: Final = 1e8
MOST_RPS: Final = 1000.0  # mean rates beyond these two are implausible for one trace of requests
LEAST_RPS: Final = 1 / 3600
# whole milliseconds that make more than this may well be whole seconds: the published Mooncake
# traces have 3 to 10 requests/s
MOST_CERTAIN_RPS: Final = 100.0
# LLM services write dates between these: 2015 and 2100, Unix time
DATED_S: Final = (1.42e9, 4.1e9)
SUFFIXES: Final[dict[TimeUnit, str]] = {
    "s": r"(_s|_secs?|_seconds?|seconds?)$",
    "ms": r"(_ms|_millis|_?milliseconds?)$",
    "us": r"(_us|_micros|_?microseconds?)$",
    "ns": r"(_ns|_nanos|_?nanoseconds?)$",
}


@dataclass(frozen=True)
class UnitChoice:
    """The unit of a numeric time.

    Attributes:
        unit: the unit.
        because: why, in words.
        is_unix: the numbers count from 1970.
    """

    unit: TimeUnit
    because: str
    is_unix: bool


def choose_unit(
    path: Path, layout: Layout, times: NDArray[np.float64], given: str | None
) -> UnitChoice:
    """Unit of a numeric time column.

    Args:
        path: file, for errors.
        layout: columns, and what their authors document.
        times: the first times of the file, in its own unit, shape (n,).
        given: unit that the user named.

    Raises:
        BiscaleError: an unknown unit, or two readings that are both plausible.
    """
    if given is not None:
        unit = known_unit(given)
        return UnitChoice(unit, "as told", _is_unix(times, unit))
    if layout.keeps_zero and layout.unit is not None:  # the unit is in the name of the column
        return UnitChoice(layout.unit, "as documented", _is_unix(times, layout.unit))
    name = re.sub(r"\W+", "_", layout.time.lower()).strip("_")  # also "time (ms)", "time [ms]"
    for unit, pattern in SUFFIXES.items():
        if layout.unit is None and re.search(pattern, name):
            return UnitChoice(unit, "as its column says", _is_unix(times, unit))
    dated = [unit for unit in SUFFIXES if _is_dated(times, unit)]
    if dated:
        return UnitChoice(dated[0], "since the numbers are Unix times", True)
    if layout.unit is None:
        return _by_rate(path, layout, times)
    if layout.rival is not None:
        return _against_rival(path, layout, times, layout.unit, layout.rival)
    return UnitChoice(layout.unit, "as documented", _is_unix(times, layout.unit))


def known_unit(name: str) -> TimeUnit:
    """A unit by its name.

    Raises:
        BiscaleError: there is no such unit.
    """
    for unit in SUFFIXES:
        if name == unit:
            return unit
    raise BiscaleError(f"unknown time unit '{name}'; known: {', '.join(NS_PER_UNIT)}")


def mean_rate_rps(times: NDArray[np.float64], unit: TimeUnit = "s") -> float:
    """Mean rate of requests at these times, requests/s; NaN where they do not tell."""
    fine = times[np.isfinite(times)]
    span_s = float(np.ptp(fine)) * NS_PER_UNIT[unit] / 1e9 if fine.size else 0.0
    return (fine.size - 1) / span_s if span_s > 0 else float("nan")


def is_plausible(rate_rps: float) -> bool:
    """Whether a mean rate may be that of a trace; one that is not known may."""
    return not (rate_rps > MOST_RPS or rate_rps < LEAST_RPS)


def _is_unix(times: NDArray[np.float64], unit: TimeUnit) -> bool:
    return bool(times.size) and bool(times[0] * NS_PER_UNIT[unit] / 1e9 >= UNIX_TIME_S)


def _is_dated(times: NDArray[np.float64], unit: TimeUnit) -> bool:
    first_s = times[0] * NS_PER_UNIT[unit] / 1e9 if times.size else 0.0
    return bool(DATED_S[0] <= first_s <= DATED_S[1])


def _against_rival(
    path: Path, layout: Layout, times: NDArray[np.float64], own: TimeUnit, rival: TimeUnit
) -> UnitChoice:
    """Two formats share these columns: Mooncake has whole milliseconds, Qwen-Bailian seconds.

    Seconds are written with fractions there, so the way the numbers are written tells the two
    apart; where it contradicts the other columns, only the rate is left.
    """
    fine = times[np.isfinite(times)]
    whole = bool((fine == np.floor(fine)).all())
    fits_own = whole == (own == "ms")
    rates = {unit: mean_rate_rps(fine, unit) for unit in (own, rival)}
    likely = [unit for unit in (own, rival) if is_plausible(rates[unit])]
    # a sparse sample makes any rate small; only a rate that is too high speaks against a unit
    certain = not rates[own] > MOST_CERTAIN_RPS or not likely or fine.size < 3  # two tell no rate
    if fits_own and (own == "s" or certain):
        return UnitChoice(own, "as documented", _is_unix(fine, own))
    if len(likely) == 1:
        other = rival if likely[0] == own else own
        return UnitChoice(
            likely[0], f"since in {other} it were {rates[other]:.3g} requests/s", False
        )
    raise _two_readings(path, layout, rates)


def _by_rate(path: Path, layout: Layout, times: NDArray[np.float64]) -> UnitChoice:
    rates = {unit: mean_rate_rps(times, unit) for unit in SUFFIXES}
    if np.isnan(rates["s"]):
        return UnitChoice("s", "which plays no role, as all times are the same", False)
    likely = {unit: rate for unit, rate in rates.items() if is_plausible(rate)}
    if len(likely) == 1:
        unit = next(iter(likely))
        return UnitChoice(unit, "the only unit with a plausible rate", _is_unix(times, unit))
    raise _two_readings(path, layout, likely or rates)


def _two_readings(path: Path, layout: Layout, rates: dict[TimeUnit, float]) -> BiscaleError:
    shown = " or ".join(f"{rate:.3g} requests/s (in {unit})" for unit, rate in rates.items())
    return BiscaleError(
        f"{path}: the unit of {layout.time} is not certain: it makes {shown}; say which with "
        f"--time-unit {'|'.join(rates)}"
    )
