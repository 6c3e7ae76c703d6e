"""Key figures of an episode: what it used and served, and what max clock would have used.

Energy is told per token made, since an episode ends at a time: a slower policy has made fewer
tokens by then.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from biscale_env.envs.batch import Batch, RequestTable
from biscale_env.envs.plant import Plant
from biscale_env.sim.constant_clock import decode_static, prefill_static
from biscale_env.sim.decode import running_of
from biscale_env.sim.state import RunningRequests

KPI_NAMES = (
    "energy_j",
    "duration_s",
    "tokens",
    "energy_per_token_j",
    "energy_ratio",
    "attainment",
    "requests_finished",
    "requests_unfinished",
)
KEPT_REFERENCES = 4096  # runs of max clock that are remembered, a number each


def latency_name(phase: str) -> str:
    """Key of the 99th percentile of a phase."""
    return "ttft_p99_s" if phase == "prefill" else "tpot_p99_s"


def kpi_names(phase: str) -> tuple[str, ...]:
    """Keys of the key figures of a phase."""
    return (*KPI_NAMES, latency_name(phase))


def tokens_made(state: Any, pool: RequestTable, running: RunningRequests | None) -> int:
    """Tokens that an instance has made: of prompts in prefill, of outputs in decode.

    Args:
        state: its record.
        pool: the requests it runs.
        running: decode: what runs in it.
    """
    begin, head = int(state["begin"]), int(state["head"])
    if running is None:
        whole = pool.cumulative[head] - pool.cumulative[begin]
        return int(whole + state["head_done"])
    admitted = int(pool.output[begin:head].sum(dtype=np.int64)) - (head - begin)
    left, slot = 0, int(state["admitted_last"])
    while slot >= 0:  # running requests, newest first
        s = running.slots[slot]
        left += int(pool.output[s["request"]]) - int(state["iterations"] - s["origin"])
        slot = int(s["older"])
    for request, had in running.stack[: int(state["preempted"])]:
        left += int(pool.output[request]) - int(had)
    return admitted - left


def p99_s(phase: str, pool: RequestTable, finish_s: NDArray[np.float64], state: Any) -> float:
    """99th percentile of TTFT or TPOT of the finished requests, s; NaN if there are none."""
    rows = slice(int(state["begin"]), int(state["end"]))
    latency = finish_s[rows] - pool.arrival_s[rows]
    if phase == "decode":
        latency = latency / (pool.output[rows] - 1)
    done = latency[~np.isnan(latency)]
    if not done.size:
        return float("nan")
    at = 0.99 * (done.size - 1)  # as np.quantile, which takes ten times as long
    low = int(at)
    pair = np.partition(done, (low, min(low + 1, done.size - 1)))
    return float(pair[low] + (at - low) * (pair[min(low + 1, done.size - 1)] - pair[low]))


class MaxClock:
    """Energy per token of max clock on the same episodes; each is run once and remembered."""

    def __init__(self, plant: Plant) -> None:
        """Nothing has been run yet."""
        self._plant = plant
        self._known: dict[tuple[Any, ...], float] = {}

    def energy_per_token_j(
        self, table: RequestTable, workload: int, key: tuple[int, int], params: Any
    ) -> float:
        """Energy per token of the episode at max clock, J.

        Args:
            table: holds the workload.
            workload: its number in the table.
            key: number of the workload in its source, and ensemble member.
            params: engine parameters of the episode; its end is that of the run, too.
        """
        known = (*key, params.tobytes())
        if known not in self._known:
            while len(self._known) >= KEPT_REFERENCES:
                self._known.pop(next(iter(self._known)))
            self._known[known] = self._run(table, workload, key[1], params)
        return self._known[known]

    def _run(self, table: RequestTable, workload: int, member: int, params: Any) -> float:
        batch = Batch(self._plant, 1, _alone(table, workload))
        c = np.array(tuple(self._plant.model.member(member)), dtype=batch.coefs.dtype)[()]
        st, requests, top = batch.states[0], batch.pool.requests, float(params["freq_max_ghz"])
        running = None
        if self._plant.phase == "prefill":
            prefill_static(st, c, params, requests, batch.times, top)
        else:
            running = running_of(batch.running, 0)
            decode_static(st, c, params, requests, batch.times, running, top)
        made = tokens_made(st, batch.pool, running)
        return float(st["energy_j"]) / made if made else float("nan")


def _alone(table: RequestTable, workload: int) -> RequestTable:
    """One workload of a table as a table of its own."""
    begin, end = int(table.begins[workload]), int(table.ends[workload])
    if begin == 0 and end == len(table.arrival_s):
        return table
    counted = table.cumulative[begin : end + 1]
    return RequestTable(
        table.arrival_s[begin:end],
        table.prompt[begin:end],
        table.output[begin:end],
        counted - counted[0],
        np.zeros(1, dtype=np.int64),
        np.array([end - begin], dtype=np.int64),
        table.durations_s[workload : workload + 1],
        table.prefix[begin:end],
        table.slo_class[begin:end],
        table.reuses,
    )


def kpis_of(
    batch: Batch, row: int, workload: int, key: tuple[int, int], reference: MaxClock
) -> dict[str, float]:
    """Key figures of the episode of one row up to now.

    Args:
        batch: records the times of its requests.
        row: of the batch.
        workload: of the batch's table.
        key: number of the workload in its source, and ensemble member.
        reference: runs max clock.

    Returns:
        ``energy_j``, ``duration_s``; ``tokens`` made and ``energy_per_token_j``; ``energy_ratio``:
        the latter over that of max clock on the same requests up to the same time;
        ``attainment``: fraction of the finished requests within the SLO, NaN without one;
        ``requests_finished``, ``requests_unfinished`` (arrived); ``ttft_p99_s`` or ``tpot_p99_s``
        of the finished ones.
    """
    st, phase = batch.states[row], batch.plant.phase
    params = batch.params[row].copy()
    if st["done"] == 0:  # cut off from outside
        params["end_s"], params["drain"] = st["time_s"], 0
    running = running_of(batch.running, row) if phase == "decode" else None
    made, finished = tokens_made(st, batch.pool, running), int(st["finished"])
    energy_j, per_token_j = float(st["energy_j"]), float("nan")
    ratio = per_token_j
    if made:
        per_token_j = energy_j / made
        ratio = per_token_j / reference.energy_per_token_j(batch.pool, workload, key, params)
    return {
        "energy_j": energy_j,
        "duration_s": float(st["time_s"]),
        "tokens": float(made),
        "energy_per_token_j": per_token_j,
        "energy_ratio": ratio,
        "attainment": 1.0 - int(st["violations"]) / finished if finished else float("nan"),
        "requests_finished": float(finished),
        "requests_unfinished": float(int(st["tail"] - st["begin"]) - finished),
        latency_name(phase): p99_s(phase, batch.pool, batch.finish_s, st),
    }
