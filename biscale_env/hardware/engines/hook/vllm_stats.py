"""vLLM without a scheduler subclass: a stat logger plug-in.

Entry point group ``vllm.stat_logger_plugins``, name ``biscale``.

Needs ``--enable-logging-iteration-details``. It runs in the API server after each iteration, so its
records are late by one iteration and know sums only: enough for logging, for rate-based policies
and for checking the hook, not for deadlines. Its addresses are in ``BISCALE_STATS`` and
``BISCALE_STATS_ALL``; without them it does nothing.
"""

import time
from typing import Any

from .engine_record import EngineRecord, Queued, Scheduled
from .guard import NOTHING, Guard, first_copy
from .sender import STATS_ALL_VARIABLE, STATS_VARIABLE, Sender


def record_of(
    stats: Any, details: Any, prompt_mean_tokens: float, counter: int, worker_id: str
) -> EngineRecord:
    """Record of one iteration from vLLM's statistics.

    Args:
        stats: ``SchedulerStats``.
        details: its ``iteration_details``; None on older versions.
        prompt_mean_tokens: running mean of prompt lengths, stands in for the lengths of waiting
            requests.
        counter: number of the record.
        worker_id: name of the engine.
    """
    scheduled = Scheduled()
    wall_time = 0.0
    if details is not None:
        scheduled = Scheduled(
            num_prefill_requests=details.num_ctx_requests,
            sum_prefill_tokens=details.num_ctx_tokens,
            num_decode_requests=details.num_generation_requests,
        )
        wall_time = details.elapsed_ms * 1e-3
    waiting = stats.num_waiting_reqs
    queued = Queued(
        num_prefill_requests=waiting, sum_prefill_tokens=round(waiting * prompt_mean_tokens)
    )
    return EngineRecord(
        worker_id=worker_id,
        counter_id=counter,
        wall_time=wall_time,
        scheduled_requests=scheduled,
        queued_requests=queued,
    )


class Recorder:
    """The logger's work, apart from vLLM's base class."""

    def __init__(self, sender: Sender, worker_id: str) -> None:
        self.sender = sender
        self.worker_id = worker_id
        self.guard = Guard("biscale stat logger", sender.close)
        self.counter = 0
        self.prompts = 0
        self.prompt_tokens = 0
        self.started_s = time.monotonic()

    def record(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        """One call of vLLM; never raises."""
        if self.sender.active:
            self.guard.run(self.send, scheduler_stats, iteration_stats)

    def send(self, scheduler_stats: Any, iteration_stats: Any) -> object:
        """Send the record of one iteration; a call without statistics is none."""
        if scheduler_stats is None:
            return NOTHING
        for finished in getattr(iteration_stats, "finished_requests", None) or ():
            self.prompts += 1
            self.prompt_tokens += finished.num_prompt_tokens
        self.counter += 1
        mean = self.prompt_tokens / self.prompts if self.prompts else 0.0
        details = getattr(scheduler_stats, "iteration_details", None)
        record = record_of(scheduler_stats, details, mean, self.counter, self.worker_id)
        return self.sender.send(record)


def make_logger(base: type) -> type:
    """Subclass vLLM's ``StatLoggerBase``."""

    class BiscaleStatLogger(base):  # type: ignore[misc]
        """Sends one record per engine iteration."""

        def __init__(
            self, vllm_config: Any, engine_index: int = 0, *args: Any, **kwargs: Any
        ) -> None:
            ours = first_copy(base, __name__)
            sender = (
                Sender.from_environment(STATS_VARIABLE, STATS_ALL_VARIABLE)
                if ours
                else Sender(None)
            )
            self._recorder = Recorder(sender, f"engine-{engine_index}")

        def record(
            self,
            scheduler_stats: Any = None,
            iteration_stats: Any = None,
            *args: Any,
            **kwargs: Any,
        ) -> None:
            self._recorder.record(scheduler_stats, iteration_stats)

        def log_engine_initialized(self) -> None:
            pass

    return BiscaleStatLogger


def __getattr__(name: str) -> Any:
    """``BiscaleStatLogger`` exists only where vLLM does."""
    if name == "BiscaleStatLogger":
        from vllm.v1.metrics.loggers import StatLoggerBase

        globals()[name] = make_logger(StatLoggerBase)
        return globals()[name]
    raise AttributeError(name)
