"""From the raw logs of a replay to run records, the same that simulation makes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.config import load_slo
from biscale_env.config.slo import one_bound
from biscale_env.core.errors import BiscaleError
from biscale_env.evaluation.runs.record import TIMELINE_COLUMNS, RunRecord
from biscale_env.hardware.loop.wire import UNCHANGED
from biscale_env.hardware.replay.client import dispatch_errors_s
from biscale_env.hardware.replay.raw_log import Raw
from biscale_env.hardware.replay.recorder import EnergyCurve, IterationRow

Floats = NDArray[np.float64]
TOKEN_COLUMNS = ("prompt_tokens", "output_tokens")


def request_columns(raw: Raw, phase: str) -> dict[str, NDArray[Any]]:
    """Requests of one phase, in the order of their arrival; times from the start of the trace, s.

    Latencies count from the times of the trace, not from when the client came to sending: a client
    that lags behind must not make the engine look fast (coordinated omission). A request that
    failed has not finished in any phase, whatever it had got by then. Decode has the requests of
    two tokens or more that were sent to it; one without a single token back counts from when it was
    sent. One whose tokens all came in one piece has finished, but when its first token was made is
    not known (NaN), and so neither is its TPOT; the same holds where nobody counted its tokens.

    Returns:
        The columns of a run record, and beside them ``sent_s`` (when the engine had the request),
        ``failed`` and ``answered`` (whether any token came back).
    """
    chosen = raw.requests
    if phase == "decode":
        chosen = [r for r in chosen if r.output_tokens > 1 and math.isfinite(r.decode_sent_s)]

    def column(name: str) -> Floats:
        return np.array([getattr(r, name) for r in chosen], dtype=np.float64) - raw.start_s

    failed = np.array([r.failed for r in chosen], dtype=bool)
    chunk = column("first_chunk_s")
    if phase == "prefill":
        separate = raw.facts["settings"]["prefill_url"] is not None
        done = column("prefill_done_s") if separate else chunk
        arrival, sent = column("scheduled_s"), column("dispatched_s")
        first = finish = np.where(failed, np.nan, done)
    else:
        done = chunk
        arrival = sent = np.where(np.isfinite(chunk), chunk, column("decode_sent_s"))
        unknown = np.array([r.in_one_piece or r.uncounted for r in chosen], dtype=bool)
        first = np.where(unknown, np.nan, arrival)
        incomplete = np.array([bool(r.error) for r in chosen], dtype=bool)
        finish = np.where(incomplete, np.nan, column("last_chunk_s"))
    order = np.argsort(arrival, kind="stable")
    columns: dict[str, NDArray[Any]] = {
        "arrival_s": arrival,
        "start_s": np.full(len(chosen), np.nan),
        "first_token_s": first,
        "finish_s": finish,
        "prompt_tokens": np.array([r.prompt_tokens for r in chosen]),
        "output_tokens": np.array([r.output_tokens for r in chosen]),
        "sent_s": sent,
        "failed": failed,
        "answered": np.isfinite(done),
    }
    return {name: values[order] for name, values in columns.items()}


def with_lost(raw: Raw, phase: str, columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The requests of a phase, and in decode those too that failed before they got there.

    A request without an answer has missed its SLO in every phase. They count from the times of the
    trace; nothing else about them is known.
    """
    if phase != "decode":
        return columns
    lost = [
        r
        for r in raw.requests
        if r.failed and r.output_tokens > 1 and not math.isfinite(r.decode_sent_s)
    ]
    when = np.array([r.scheduled_s for r in lost], dtype=np.float64) - raw.start_s
    more: dict[str, Any] = dict.fromkeys(columns, np.full(len(lost), np.nan))
    more |= {name: np.array([getattr(r, name) for r in lost], int) for name in TOKEN_COLUMNS}
    more |= {"arrival_s": when, "sent_s": when}
    more |= {"failed": np.ones(len(lost), bool), "answered": np.zeros(len(lost), bool)}
    both = {name: np.concatenate([columns[name], more[name]]) for name in columns}
    order = np.argsort(both["arrival_s"], kind="stable")
    return {name: values[order] for name, values in both.items()}


