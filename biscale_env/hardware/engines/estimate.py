"""Single requests, estimated from sums: for engines that publish ForwardPassMetrics only.

Lengths: all alike, the mean. Arrivals: requests are taken to have come when the count of those not
yet served rose, first come first served. So counts, sums, rates and batch sizes are right, tightest
slacks are approximate. Use a hook where deadlines matter.
"""

import time
from collections import deque

from biscale_env.hardware.engines.hook.engine_record import Detail, EngineRecord, table


class Estimator:
    """Remembers what the stream of records implies about single requests."""

    def __init__(self, phase: str, token_budget: int) -> None:
        self.phase = phase
        self.token_budget = token_budget
        self.epoch_s = time.monotonic()
        self.queue: deque[float] = deque()  # prefill: arrivals of requests not yet done
        self.running: deque[float] = deque()  # decode: starts of the running requests
        self.tokens: deque[int] = deque()  # and their tokens
        self.arrived = 0
        self.arrived_tokens = 0

    def detail(self, record: EngineRecord, now_s: float | None = None) -> Detail:
        """Estimate of the missing detail."""
        now = time.monotonic() if now_s is None else now_s
        return self._prefill(record, now) if self.phase == "prefill" else self._decode(record, now)

    def _came(self, times: deque[float], wanted: int, now: float, mean: float) -> list[float]:
        """Bring ``times`` to ``wanted`` entries: the oldest leave, new ones come now."""
        recent: list[float] = []
        while len(times) > wanted:
            times.popleft()
        while len(times) < wanted:
            times.append(now)
            recent += (now, mean)
            self.arrived += 1
            self.arrived_tokens += round(mean)
        return recent

    def _prefill(self, record: EngineRecord, now: float) -> Detail:
        s, q = record.scheduled_requests, record.queued_requests
        count = s.num_prefill_requests + q.num_prefill_requests
        total = s.sum_prefill_tokens + s.sum_prefill_kv_tokens + q.sum_prefill_tokens
        mean = max(total / count, 1.0) if count else 0.0
        recent = self._came(self.queue, count, now, mean)
        rows: list[float] = []
        for arrival in self.queue:
            rows += (arrival, round(mean), 0)
        return Detail(
            now,
            self.epoch_s,
            waiting=table(rows),
            arrived=self.arrived,
            arrived_tokens=self.arrived_tokens,
            recent=table(recent),
        )

    def _decode(self, record: EngineRecord, now: float) -> Detail:
        s, q = record.scheduled_requests, record.queued_requests
        while len(self.running) > s.num_decode_requests:
            self.running.popleft()
            self.tokens.popleft()
        self.tokens = deque(t + 1 for t in self.tokens)
        mean = s.sum_decode_kv_tokens / s.num_decode_requests if s.num_decode_requests else 0.0
        recent: list[float] = []
        while len(self.running) < s.num_decode_requests:
            self.running.append(now)
            self.tokens.append(1)
            recent += (now, mean)
            self.arrived += 1
            self.arrived_tokens += round(mean)
        waiting: list[float] = []
        for _ in range(q.num_prefill_requests + q.num_decode_requests):
            waiting += (now, round(mean), 0)
        return Detail(
            now,
            self.epoch_s,
            waiting=table(waiting),
            running_start=table(self.running),
            running_tokens=table(self.tokens),
            cached_tokens=s.sum_decode_kv_tokens,
            arrived=self.arrived,
            arrived_tokens=self.arrived_tokens,
            recent=table(recent),
        )
