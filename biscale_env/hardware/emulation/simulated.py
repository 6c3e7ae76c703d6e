"""Records of the simulator's own state, as an engine hook would write them.

For the emulated engine and for the builder's test.
"""

from typing import Any

import numpy as np

from biscale_env.hardware.engines.hook.engine_record import (
    Detail,
    EngineRecord,
    Queued,
    Scheduled,
    table,
)

MAX_ROWS = 1024


def waiting_rows(
    arrival_s: Any, prompt: Any, first: int, last: int, done: int, epoch_s: float
) -> tuple[bytes, int]:
    """Rows of requests ``first .. last - 1`` and how many more there are.

    ``done`` tokens of the first are done.
    """
    end = min(last, first + MAX_ROWS)
    rows = np.zeros((end - first, 3))
    rows[:, 0] = arrival_s[first:end] + epoch_s
    rows[:, 1] = prompt[first:end]
    if len(rows):
        rows[0, 2] = done
    return rows.tobytes(), last - end


class SimulatedWatcher:
    """Keeps what a hook keeps between records.

    The counts of arrivals and the number of the record.
    """

    def __init__(self, worker_id: str, epoch_s: float) -> None:
        self.worker_id = worker_id
        self.epoch_s = epoch_s
        self.counter = 0
        self.arrived = 0
        self.arrived_tokens = 0

    def _arrivals(self, st: Any, arrival_s: Any, prompt: Any) -> dict[str, Any]:
        first, last = int(st["begin"]) + self.arrived, int(st["tail"])
        recent: list[float] = []
        for r in range(first, last):
            recent += (arrival_s[r] + self.epoch_s, prompt[r])
        self.arrived += last - first
        self.arrived_tokens += int(prompt[first:last].sum())
        return {
            "arrived": self.arrived,
            "arrived_tokens": self.arrived_tokens,
            "recent": table(recent),
        }

    def prefill(
        self, st: Any, arrival_s: Any, prompt: Any, tokens: int, n_seq: int
    ) -> EngineRecord:
        """Record of a prefill instance that is about to run ``tokens`` of ``n_seq`` requests."""
        head, tail = int(st["head"]), int(st["tail"])
        rows, more = waiting_rows(arrival_s, prompt, head, tail, int(st["head_done"]), self.epoch_s)
        self.counter += 1
        detail = Detail(
            float(st["time_s"]) + self.epoch_s,
            self.epoch_s,
            rows,
            more,
            **self._arrivals(st, arrival_s, prompt),
        )
        queued = int(prompt[head:tail].sum()) - int(st["head_done"]) - tokens
        return EngineRecord(
            worker_id=self.worker_id,
            counter_id=self.counter,
            wall_time=float(st["last_time_s"]),
            scheduled_requests=Scheduled(n_seq, tokens, 0.0, int(st["head_done"])),
            queued_requests=Queued(max(tail - head - n_seq, 0), max(queued, 0)),
            detail=detail,
        )

    def decode(
        self,
        st: Any,
        arrival_s: Any,
        prompt: Any,
        slots: Any,
        tree: Any,
        stack: Any,
        kv_capacity: int,
    ) -> EngineRecord:
        """Record of a decode instance that is about to run its batch."""
        head, tail = int(st["head"]), int(st["tail"])
        rows, more = waiting_rows(arrival_s, prompt, head, tail, 0, self.epoch_s)
        half = tree.size // 2
        active = np.flatnonzero(np.isfinite(tree[half : half + len(slots)]))
        start = arrival_s[slots["request"][active]] + self.epoch_s
        made = (int(st["iterations"]) - slots["origin"][active]).astype(np.float64)
        again = stack[: int(st["preempted"])]
        preempted = np.column_stack(
            [arrival_s[again[:, 0]] + self.epoch_s, prompt[again[:, 0]], again[:, 1]]
        )
        self.counter += 1
        detail = Detail(
            time_s=float(st["time_s"]) + self.epoch_s,
            epoch_s=self.epoch_s,
            waiting=rows,
            waiting_more=more,
            preempted=preempted.astype(np.float64).tobytes(),
            running_start=start.tobytes(),
            running_tokens=made.tobytes(),
            cached_tokens=int(st["cached"]),
            kv_use=float(st["cached"]) / kv_capacity,
            recompute_tokens=int(st["recompute_tokens"]),
            incoming=int(st["incoming"]),
            **self._arrivals(st, arrival_s, prompt),
        )
        queued = int(prompt[head:tail].sum())
        return EngineRecord(
            worker_id=self.worker_id,
            counter_id=self.counter,
            wall_time=float(st["last_time_s"]),
            scheduled_requests=Scheduled(
                num_decode_requests=int(st["batch"]), sum_decode_kv_tokens=int(st["cached"])
            ),
            queued_requests=Queued(
                tail - head, queued, 0.0, len(again), int(preempted[:, 1:].sum())
            ),
            detail=detail,
        )
