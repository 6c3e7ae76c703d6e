"""Where a saving comes from: the clock, fuller batches, or less idle power.

The energy of a run is ``E = g R + I``: its idle energy ``I``; what its iterations would have cost
at the highest clock, ``R``; and the factor ``g`` by which its clocks change the energy of the same
iterations. A slower instance makes fewer and fuller iterations for the same requests, which is in
``R``; the same iterations at a lower clock, which is in ``g``. Against a reference ``0`` ::

    clock    (g - g0) (R + R0) / 2      fewer joules per iteration of the same work
    batches  (R - R0) (g + g0) / 2      fewer, larger iterations
    idle     I - I0

The two first are the Shapley values of the two factors of ``g R``: each factor is exchanged first
and second, and the two orders are averaged. So the parts add up to ``E - E0`` exactly and do not
depend on an order. Where no clock changes the batches, ``R = R0`` and the second is 0.
"""

from typing import Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from biscale_env.evaluation.runs.record import PAIR_COLUMNS, REFERENCE_POLICY, SCENARIO_COLUMNS

Floats = NDArray[np.float64]
AT_MAX: Final = "busy_at_max_clock_j"
"""Column of the results: energy of a run's iterations at the highest clock, J."""
PARTS: Final = ("clock", "batches", "idle")


class EnergyParts(NamedTuple):
    """Differences of energy, J; negative saves."""

    clock: Floats
    batches: Floats
    idle: Floats


class Spent(NamedTuple):
    """Energy of runs, J, arrays of one shape."""

    busy_j: ArrayLike
    at_max_j: ArrayLike  # of the same iterations at the highest clock
    idle_j: ArrayLike


def difference(run: Spent, reference: Spent) -> EnergyParts:
    """Split ``run - reference`` into parts that add up to it exactly.

    Args:
        run: energy of the runs.
        reference: of the runs that they are compared with, on the same workloads.
    """
    busy, work, idle = (np.asarray(x, dtype=np.float64) for x in run)
    busy0, work0, idle0 = (np.asarray(x, dtype=np.float64) for x in reference)
    factor, factor0 = busy / work, busy0 / work0
    clock = (factor - factor0) * (work + work0) / 2.0
    # the other Shapley value, written as what is left: the sum is exact in floating point too
    return EnergyParts(clock, (busy - busy0) - clock, idle - idle0)


def decompose(results: pd.DataFrame) -> pd.DataFrame:
    """Parts of the difference to max clock per operating point and policy.

    Args:
        results: the results frame of a run; runs without the reference on the same workload and
            member, or without :data:`AT_MAX` (measured ones), are left out.

    Returns:
        ``SCENARIO_COLUMNS``, ``policy``, ``variant``, ``runs``, ``reference_j`` (energy of max
        clock on these workloads), ``total``, ``clock``, ``batches``, ``idle`` (fractions of it,
        negative saves, the parts add up to the total), ``iterations`` and ``clock_factor``
        (iterations, and joules per iteration of the same work, relative to those of max clock).
    """
    needed = {AT_MAX, "energy_idle_j", "iterations"}
    columns = ["energy_j", "energy_idle_j", AT_MAX, "iterations"]
    if results.empty or not needed <= set(results):
        return pd.DataFrame()
    is_reference = (results["policy"] == REFERENCE_POLICY) & (results["variant"] == "")
    base = results[is_reference].drop_duplicates(list(PAIR_COLUMNS))
    paired = results.merge(
        base[[*PAIR_COLUMNS, *columns]], on=list(PAIR_COLUMNS), suffixes=("", "0")
    )
    paired = paired.dropna(subset=[*columns, *(f"{name}0" for name in columns)])
    parts = difference(_spent(paired, ""), _spent(paired, "0"))
    paired = paired.assign(**{f"{name}_part": part for name, part in parts._asdict().items()})
    keys = [*SCENARIO_COLUMNS, "policy", "variant"]
    rows = []
    for values, group in paired.groupby(keys, dropna=False, sort=False):
        rows.append(dict(zip(keys, values, strict=True)) | _fractions(group))
    return pd.DataFrame(rows)


def _spent(frame: pd.DataFrame, end: str) -> Spent:
    idle_j = frame[f"energy_idle_j{end}"]
    return Spent(frame[f"energy_j{end}"] - idle_j, frame[f"{AT_MAX}{end}"], idle_j)


def _fractions(group: pd.DataFrame) -> dict[str, float]:
    reference_j = float(group["energy_j0"].sum())
    factors = [
        float((group[f"energy_j{end}"] - group[f"energy_idle_j{end}"]).sum())
        / float(group[f"{AT_MAX}{end}"].sum())
        for end in ("", "0")
    ]
    return {
        "runs": len(group),
        "reference_j": reference_j,
        "total": float((group["energy_j"] - group["energy_j0"]).sum()) / reference_j,
        **{name: float(group[f"{name}_part"].sum()) / reference_j for name in PARTS},
        "iterations": float(group["iterations"].sum() / group["iterations0"].sum()),
        "clock_factor": factors[0] / factors[1],
    }
