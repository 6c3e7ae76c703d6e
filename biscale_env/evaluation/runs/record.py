"""What one simulated (or measured) run hands over to evaluation.

Its key, its requests, its decisions, its totals.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from biscale_env.config.slo import Slo
from biscale_env.core.errors import BiscaleError

Column = NDArray[Any]

PHASES: Final = ("prefill", "decode", "cluster")
REFERENCE_POLICY: Final = "max"
"""DistServe's clock: always the highest. Every energy ratio is relative to it."""

REQUEST_COLUMNS: Final = (
    "arrival_s",
    "start_s",
    "first_token_s",
    "finish_s",
    "prompt_tokens",
    "output_tokens",
)
TIMELINE_COLUMNS: Final = (
    "time_s",
    "duration_s",
    "idle_s",
    "freq_requested_mhz",
    "freq_applied_mhz",
    "freq_effective_mhz",
    "power_w",
    "energy_j",
    "queue_requests",
    "batch_requests",
    "batch_tokens",
    "kv_use",
)
SLO_CLASS: Final = "slo_class"
"""Column of requests: number of each one's class in the SLO; only where the SLO has classes."""
INSTANCE: Final = "instance"
"""Column of timelines: number of the instance, where several are in one record. The labels
``instance_names`` and ``instance_gpus`` then tell of each, separated by spaces."""
REQUIRED_TOTALS: Final = ("energy_j", "duration_s")

KEY_COLUMNS: Final = (
    "phase",
    "policy",
    "variant",
    "scenario",
    "slo",
    "load",
    "workload_seed",
    "ensemble_member",
    "training_seed",
    "tp",
    "dtype",
)
SCENARIO_COLUMNS: Final = ("phase", "scenario", "slo", "load", "tp", "dtype")
"""Together they name one operating point; policies are compared within it."""
INFEASIBLE_COLUMNS: Final = (*SCENARIO_COLUMNS, "reason")
"""A point without runs, since max clock cannot serve it at any load, and what shows it."""
PAIR_COLUMNS: Final = (*SCENARIO_COLUMNS, "workload_seed", "ensemble_member")
"""Together they name one workload in one plant.

Every policy sees it unchanged, so differences are paired on it.
"""


