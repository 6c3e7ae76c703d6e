"""`biscale fit --from RUN`: a shipped model, corrected by what a running engine tells.

Live traffic shows how long iterations take, by batch, prompt tokens and cached tokens. What of a
model that corrects is what an engine and a machine decide, and no kernel table knows: host time,
communication, and reading the KV cache. Where the run has visited three clocks or more, how time
goes with the clock is fitted too; else that, like power and kernels, stays borrowed.

Whole minutes are held out: neighbours in time resemble each other, so single rows would flatter.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from biscale_env.config.hardware import Dtype
from biscale_env.core.errors import BiscaleError
from biscale_env.models.coefficient import Coefficient, rounded
from biscale_env.models.coefficient_files import ModelFile, Phase
from biscale_env.models.fit.latency import mape, predict_s, refine
from biscale_env.models.fit.llm_files import domain_of
from biscale_env.models.fit.profile_table import ProfileTable
from biscale_env.models.fit.user_profile import StartModel, UserFit, start_model
from biscale_env.models.physics import Coefficients

Floats = NDArray[np.float64]
ENGINE_FIELDS = ("host0_s", "host_s_per_seq", "comm0_s", "comm_s_per_token")
KV_FIELD = {"prefill": "attn_prefill_s", "decode": "attn_decode_s"}
CLOCK_FIELDS = ("core_share", "stream_knee_ghz")
MIN_CLOCKS = 3  # clocks from which the axis is fitted
CLOCK_STEP_MHZ = 40.0  # clocks nearer than this are one (chosen: read-backs scatter)
MIN_ITERATIONS = 100
MINUTE_S = 60.0
LEAST_BLOCKS = 6  # a run too short for so many minutes is cut into so many parts
ROWS = 4000  # iterations used at most, drawn evenly over time
SIGMA = 20.0  # hardly any pull to the start: it only settles what the run cannot tell apart
BOOTSTRAPS = 32
BORROWED_CLOCK = "how time goes with the clock (seen: {}; `biscale hw explore` visits more)"


@dataclass(frozen=True)
class ObservedIterations:
    """Iterations of one phase.

    Attributes:
        phase: ``prefill`` or ``decode``.
        time_s: when each began, from the first one on, (n,), s.
        table: ``batch``, ``new_tokens``, ``prefix``, ``context`` (per request), ``latency_s`` and
            ``freq_mhz``, n rows.
        left_out: iterations that the run holds beside these.
    """

    phase: str
    time_s: Floats
    table: pd.DataFrame
    left_out: int

    @property
    def clocks_mhz(self) -> list[int]:
        """Clocks that the run has visited, to :data:`CLOCK_STEP_MHZ`."""
        steps = np.round(self.table["freq_mhz"].to_numpy() / CLOCK_STEP_MHZ)
        values, counts = np.unique(steps, return_counts=True)
        often = values[counts >= max(10, 0.01 * len(steps))]
        return [round(float(v) * CLOCK_STEP_MHZ) for v in often]


@dataclass(frozen=True)
class RunFit:
    """A model corrected by a run.

    Attributes:
        fit: the files; its ``latency_mape`` is the error after.
        before_mape: error of the model that it began with, on the same held-out minutes.
        iterations: used, train and held out.
        borrowed: what the run could not tell and the new model has from the old one.
    """

    fit: UserFit
    before_mape: float
    iterations: tuple[int, int]
    borrowed: list[str]


def held_out_minutes(time_s: Floats) -> NDArray[np.bool_]:
    """Rows of every third minute; of every third sixth of a run that is shorter than that."""
    length_s = float(time_s.max()) + 1e-9
    block_s = min(MINUTE_S, length_s / LEAST_BLOCKS)
    return np.asarray((time_s // block_s).astype(int) % 3 == 1)


def fit_run(
    seen: ObservedIterations,
    base: str,
    tp: int,
    dtype: str,
    ep: int = 1,
    gpu: str | None = None,
    llm: str | None = None,
    name: str = "",
) -> RunFit:
    """Correct the model of one phase.

    Args:
        seen: the iterations.
        base: model family to begin with.
        tp: GPUs of the instance.
        dtype: of its weights.
        ep: groups that its experts are spread over.
        gpu: its GPU; None: the family's.
        llm: its LLM; None: the family's.
        name: of the new family.

    Raises:
        BiscaleError: too few iterations, or a base without such a phase.
    """
    n = len(seen.table)
    if n < MIN_ITERATIONS:
        raise BiscaleError(
            f"the run has {n} usable iterations of {seen.phase} ({seen.left_out} tell too little); "
            f"a fit needs at least {MIN_ITERATIONS}: observe for longer, or under load"
        )
    pick = np.unique(np.linspace(0, n - 1, min(n, ROWS)).astype(int))
    rows, time_s = seen.table.iloc[pick].reset_index(drop=True), seen.time_s[pick]
    table = ProfileTable(cast(Phase, seen.phase), tp, cast(Dtype, dtype), rows, ep=ep)
    begin = start_model(table, base, gpu, llm)
    start = begin.model.coefficients
    fields = fields_of(seen)
    out = held_out_minutes(time_s)
    train = np.flatnonzero(~out)
    clock = rows["freq_mhz"].to_numpy(np.float64) * 1e-3
    effective = begin.model.effective_freq_mhz(*table.work.as_tuple(), clock * 1e3) * 1e-3
    found = corrected(start, fields, table, train, effective)
    measured = table.column("latency_s")
    before = mape(predict_s(start, table, effective)[out], measured[out])
    after = mape(predict_s(found, table, effective)[out], measured[out])
    moved = [f for f in fields if getattr(found, f) != getattr(start, f)]
    record = _record(seen, begin, (len(train), int(out.sum())), (before, after))
    content = _content(found, moved, begin, table, name, record)
    members = _members(found, moved, table, time_s, train, effective, begin)
    fit = UserFit(content, members, after, float("nan"), begin.descriptions)
    return RunFit(fit, before, (len(train), int(out.sum())), borrowed_of(seen))


def fields_of(seen: ObservedIterations) -> tuple[str, ...]:
    """Coefficients that a run corrects."""
    fields = (*ENGINE_FIELDS, KV_FIELD[seen.phase])
    return (*fields, *CLOCK_FIELDS) if len(seen.clocks_mhz) >= MIN_CLOCKS else fields


def borrowed_of(seen: ObservedIterations) -> list[str]:
    """What a run cannot tell."""
    borrowed = ["times of the kernels", "power and energy"]
    if len(seen.clocks_mhz) < MIN_CLOCKS:
        clocks = ", ".join(f"{c} MHz" for c in seen.clocks_mhz) or "no clock for long"
        borrowed.append(BORROWED_CLOCK.format(clocks))
    return borrowed


def corrected(
    start: Coefficients,
    fields: Sequence[str],
    table: ProfileTable,
    rows: NDArray[np.intp],
    freq_ghz: Floats,
) -> Coefficients:
    """Fit these coefficients to these rows; the energy per request in host time is kept."""
    found = refine(start, fields, table, rows, freq_ghz, SIGMA)
    if found.host_s_per_seq <= 0.0:
        return found
    per_request = start.p_seq_w * start.host_s_per_seq
    return found._replace(p_seq_w=per_request / found.host_s_per_seq)


def _record(
    seen: ObservedIterations,
    begin: StartModel,
    counts: tuple[int, int],
    errors: tuple[float, float],
) -> dict[str, object]:
    return {
        "from": "iterations of a running engine",
        "start": str(begin.model.name),
        "split": "every third minute held out",
        "train_points": counts[0],
        "held_out_points": counts[1],
        "held_out_mape_before": rounded(errors[0], 4),
        "held_out_mape": rounded(errors[1], 4),
        "clocks_mhz": json.dumps(seen.clocks_mhz),
        "borrowed": "; ".join(borrowed_of(seen)),
    }


def _content(
    found: Coefficients,
    moved: Sequence[str],
    begin: StartModel,
    table: ProfileTable,
    name: str,
    record: dict[str, object],
) -> ModelFile:
    """The corrected coefficient file: what moved is measured, the rest is as it was."""
    old = begin.model.content
    known = old.coefficients
    changed = {
        n: Coefficient(
            value=rounded(getattr(found, n)), provenance="measured", source=f"fitted to {name}"
        )
        for n in (*moved, *(("p_seq_w",) if "host_s_per_seq" in moved else ()))
    }
    clocks = table.column("freq_mhz")
    return old.model_copy(
        update={
            "name": name or f"{old.name}-observed",
            "tp": table.tp,
            "dtype": table.dtype,
            "ep": table.ep,
            "gpu": begin.gpu,
            "llm": begin.llm,
            "coefficients": {**known, **changed},
            "box": domain_of(table, float(clocks.min()), float(clocks.max())),
            "fit": record,
        }
    )


def _members(
    found: Coefficients,
    moved: Sequence[str],
    table: ProfileTable,
    time_s: Floats,
    train: NDArray[np.intp],
    freq_ghz: Floats,
    begin: StartModel,
) -> pd.DataFrame:
    """Refits on resampled minutes, from the fitted coefficients on."""
    rng, model = np.random.default_rng(0), begin.model
    block_s = min(MINUTE_S, (float(time_s.max()) + 1e-9) / LEAST_BLOCKS)
    blocks = [train[time_s[train] // block_s == b] for b in np.unique(time_s[train] // block_s)]
    members = []
    for k in range(BOOTSTRAPS):
        drawn = rng.integers(0, len(blocks), len(blocks))
        rows = np.concatenate([blocks[b] for b in drawn])
        member = corrected(found, moved, table, rows, freq_ghz)
        delay_s = model.delay_s(k % model.n_members) if model.n_members else model.delay_s()
        members.append({"delay_s": delay_s} | {n: getattr(member, n) for n in moved})
    return pd.DataFrame(members)
