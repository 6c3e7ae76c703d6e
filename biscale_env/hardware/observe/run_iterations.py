"""From the logs of a run to a table of iterations that a fit can read."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from biscale_env.core.errors import BiscaleError
from biscale_env.hardware.replay.assemble import iteration_times
from biscale_env.hardware.replay.raw_log import Raw
from biscale_env.models.fit.run_fit import ObservedIterations

Floats = NDArray[np.float64]
STEADY = 0.02  # relative change of the clock over an iteration up to which it counts as one clock
LONGEST_GAP = 3.0  # between samples, in usual ones, up to which the clock is known (assumed)
MIXED = 0.1  # prompt tokens per decoding request up to which an iteration counts as decode


def observed_iterations(raw: Raw, phase: str) -> ObservedIterations:
    """Iterations of one phase whose duration, work and clock are known.

    Left out: those whose duration no record tells, those that mix the phases, and those during
    which the clock changed.

    Raises:
        BiscaleError: no iteration is left.
    """
    rows = raw.iterations[phase]
    if not rows:
        raise BiscaleError(f"the run holds no iteration of {phase}: did its engine run the hook?")
    begin_s, took_s = iteration_times(rows)
    took_s = np.minimum(took_s, np.append(np.diff(begin_s), np.inf))
    prompts = np.array([r.prefill_requests for r in rows], dtype=np.float64)
    new = np.array([r.prefill_tokens for r in rows], dtype=np.float64)
    before = np.array([r.prefill_kv_tokens for r in rows], dtype=np.float64)
    decoding = np.array([r.decode_requests for r in rows], dtype=np.float64)
    cached = np.array([r.decode_kv_tokens for r in rows], dtype=np.float64)
    freq_mhz, steady = clock_of(
        raw.telemetry, phase, begin_s, begin_s + np.where(np.isfinite(took_s), took_s, 0.0)
    )
    known = np.isfinite(took_s) & (took_s > 0) & steady & (freq_mhz > 0)
    if phase == "prefill":
        pure = (prompts > 0) & (decoding == 0) & (new > 0)
        work = {"batch": prompts, "new_tokens": new, "prefix": before}
        per_request = np.maximum(prompts, 1.0)
        work = {k: v if k == "batch" else v / per_request for k, v in work.items()}
        work["context"] = np.zeros(len(rows))
    else:
        pure = (decoding > 0) & (new <= MIXED * decoding)
        work = {"batch": decoding, "context": cached / np.maximum(decoding, 1.0)}
        work |= {"new_tokens": np.zeros(len(rows)), "prefix": np.zeros(len(rows))}
    keep = known & pure
    if not keep.any():
        raise BiscaleError(
            f"none of the {len(rows)} iterations of {phase} tells duration, work and a steady clock"
        )
    table = pd.DataFrame({**work, "latency_s": took_s, "freq_mhz": freq_mhz})[keep]
    return ObservedIterations(phase, begin_s[keep] - begin_s[keep][0], table, int((~keep).sum()))


def clock_of(
    telemetry: pd.DataFrame, group: str, begin_s: Floats, end_s: Floats
) -> tuple[Floats, NDArray[np.bool_]]:
    """Mean SM clock of a group's GPUs over intervals, MHz, and whether it stood still.

    From the samples of each interval, of the sampling period before and after it (a busy machine
    may stamp a sample late), and the next ones beyond. Where samples are missing around an
    interval, nobody knows whether the clock stood still, so it did not. NaN without samples.
    """
    mine = telemetry[telemetry["group"] == group]
    sampled = mine.groupby("time_s")["freq_mhz"].mean().dropna()
    if sampled.empty:
        return np.full(len(begin_s), np.nan), np.zeros(len(begin_s), bool)
    times, freqs = sampled.index.to_numpy(np.float64), sampled.to_numpy(np.float64)
    period_s = float(mine.groupby("gpu")["time_s"].diff().median())
    margin_s = period_s if np.isfinite(period_s) else 0.0
    first = np.maximum(np.searchsorted(times, begin_s - margin_s, side="right") - 1, 0)
    last = np.minimum(np.searchsorted(times, end_s + margin_s, side="left"), len(times) - 1)
    around = [slice(a, b + 1) for a, b in zip(first, last, strict=True)]
    low, high = (np.array([pick(freqs[part]) for part in around]) for pick in (np.min, np.max))
    widest_s = np.array([np.diff(times[part]).max(initial=0.0) for part in around])
    seen = widest_s <= LONGEST_GAP * margin_s
    return 0.5 * (low + high), (high - low <= STEADY * high) & seen