def _canonical(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    return format(float(value), ".9g")


def run_id(row: Mapping[str, Any]) -> str:
    """Short name of a run: 12 hexadecimal digits of a hash of its key columns.

    The same key has the same name in any process.
    """
    text = "|".join(f"{name}={_canonical(row[name])}" for name in KEY_COLUMNS)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


BOUND_FAMILY: Final = "oracle"
"""Policies of this family know the future: a bound, no controller."""
FORESIGHT_FAMILY: Final = "lookahead"
"""Policies of this family know the next seconds: no controller either."""


def is_bound(policy: str) -> bool:
    """Whether a policy is a bound that knows the future, and no controller."""
    family = policy.partition(":")[0]
    return family in (BOUND_FAMILY, FORESIGHT_FAMILY) or policy.startswith(f"{BOUND_FAMILY}-")


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One run of one policy on one workload with one ensemble member.

    The clock of a run starts at 0 with the first instant of the workload and ends at
    ``totals["duration_s"]``.

    Attributes:
        phase: ``prefill``, ``decode`` or ``cluster`` (both behind each other).
        policy: name of the policy; ``max`` is the reference (DistServe).
        scenario: name of the scenario (workload family, load, placement, delay).
        slo: the objective that the run was controlled for and is judged by.
        rate_rps: mean arrival rate of the workload, requests/s.
        workload_seed: which workload; the same for every policy.
        ensemble_member: which member of the plant's coefficients; -1 is the nominal one.
        tp: GPUs of the instance (tensor parallel).
        dtype: ``bf16`` or ``fp8``.
        n_gpus: GPUs whose energy is counted in ``totals["energy_j"]``.
        requests: one array of length n per name of ``REQUEST_COLUMNS``. ``start_s``: service begins
            (prefill: its first batch; decode: admission). ``first_token_s``: prefill completes
            (decode: arrival at the decode pool, where TPOT starts to count). ``finish_s``: the last
            token (prefill: equal to ``first_token_s``). NaN: did not happen within the run. Tokens
            are those asked for. Prefill also has ``cached_tokens``: tokens of the prompt that the
            prefix cache had. `SLO_CLASS` where the SLO has classes.
        timeline: one array per name of ``TIMELINE_COLUMNS``, one entry per decision: ``time_s`` its
            start, ``duration_s`` of the iteration, ``idle_s`` after it, clocks (requested; applied
            at the start; mean effective under the power cap), ``power_w`` mean per GPU over the
            iteration, ``energy_j`` of the instance including the idle time after it, queue and
            batch sizes, ``kv_use`` in [0, 1]. `INSTANCE` where there are several.
        totals: at least ``energy_j`` (all counted GPUs, idle included) and ``duration_s``; also
            used when present: ``energy_idle_j``, ``busy_at_max_clock_j`` (what its iterations
            would have cost at the highest clock), ``iterations``, ``output_tokens`` (produced
            within the run),
            ``decision_time_median_s``, ``decision_time_p99_s``, ``solver_failures`` (a fraction
            when several runs have a count in common), ``preemptions``.
        load: fraction of the capacity at max clock; None when the workload is taken as it is.
        training_seed: seed that a learned policy was trained with; -1 for policies that are not
            trained.
        variant: which setting of the policy's free parameters, e.g. ``margin=0.1``; empty is its
            default.
        labels: further columns for the results table, e.g. ``{"delay_s": 0.05}``. ``one_trace``:
            the workload is a subsample of a trace, as those of the other workload seeds are;
            ``day``: which day it is taken from, where there are several.
        workload_s: observed time of the workload, the same for every policy, s; NaN: until the last
            arrival.
        copies: circular shift (s) and share of the requests of each copy of the original trace that
            the workload is put together of; shares add up to 1.
    """

    phase: str
    policy: str
    scenario: str
    slo: Slo
    rate_rps: float
    workload_seed: int
    ensemble_member: int
    tp: int
    dtype: str
    n_gpus: int
    requests: Mapping[str, Column]
    timeline: Mapping[str, Column]
    totals: Mapping[str, float]
    load: float | None = None
    training_seed: int = -1
    variant: str = ""
    labels: Mapping[str, str | float | int | bool] = field(default_factory=dict)
    workload_s: float = math.nan
    copies: tuple[tuple[float, float], ...] = ((0.0, 1.0),)

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise BiscaleError(
                f"unknown phase '{self.phase}' in a run record; known: {', '.join(PHASES)}"
            )
        _check_table(
            self.requests, REQUEST_COLUMNS, f"requests of {self.policy} in {self.scenario}"
        )
        _check_table(
            self.timeline, TIMELINE_COLUMNS, f"timeline of {self.policy} in {self.scenario}"
        )
        for name in REQUIRED_TOTALS:
            value = self.totals.get(name, math.nan)
            if not (math.isfinite(value) and value >= 0):
                raise BiscaleError(
                    f"totals of {self.policy} in {self.scenario}: '{name}' must be a finite number "
                    f">= 0, got {value}"
                )

    @property
    def key(self) -> dict[str, Any]:
        """The key columns, which name this run and no other."""
        return {
            "phase": self.phase,
            "policy": self.policy,
            "variant": self.variant,
            "scenario": self.scenario,
            "slo": self.slo.name,
            "load": math.nan if self.load is None else float(self.load),
            "workload_seed": int(self.workload_seed),
            "ensemble_member": int(self.ensemble_member),
            "training_seed": int(self.training_seed),
            "tp": int(self.tp),
            "dtype": self.dtype,
        }

    @property
    def run_id(self) -> str:
        """Short name of the run, see :func:`run_id`."""
        return run_id(self.key)

    @property
    def duration_s(self) -> float:
        """Length of the run, s."""
        return float(self.totals["duration_s"])


def _check_table(table: Mapping[str, Column], names: tuple[str, ...], where: str) -> None:
    missing = [name for name in names if name not in table]
    if missing:
        raise BiscaleError(f"{where}: the column '{missing[0]}' is missing")
    lengths = {
        name: int(np.shape(table[name])[0]) if np.ndim(table[name]) == 1 else -1 for name in names
    }
    if len(set(lengths.values())) > 1 or -1 in lengths.values():
        raise BiscaleError(f"{where}: columns must be arrays of one length, got {lengths}")
