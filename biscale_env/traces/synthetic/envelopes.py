"""Rate profiles (envelopes) out of traces and out of tables of request rates.

`biscale traces envelope` prints them; the shipped ``rates-*`` profiles are its output.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.traces.synthetic.profiles import RateEnvelope
from biscale_env.traces.trace import Trace
from biscale_env.traces.trace_statistics import counts_per_window


def fit_envelope(trace: Trace, name: str, source: str, step_s: float = 3600.0) -> RateEnvelope:
    """Relative rate of each whole step of the trace.

    Raises:
        BiscaleError: the trace is shorter than two steps.
    """
    counts = counts_per_window(trace, step_s)
    return envelope_of(counts.astype(np.float64), name, source, step_s)


def envelope_of(
    rates: NDArray[np.float64], name: str, source: str, step_s: float, start: str = ""
) -> RateEnvelope:
    """Envelope with a mean of 1 from rates at equal steps, shape (n,).

    Raises:
        BiscaleError: fewer than two steps, or rates that are not all finite, non-negative and
            somewhere positive.
    """
    if rates.size < 2 or not np.isfinite(rates).all() or (rates < 0).any() or not rates.any():
        raise BiscaleError(
            f"rate profile '{name}' needs at least two steps of {step_s:g} s with rates of 0 or "
            "more"
        )
    factors = tuple(round(float(v), 4) for v in rates / rates.mean())
    return RateEnvelope(name=name, start=start, step_s=step_s, factors=factors, source=source)


def read_rates(
    path: Path, time_column: str, rate_column: str, where: str | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Read times (s) and request rates (requests/s) from two columns of a CSV file.

    Each has shape (n,).

    Args:
        path: file with a header line.
        time_column: name of the column of times.
        rate_column: name of the column of rates.
        where: keep only lines with ``COLUMN=VALUE``.

    Raises:
        BiscaleError: no such file or column, no line left, or a value that is not a number.
    """
    try:
        table = pd.read_csv(path, dtype=str)
    except (OSError, ValueError) as error:
        raise BiscaleError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    column, _, value = (where or "").partition("=")
    for wanted in (time_column, rate_column, *([column] if where else [])):
        if wanted not in table.columns:
            raise BiscaleError(
                f"{path}: there is no column '{wanted}'; the columns are {', '.join(table.columns)}"
            )
    if where:
        table = table[table[column] == value]
    if table.empty:
        raise BiscaleError(f"{path} has no line" + (f" with {where}" if where else ""))
    numbers = table[[time_column, rate_column]].apply(pd.to_numeric, errors="coerce")
    bad = ~np.isfinite(numbers).all(axis=1)
    if bad.any():
        line = int(numbers.index[np.argmax(bad)]) + 2
        raise BiscaleError(f"{path}, line {line}: {time_column} and {rate_column} must be numbers")
    return numbers[time_column].to_numpy(float), numbers[rate_column].to_numpy(float)


def fold_rates(
    time_s: NDArray[np.float64],
    rate_rps: NDArray[np.float64],
    period_s: float,
    step_s: float,
    name: str,
    source: str,
    start: str = "",
) -> RateEnvelope:
    """Envelope of one period: the mean rate of each step, over all periods that the table covers.

    Args:
        time_s: times, shape (n,), s.
        rate_rps: request rates at these times, shape (n,).
        period_s: period, s, a multiple of ``step_s``.
        step_s: step, s.
        name: name of the profile.
        source: citation.
        start: moment of the first factor, for the reader.

    Raises:
        BiscaleError: a step without any rate, or a period that is not a multiple of the step.
    """
    steps = round(period_s / step_s)
    if steps < 2 or abs(steps * step_s - period_s) > 1e-6 * period_s:
        raise BiscaleError(
            f"the period of {period_s:g} s must be a multiple of the step of {step_s:g} s, at "
            "least twice"
        )
    index = np.floor(time_s / step_s).astype(np.int64) % steps
    counts = np.bincount(index, minlength=steps)
    if (counts == 0).any():
        raise BiscaleError(
            f"rate profile '{name}': step {int(np.argmin(counts))} of {steps} has no rate in the "
            "table"
        )
    return envelope_of(np.bincount(index, rate_rps, steps) / counts, name, source, step_s, start)
