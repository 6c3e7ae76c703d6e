"""Hook for SGLang: entry point group ``sglang.srt.plugins``, name ``biscale`` -> :func:`register`.

It puts a BEFORE hook on ``Scheduler.run_batch``, the last step before the forward pass, and an
AFTER hook on ``Scheduler.process_batch_result``: with its overlapped schedule SGLang launches batch
N + 1 before it takes the results of batch N, and the record says so (``Detail.ahead``). Written
against the source of 0.5.23 and tested on stand-ins; it has not been run inside SGLang. A target
that SGLang does not know is only logged there, so check that records arrive (``biscale hw
doctor``). SGLang's own ``--enable-forward-pass-metrics`` is the alternative (``biscale hw
bridge``).
"""

import time
from typing import Any

from .engine_record import (
    Detail,
    EngineRecord,
    Queued,
    Scheduled,
    table,
)
from .guard import MARK, Guard
from .in_flight import InFlight
from .sender import Sender

TARGET = "sglang.srt.managers.scheduler.Scheduler.run_batch"
RESULT_TARGET = "sglang.srt.managers.scheduler.Scheduler.process_batch_result"
MAX_ROWS = 128
FORGET_EVERY = 1024  # iterations between clearings of what is remembered about finished requests


class SglangWatcher:
    """Turns SGLang's scheduler and batch into records."""

    def __init__(self, sender: Sender) -> None:
        self.sender = sender
        self.epoch_s = time.monotonic()
        self.counter = 0
        self.guard = Guard("biscale hook", sender.close)
        self.hook_s = 0.0
        self.last_s = 0.0
        self.flying = InFlight()
        self.before = (0, 0.0)
        self.seen: dict[str, float] = {}  # request -> when it was first seen, its arrival
        self.starts: dict[str, float] = {}  # request -> when it was first seen decoding
        self.recent: list[float] = []
        self.arrived = 0
        self.arrived_tokens = 0

    @property
    def failures(self) -> int:
        """Failures in a row; 100 of them end the hook."""
        return self.guard.worst

    def before_run_batch(self, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
        """The hook; returns None, which leaves the arguments as they are. Never raises."""
        if self.sender.active:
            self.guard.run(self.send, scheduler, batch)

    def after_results(self, result: Any, *args: Any, **kwargs: Any) -> None:
        """The results of the oldest batch have come back; returns None, which keeps the result."""
        if self.sender.active:
            self.guard.run(self._ends)

    def _ends(self) -> None:
        self.flying.ends(time.monotonic())

    def send(self, scheduler: Any, batch: Any) -> None:
        """Send the record of the batch about to run."""
        now = time.monotonic()
        self.before = self.flying.forms(now)
        if not self.flying.ends_seen:  # this SGLang may call the results something else
            self.before = (0, 0.0)
        self.counter += 1
        self.sender.send(self.record(scheduler, batch, now))
        self.recent, self.last_s = [], now
        if self.counter % FORGET_EVERY == 0:
            self._forget(scheduler, batch)
        self.hook_s = time.monotonic() - now

    def _arrival(self, request: Any, now: float) -> float:
        if request.rid not in self.seen:
            self.seen[request.rid] = now
            self.arrived += 1
            self.arrived_tokens += len(request.origin_input_ids)
            self.recent += (now, len(request.origin_input_ids))
        return self.seen[request.rid]

    def _forget(self, scheduler: Any, batch: Any) -> None:
        alive = {r.rid for r in (*batch.reqs, *scheduler.waiting_queue)}
        running = getattr(scheduler, "running_batch", None)
        alive |= {r.rid for r in getattr(running, "reqs", ())}
        self.seen = {k: v for k, v in self.seen.items() if k in alive}
        self.starts = {k: v for k, v in self.starts.items() if k in alive}

    def record(self, scheduler: Any, batch: Any, now: float) -> EngineRecord:
        """Everything about the batch and the queue."""
        rows: list[float] = []
        prompts = new_tokens = prefix = 0
        start: list[float] = []
        tokens: list[int] = []
        cached = 0
        if batch.forward_mode.is_extend():
            for request, new, done in zip(
                batch.reqs, batch.extend_lens, batch.prefix_lens, strict=True
            ):
                rows += (self._arrival(request, now), len(request.origin_input_ids), done)
                prompts, new_tokens, prefix = prompts + 1, new_tokens + new, prefix + done
        else:
            cached = int(batch.seq_lens_sum)
            for request in batch.reqs:
                self._arrival(request, now)
                start.append(self.starts.setdefault(request.rid, now))
                tokens.append(len(request.output_ids))
        waiting = scheduler.waiting_queue
        queued = 0
        for request in waiting[:MAX_ROWS]:
            rows += (self._arrival(request, now), len(request.origin_input_ids), 0)
            queued += len(request.origin_input_ids)
        more = max(len(waiting) - MAX_ROWS, 0)
        detail = Detail(
            time_s=now,
            epoch_s=self.epoch_s,
            waiting=table(rows),
            waiting_more=more,
            running_start=table(start),
            running_tokens=table(tokens),
            cached_tokens=cached,
            arrived=self.arrived,
            arrived_tokens=self.arrived_tokens,
            recent=table(self.recent),
            hook_s=self.hook_s,
            ahead=self.before[0],
            running_since_s=self.before[1],
        )
        between_s = now - self.last_s if self.last_s else 0.0
        return EngineRecord(
            worker_id="sglang",
            counter_id=self.counter,
            wall_time=self.flying.wall_time if self.flying.ends_seen else between_s,
            scheduled_requests=Scheduled(prompts, new_tokens, 0.0, prefix, len(tokens), cached),
            queued_requests=Queued(len(waiting), queued + more * queued // MAX_ROWS),
            detail=detail,
        )


def register() -> None:
    """Plug-in entry point, called by SGLang in every process; the hook fires in the scheduler's.

    Registers once, however often and through whichever installed copy it is called.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if hasattr(HookRegistry, MARK):
        return
    setattr(HookRegistry, MARK, __name__)
    watcher: list[SglangWatcher] = []

    def hook(scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
        if not watcher:
            watcher.append(SglangWatcher(Sender.from_environment()))
        watcher[0].before_run_batch(scheduler, batch, *args, **kwargs)

    def results(result: Any, *args: Any, **kwargs: Any) -> None:
        if watcher:
            watcher[0].after_results(result)

    HookRegistry.register(TARGET, hook, HookType.BEFORE)
    HookRegistry.register(RESULT_TARGET, results, HookType.AFTER)