def clock_steps(raw: Raw, phase: str, top_mhz: float) -> tuple[Floats, Floats]:
    """Applied clock over time, from the read-backs: (times from the start, MHz from each on).

    0 stands for the driver's own.
    """
    mine = [c for c in raw.changes if c.group == phase and c.cause not in UNCHANGED]
    delays = [c.seen_s - c.set_s for c in mine if math.isfinite(c.seen_s)]
    usual_s = float(np.median(delays)) if delays else 0.0
    times = [
        (c.seen_s if math.isfinite(c.seen_s) else c.set_s + usual_s) - raw.start_s for c in mine
    ]
    freqs = [c.freq_mhz or top_mhz for c in mine]
    order = np.argsort(times, kind="stable")
    return np.array(times)[order], np.array(freqs)[order]


def at_step(times: Floats, values: Floats, when: Floats, before: float) -> Floats:
    """Value of a step function at given times; ``before`` ahead of its first step."""
    if not len(times):
        return np.full(np.shape(when), before)
    k = np.searchsorted(times, when, side="right") - 1
    return np.where(k >= 0, values[np.maximum(k, 0)], before)


def iteration_times(rows: Sequence[IterationRow]) -> tuple[Floats, Floats]:
    """Begin and duration of every iteration, s; a duration that no record tells is infinite.

    The record after tells the duration. One that came an iteration early was taken when the
    iteration before its own began; its own began when the next early one was taken, and the record
    after that one tells the duration.
    """
    told_s, wall_s = np.array([[r.time_s, r.wall_time_s] for r in rows]).T
    early = np.array([r.ahead > 0 for r in rows])
    following = np.append(told_s[1:], np.inf)
    begin_s = np.where(early, np.minimum(following, told_s + wall_s), told_s)
    next_is_early = np.append(early[1:], False)
    begin_s = np.where(early & next_is_early, following, begin_s)
    one, two = np.append(wall_s[1:], np.inf), np.append(wall_s[2:], [np.inf] * min(2, len(rows)))
    return begin_s, np.where(next_is_early, two, one)


def timeline_columns(raw: Raw, phase: str, end_s: float, top_mhz: float) -> dict[str, Floats]:
    """One entry per engine iteration within the run.

    Energy and power from the counters, clocks from the logs.
    """
    rows = [r for r in raw.iterations[phase] if -1e-3 <= r.time_s - raw.start_s <= end_s]
    if not rows:
        return {name: np.zeros(0) for name in TIMELINE_COLUMNS}
    time_s, ran = iteration_times(rows)
    time_s -= raw.start_s
    after = np.append(time_s[1:], max(end_s, time_s[-1]))
    duration = np.minimum(ran, after - time_s)
    curve = EnergyCurve(raw.telemetry, phase)
    spent = curve.at(after + raw.start_s) - curve.at(time_s + raw.start_s)
    busy_j = curve.at(time_s + duration + raw.start_s) - curve.at(time_s + raw.start_s)
    decided = raw.decisions[phase]
    d_time, d_freq = (
        np.array([d.time_s for d in decided]) - raw.start_s,
        np.array([d.freq_mhz for d in decided]),
    )
    sampled = raw.telemetry[raw.telemetry["group"] == phase].groupby("time_s")["freq_mhz"].mean()
    middle = time_s + 0.5 * duration + raw.start_s
    effective = (
        np.interp(middle, sampled.index.to_numpy(), sampled.to_numpy())
        if len(sampled)
        else np.full(len(rows), np.nan)
    )
    prefill = phase == "prefill"
    return {
        "time_s": time_s,
        "duration_s": duration,
        "idle_s": after - time_s - duration,
        "freq_requested_mhz": at_step(d_time, d_freq, time_s + 1e-6, top_mhz),
        "freq_applied_mhz": at_step(*clock_steps(raw, phase, top_mhz), time_s, top_mhz),
        "freq_effective_mhz": effective,
        "power_w": np.divide(
            busy_j, duration * max(curve.n_gpus, 1), out=np.zeros(len(rows)), where=duration > 0
        ),
        "energy_j": spent,
        "queue_requests": np.array([r.queued_requests for r in rows], dtype=float),
        "batch_requests": np.array(
            [r.prefill_requests if prefill else r.decode_requests for r in rows], dtype=float
        ),
        "batch_tokens": np.array(
            [r.prefill_tokens if prefill else r.decode_requests for r in rows], dtype=float
        ),
        "kv_use": np.array([r.kv_use for r in rows], dtype=float),
    }


def delays_s(raw: Raw, phase: str) -> Floats:
    """Measured actuation delays: from the controller's decision to the clock being read back, s."""
    mine = [c for c in raw.changes if c.group == phase and c.cause == "command"]
    return np.array(
        [
            c.seen_s - c.decided_s
            for c in mine
            if math.isfinite(c.seen_s) and math.isfinite(c.decided_s)
        ]
    )


def _quantile(values: Floats | list[float], q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else math.nan


def run_record(raw: Raw, phase: str, top_mhz: float) -> RunRecord:
    """Record of one phase.

    Raises:
        BiscaleError: not one request was answered.
    """
    settings, instance = raw.facts["settings"], raw.instance
    requests = with_lost(raw, phase, request_columns(raw, phase))
    last = requests["first_token_s" if phase == "prefill" else "finish_s"]
    if not np.isfinite(last).any():
        why = next((r.error for r in raw.requests if r.error), "none was sent")
        raise BiscaleError(f"no request was answered in {phase}: {why}")
    end_s = float(max(np.nanmax(last), np.max(requests["arrival_s"])))
    curve = EnergyCurve(raw.telemetry, phase)
    energy_j = curve.between(raw.start_s, raw.start_s + end_s)
    return RunRecord(
        phase=phase,
        policy=settings["policies"][phase],
        scenario=f"replay of {raw.facts['trace']}",
        slo=one_bound(load_slo(instance.slo), "a measured run"),
        rate_rps=len(raw.requests) / max(end_s, 1e-9),
        workload_seed=0,
        ensemble_member=-1,
        tp=instance.tp,
        dtype=instance.dtype,
        n_gpus=curve.n_gpus,
        requests=requests,
        timeline=timeline_columns(raw, phase, end_s, top_mhz),
        totals={"energy_j": energy_j, "duration_s": end_s, **totals_of(raw, phase)},
        labels=labels_of(raw, phase),
    )


def totals_of(raw: Raw, phase: str) -> dict[str, float]:
    """Counts and decision latencies of one phase; in decode the tokens that were delivered."""
    seen = {r.counter for r in raw.iterations[phase]}
    spent_s = [d.decided_s - d.received_s for d in raw.decisions[phase]]
    switches = sum(c.group == phase and c.cause == "command" for c in raw.changes)
    totals = {
        "iterations": float(len(seen)),
        "records_lost": float(max(seen) - min(seen) + 1 - len(seen)) if seen else 0.0,
        "decision_time_median_s": _quantile(spent_s, 0.5),
        "decision_time_p99_s": _quantile(spent_s, 0.99),
        "clock_switches": float(switches),
    }
    if phase == "decode":
        good = (r for r in raw.requests if r.output_tokens > 1 and not r.failed)
        totals["output_tokens"] = float(sum(max(r.completion_tokens, 0) for r in good))
    return totals


def labels_of(raw: Raw, phase: str) -> dict[str, str | float | int | bool]:
    """What the results table says about a measurement beside the metrics."""
    decided, hook_s = raw.decisions[phase], [r.hook_s for r in raw.iterations[phase] if r.hook_s]
    return {
        "source": "hardware",
        "engine": raw.facts["settings"]["engine"],
        "record_to_command_p99_s": _quantile([d.sent_s - d.received_s for d in decided], 0.99),
        "dispatch_error_p99_s": _quantile(dispatch_errors_s(raw.requests), 0.99),
        "actuation_delay_median_s": _quantile(delays_s(raw, phase), 0.5),
        "hook_p50_s": _quantile(hook_s, 0.5),
        "hook_p99_s": _quantile(hook_s, 0.99),
        "failed_requests": sum(r.failed for r in raw.requests),
        "unknown_tpot_requests": sum(
            (r.in_one_piece or r.uncounted) and not r.failed and r.output_tokens > 1
            for r in raw.requests
        ),
    }
